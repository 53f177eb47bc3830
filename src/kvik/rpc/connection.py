"""One end of a connection, without I/O: bytes in, messages out; both roles.

    connection = Connection(Role.SERVER)
    for message in connection.feed(data):           # RpcError: close the connection, the peer cannot be followed
        match message:
            case Call(): socket.send(reply(message, values))

What may arrive is the table below; anything else is an RpcError. What is sent is written with `kvik.rpc.message`;
only calls (whose serials are counted here) and streams (whose end is a matter of both sides) go through the connection.

A stream's states, kept per (program, procedure, serial) from `open_stream()` on:

    state      on                                          next
    OPEN       peer's FINISH or ABORT                      gone  (a server answers either; see `feed`'s messages)
    OPEN       finish_stream(), abort_stream()             CLOSING (client: waits for the confirmation), gone (server)
    CLOSING    peer's data, end, holes                     CLOSING, dropped: they were under way
    CLOSING    peer's FINISH or ABORT                      gone, passed on
    gone       anything                                    dropped: stream packets are not acknowledged, late ones occur
"""

from __future__ import annotations

from collections import deque

from kvik.errors import RpcError
from kvik.rpc import message as m
from kvik.rpc.message import HEADER, HEADER_SIZE, Key, Message
from kvik.rpc.program import KEEPALIVE_NUMBER

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any, Final

    from kvik.rpc.program import Procedure


class Role:
    """Which end of the connection we are. Words, not an enum: that would cost a command 1 ms of imports."""

    CLIENT: Final = "client"
    SERVER: Final = "server"


class StreamState:
    OPEN: Final = "open"
    CLOSING: Final = "closing"


def _key(kind: int, status: int) -> int:
    return kind << 32 | status


_STREAM_CLASSES: Final[dict[int, type[Message]]] = {
    _key(m.STREAM, m.CONTINUE): m.StreamData,
    _key(m.STREAM, m.OK): m.StreamFinish,
    _key(m.STREAM, m.ERROR): m.StreamAbort,
    _key(m.STREAM_HOLE, m.CONTINUE): m.StreamHole,
}
# What each role accepts: (type, status) -> class. Keepalives (type MESSAGE of their own program) go both ways.
ACCEPTS: Final[dict[str, dict[int, type[Message]]]] = {
    Role.SERVER: {
        _key(m.CALL, m.OK): m.Call,
        _key(m.CALL_WITH_FDS, m.OK): m.Call,
        _key(m.MESSAGE, m.OK): m.Ping,
        **_STREAM_CLASSES,
    },
    Role.CLIENT: {
        _key(m.REPLY, m.OK): m.Reply,
        _key(m.REPLY, m.ERROR): m.ErrorReply,
        _key(m.REPLY_WITH_FDS, m.OK): m.Reply,
        _key(m.MESSAGE, m.OK): m.Event,
        **_STREAM_CLASSES,
    },
}
_KEEPALIVE: Final[dict[int, type[Message]]] = {1: m.Ping, 2: m.Pong}
# The fast path takes these as they are; everything else goes through _special().
_PLAIN: Final = {_key(m.CALL, m.OK), _key(m.REPLY, m.OK), _key(m.REPLY, m.ERROR)}


class Connection:
    """The state of one end. `max_message` may be lowered while the peer is not yet trusted, and raised later."""

    def __init__(self, role: str, *, max_message: int = m.LENGTH_MAX, first_serial: int = 0) -> None:
        self.role = role
        self.max_message = max_message
        self._accepts = ACCEPTS[role]
        self._plain = {key: cls for key, cls in self._accepts.items() if key in _PLAIN}
        self._buffer = bytearray()  # the beginning of a message whose rest is still to come
        self._needed = 0  # size that the buffer must reach before looking at it again
        self._fds: deque[int] = deque()
        self._streams: dict[Key, str] = {}
        self._serial = first_serial

    # --- receiving ---

    def feed(self, data: bytes, fds: Sequence[int] = ()) -> list[Message]:
        """Received bytes (and the descriptors that came with them) -> the messages that are now complete.

        Raises RpcError when the bytes are not the protocol; the connection is then of no more use.
        """
        if fds:
            self._fds.extend(fds)
            if len(self._fds) > m.FDS_MAX:
                raise RpcError(f"more than {m.FDS_MAX} descriptors received ahead of their message")
        if self._buffer:
            self._buffer += data
            if len(self._buffer) < self._needed:
                return []
            data = bytes(self._buffer)
            self._buffer.clear()
        elif data.__class__ is not bytes:
            data = bytes(data)
        messages: list[Message] = []
        add = messages.append
        unpack, plain, limit = HEADER.unpack_from, self._plain, self.max_message
        new = tuple.__new__
        pos, size = 0, len(data)
        needed = HEADER_SIZE
        while size - pos >= HEADER_SIZE:
            length, program, version, procedure, kind, serial, status = unpack(data, pos)
            if not HEADER_SIZE <= length <= limit:
                raise RpcError(f"message length {length} is not between {HEADER_SIZE} and {limit}")
            end = pos + length
            if end > size:
                needed = length
                break
            cls = plain.get(kind << 32 | status)
            if cls is not None:
                fields = (program, version, procedure, kind, serial, status, data, pos + HEADER_SIZE, end, ())
                add(new(cls, fields))
                pos = end
                continue
            fields = (program, version, procedure, kind, serial, status, data, pos + HEADER_SIZE, end, ())
            message, end = self._special(fields, size)
            if end > size:
                needed = end - pos
                break
            if message is not None:
                add(message)
            pos = end
        if pos < size:
            if size - pos >= 4:
                length = int.from_bytes(data[pos : pos + 4])
                if not HEADER_SIZE <= length <= limit:
                    raise RpcError(f"message length {length} is not between {HEADER_SIZE} and {limit}")
            self._buffer += data[pos:] if pos else data
            self._needed = needed
        return messages

    def _special(self, fields: tuple[Any, ...], size: int) -> tuple[Message | None, int]:
        """Everything but plain calls and replies: (message or None if it is to be dropped, where the next one starts).

        The position is beyond `size` if bytes that belong to the message (descriptors' dummy bytes) are missing.
        """
        program, version, procedure, kind, serial, status, data, start, end, _ = fields
        cls = self._accepts.get(_key(kind, status))
        if cls is None:
            raise RpcError(f"a {self.role} cannot receive a message of type {kind} with status {status}")
        if kind in (m.CALL_WITH_FDS, m.REPLY_WITH_FDS):
            if end - start < 4:
                raise RpcError("a message with descriptors does not say how many")
            count = int.from_bytes(data[start : start + 4])
            if count > m.FDS_MAX:
                raise RpcError(f"{count} descriptors in one message: the limit is {m.FDS_MAX}")
            if end + count > size:
                return None, end + count
            if len(self._fds) < count:
                raise RpcError(f"{count} descriptors announced, {len(self._fds)} received")
            received = tuple(self._fds.popleft() for _ in range(count))
            fields = (program, version, procedure, kind, serial, status, data, start + 4, end, received)
            return tuple.__new__(cls, fields), end + count
        if kind == m.MESSAGE:
            if program == KEEPALIVE_NUMBER:
                cls = _KEEPALIVE.get(procedure, cls if cls is m.Event else None)
            if cls is None or (cls is m.Ping and program != KEEPALIVE_NUMBER):
                raise RpcError(f"a {self.role} cannot receive events (program 0x{program:x}, {procedure})")
            return tuple.__new__(cls, fields), end
        return self._stream(cls, fields), end

    def _stream(self, cls: type[Message], fields: tuple[Any, ...]) -> Message | None:
        if cls is m.StreamData and fields[7] == fields[8]:
            cls = m.StreamEnd
        if cls is m.StreamData and fields[8] - fields[7] > self.max_message:
            raise RpcError("stream packet too long")
        message = tuple.__new__(cls, fields)
        if cls is m.StreamHole:
            m.hole_length(message)  # RpcError if it is none
        key = message.key
        state = self._streams.get(key)
        if state is None:
            return None
        if cls in (m.StreamFinish, m.StreamAbort):
            del self._streams[key]
            return message
        return message if state == StreamState.OPEN else None

    def take_fds(self) -> list[int]:
        """Descriptors received that no message claimed: close them when the connection ends."""
        fds = list(self._fds)
        self._fds.clear()
        return fds

    # --- sending ---

    def call(self, procedure: Procedure, values: Sequence[Any] = (), fds: int = 0) -> tuple[int, bytes]:
        """A client's next call: (serial, bytes)."""
        data = m.call(procedure, self._serial, values, fds)
        serial = self._serial
        self._serial = serial + 1 & 0xFFFFFFFF
        return serial, data

    # --- streams ---

    def open_stream(self, key: Key) -> None:
        """The call `key` was answered with success and is a stream from now on."""
        if key in self._streams:
            raise RpcError(f"stream {key} is open already")
        self._streams[key] = StreamState.OPEN

    def finish_stream(self, key: Key) -> bytes:
        """The packet that ends a stream: a client's request, a server's confirmation."""
        self._close(key)
        return m.stream_finish(key)

    def abort_stream(self, key: Key, error: BaseException | None = None) -> bytes:
        """The packet that gives a stream up."""
        self._close(key)
        return m.stream_abort(key, error)

    def _close(self, key: Key) -> None:
        if key in self._streams and self.role == Role.CLIENT:
            self._streams[key] = StreamState.CLOSING
        else:
            self._streams.pop(key, None)

    def forget_stream(self, key: Key) -> None:
        """The call failed after all, or nobody wants the rest: late packets are dropped."""
        self._streams.pop(key, None)

    @property
    def streams(self) -> list[Key]:
        return list(self._streams)
