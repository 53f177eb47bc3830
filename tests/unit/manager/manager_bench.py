"""A manager on the in-memory driver, in a directory of its own, with all events written down."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

from kvik.hypervisor.test.driver import TestDriver
from kvik.manager.events import DomainEvent
from kvik.manager.manager import Manager
from kvik.paths import Paths

AGENT = "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>"
UUIDS = {name: f"00000000-0000-4000-8000-{number:012d}" for number, name in enumerate("abcdefgh", 1)}


def document(
    name: str = "a", *, uuid: str | None = "", extra: str = "", devices: str = "", memory: int = 262144, vcpus: int = 2
) -> str:
    """A small machine with a serial line and the agent's channel. `uuid` None: none in the document."""
    known = UUIDS.get(name) if uuid == "" else uuid
    element = f"<uuid>{known}</uuid>" if known else ""
    return (
        f"<domain type='test'><name>{name}</name>{element}<memory unit='KiB'>{memory}</memory>"
        f"<vcpu>{vcpus}</vcpu><os><type arch='x86_64' machine='q35'>hvm</type></os>{extra}"
        f"<devices><serial type='pty'/>{AGENT}{devices}</devices></domain>"
    )


class Bench:
    """One state directory and driver; managers on it come and go."""

    def __init__(self, root: Path) -> None:
        self.paths = Paths.system(root)
        self.driver = TestDriver()
        self.events: list[DomainEvent] = []
        self.managers: list[Manager] = []

    @property
    def manager(self) -> Manager:
        return self.managers[-1]

    async def open(self) -> Manager:
        manager = Manager(self.paths, {"test": self.driver})
        self.managers.append(manager)
        manager.events.subscribe(self.events.append)
        await manager.open()
        assert manager.autostarting
        await manager.autostarting
        return manager

    async def kill(self) -> None:
        """The daemon is gone at once: no task of its goes on, nothing more is written."""
        manager = self.managers[-1]
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        own = {task for task in tasks if task in manager._tasks}
        for task in own:
            task.cancel()
        await asyncio.gather(*own, return_exceptions=True)
        manager.store.close()
        self.driver.abandon()

    async def reopen(self) -> Manager:
        await self.kill()
        return await self.open()

    def lifecycle(self) -> list[tuple[int, int]]:
        return [(event.fields["event"], event.fields["detail"]) for event in self.events if event.kind == "lifecycle"]

    def kinds(self) -> list[str]:
        return [event.kind for event in self.events if event.kind != "stage"]


async def until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not happen in time"
        await asyncio.sleep(0.002)
