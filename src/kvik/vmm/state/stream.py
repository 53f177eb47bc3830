"""The migration stream: its frames, and where it can go.

One or more connections ("channels"). Each begins with a greeting, then come frames: a header of 16 bytes, and data.

    greeting   "KVIKMIGR", version u16, channel u16, channels u16, 2 bytes of zeroes, a token of 16 bytes
    frame      kind u8, 3 bytes of zeroes, size u32, address u64

    source to destination                            destination to source, on channel 0
    HEADER  channel 0: what the machine is           READY   it fits: send
    PAGES   `size` bytes of RAM for `address`        DONE    RAM and state are in: I could run
    ZERO    `size` pages of zeroes at `address`      FAILED  a text why not
    END     nothing more on this channel
    STATE   channel 0: all but RAM
    RUN     channel 0: I shall not run again; go

Post-copy: the destination runs before all of RAM is there (docs/internals/vmm-state.md has it drawn).

    MISSING channel 0, between END and STATE, one a region, at its address: a bit for each page that is still to come
                                                     REQUEST the page at `address` first: a vCPU waits for it
                                                     RUNNING channel 0: RUN came, the guest is ours
    PAGES, ZERO, END: as before, until all of it      FILLED  all channels: all of RAM is here
    RESUME  channel 0 of connections made anew, whose greeting has the same token; answered by
                                                     MISSING what is still to come, a region each

A page always travels on the same channel (its 2 MiB piece decides: of the address space, in post-copy of the region),
so a later copy never overtakes an earlier one. The last two steps keep the guest from running twice: the source gives
it up before RUN, the destination starts it behind.
"""

from __future__ import annotations

import os
import socket
import struct

from kvik.errors import HostError, InvalidArgument, OperationFailed
from kvik.vmm.layout import MIB

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

__all__ = [
    "CHUNK",
    "DONE",
    "END",
    "FAILED",
    "FILLED",
    "HEADER",
    "MAX_CHANNELS",
    "MISSING",
    "PAGES",
    "PIECE",
    "READY",
    "REQUEST",
    "RESUME",
    "RUN",
    "RUNNING",
    "STATE",
    "ZERO",
    "connect",
    "frame",
    "greeting",
    "listen",
    "parse",
    "prepare_postcopy",
    "receive_exactly",
    "receive_frame",
    "receive_greeting",
]

VERSION = 1
MAX_CHANNELS = 16
CHUNK = 2 * MIB  # no frame of pages is larger, none crosses a multiple of it
PIECE = MIB // 16  # the same in post-copy: what a page that somebody waits for may have to wait behind
MAX_HEADER = 4 * MIB
HEADER, PAGES, ZERO, END, STATE, RUN, MISSING, RESUME = 1, 2, 3, 4, 5, 6, 7, 8
READY, DONE, FAILED, REQUEST, RUNNING, FILLED = 16, 17, 18, 19, 20, 21
FRAME_SIZE = 16
_TCP_USER_TIMEOUT, _TCP_NOTSENT_LOWAT = 18, 25  # linux/tcp.h
SILENCE = 30  # seconds after which a connection whose other end does not answer counts as lost
_GREETING, _FRAME = struct.Struct("<8sHHH2x16s"), struct.Struct("<B3xIQ")
_MAGIC = b"KVIKMIGR"


def greeting(channel: int, channels: int, token: bytes) -> bytes:
    return _GREETING.pack(_MAGIC, VERSION, channel, channels, token)


def frame(kind: int, size: int = 0, address: int = 0) -> bytes:
    return _FRAME.pack(kind, size, address)


def receive_exactly(sock: socket.socket, view: memoryview) -> None:
    while view:
        count = sock.recv_into(view)
        if not count:
            raise OperationFailed("the other side of the migration closed the connection")
        view = view[count:]


def _take(sock: socket.socket, size: int) -> bytes:
    data = bytearray(size)
    receive_exactly(sock, memoryview(data))
    return bytes(data)


def receive_greeting(sock: socket.socket) -> tuple[int, int, bytes]:
    """(channel, channels, token)."""
    magic, version, channel, channels, token = _GREETING.unpack(_take(sock, _GREETING.size))
    if magic != _MAGIC:
        raise OperationFailed("what connected is no migration of kvik-vmm")
    if version != VERSION:
        raise OperationFailed(f"the source speaks version {version} of the migration stream, this kvik {VERSION}")
    if not 1 <= channels <= MAX_CHANNELS or channel >= channels:
        raise OperationFailed(f"channel {channel} of {channels} cannot be: 1 to {MAX_CHANNELS} are possible")
    return channel, channels, token


def receive_frame(sock: socket.socket) -> tuple[int, int, int]:
    """(kind, size, address); the data is still to be read."""
    kind, size, address = _FRAME.unpack(_take(sock, _FRAME.size))
    return kind, size, address


def parse(data: bytes | bytearray) -> tuple[int, int, int]:
    """(kind, size, address) of a frame's header."""
    kind, size, address = _FRAME.unpack(data)
    return kind, size, address


def prepare_postcopy(sock: socket.socket) -> None:
    """Little is queued before a page that somebody waits for, and a silent end is noticed. TCP alone needs it."""
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.IPPROTO_TCP, _TCP_NOTSENT_LOWAT, PIECE)
        sock.setsockopt(socket.IPPROTO_TCP, _TCP_USER_TIMEOUT, SILENCE * 1000)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, seconds in ((socket.TCP_KEEPIDLE, SILENCE // 3), (socket.TCP_KEEPINTVL, SILENCE // 3)):
            sock.setsockopt(socket.IPPROTO_TCP, option, seconds)


# Where to ---------------------------------------------------------------------------------------------------------


def _bad(uri: str) -> NoReturn:
    raise InvalidArgument(f"{uri[:80]!r} is no migration address", remedy="give unix:PATH, tcp:HOST:PORT or fd:N")


def _tcp(uri: str) -> tuple[str, int]:
    host, _, port = uri[4:].rpartition(":")
    if not port.isascii() or not port.isdigit() or int(port) > 65535:
        _bad(uri)
    return host.strip("[]"), int(port)


def _adopt(uri: str) -> socket.socket:
    number = uri[3:]
    if not number.isascii() or not number.isdigit():
        _bad(uri)
    try:
        return socket.socket(fileno=os.dup(int(number)))
    except OSError as error:
        raise HostError(f"descriptor {number} is no socket: {error.strerror}", errno=error.errno or 0) from error


def connect(uri: str) -> socket.socket:
    """A blocking connection. InvalidArgument, HostError."""
    try:
        if uri.startswith("unix:"):
            sock = socket.socket(socket.AF_UNIX)
            try:
                sock.connect(uri[5:])
            except BaseException:
                sock.close()
                raise
            return sock
        if uri.startswith("tcp:"):
            sock = socket.create_connection(_tcp(uri), 10)
            sock.settimeout(None)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            return sock
    except OSError as error:
        raise HostError(f"cannot connect to {uri}: {error.strerror or error}", errno=error.errno or 0) from error
    if uri.startswith(("fd:", "fd=")):
        return _adopt(uri)
    _bad(uri)


def listen(uri: str) -> tuple[socket.socket, bool]:
    """A socket, and whether it listens (else it is the connection)."""
    try:
        if uri.startswith("unix:"):
            sock = socket.socket(socket.AF_UNIX)
            try:
                sock.bind(uri[5:])
                os.chmod(uri[5:], 0o600)  # noqa: PTH101 - pathlib is not imported
                sock.listen(MAX_CHANNELS)
            except BaseException:
                sock.close()
                raise
            return sock, True
        if uri.startswith("tcp:"):
            host, port = _tcp(uri)
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            return socket.create_server((host, port), family=family, backlog=MAX_CHANNELS), True
    except OSError as error:
        raise HostError(f"cannot listen on {uri}: {error.strerror or error}", errno=error.errno or 0) from error
    if uri.startswith(("fd:", "fd=")):
        sock = _adopt(uri)
        return sock, bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    _bad(uri)
