"""A driver on a directory of its own, real QEMU, and machines that never outlive their test."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from kvik.conf.domain import Domain, parse_domain
from kvik.conf.machine import MachineDefaults
from kvik.conf.postparse import postparse
from kvik.host.process import find_program
from kvik.hypervisor.driver import HostVerdict, MachineEvent, StartRequest
from kvik.hypervisor.qemu.driver import QemuDriver
from kvik.hypervisor.qemu.machine import QemuMachine
from kvik.paths import Paths

needs_qemu = pytest.mark.skipif(
    find_program("qemu-system-x86_64") is None, reason="needs qemu-system-x86_64 (apt install qemu-system-x86)"
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.functional)
            item.add_marker(needs_qemu)


@pytest.fixture
def place() -> Iterator[Path]:
    """A short path: sockets live below it."""
    directory = Path(tempfile.mkdtemp(prefix="kq"))
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def driver(place: Path) -> QemuDriver:
    return QemuDriver(Paths.system(place / "root"), lambda: HostVerdict(False, "the tests use software emulation"))


class Lab:
    """Starts machines and remembers what they said."""

    def __init__(self, driver: QemuDriver, place: Path) -> None:
        self.driver = driver
        self.place = place
        self.events: list[MachineEvent] = []
        self.machines: list[QemuMachine] = []

    async def complete(self, xml: str) -> Domain:
        domain = parse_domain(xml)
        await self.driver.complete(domain)
        postparse(domain, MachineDefaults())
        return domain

    @property
    def directory(self) -> Path:
        return self.place / "run"

    @property
    def log(self) -> str:
        return (self.place / "log").read_text()

    def kinds(self) -> list[str]:
        return [event.kind.value for event in self.events if event.kind.value != "monitor"]

    async def start(self, xml: str, *, paused: bool = False) -> QemuMachine:
        domain = await self.complete(xml)
        self.directory.mkdir(mode=0o700, exist_ok=True)
        log = os.open(self.place / "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            request = StartRequest(domain, self.directory, log, paused=paused, sink=self.events.append)
            machine = await self.driver.start(request)
        finally:
            os.close(log)
        self.machines.append(machine)
        return machine


@pytest.fixture
async def lab(driver: QemuDriver, place: Path) -> AsyncIterator[Lab]:
    lab = Lab(driver, place)
    yield lab
    for machine in lab.machines:
        if machine.process.alive:
            machine.process.kill()


Start = Callable[[str], Awaitable[QemuMachine]]
