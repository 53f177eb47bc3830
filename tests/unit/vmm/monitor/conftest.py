"""A machine without KVM: real loop, memory and buses; vCPUs that only remember."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvik.vmm.bus import Bus
from kvik.vmm.loop import EventLoop
from kvik.vmm.memory import GuestMemory
from kvik.vmm.monitor.mock import MonitoredMock
from kvik.vmm.monitor.server import MonitorServer

MIB = 1 << 20


@pytest.fixture(autouse=True)
def no_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """Snapshots and migration need a real machine: tests/functional/vmm/test_state*.py. Here they are refused."""
    monkeypatch.setattr("kvik.vmm.state.qmp.HANDLERS", {})


class FakeMachine(MonitoredMock):
    """With memory and buses, and no device."""

    def __init__(self) -> None:
        self.prepare("fake", 16 * MIB)
        self.loop = EventLoop()
        self.memory = GuestMemory.allocate(16 * MIB)
        self.ports, self.mmio = Bus("port", 0x10000), Bus("memory", 1 << 52)
        self.devices = {}


class Client:
    """The other end, on the same thread: it lets the loop run while it waits."""

    def __init__(self, loop: EventLoop, path: str) -> None:
        self.loop = loop
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(path)
        self.sock.setblocking(False)
        self.buffer = b""
        self.events: list[dict[str, Any]] = []

    def pump(self) -> bool:
        """One round; False when the server closed."""
        self.loop.run_once(0.005)
        try:
            data = self.sock.recv(1 << 20)
        except BlockingIOError:
            return True
        except ConnectionResetError:
            return False
        self.buffer += data
        return bool(data)

    def line(self, seconds: float = 10.0) -> dict[str, Any]:
        end = time.monotonic() + seconds
        while b"\n" not in self.buffer:
            assert self.pump() or b"\n" in self.buffer, "the server closed"
            assert time.monotonic() < end, "nothing came"
        line, _, self.buffer = self.buffer.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    def reply(self) -> dict[str, Any]:
        while True:
            message = self.line()
            if "event" not in message:
                return message
            self.events.append(message)

    def send(self, data: bytes, fds: tuple[int, ...] = ()) -> None:
        self.sock.setblocking(True)
        socket.send_fds(self.sock, [data], list(fds))
        self.sock.setblocking(False)

    def ask(self, command: str, arguments: Any = None, *, fds: tuple[int, ...] = (), **more: Any) -> dict[str, Any]:
        message = {"execute": command} | more
        if arguments is not None:
            message["arguments"] = arguments
        self.send(json.dumps(message).encode() + b"\n", fds)
        return self.reply()

    def get(self, command: str, arguments: Any = None, **more: Any) -> Any:
        message = self.ask(command, arguments, **more)
        assert "return" in message, message
        return message["return"]

    def error(self, command: str, arguments: Any = None, **more: Any) -> tuple[str, str]:
        message = self.ask(command, arguments, **more)
        assert "error" in message, message
        return message["error"]["class"], message["error"]["desc"]


@pytest.fixture
def machine() -> Iterator[FakeMachine]:
    made = FakeMachine()
    yield made
    made.memory.close()
    made.loop.close()


@pytest.fixture
def server(machine: FakeMachine, tmp_path: Path) -> Iterator[MonitorServer]:
    made = MonitorServer(machine)
    made.listen(str(tmp_path / "qmp"))
    yield made
    made.close()


@pytest.fixture
def connect(server: MonitorServer, machine: FakeMachine, tmp_path: Path) -> Iterator[Callable[..., Client]]:
    clients: list[Client] = []

    def make(negotiate: bool = True, enable: tuple[str, ...] = ()) -> Client:
        client = Client(machine.loop, str(tmp_path / "qmp"))
        clients.append(client)
        if negotiate:
            assert "QMP" in client.line()
            assert client.get("qmp_capabilities", {"enable": list(enable)} if enable else None) == {}
        return client

    yield make
    for client in clients:
        client.sock.close()


@pytest.fixture
def client(connect: Callable[..., Client]) -> Client:
    return connect()
