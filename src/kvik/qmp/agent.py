"""The guest agent's protocol without I/O: one command at a time, resynchronised whenever a reply was lost.

    state     input                        next
    UNSYNCED  sync()                       SYNCING
    SYNCING   0xFF, then our sync number   READY
    SYNCING   anything else                SYNCING (dropped: replies to an earlier owner's commands)
    READY     execute()                    BUSY
    BUSY      a line                       READY
    any       abandon(), bad input         UNSYNCED

The agent's replies carry no ids, and whoever wrote to the channel before us may have left commands unanswered.
So each owner first sends `guest-sync-delimited` with a fresh number: the agent answers with a byte 0xFF, which is
never part of UTF-8, and the number; everything before it is stale. What a guest sends is hostile input: replies are
bounded and type-checked, and an agent that misbehaves is an `AgentError`.

Reference: QEMU's qga/qapi-schema.json.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any

import msgspec

from kvik.errors import AgentError, HypervisorError
from kvik.qmp.protocol import decode_object

__all__ = ["MAX_REPLY", "AgentClient", "AgentState"]

# guest-exec-status returns at most 16 MiB of captured output per stream, in base64.
MAX_REPLY = 48 * 1024 * 1024
_STALE_LIMIT = 64 * 1024 * 1024  # bytes dropped while synchronising before we give up on this guest

_DELIMITER = b"\xff"


class AgentState(enum.Enum):
    UNSYNCED = "unsynced"
    SYNCING = "syncing"
    READY = "ready"
    BUSY = "busy"


class AgentClient:
    __slots__ = ("_buffer", "_command", "_dropped", "_max_reply", "_scanned", "_token", "state")

    def __init__(self, *, max_reply: int = MAX_REPLY) -> None:
        self.state = AgentState.UNSYNCED
        self._buffer = bytearray()
        self._scanned = 0
        self._dropped = 0
        self._token = 0
        self._command = ""
        self._max_reply = max_reply

    def sync(self, token: int) -> bytes:
        """Bytes that start a synchronisation; `token` is a number no earlier owner used (random, below 2^53).

        The leading 0xFF makes the agent's own parser drop half a command of an earlier owner.
        """
        self._token = token
        self._clear()
        self._dropped = 0
        self.state = AgentState.SYNCING
        message = {"execute": "guest-sync-delimited", "arguments": {"id": token}}
        return _DELIMITER + msgspec.json.encode(message) + b"\n"

    def execute(self, command: str, arguments: Mapping[str, Any] | None = None) -> bytes:
        if self.state is not AgentState.READY:
            raise AgentError(f"guest agent: {command} cannot be sent while {self.state.value}")
        message: dict[str, Any] = {"execute": command}
        if arguments:
            message["arguments"] = arguments
        try:
            data = msgspec.json.encode(message) + b"\n"
        except (TypeError, ValueError, msgspec.MsgspecError) as error:
            raise AgentError(f"guest agent: the arguments of {command} are not JSON: {error}") from error
        self._command = command
        self.state = AgentState.BUSY
        return data

    def abandon(self) -> None:
        """Nobody waits for the current reply any more: the next command needs a new synchronisation."""
        self._clear()
        self.state = AgentState.UNSYNCED

    def _clear(self) -> None:
        self._buffer.clear()
        self._scanned = 0

    def receive(self, data: bytes) -> list[tuple[bool, Any]]:
        """At most one outcome: (True, None) when synchronised, (True, value) of the command.

        Raises `AgentError` for the agent's own errors (state READY again) and for bad input (UNSYNCED).
        """
        if self.state is AgentState.SYNCING:
            return self._receive_sync(data)
        if self.state is not AgentState.BUSY:
            return []  # nobody asked: drop
        return self._receive_reply(data)

    def _receive_sync(self, data: bytes) -> list[tuple[bool, Any]]:
        self._buffer += data
        while True:
            start = self._buffer.rfind(_DELIMITER)
            if start > 0:
                self._drop(start)
            elif start < 0:
                self._drop(len(self._buffer))
                return []
            end = self._buffer.find(b"\n")
            if end < 0:
                if len(self._buffer) > 4096:  # the reply to a sync is a few dozen bytes
                    self._drop(len(self._buffer))
                return []
            line = bytes(self._buffer[1:end])
            self._drop(end + 1)
            try:
                value = decode_object(line, "the reply to guest-sync-delimited").get("return")
            except HypervisorError:
                continue
            if value == self._token and not isinstance(value, bool):
                self._clear()
                self.state = AgentState.READY
                return [(True, None)]

    def _drop(self, count: int) -> None:
        del self._buffer[:count]
        self._dropped += count
        if self._dropped > _STALE_LIMIT:
            self.abandon()
            raise AgentError(f"the guest agent sent over {_STALE_LIMIT} bytes and did not synchronise")

    def _receive_reply(self, data: bytes) -> list[tuple[bool, Any]]:
        self._buffer += data
        end = self._buffer.find(b"\n", self._scanned)
        if end < 0:
            self._scanned = len(self._buffer)
            if self._scanned > self._max_reply:
                self.abandon()
                raise AgentError(f"the guest agent's reply to {self._command} exceeds {self._max_reply} bytes")
            return []
        line = bytes(self._buffer[:end])
        self._clear()
        try:
            message = decode_object(line.lstrip(_DELIMITER), f"the guest agent's reply to {self._command}")
        except HypervisorError as error:
            self.abandon()
            raise AgentError(error.message) from error
        self.state = AgentState.READY
        if "return" in message:
            return [(True, message["return"])]
        error_body = message.get("error")
        if isinstance(error_body, dict) and isinstance(error_body.get("desc"), str):
            description = error_body["desc"][:2000]
            remedy = ""
            if error_body.get("class") == "CommandNotFound":
                remedy = "the agent in the guest is too old, or the command is on its block list"
            raise AgentError(f"guest agent command {self._command} failed: {description}", remedy=remedy)
        self.abandon()
        raise AgentError(f"the guest agent's reply to {self._command} is neither a return nor an error")
