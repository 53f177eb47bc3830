"""Messages of libvirt's RPC protocol: framing, the classes that a connection yields, and how to write each.

A message is a 4-byte length that counts itself, a header of six 4-byte fields (program, version, procedure, type,
serial, status) and a payload. Source: libvirt's docs/kbase/internals/rpc.rst.

    type            status      payload                              sent by
    CALL            OK          arguments                            client
    REPLY           OK | ERROR  result | remote_error                server
    MESSAGE         OK          event body; keepalive ping or pong   server; both
    STREAM          CONTINUE    data; none at all: end of data       both
                    OK          none: finish, or its confirmation    both
                    ERROR       none or remote_error: abort          both
    CALL_WITH_FDS, REPLY_WITH_FDS   as CALL and REPLY, but u32 count first; after the message one byte per descriptor
    STREAM_HOLE     CONTINUE    {hyper length, u32 flags}            both

The writers return `bytes` ready for the socket. Serials: a reply and a stream's packets carry their call's.
"""

from __future__ import annotations

import struct

from kvik.errors import KvikError, NoSupport, RpcError
from kvik.rpc.program import KEEPALIVE_NUMBER, VERSION, Procedure, program
from kvik.rpc.remote_error import decode_error, encode_error

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any, Final

    from kvik.rpc.xdr_types import Record

CALL: Final = 0
REPLY: Final = 1
MESSAGE: Final = 2
STREAM: Final = 3
CALL_WITH_FDS: Final = 4
REPLY_WITH_FDS: Final = 5
STREAM_HOLE: Final = 6

OK: Final = 0
ERROR: Final = 1
CONTINUE: Final = 2

HEADER: Final = struct.Struct(">7I")  # length, program, version, procedure, type, serial, status
HEADER_SIZE: Final = HEADER.size
LENGTH_MAX: Final = 32 * 1024 * 1024 + 4  # VIR_NET_MESSAGE_MAX, plus the length itself
STREAM_DATA_MAX: Final = 262120  # what every libvirt release accepts in one stream packet
FDS_MAX: Final = 32
EVENT_SERIAL: Final = 1  # libvirt's daemon numbers all its events so

_HOLE: Final = struct.Struct(">qI")
_U32: Final = struct.Struct(">I")


class Message(tuple["Any", ...]):
    """A received message: (program, version, procedure, type, serial, status, data, start, end, fds).

    `data[start:end]` is the payload (without a descriptor count); `data` may hold other messages too, so nothing is
    copied until somebody asks. Subclasses say what it is; connections yield only subclasses.
    """

    # The tuple's items have no types of their own, for it is made millions of times: the properties say them, and
    # each tells mypy so with `no-any-return`, as `decode` of the subclasses does.

    __slots__ = ()

    @property
    def program(self) -> int:
        return self[0]  # type: ignore[no-any-return]

    @property
    def version(self) -> int:
        return self[1]  # type: ignore[no-any-return]

    @property
    def procedure(self) -> int:
        return self[2]  # type: ignore[no-any-return]

    @property
    def serial(self) -> int:
        return self[4]  # type: ignore[no-any-return]

    @property
    def status(self) -> int:
        return self[5]  # type: ignore[no-any-return]

    @property
    def fds(self) -> tuple[int, ...]:
        """Descriptors that came with the message; they now belong to the caller."""
        return self[9]  # type: ignore[no-any-return]

    @property
    def payload(self) -> bytes:
        return self[6][self[7] : self[8]]  # type: ignore[no-any-return]

    @property
    def key(self) -> tuple[int, int, int]:
        """What identifies a stream: (program, procedure, serial)."""
        return (self[0], self[2], self[4])

    def lookup(self) -> Procedure:
        """The procedure's description; NoSupport if the program, its version or the procedure is unknown."""
        if self[1] != VERSION:
            raise NoSupport(f"unknown program version {self[1]} of 0x{self[0]:x}: only {VERSION} exists")
        return program(self[0])[self[2]]

    def __repr__(self) -> str:
        size = self[8] - self[7]
        return f"<{type(self).__name__} 0x{self[0]:x}:{self[2]} serial {self[4]} status {self[5]}, {size} bytes>"


class Call(Message):
    """A request to the server. `decode()` gives its arguments."""

    __slots__ = ()

    def decode(self) -> Record:
        return self.lookup().args.decode(self[6], self[7], self[8])  # type: ignore[no-any-return]


class Reply(Message):
    """A successful answer to the call with the same serial."""

    __slots__ = ()

    def decode(self) -> Record:
        return self.lookup().result.decode(self[6], self[7], self[8])  # type: ignore[no-any-return]


class ErrorReply(Message):
    """A failed answer; `error()` is what to raise."""

    __slots__ = ()

    def error(self) -> KvikError:
        return decode_error(self.payload)


class Event(Message):
    """Something that the server tells unasked."""

    __slots__ = ()

    def decode(self) -> Record:
        return self.lookup().args.decode(self[6], self[7], self[8])  # type: ignore[no-any-return]


class StreamData(Message):
    """A piece of a stream, never empty."""

    __slots__ = ()


class StreamEnd(Message):
    """No more data will come in this direction (an empty CONTINUE packet)."""

    __slots__ = ()


class StreamFinish(Message):
    """The peer is done with the stream, or confirms that it is (an OK packet)."""

    __slots__ = ()


class StreamAbort(Message):
    """The stream failed or was given up; `error()` says why, as far as the peer said."""

    __slots__ = ()

    def error(self) -> KvikError:
        return decode_error(self.payload) if self[8] > self[7] else RpcError("the stream was aborted by the peer")


class StreamHole(Message):
    """A hole of `length` zero bytes instead of data."""

    __slots__ = ()

    @property
    def length(self) -> int:
        return hole_length(self)


class Ping(Message):
    """Keepalive request: answer with PONG_BYTES at once."""

    __slots__ = ()


class Pong(Message):
    """Keepalive answer."""

    __slots__ = ()


def hole_length(message: Message) -> int:
    if message[8] - message[7] != _HOLE.size:
        raise RpcError(f"stream hole of {message[8] - message[7]} bytes where {_HOLE.size} are needed")
    length, flags = _HOLE.unpack_from(message[6], message[7])
    if length < 0 or flags:
        raise RpcError(f"stream hole with length {length} and flags {flags}")
    return int(length)


# --- writing ----------------------------------------------------------------------------------------------------------


Key = tuple[int, int, int]  # (program, procedure, serial): a call, and the stream that it opened


def frame(key: Key, kind: int, status: int, payload: bytes = b"") -> bytes:
    """Header and payload of any message. RpcError if it is longer than the protocol allows."""
    length = HEADER_SIZE + len(payload)
    if length > LENGTH_MAX:
        raise RpcError(f"message of {length} bytes exceeds the protocol's limit of {LENGTH_MAX}")
    return HEADER.pack(length, key[0], VERSION, key[1], kind, key[2], status) + payload


def call(procedure: Procedure, serial: int, values: Sequence[Any] = (), fds: int = 0) -> bytes:
    """A call; with `fds` > 0 the caller sends as many dummy bytes, each with one descriptor, after it."""
    key = (procedure.program.number, procedure.number, serial)
    payload = procedure.args.encode(values)
    return frame(key, CALL_WITH_FDS, OK, _count(fds) + payload) if fds else frame(key, CALL, OK, payload)


def _count(fds: int) -> bytes:
    if fds > FDS_MAX:
        raise RpcError(f"{fds} descriptors in one message: the limit is {FDS_MAX}")
    return _U32.pack(fds)


def reply(request: Message, values: Sequence[Any] = (), fds: int = 0) -> bytes:
    """The successful answer to a call."""
    return reply_payload(request, request.lookup().result.encode(values), fds)


def reply_payload(request: Message, payload: bytes, fds: int = 0) -> bytes:
    """An answer whose result is encoded already: for cached results."""
    if fds:
        return frame(request.key, REPLY_WITH_FDS, OK, _count(fds) + payload)
    length = HEADER_SIZE + len(payload)
    if length > LENGTH_MAX:
        raise RpcError(f"reply of {length} bytes exceeds the protocol's limit of {LENGTH_MAX}")
    return HEADER.pack(length, request[0], VERSION, request[2], REPLY, request[4], OK) + payload


def reply_error(request: Message, error: BaseException) -> bytes:
    """The failed answer to a call, or to a stream's packet (then it aborts the stream). Never raises."""
    kind = REPLY if request[3] in (CALL, CALL_WITH_FDS) else STREAM
    return frame(request.key, kind, ERROR, encode_error(error))


def event(procedure: Procedure, values: Sequence[Any]) -> bytes:
    key = (procedure.program.number, procedure.number, EVENT_SERIAL)
    return frame(key, MESSAGE, OK, procedure.args.encode(values))


def stream_data(key: Key, data: bytes) -> bytes:
    """One packet of at most STREAM_DATA_MAX bytes; no data at all means the end of this direction."""
    if len(data) > STREAM_DATA_MAX:
        raise RpcError(f"stream packet of {len(data)} bytes: the limit is {STREAM_DATA_MAX}")
    return frame(key, STREAM, CONTINUE, data)


def stream_end(key: Key) -> bytes:
    return frame(key, STREAM, CONTINUE)


def stream_finish(key: Key) -> bytes:
    return frame(key, STREAM, OK)


def stream_abort(key: Key, error: BaseException | None = None) -> bytes:
    """With `error` (servers) it says why; clients send none."""
    return frame(key, STREAM, ERROR, encode_error(error) if error is not None else b"")


def stream_hole(key: Key, length: int) -> bytes:
    return frame(key, STREAM_HOLE, CONTINUE, _HOLE.pack(length, 0))


PING_BYTES: Final = frame((KEEPALIVE_NUMBER, 1, 0), MESSAGE, OK)
PONG_BYTES: Final = frame((KEEPALIVE_NUMBER, 2, 0), MESSAGE, OK)
