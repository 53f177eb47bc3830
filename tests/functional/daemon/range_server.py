"""`range_server.py PORT DIRECTORY USER:PASSWORD`: files over HTTP with ranges, as disks are read; for one user, who has
our cookies."""

from __future__ import annotations

import base64
import re
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COOKIES = "token=twelve; site=3"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    directory: Path
    user: str

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        if self.headers.get("Authorization") != f"Basic {self.user}" or self.headers.get("Cookie") != COOKIES:
            self.send_response(401)
            self.send_header("WWW-Authenticate", 'Basic realm="disks"')
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data = (self.directory / Path(self.path.partition("?")[0]).name).read_bytes()
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        first, last = (int(wanted[1]), min(int(wanted[2]), len(data) - 1)) if wanted else (0, len(data) - 1)
        self.send_response(206 if wanted else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(last - first + 1))
        if wanted:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.end_headers()
        if body:
            self.wfile.write(data[first : last + 1])


def main() -> None:
    Handler.directory = Path(sys.argv[2])
    Handler.user = base64.b64encode(sys.argv[3].encode()).decode()
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()


if __name__ == "__main__":
    main()
