"""The NBD protocol, server's side, without I/O: fixed newstyle, structured replies, metadata contexts; read-only.

A client is hostile: every length is bounded before anything is kept, and what is no NBD ends the connection
(`ProtocolError`). Reference: https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md
"""

from __future__ import annotations

import struct

from kvik.errors import KvikError
from kvik.named import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from typing import Protocol

    class Offered(Protocol):
        """What is told of an export before it is chosen."""

        @property
        def size(self) -> int: ...
        @property
        def contexts(self) -> Collection[str]: ...


__all__ = ["MAX_LENGTH", "Handshake", "ProtocolError", "Request", "chunk", "error_reply", "simple_reply"]

GREETING = b"NBDMAGICIHAVEOPT" + struct.pack(">H", 1 | 2)  # fixed newstyle, no zeroes
_OPTION = struct.Struct(">8sII")  # "IHAVEOPT", option, length
_REPLY = struct.Struct(">QIII")
_REPLY_MAGIC = 0x3E889045565A9
O_EXPORT_NAME, O_ABORT, O_LIST, O_INFO, O_GO, O_STRUCTURED, O_LIST_META, O_SET_META = 1, 2, 3, 6, 7, 8, 9, 10
R_ACK, R_SERVER, R_INFO, R_META = 1, 2, 3, 4
E_UNSUP, E_INVALID, E_UNKNOWN, E_TOO_BIG = 0x80000001, 0x80000003, 0x80000006, 0x80000009
INFO_EXPORT, INFO_BLOCK_SIZE = 0, 3

HAS_FLAGS, READ_ONLY, SEND_DF, CAN_MULTI_CONN = 1, 2, 128, 256

MAX_OPTION = 32 << 10  # bytes of an option's data; those that clients send have some hundred
MAX_QUERIES = 64
MAX_LENGTH = 32 << 20  # bytes that one request reads, as QEMU offers
PREFERRED = 65536

_REQUEST = struct.Struct(">IHHQQI")
_REQUEST_MAGIC, _SIMPLE_MAGIC, _CHUNK_MAGIC = 0x25609513, 0x67446698, 0x668E33EF
_SIMPLE = struct.Struct(">IIQ")
_CHUNK = struct.Struct(">IHHQI")
READ, WRITE, DISCONNECT, FLUSH, BLOCK_STATUS = 0, 1, 2, 3, 7
WRITING = (WRITE, 4, 6)  # and trim, write zeroes
DF, REQ_ONE = 4, 8  # flags of a request
DONE = 1
T_NONE, T_DATA, T_HOLE, T_STATUS, T_ERROR = 0, 1, 2, 5, 0x8001
EPERM, EIO, EINVAL, EOVERFLOW = 1, 5, 22, 75


class ProtocolError(KvikError):
    """What came is no NBD, or more than a server takes. The connection ends."""


class Request(NamedTuple):
    flags: int
    type: int
    cookie: int  # given back
    offset: int
    length: int

    @classmethod
    def take(cls, data: bytearray) -> Request | None:
        """The next one, which is removed from `data`; None: not all of it is there."""
        if len(data) < _REQUEST.size:
            return None
        magic, flags, kind, cookie, offset, length = _REQUEST.unpack_from(data)
        if magic != _REQUEST_MAGIC:
            raise ProtocolError("a request has the wrong magic number")
        del data[: _REQUEST.size]
        return cls(flags, kind, cookie, offset, length)


def simple_reply(request: Request, error: int = 0) -> bytes:
    return _SIMPLE.pack(_SIMPLE_MAGIC, error, request.cookie)


def chunk(request: Request, kind: int, data: bytes = b"", *, more: int = 0, done: bool = False) -> bytes:
    """Of a structured reply; `more` bytes of it follow."""
    return _CHUNK.pack(_CHUNK_MAGIC, DONE if done else 0, kind, request.cookie, len(data) + more) + data


def error_reply(request: Request, number: int, *, structured: bool) -> bytes:
    if structured:
        return chunk(request, T_ERROR, struct.pack(">IH", number, 0), done=True)
    return simple_reply(request, number)


class Handshake:
    """Up to the choice of an export: then `chosen` is its name, and `data` what came after that.

    `exports`: those that can be chosen here. `names`: of all that there are; when a client asks for one that is not
    here, `elsewhere` is its name, and whoever has it goes on with `data` and `state`.
    """

    def __init__(self, exports: Mapping[str, Offered], names: Collection[str], *, state: bytes = b"") -> None:
        self._exports, self._names = exports, names
        self.data = bytearray()
        self.output = bytearray(b"" if state else GREETING)
        self.contexts: list[str] = []  # what was chosen for the export: a context's number is its place here
        self._contexts_of = ""
        self.chosen = self.elsewhere = ""
        self.ended = False
        self._begun, self.structured, self._no_zeroes = (bool(byte) for byte in state or bytes(3))

    @property
    def state(self) -> bytes:
        return bytes((self._begun, self.structured, self._no_zeroes))

    def step(self) -> bool:
        """Deal with what is in `data`; False: there is not enough of it, or nothing more to be done. Raises
        `ProtocolError`."""
        if self.chosen or self.elsewhere or self.ended:
            return False
        data = self.data
        if not self._begun:
            if len(data) < 4:
                return False
            flags = int.from_bytes(data[:4], "big")
            if flags & ~3 or not flags & 1:
                raise ProtocolError(f"the client's flags are {flags:#x}")
            self._begun, self._no_zeroes = True, bool(flags & 2)
            del data[:4]
            return True
        if len(data) < _OPTION.size:
            return False
        magic, option, length = _OPTION.unpack_from(data)
        if magic != b"IHAVEOPT" or length > MAX_OPTION:
            raise ProtocolError(f"option {option} of {length} bytes")
        if len(data) < _OPTION.size + length:
            return False
        given = bytes(data[_OPTION.size : _OPTION.size + length])
        try:
            self._option(option, given)
        except struct.error:
            self._say(option, E_INVALID)
        if not self.elsewhere:
            del data[: _OPTION.size + length]
        return True

    def _say(self, option: int, kind: int, data: bytes = b"") -> None:
        self.output += _REPLY.pack(_REPLY_MAGIC, option, kind, len(data)) + data

    def _option(self, option: int, data: bytes) -> None:
        if option == O_ABORT:
            self._say(option, R_ACK)
            self.ended = True
        elif option == O_EXPORT_NAME:
            self._by_name(data)
        elif option in (O_INFO, O_GO):
            self._info(option, data)
        elif option in (O_LIST_META, O_SET_META):
            self._meta(option, data)
        elif option in (O_LIST, O_STRUCTURED):
            if data:
                self._say(option, E_INVALID)
                return
            for name in self._names if option == O_LIST else ():
                encoded = name.encode()
                self._say(option, R_SERVER, struct.pack(">I", len(encoded)) + encoded)
            self.structured = self.structured or option == O_STRUCTURED
            self._say(option, R_ACK)
        else:
            self._say(option, E_UNSUP)

    def _find(self, name: str) -> Offered | None:
        found = self._exports.get(name)
        if found is None and name in self._names:
            self.elsewhere = name
        return found

    @property
    def _flags(self) -> int:
        return HAS_FLAGS | READ_ONLY | CAN_MULTI_CONN | (SEND_DF if self.structured else 0)

    def _by_name(self, data: bytes) -> None:
        name = data.decode(errors="replace")
        export = self._find(name)
        if export is None:
            if not self.elsewhere:
                raise ProtocolError(f"the client asks for an export {name[:80]!r}")  # there is no other answer to that
            return
        self.output += struct.pack(">QH", export.size, self._flags) + bytes(0 if self._no_zeroes else 124)
        self._choose(name)

    def _choose(self, name: str) -> None:
        self.chosen = name
        if self._contexts_of != name:
            self.contexts = []

    def _info(self, option: int, data: bytes) -> None:
        name, at = _text(data, 0)
        (count,) = struct.unpack_from(">H", data, at)
        wanted = struct.unpack_from(f">{count}H", data, at + 2)
        if len(data) != at + 2 + 2 * count:
            self._say(option, E_INVALID)
            return
        export = self._find(name)
        if export is None:
            if not self.elsewhere:
                self._say(option, E_UNKNOWN)
            return
        self._say(option, R_INFO, struct.pack(">HQH", INFO_EXPORT, export.size, self._flags))
        if INFO_BLOCK_SIZE in wanted:
            self._say(option, R_INFO, struct.pack(">HIII", INFO_BLOCK_SIZE, 1, PREFERRED, MAX_LENGTH))
        self._say(option, R_ACK)
        if option == O_GO:
            self._choose(name)

    def _meta(self, option: int, data: bytes) -> None:
        name, at = _text(data, 0)
        (count,) = struct.unpack_from(">I", data, at)
        if count > MAX_QUERIES:
            self._say(option, E_TOO_BIG)
            return
        at += 4
        queries = []
        for _ in range(count):
            query, at = _text(data, at)
            queries.append(query)
        if at != len(data) or not self.structured:
            self._say(option, E_INVALID)
            return
        export = self._find(name)
        if export is None:
            if not self.elsewhere:
                self._say(option, E_UNKNOWN)
            return
        listing = option == O_LIST_META
        found = [
            context
            for context in export.contexts
            if (listing and not queries)
            or any(
                query == context or (listing and query[-1:] == ":" and context.startswith(query)) for query in queries
            )
        ]
        if not listing:
            self.contexts, self._contexts_of = found, name
        for number, context in enumerate(found):
            self._say(option, R_META, struct.pack(">I", 0 if listing else number) + context.encode())
        self._say(option, R_ACK)


def _text(data: bytes, at: int) -> tuple[str, int]:
    """A string with its length before it, and where the next thing begins. Raises `struct.error`."""
    (length,) = struct.unpack_from(">I", data, at)
    if length > len(data) - at - 4:
        raise struct.error
    return data[at + 4 : at + 4 + length].decode(errors="replace"), at + 4 + length
