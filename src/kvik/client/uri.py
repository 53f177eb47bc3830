"""Where to connect: URIs as libvirt's users write them.

    SCHEME[+TRANSPORT]://[USER@][HOST][:PORT]/system|session[?socket=PATH]

    kvik:///system  kvik:///session  qemu:///system     this host's daemon of that scope
    qemu+unix:///system?socket=/run/x.sock              a Unix socket by name; no daemon is started for it
    kvik+ssh://me@host/system                           through the system's ssh, which runs `kvik proxy` over there

Without a URI: KVIK_URI, else the system daemon for root and the session daemon for everybody else. `qemu` and `kvik`
mean the same daemon, ours. The in-memory driver is `kvikd --driver test --socket PATH`.
"""

from __future__ import annotations

import os

from kvik.errors import InvalidArgument
from kvik.named import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

SCHEMES = ("kvik", "qemu", "test")
TRANSPORTS = ("unix", "ssh")
SCOPES = ("system", "session")
EXAMPLES = "write it like kvik:///system, kvik:///session or kvik+ssh://user@host/system"
_IGNORED_PARAMETERS = ("mode", "no_verify", "no_tty", "no_sanity")  # of libvirt's, without meaning here


class Address(NamedTuple):
    """A parsed URI. `socket` is "" for the scope's default one; `name` is what CONNECT_OPEN is told."""

    scheme: str
    transport: str  # "unix" or "ssh"
    scope: str  # "system" or "session"
    host: str = ""
    user: str = ""
    port: int = 0
    socket: str = ""
    path: str = ""  # as written: "system" or "session"

    @property
    def name(self) -> str:
        return f"{self.scheme}:///{self.path}"


def default_uri(environ: Mapping[str, str] = os.environ) -> str:
    if uri := environ.get("KVIK_URI"):
        return uri
    return "kvik:///system" if os.geteuid() == 0 else "kvik:///session"


def _unquote(text: str) -> str:
    if "%" not in text:
        return text
    from urllib.parse import unquote  # 5 ms of imports that hardly anybody needs

    return unquote(text)


def parse_uri(uri: str) -> Address:
    """A URI -> Address. InvalidArgument says which part is wrong."""

    def bad(why: str) -> InvalidArgument:
        return InvalidArgument(f"connection URI {uri!r}: {why}", remedy=EXAMPLES)

    if any(ord(char) <= 32 for char in uri):
        raise bad("blanks and control characters are not allowed")
    head, separator, rest = uri.partition("://")
    if not separator:
        raise bad("there is no '://'")
    scheme, plus, transport = head.partition("+")
    if scheme not in SCHEMES:
        raise bad(f"the scheme {scheme!r} is not one of {', '.join(SCHEMES)}")
    rest, _, query = rest.partition("?")
    authority, slash, path = rest.partition("/")
    user, at, host = authority.rpartition("@")
    port = 0
    if at and not user:
        raise bad("there is no user before '@'")
    if host.startswith("["):
        host, bracket, tail = host[1:].partition("]")
        if not bracket or (tail and not tail.startswith(":")):
            raise bad("an IPv6 address is written [ADDRESS]")
        port_text = tail[1:]
        has_port = bool(tail)
    else:
        host, colon, port_text = host.partition(":")
        has_port = bool(colon)
    if has_port:
        if not (port_text.isascii() and port_text.isdigit() and 0 < int(port_text) < 65536):
            raise bad(f"{port_text!r} is not a port")
        port = int(port_text)
    if plus and transport not in TRANSPORTS:
        raise bad(f"the transport {transport!r} is not supported; there are {', '.join(TRANSPORTS)}")
    if not transport:
        if host:
            raise bad("a host needs a transport, as in kvik+ssh://")
        transport = "unix"
    host, user, path = _unquote(host), _unquote(user), path.rstrip("/")
    if transport == "unix" and (host or user or port):
        raise bad("a Unix socket has no host; another host is reached with kvik+ssh://")
    if transport == "ssh" and not host:
        raise bad("there is no host")
    if host.startswith("-") or user.startswith("-"):
        raise bad("a host or user cannot begin with '-'")  # ssh would take it for an option
    # Of libvirt's in-memory driver, at a socket somebody names; it knows no scopes.
    scope = "session" if scheme == "test" else path
    if scope not in SCOPES:
        raise bad("the path is to be /system or /session" if slash else "the path is missing")
    socket = ""
    for item in filter(None, query.split("&")):
        key, _, value = item.partition("=")
        if key == "socket":
            socket = _unquote(value)
            if not socket.startswith("/"):
                raise bad("socket= wants an absolute path")
        elif key not in _IGNORED_PARAMETERS:
            raise bad(f"unknown parameter {key!r}")
    if scheme == "test" and transport == "unix" and not socket:
        raise InvalidArgument(
            f"'{uri}': the in-memory driver is a daemon of its own",
            remedy="start 'kvikd --driver test --socket PATH', then use kvik+unix:///system?socket=PATH",
        )
    return Address(scheme, transport, scope, host, user, port, socket, path)
