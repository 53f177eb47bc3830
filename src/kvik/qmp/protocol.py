"""The QEMU Machine Protocol without I/O: bytes in, typed messages out. The client is here, the server in `server.py`.

Client (kvik's drivers)                       Server (kvik's own VMM)

    state        input        next                state        input               next
    GREETING     greeting     NEGOTIATING         NEGOTIATING  qmp_capabilities    READY
    NEGOTIATING  return       READY               NEGOTIATING  any other command   NEGOTIATING (error reply)
    READY        any message  READY               READY        any command         READY
    any          bad input    FAILED              any          bad line            same (error reply)
    any          end          CLOSED              any          line too long, end  FAILED, CLOSED

One message is one JSON object on one line; a server takes commands without line ends too, as QEMU does. What the peer
sends is not trusted: lines are bounded before they are buffered, every field is type-checked, and whatever is wrong is
a `HypervisorError`, never another exception. A reply to a command that nobody waits for any more (its deadline passed)
is dropped; a reply to a command that was never sent fails the connection.

Reference: QEMU's docs/interop/qmp-spec.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from kvik.errors import HypervisorError, MonitorError
from kvik.qmp.state import MAX_LINE, State

__all__ = [
    "Client",
    "Event",
    "Failure",
    "Greeting",
    "Ready",
    "Reply",
    "decode_object",
]

_encode = msgspec.json.encode
_decode = msgspec.json.Decoder().decode


@dataclass(frozen=True, slots=True)
class Greeting:
    """The server's first message. `version` is (major, minor, micro); `package` the builder's own version text."""

    version: tuple[int, int, int]
    package: str
    capabilities: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Ready:
    """Capabilities are negotiated; commands may flow."""


@dataclass(frozen=True, slots=True)
class Reply:
    id: int
    value: Any


@dataclass(frozen=True, slots=True)
class Failure:
    id: int | None  # None: the server could not even read the command
    qmp_class: str
    description: str

    def error(self, command: str) -> MonitorError:
        return MonitorError(f"QMP command {command} failed: {self.description}", qmp_class=self.qmp_class)


@dataclass(frozen=True, slots=True)
class Event:
    """`timestamp` is in seconds since the epoch, 0.0 when the peer's clock could not tell."""

    name: str
    data: Mapping[str, Any]
    timestamp: float


Message = Greeting | Ready | Reply | Failure | Event


def decode_object(line: bytes | bytearray | memoryview, what: str) -> dict[str, Any]:
    """One JSON object from untrusted bytes. Raises `HypervisorError`."""
    try:
        value = _decode(line)
    except (msgspec.MsgspecError, RecursionError, ValueError) as error:
        raise HypervisorError(f"{what} is not JSON ({error}): {_excerpt(line)}") from error
    if not isinstance(value, dict):
        raise HypervisorError(f"{what} is not a JSON object: {_excerpt(line)}")
    return value


def _excerpt(line: bytes | bytearray | memoryview) -> str:
    """The first bytes of what was wrong, safe to print in a log or on a terminal."""
    return repr(bytes(line[:80]))[1:]


class LineBuffer:
    """Splits a byte stream into lines, holding at most `limit` bytes of an unfinished one."""

    __slots__ = ("_buffer", "_limit", "_scanned")

    def __init__(self, limit: int) -> None:
        self._buffer = bytearray()
        self._scanned = 0
        self._limit = limit

    def feed(self, data: bytes) -> list[bytes]:
        """The complete lines, without line ends; empty lines are dropped. Raises `HypervisorError`."""
        if not self._buffer and data.endswith(b"\n") and data.count(b"\n") == 1:  # by far the most frequent case
            if len(data) > self._limit:
                raise HypervisorError(f"a line of {len(data)} bytes exceeds the limit of {self._limit}")
            line = data.strip()
            return [line] if line else []
        self._buffer += data
        end = self._buffer.rfind(b"\n", self._scanned)
        if end < 0:
            self._scanned = len(self._buffer)
            if self._scanned > self._limit:
                self._buffer = bytearray()
                self._scanned = 0
                raise HypervisorError(f"a line exceeds the limit of {self._limit} bytes")
            return []
        lines = bytes(self._buffer[:end]).split(b"\n")
        del self._buffer[: end + 1]
        self._scanned = len(self._buffer)
        if self._scanned > self._limit or any(len(line) > self._limit for line in lines):
            raise HypervisorError(f"a line exceeds the limit of {self._limit} bytes")
        return [stripped for line in lines if (stripped := line.strip())]


class Client:
    """The commanding side. `receive` takes bytes and gives messages; `execute` gives the bytes to send."""

    __slots__ = ("_lines", "_next_id", "_pending", "greeting", "state")

    def __init__(self, *, max_line: int = MAX_LINE) -> None:
        self.state = State.GREETING
        self.greeting: Greeting | None = None
        self._lines = LineBuffer(max_line)
        self._next_id = 1
        self._pending: dict[int, str] = {}  # id -> command name

    def negotiate(self, enable: Sequence[str] = ()) -> bytes:
        """The `qmp_capabilities` command, to be sent once after the greeting."""
        if self.state is not State.NEGOTIATING:
            raise HypervisorError(f"QMP: capabilities cannot be negotiated in state {self.state.value}")
        arguments = {"enable": list(enable)} if enable else None
        return self._command("qmp_capabilities", arguments)[1]

    def execute(self, command: str, arguments: Mapping[str, Any] | None = None) -> tuple[int, bytes]:
        """The id and the bytes of one command. Raises `HypervisorError` if commands cannot flow."""
        if self.state is not State.READY:
            raise HypervisorError(f"QMP: {command} cannot be sent in state {self.state.value}")
        return self._command(command, arguments)

    def _command(self, command: str, arguments: Mapping[str, Any] | None) -> tuple[int, bytes]:
        number = self._next_id
        message: dict[str, Any] = {"execute": command, "id": number}
        if arguments:
            message["arguments"] = arguments
        try:
            data = _encode(message) + b"\n"
        except (TypeError, ValueError, msgspec.MsgspecError) as error:
            raise HypervisorError(f"QMP: the arguments of {command} are not JSON: {error}") from error
        self._next_id = number + 1
        self._pending[number] = command
        return number, data

    def forget(self, number: int) -> None:
        """Nobody waits for this reply any more; it is dropped when it comes."""
        self._pending.pop(number, None)

    def receive(self, data: bytes) -> list[Message]:
        """Messages that `data` completed. Empty `data` is the end of the stream. Raises `HypervisorError`."""
        if self.state in (State.FAILED, State.CLOSED):
            return []
        if not data:
            self.state = State.CLOSED
            self._pending.clear()
            return []
        try:
            messages = []
            for line in self._lines.feed(data):
                message = self._message(decode_object(line, "a QMP message"))
                if message is not None:
                    messages.append(message)
            return messages
        except HypervisorError:
            self.state = State.FAILED
            self._pending.clear()
            raise

    def _message(self, message: dict[str, Any]) -> Message | None:
        if self.state is State.GREETING:
            self.greeting = _greeting(message)
            self.state = State.NEGOTIATING
            return self.greeting
        if "return" in message:
            return self._reply(message)
        if "event" in message:
            return _event(message)
        if "error" in message:
            return self._failure(message)
        raise HypervisorError(f"QMP: a message is neither return, error nor event but has {sorted(message)[:5]}")

    def _known(self, message: dict[str, Any]) -> bool:
        """Whether somebody waits for this reply."""
        number = message.get("id")
        if not isinstance(number, int) or isinstance(number, bool) or not 0 < number < self._next_id:
            raise HypervisorError(f"QMP: a reply carries the id {str(number)[:40]!r}, which was never sent")
        return self._pending.pop(number, None) is not None

    def _reply(self, message: dict[str, Any]) -> Message | None:
        if not self._known(message):
            return None
        if self.state is State.NEGOTIATING:
            self.state = State.READY
            return Ready()
        return Reply(message["id"], message["return"])

    def _failure(self, message: dict[str, Any]) -> Message | None:
        error = message["error"]
        if not isinstance(error, dict):
            raise HypervisorError("QMP: an error is not an object")
        qmp_class, description = error.get("class"), error.get("desc")
        if not isinstance(qmp_class, str) or not isinstance(description, str):
            raise HypervisorError("QMP: an error has no class or description")
        if "id" not in message:  # the server could not parse what we sent
            return Failure(None, qmp_class, description)
        if not self._known(message):
            return None
        if self.state is State.NEGOTIATING:
            raise HypervisorError(f"QMP: capabilities were refused: {description}")
        return Failure(message["id"], qmp_class, description)


def _greeting(message: dict[str, Any]) -> Greeting:
    try:
        body = message["QMP"]
        version = body["version"]["qemu"]
        numbers = (version["major"], version["minor"], version["micro"])
        package = body["version"].get("package", "")
        capabilities = body.get("capabilities", [])
    except (KeyError, TypeError, AttributeError) as error:
        raise HypervisorError("QMP: the peer's first message is not a greeting") from error
    if not all(isinstance(number, int) for number in numbers) or not isinstance(package, str):
        raise HypervisorError("QMP: the greeting's version is malformed")
    if not isinstance(capabilities, list):
        raise HypervisorError("QMP: the greeting's capabilities are malformed")
    return Greeting(numbers, package, tuple(str(item) for item in capabilities if isinstance(item, str)))


def _event(message: dict[str, Any]) -> Event:
    name, data, when = message["event"], message.get("data", {}), message.get("timestamp", {})
    if not isinstance(name, str) or not isinstance(data, dict) or not isinstance(when, dict):
        raise HypervisorError("QMP: an event is malformed")
    seconds, microseconds = when.get("seconds", 0), when.get("microseconds", 0)
    # The specification: both are -1 if the host's clock cannot be read.
    if not isinstance(seconds, int) or not isinstance(microseconds, int) or not 0 <= seconds < 2**40:
        return Event(name, data, 0.0)
    return Event(name, data, seconds + min(max(microseconds, 0), 999_999) / 1e6)
