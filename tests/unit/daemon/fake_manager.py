"""A manager whose machines do what a test says: for what the daemon must survive, not for what machines do."""

from __future__ import annotations

import asyncio
import os
import socket
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from fake_networks import FakeNetworks

from kvik.errors import NoDomain, OperationInvalid
from kvik.manager.events import DomainRef, EventHub
from kvik.manager.secrets import Secrets
from kvik.manager.storage import Pools
from kvik.manager.store import Store
from kvik.paths import Paths


class FakeDomain:
    def __init__(self, name: str) -> None:
        self.name = name
        self.uuid = uuid.uuid4().bytes
        self.uuid_text = str(uuid.UUID(bytes=self.uuid))
        self.id = -1
        self.encoded: tuple[str, int, bytes] | None = None
        self.state = 5
        self.reason = 0
        self.persistent = True
        self.autostart = False
        self.updated = False
        self.has_managed_save = False
        self.accelerator = ""
        self.os_type = "hvm"
        self.max_vcpus = 1
        self.ready = False
        self.address = ""
        self.reason_text = ""
        self.stages: list[Any] = []
        self.console: socket.socket | None = None  # the guest's end of the last one opened
        self.consoles: list[socket.socket] = []
        self.started = 0
        self.live: Any = None
        self.on_start: Callable[[], Awaitable[None]] | None = None
        self.files: dict[str, int] = {}

    def info(self) -> tuple[int, int, int, int, int]:
        return (self.state, 1024, 1024, 1, 0)

    def xml(self, flags: int = 0) -> str:
        return f"<domain><name>{self.name}</name></domain>"

    async def start(self, **options: Any) -> None:
        self.started += 1
        if options.get("files"):
            self.files = {name: os.fstat(fd).st_ino for name, fd in options["files"].items()}
        if self.on_start is not None:
            await self.on_start()
        self.id, self.state = 1, 1

    async def destroy(self, graceful: bool = False) -> None:
        if self.id < 0:
            raise OperationInvalid(f"machine '{self.name}' is not running")
        self.id, self.state = -1, 5

    def open_console(self, device: str | None = None) -> int:
        ours, self.console = socket.socketpair()
        ours.setblocking(False)
        self.console.setblocking(False)
        self.consoles.append(self.console)
        return ours.detach()

    async def screenshot(self, screen: int = 0) -> tuple[str, bytes]:
        return ("image/png", bytes(range(256)) * 4096)


class FakeManager:
    def __init__(self, count: int = 1, root: Path = Path("/nonexistent")) -> None:
        """`root`: where storage pools are kept, which are real ones: they need nothing but a directory."""
        self.events = EventHub()
        self.networks = FakeNetworks()
        self.pools = Pools(Paths.system(root))
        self.store = Store(Paths.system(root))
        self.secrets = Secrets(Paths.system(root), self.store)
        self.all = [FakeDomain(f"m{number}") for number in range(count)]
        self.drivers: dict[str, Any] = {}
        self.is_open = False
        self.gone: list[object] = []
        self.define_delay = 0.0
        self.failure: BaseException | None = None

    async def open(self) -> None:
        self.is_open = True

    async def close(self) -> None:
        self.is_open = False
        self.store.close()

    async def client_gone(self, client: object) -> None:
        self.gone.append(client)

    needed_by = ""  # the machine that keeps an idle daemon alive

    def domains(self) -> list[FakeDomain]:
        return list(self.all)

    def _find(self, what: object, test: Callable[[FakeDomain], bool]) -> FakeDomain:
        if self.failure is not None:
            raise self.failure
        for domain in self.all:
            if test(domain):
                return domain
        raise NoDomain(f"no machine {what!r}")

    def lookup_name(self, name: str) -> FakeDomain:
        return self._find(name, lambda domain: domain.name == name)

    def lookup_uuid(self, value: bytes) -> FakeDomain:
        return self._find(value.hex(), lambda domain: domain.uuid == value)

    def lookup_id(self, number: int) -> FakeDomain:
        return self._find(number, lambda domain: domain.id == number)

    async def define(self, xml: str, *, validate: bool = False) -> FakeDomain:
        await asyncio.sleep(self.define_delay)
        if self.failure is not None:
            raise self.failure
        domain = FakeDomain(xml)
        self.all.append(domain)
        self.emit(domain, "lifecycle", event=0, detail=0)
        return domain

    def emit(self, domain: FakeDomain, kind: str, **fields: Any) -> None:
        self.events.emit(DomainRef(domain.name, domain.uuid, domain.id), kind, **fields)
