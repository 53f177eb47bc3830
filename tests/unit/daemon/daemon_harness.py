"""A daemon in this process, and a client of the wire protocol that sees every message."""

from __future__ import annotations

import array
import asyncio
import contextlib
import shutil
import socket
import tempfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from kvik.daemon.server import Limits, Server
from kvik.manager.node import Node
from kvik.paths import Paths
from kvik.rpc import message as m
from kvik.rpc.connection import Connection, Role
from kvik.rpc.program import Program, kvik, qemu, remote

PROGRAMS = {"remote": remote, "qemu": qemu, "kvik": kvik}


class Client:
    """One connection, driven by hand. `events` and `streams` collect what comes besides replies."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.wire = Connection(Role.CLIENT)
        self.events: asyncio.Queue[Any] = asyncio.Queue()
        self.stream: asyncio.Queue[Any] = asyncio.Queue()
        self.pings = 0
        self.answer_pings = True
        self.replies: dict[int, asyncio.Future[Any]] = {}
        self.ended = asyncio.Event()

    async def connect(self) -> Client:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(self.sock, str(self.path))
        self.task = asyncio.create_task(self._read())
        return self

    async def _read(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while data := await loop.run_in_executor(None, self._receive):
                for message in self.wire.feed(*data):
                    self._take(message)
        except OSError:
            pass
        finally:
            self.ended.set()
            for future in self.replies.values():
                if not future.done():
                    future.set_exception(ConnectionError("the daemon hung up"))

    def _receive(self) -> tuple[bytes, list[int]] | None:
        self.sock.setblocking(True)
        data, ancillary, _, _ = self.sock.recvmsg(1 << 20, 1024)
        files = array.array("i")
        for _, _, payload in ancillary:
            files.frombytes(payload)
        return (data, files.tolist()) if data else None

    def _take(self, message: Any) -> None:
        match message:
            case m.Reply() | m.ErrorReply():
                future = self.replies.pop(message.serial)
                if not future.done():
                    future.set_result(message)
            case m.Event():
                self.events.put_nowait(message)
            case m.Ping():
                self.pings += 1
                if self.answer_pings:
                    self.send(m.PONG_BYTES)
            case m.Pong():
                self.events.put_nowait(message)
            case _:
                self.stream.put_nowait(message)

    def send(self, data: bytes, files: Sequence[int] = ()) -> None:
        self.sock.sendall(data)
        for fd in files:
            self.sock.sendmsg([b"\0"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))])

    def start(self, name: str, *values: Any, program: str = "remote", files: Sequence[int] = ()) -> Any:
        """Send a call; the future's result is its message."""
        procedure = PROGRAMS[program]()[name]
        serial, data = self.wire.call(procedure, values, len(files))
        future = self.replies[serial] = asyncio.get_running_loop().create_future()
        self.last_key = (procedure.program.number, procedure.number, serial)
        self.send(data, files)
        return future

    async def call(self, name: str, *values: Any, program: str = "remote", files: Sequence[int] = ()) -> Any:
        """Call and return the result's fields, or raise the error."""
        async with asyncio.timeout(10):
            message = await self.start(name, *values, program=program, files=files)
        if isinstance(message, m.ErrorReply):
            raise message.error()
        result = message.decode()
        return result if not message.fds else (result, message.fds)

    async def open(self, uri: str | None = None, flags: int = 0) -> Client:
        await self.call("CONNECT_OPEN", uri, flags)
        return self

    async def raw(self, number: int, procedure: int, payload: bytes = b"", version: int = 1) -> Any:
        """Any bytes as a call; returns the answering message."""
        serial = 1_000_000 + len(self.replies)
        future = self.replies[serial] = asyncio.get_running_loop().create_future()
        header = m.HEADER.pack(m.HEADER_SIZE + len(payload), number, version, procedure, m.CALL, serial, m.OK)
        self.send(header + payload)
        async with asyncio.timeout(10):
            return await future

    async def event(self) -> Any:
        async with asyncio.timeout(5):
            return await self.events.get()

    async def packet(self) -> Any:
        async with asyncio.timeout(5):
            return await self.stream.get()

    async def close(self) -> None:
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(asyncio.CancelledError):
            await self.task
        self.sock.close()


class Daemon:
    """A running server and its clients."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.clients: list[Client] = []

    async def client(self, *, opened: bool = True, flags: int = 0) -> Client:
        client = await Client(self.server.socket_path).connect()
        self.clients.append(client)
        return await client.open("qemu:///system", flags) if opened else client

    async def settled(self, *, connections: int = 0) -> None:
        """Wait until only so many connections are left."""
        async with asyncio.timeout(5):
            while len(self.server.connections) != connections:
                await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def running(manager: Any, *, limits: Limits | None = None, idle_timeout: float = 0.0) -> AsyncIterator[Daemon]:
    root = Path(tempfile.mkdtemp(prefix="kvikd-"))  # short: a socket's path has 107 bytes
    paths = Paths.system(root, {})
    server = Server(manager, paths, node=Node(manager), limits=limits, idle_timeout=idle_timeout)
    daemon = Daemon(server)
    task = asyncio.create_task(server.run())
    try:
        async with asyncio.timeout(5):
            while not server.socket_path.exists():
                if task.done():
                    task.result()
                await asyncio.sleep(0.001)
        yield daemon
    finally:
        for client in daemon.clients:
            await client.close()
        server.stop("the test is over")
        await task
        shutil.rmtree(root, ignore_errors=True)


def payload(program: Program, name: str, *values: Any) -> bytes:
    return program[name].args.encode(values)
