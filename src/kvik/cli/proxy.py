"""proxy: standard input and output become a connection to the daemon here; what `kvik+ssh://` runs at the other end."""

from __future__ import annotations

import os

from kvik.cli.options import FLAG, TEXT, Option, UsageError, Verb

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.cli.context import Context
    from kvik.cli.options import Options

CHUNK = 1 << 18


def proxy(ctx: Context, options: Options) -> int:
    from urllib.parse import quote

    from kvik.client.transport import open_transport
    from kvik.client.uri import default_uri, parse_uri

    path = options.text("socket")
    if options.flag("system") and options.flag("session"):
        raise UsageError("Options --system and --session are mutually exclusive")
    scope = "system" if options.flag("system") else "session" if options.flag("session") else ""
    uri = f"kvik:///{scope}" if scope else ctx.uri or default_uri()
    if path is not None:
        uri = f"kvik+unix:///{scope or 'system'}?socket={quote(path)}"
    transport = open_transport(parse_uri(uri))
    try:
        carry(0, 1, transport.socket.fileno())
    finally:
        transport.close()
    return 0


def carry(source: int, sink: int, peer: int) -> None:
    """Bytes from `source` to `peer` and from `peer` to `sink` until either ends."""
    import select

    poller = select.poll()
    for fd in (source, peer):
        poller.register(fd, select.POLLIN)
    while True:
        for fd, _ in poller.poll():
            data = os.read(fd, CHUNK)
            if not data:
                return
            view = memoryview(data)
            while view:
                view = view[os.write(peer if fd == source else sink, view) :]


COMMANDS = {
    "proxy": Verb(
        proxy,
        "Carries the daemon's protocol over standard input and output. kvik+ssh:// URIs run it.",
        Option("system", FLAG, "the system daemon"),
        Option("session", FLAG, "this user's own daemon"),
        Option("socket", TEXT, "the socket of a daemon", complete="file", named_only=True),
    )
}
