"""Two network namespaces: a host's, and a small world at the other end of its only cable. Needs root."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

_WORLD = r"""
import http.server, socket, struct, sys, threading

def names(address):
    # Every name is our address.
    server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.bind((address, 53))
    while True:
        data, client = server.recvfrom(4096)
        end = data.index(b"\0", 12) + 5
        kind = struct.unpack_from("!H", data, end - 4)[0]
        answer = struct.pack("!HHHIH", 0xC00C, 1, 1, 60, 4) + socket.inet_aton(sys.argv[1]) if kind == 1 else b""
        head = data[:2] + struct.pack("!HHHHH", 0x8180, 1, bool(answer), 0, 0)
        server.sendto(head + data[12:end] + answer, client)

class Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"the world\n")
    def log_message(self, *words):
        pass

for address in sys.argv[2:]:
    threading.Thread(target=names, args=(address,), daemon=True).start()
server = http.server.ThreadingHTTPServer((sys.argv[1], 8000), Page)
print("ready", flush=True)
server.serve_forever()
"""


class World:
    ADDRESS = "203.0.113.5"

    def __init__(self) -> None:
        self._held = [self._hold(), self._hold()]
        ours, theirs = (process.pid for process in self._held)
        self.inside = ["nsenter", f"--net=/proc/{ours}/ns/net"]
        self.outside = ["nsenter", f"--net=/proc/{theirs}/ns/net"]
        self.namespace = Path(f"/proc/{ours}/ns/net").readlink()
        lines = Path("/etc/resolv.conf").read_text().splitlines()
        named = [line.split()[1] for line in lines if line.startswith("nameserver ")]
        self.resolvers = [address for address in named if "." in address and not address.startswith("127.")]
        commands = [
            (self.inside, f"ip link add uplink0 type veth peer name cable0 netns {theirs}"),
            (self.inside, "ip link set lo up"),
            (self.inside, "ip addr add 198.51.100.1/24 dev uplink0"),
            (self.inside, "ip link set uplink0 up"),
            (self.outside, "ip link set lo up"),
            (self.outside, "ip addr add 198.51.100.2/24 dev cable0"),
            (self.outside, "ip link set cable0 up"),
            *((self.outside, f"ip addr add {address}/32 dev lo") for address in (self.ADDRESS, *self.resolvers)),
            (self.inside, "ip route add default via 198.51.100.2"),
        ]
        for where, command in commands:
            subprocess.run([*where, *command.split()], check=True)
        self._server = subprocess.Popen(
            [*self.outside, sys.executable, "-c", _WORLD, self.ADDRESS, *self.resolvers], stdout=subprocess.PIPE
        )
        assert self._server.stdout is not None
        assert self._server.stdout.readline() == b"ready\n"

    def _hold(self) -> subprocess.Popen[bytes]:
        before = Path("/proc/self/ns/net").readlink()
        process = subprocess.Popen(["unshare", "--net", "sleep", "infinity"])
        while Path(f"/proc/{process.pid}/ns/net").readlink() == before:
            time.sleep(0.01)
        return process

    @contextlib.contextmanager
    def listening_inside(self, port: int) -> Iterator[None]:
        """Something of the host's own, on its loopback."""
        script = f"import socket; s = socket.create_server(('127.0.0.1', {port})); print(1, flush=True); s.accept()"
        with subprocess.Popen([*self.inside, sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            yield
            process.kill()

    def fetch_inside(self, port: int) -> bytes:
        """What a port of the host's loopback answers. We speak first: passt of 2023 tells the guest of a connection's
        third step with its first data only."""
        connect = f"s = socket.create_connection(('127.0.0.1', {port}), 5)"
        script = (
            f"import socket, sys; {connect}; s.sendall(b'hello'); s.settimeout(5); sys.stdout.buffer.write(s.recv(100))"
        )
        return subprocess.run([*self.inside, sys.executable, "-c", script], capture_output=True, check=False).stdout

    def close(self) -> None:
        for process in (self._server, *self._held):
            process.kill()
            process.wait()
