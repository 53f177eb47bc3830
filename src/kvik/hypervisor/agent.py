"""The guest agent over its channel's Unix socket: one owner, one command at a time, deadlines, resynchronisation."""

from __future__ import annotations

import asyncio
import secrets
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvik.errors import AgentError, HypervisorError, OperationTimeout
from kvik.qmp.agent import AgentClient, AgentState
from kvik.qmp.aio import connect_unix

__all__ = ["AGENT_CHANNEL", "GuestAgent", "check_reply"]

AGENT_CHANNEL = "org.qemu.guest_agent.0"
_SYNC_DEADLINE = 5.0
_REMEDY = "install and start qemu-guest-agent in the guest"


class GuestAgent:
    """`path` is the channel's listening socket. Commands of several callers queue up; nothing is sent unasked.

    `connected` is what QEMU says of the guest's side of the channel; without a listener there, whatever is written
    would pile up and be answered to nobody, so commands then fail at once.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.connected: bool | None = None  # None: not known
        self._path = path
        self._name = name
        self._client = AgentClient()
        self._socket: socket.socket | None = None
        self._lock = asyncio.Lock()

    async def execute(self, command: str, arguments: Mapping[str, Any] | None, timeout: float) -> Any:
        """The command's return value. Raises `AgentError`: absent, silent within `timeout` seconds, or refused."""
        if self.connected is False:
            raise AgentError(f"{self._name}: the guest agent is not connected", remedy=_REMEDY)
        try:
            async with asyncio.timeout(timeout), self._lock:
                try:
                    return await self._locked(command, arguments)
                except AgentError:
                    raise
                except BaseException:
                    self._client.abandon()
                    raise
        except TimeoutError:
            raise AgentError(
                f"{self._name}: the guest agent did not answer {command} within {timeout:g} s", remedy=_REMEDY
            ) from None
        except OperationTimeout as error:
            raise AgentError(f"{self._name}: the guest agent's channel is busy: {error.message}") from error
        except HypervisorError as error:
            if isinstance(error, AgentError):
                raise
            raise AgentError(f"{self._name}: the guest agent cannot be reached: {error.message}") from error

    async def _locked(self, command: str, arguments: Mapping[str, Any] | None) -> Any:
        if self._socket is None:
            self._socket = await connect_unix(self._path, _SYNC_DEADLINE)
            self._client.abandon()
        if self._client.state is not AgentState.READY:
            # Numbers below 2^53 survive any JSON parser.
            await self._exchange(self._client.sync(secrets.randbelow(2**53)))
        if command == "guest-sync-delimited":
            return None
        data = self._client.execute(command, arguments)
        if command in ("guest-shutdown", "guest-suspend-disk", "guest-suspend-ram", "guest-suspend-hybrid"):
            return await self._exchange_to_the_end(data)
        return await self._exchange(data)

    async def _exchange(self, data: bytes) -> Any:
        loop = asyncio.get_running_loop()
        sock = self._socket
        assert sock is not None
        try:
            await loop.sock_sendall(sock, data)
            while True:
                received = await loop.sock_recv(sock, 1 << 16)
                if not received:
                    raise AgentError(f"{self._name}: the guest agent's channel was closed")
                for _, value in self._client.receive(received):
                    return value
        except OSError as error:
            self.close()
            raise AgentError(f"{self._name}: the guest agent's channel failed: {error.strerror}") from error
        except AgentError:
            if self._client.state is AgentState.UNSYNCED or not self._client_alive():
                self.close()
            raise

    def _client_alive(self) -> bool:
        return self._client.state is AgentState.READY

    async def _exchange_to_the_end(self, data: bytes) -> Any:
        """For commands that succeed without a reply: an answer is an error; none, or the end, is success."""
        try:
            async with asyncio.timeout(1.0):
                return await self._exchange(data)
        except TimeoutError:
            self._client.abandon()
            return None
        except AgentError:
            if self._socket is None and self._client.state is not AgentState.READY:
                return None  # the channel went with the guest
            raise

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        self._client.abandon()

    def set_connected(self, connected: bool) -> None:
        """QEMU's word on the guest's side. A new agent must be synchronised with anew."""
        if connected != self.connected:
            self._client_lost()
        self.connected = connected

    def _client_lost(self) -> None:
        if self._client.state is AgentState.READY:
            self._client.abandon()


def check_reply(value: Any, kind: type, command: str) -> Any:
    """The reply if it has this type. Raises `AgentError`: what a guest says is not trusted."""
    if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
        raise AgentError(f"the guest agent's reply to {command} is not of type {kind.__name__}")
    return value
