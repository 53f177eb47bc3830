"""The QEMU Machine Protocol without I/O: bytes in, typed messages out, for both roles.

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

import enum
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from kvik.errors import HypervisorError, MonitorError

__all__ = [
    "MAX_LINE",
    "Client",
    "Command",
    "Event",
    "Failure",
    "Greeting",
    "Ready",
    "Reply",
    "Server",
    "State",
    "decode_object",
]

# query-qmp-schema, the longest honest reply, is about 0.25 MB; a reply ten times that is an attack or a fault.
MAX_LINE = 8 * 1024 * 1024

_encode = msgspec.json.encode
_decode = msgspec.json.Decoder().decode


class State(enum.Enum):
    GREETING = "greeting"
    NEGOTIATING = "negotiating"
    READY = "ready"
    FAILED = "failed"
    CLOSED = "closed"


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


@dataclass(frozen=True, slots=True)
class Command:
    """What a client asks of a server. `id` is any JSON value, echoed in the reply; None: it sent none."""

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    id: Any = None
    out_of_band: bool = False


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


class ObjectBuffer:
    """Splits a byte stream into JSON objects as QEMU does: by their braces, not by lines. Some clients (qemu.qmp) end
    no line, and people paste objects of several lines. Holds at most `limit` bytes of an unfinished one.

    What cannot be an object comes out as a piece of its own, for the parser to refuse: a line without braces, a line
    end inside a string, and whatever is nested deeper than `MAX_DEPTH`, up to the end of its line.
    """

    __slots__ = ("_buffer", "_depth", "_limit", "_quoted", "_scanned", "_skipping")

    MAX_DEPTH = 200

    def __init__(self, limit: int) -> None:
        self._buffer = bytearray()
        self._limit = limit
        self._scanned = self._depth = 0
        self._quoted = self._skipping = False

    def feed(self, data: bytes) -> list[bytes]:
        """The complete pieces; empty ones are dropped. Raises `HypervisorError`."""
        self._buffer += data
        pieces: list[bytes] = []
        start = 0
        while (found := (_IN_STRING if self._quoted else _OUTSIDE).search(self._buffer, self._scanned)) is not None:
            mark, self._scanned = found[0], found.end()
            ended = mark == b"\n" and (self._quoted or self._skipping or self._depth == 0)
            if self._skipping and not ended:
                continue
            if self._quoted:
                self._quoted = mark != b'"' if len(mark) == 1 else True
            elif mark == b'"':
                self._quoted = True
            elif mark in b"{[":
                self._depth += 1
                self._skipping = self._depth > self.MAX_DEPTH
            elif mark in b"}]":
                self._depth -= 1
                ended = self._depth <= 0
            if ended:
                if piece := bytes(self._buffer[start : self._scanned]).strip():
                    pieces.append(piece)
                start, self._depth, self._quoted, self._skipping = self._scanned, 0, False, False
        # A backslash at the end waits for what it escapes.
        self._scanned = len(self._buffer) - (self._quoted and self._buffer.endswith(b"\\"))
        if self._quoted and self._scanned < len(self._buffer) and self._escaped():
            self._scanned = len(self._buffer)
        del self._buffer[:start]
        self._scanned -= start
        if len(self._buffer) > self._limit or any(len(piece) > self._limit for piece in pieces):
            self._buffer = bytearray()
            raise HypervisorError(f"a line exceeds the limit of {self._limit} bytes")
        return pieces

    def _escaped(self) -> bool:
        """Whether the backslash at the end is itself escaped: an even number of them stands there."""
        return (len(self._buffer) - len(self._buffer.rstrip(b"\\"))) % 2 == 0


_OUTSIDE = re.compile(rb'[\n"{}\[\]]')
_IN_STRING = re.compile(rb'\\.|["\n]', re.DOTALL)


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


class Server:
    """The obeying side: greets, reads commands, writes replies and events."""

    __slots__ = ("_lines", "_version", "capabilities", "enabled", "state")

    def __init__(
        self,
        version: tuple[int, int, int] = (0, 0, 0),
        package: str = "",
        *,
        capabilities: Sequence[str] = (),
        max_line: int = MAX_LINE,
    ) -> None:
        self.state = State.NEGOTIATING
        self.capabilities = tuple(capabilities)
        self.enabled: frozenset[str] = frozenset()  # what the client asked for, known after negotiation
        self._version = {
            "qemu": {"major": version[0], "minor": version[1], "micro": version[2]},
            "package": package,
        }
        self._lines = ObjectBuffer(max_line)

    def greeting(self) -> bytes:
        body = {"version": self._version, "capabilities": list(self.capabilities)}
        return _encode({"QMP": body}) + b"\r\n"

    def receive(self, data: bytes) -> tuple[list[Command], bytes]:
        """Commands to run, and bytes to send at once (negotiation, refusals of bad lines).

        Raises `HypervisorError` when the line limit is exceeded: the caller closes the connection.
        """
        if self.state in (State.FAILED, State.CLOSED):
            return [], b""
        if not data:
            self.state = State.CLOSED
            return [], b""
        try:
            lines = self._lines.feed(data)
        except HypervisorError:
            self.state = State.FAILED
            raise
        commands: list[Command] = []
        answer = b""
        for line in lines:
            identity = None
            try:
                message = _input(line)
                identity = message.get("id")
                command = _command(message, out_of_band="oob" in self.enabled)
            except HypervisorError as error:
                answer += self.failure(identity, "GenericError", error.message)
                continue
            if self.state is State.NEGOTIATING:
                answer += self._negotiated(command)
            elif command.name == "qmp_capabilities":
                text = "Capabilities negotiation is already complete, command ignored"
                answer += self.failure(command.id, "CommandNotFound", text)
            else:
                commands.append(command)
        return commands, answer

    def _negotiated(self, command: Command) -> bytes:
        if command.name != "qmp_capabilities":
            text = "Expecting capabilities negotiation with 'qmp_capabilities'"
            return self.failure(command.id, "CommandNotFound", text)
        wanted = command.arguments.get("enable", [])
        if not isinstance(wanted, list) or any(item not in self.capabilities for item in wanted):
            return self.failure(command.id, "GenericError", "a capability to enable is not available")
        self.enabled = frozenset(wanted)
        self.state = State.READY
        return self.reply(command.id, {})

    def reply(self, identity: Any, value: Any) -> bytes:
        message = {"return": value}
        if identity is not None:
            message["id"] = identity
        return _encode(message) + b"\r\n"

    def failure(self, identity: Any, qmp_class: str, description: str) -> bytes:
        message: dict[str, Any] = {"error": {"class": qmp_class, "desc": description}}
        if identity is not None:
            message["id"] = identity
        return _encode(message) + b"\r\n"

    def event(self, name: str, data: Mapping[str, Any] | None = None, *, timestamp: float = 0.0) -> bytes:
        """An event's bytes; empty before negotiation is complete, as the specification asks."""
        if self.state is not State.READY:
            return b""
        seconds = int(timestamp)
        when = {"seconds": seconds, "microseconds": int((timestamp - seconds) * 1e6)}
        message: dict[str, Any] = {"timestamp": when, "event": name}
        if data:
            message["data"] = data
        return _encode(message) + b"\r\n"


def _input(line: bytes) -> dict[str, Any]:
    """One command from untrusted bytes. Raises `HypervisorError` in QEMU's words."""
    try:
        value = _decode(line)
    except (msgspec.MsgspecError, RecursionError, ValueError) as error:
        raise HypervisorError(f"JSON parse error, {error}") from error
    if not isinstance(value, dict):
        raise HypervisorError("QMP input must be a JSON object")
    return value


def _command(message: dict[str, Any], *, out_of_band: bool) -> Command:
    """The checks of QEMU's qmp_dispatch_check_obj(), in its order. Raises `HypervisorError`."""
    word = None
    for member, value in message.items():
        if member == "execute" or (member == "exec-oob" and out_of_band):
            if not isinstance(value, str):
                raise HypervisorError(f"QMP input member '{member}' must be a string")
            if word is not None:
                raise HypervisorError(f"QMP input member '{member}' clashes with '{word}'")
            word = member
        elif member == "arguments":
            if not isinstance(value, dict):
                raise HypervisorError("QMP input member 'arguments' must be an object")
        elif member != "id":
            raise HypervisorError(f"QMP input member '{member[:80]}' is unexpected")
    if word is None:
        raise HypervisorError("QMP input lacks member 'execute'")
    return Command(message[word], message.get("arguments", {}), message.get("id"), word == "exec-oob")
