"""The obeying side of QMP, without I/O; `protocol` has the commanding one, and a table of both.

A machine answers its monitor after this is imported, so it does without `msgspec` and `dataclasses`, which cost 10 ms
and more (docs/adr/0011-vmm-start.md).
"""

from __future__ import annotations

import json
import re
from math import isfinite

from kvik.errors import HypervisorError
from kvik.named import NamedTuple
from kvik.qmp.state import MAX_LINE, State

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

__all__ = ["Command", "Server"]


class Command(NamedTuple):
    """What a client asks of a server. `id` is any JSON value, echoed in the reply; None: it sent none."""

    name: str
    arguments: Mapping[str, Any] = {}
    id: Any = None
    out_of_band: bool = False


def _number(text: str) -> float:
    if not isfinite(value := float(text)):
        raise ValueError(f"{text[:40]} is too large a number")
    return value


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


_decoder = json.JSONDecoder(parse_float=_number, parse_constant=_no_constant)
_encoder = json.JSONEncoder(separators=(",", ":"), allow_nan=False)


def _encode(message: dict[str, Any]) -> bytes:
    """Raises ValueError or TypeError for what JSON has not."""
    return _encoder.encode(message).encode() + b"\r\n"


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
        return _encode({"QMP": body})

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
        return _encode(message)

    def failure(self, identity: Any, qmp_class: str, description: str) -> bytes:
        message: dict[str, Any] = {"error": {"class": qmp_class, "desc": description}}
        if identity is not None:
            message["id"] = identity
        return _encode(message)

    def event(self, name: str, data: Mapping[str, Any] | None = None, *, timestamp: float = 0.0) -> bytes:
        """An event's bytes; empty before negotiation is complete, as the specification asks."""
        if self.state is not State.READY:
            return b""
        seconds = int(timestamp)
        when = {"seconds": seconds, "microseconds": int((timestamp - seconds) * 1e6)}
        message: dict[str, Any] = {"timestamp": when, "event": name}
        if data:
            message["data"] = data
        return _encode(message)


def _input(line: bytes) -> dict[str, Any]:
    """One command from untrusted bytes. Raises `HypervisorError` in QEMU's words."""
    try:
        value = _decoder.decode(line.decode())
        if b"\\u" in line:
            json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is no text: nobody could write it
    except (RecursionError, ValueError) as error:
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
