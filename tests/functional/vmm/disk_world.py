"""A manager with one kvik-vmm, whose disks kvik-blks and qemu-storage-daemons serve, and a guest of a few hundred bytes
that writes to them when it is told to. The fixture `world` is in conftest.py."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from blk_guest import BlkDriver, say_memory, wait_key
from tiny_kernel import IDLE, elf, say

from kvik.conf.devices.disk import Disk
from kvik.conf.enums import DomainSnapshotCreateFlags as Create
from kvik.hypervisor.driver import HostVerdict
from kvik.hypervisor.kvik.driver import KvikDriver
from kvik.hypervisor.test.driver import TestDriver
from kvik.image.opening import Opener
from kvik.manager.domain import DomainObject
from kvik.manager.manager import Manager
from kvik.manager.snapshots import create
from kvik.manager.store import Store
from kvik.paths import Paths
from kvik.qmp.aio import QmpConnection

DOMAIN = """<domain type='kvm'><name>m</name><uuid>{uuid}</uuid><memory unit='MiB'>32</memory>
<os><type machine='kvik'>hvm</type><kernel>{root}/kernel</kernel></os>
<devices><emulator>kvik-vmm</emulator>{disks}
<serial type='unix'><source mode='bind' path='{root}/line'/></serial>
<memballoon model='none'/></devices></domain>"""
DISK = """<disk type='file'><driver name='{name}' type='{format}'{options}/><source file='{path}'/>
<target dev='{dev}' bus='virtio'/>{more}<address type='pci' domain='0' bus='0' slot='{slot}' function='0'/></disk>"""
UUID = "0e896d9e-a81e-4e2f-b06d-4a1c33d88bc7"
SECONDS = 30.0
AGAIN = "was started again"  # the log of a machine whose kvik-blk died
WORDS = (b"one", b"two", b"three", b"four")

# Images and the documents that name them


def disk(path: Path | str, format: str = "qcow2", slot: int = 5, dev: str = "vda", **more: str) -> str:
    return DISK.format(path=path, format=format, slot=slot, dev=dev,
                       **{"name": "qemu", "options": "", "more": "", **more})  # fmt: skip


def image(path: Path, format: str = "qcow2", *options: str, first: bytes = b"") -> Path:
    subprocess.run(["qemu-img", "create", "-q", "-f", format, *options, str(path), "8M"], check=True)
    if first:
        raw = path.with_suffix(".pattern")
        raw.write_bytes(first.ljust(512, b"\0"))
        subprocess.run(["qemu-io", "-f", format, "-c", f"write -q -s {raw} 0 512", str(path)], check=True)
    return path


def raw(path: Path) -> Path:
    path.write_bytes(bytes(8 << 20))
    return path


def content(path: Path, format: str = "qcow2") -> bytes:
    raw = path.with_suffix(".content")
    subprocess.run(["qemu-img", "convert", "-f", format, "-O", "raw", str(path), str(raw)], check=True)
    return raw.read_bytes()


def checked(path: Path) -> None:
    subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", str(path)], check=True)


def word(path: Path | str) -> bytes:
    """What an image shows in sector 16, beside whoever has it open."""
    kind = "raw" if str(path).endswith(".raw") else "qcow2"
    with Opener(share=True, lock=False).open(str(path), kind) as opened:
        return opened.read(16 * 512, 512).rstrip(b"\0")


# The machine


async def soon(condition: Any) -> None:
    async with asyncio.timeout(SECONDS):
        while not condition():
            await asyncio.sleep(0.01)


class World:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.managers: list[Manager] = []
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.line: socket.socket | None = None
        self.text = b""

    async def manager(self) -> Manager:
        paths = Paths.system(self.root / "state")
        ours = KvikDriver(paths, lambda: HostVerdict(True, "told so"))
        manager = Manager(paths, {"qemu": TestDriver(), "kvik-vmm": ours})
        self.managers.append(manager)
        await manager.open()
        manager.events.subscribe(lambda event: self.events.append((event.kind, dict(event.fields))))
        return manager

    async def start(self, code: bytes, disks: str = "") -> DomainObject:
        (self.root / "kernel").write_bytes(elf(code))
        manager = self.managers[-1] if self.managers else await self.manager()
        domain = await manager.define(DOMAIN.format(root=self.root, uuid=UUID, disks=disks))
        await domain.start()
        self.connect()
        return domain

    async def next_manager(self) -> DomainObject:
        """Close the manager; the machine as the next one finds it."""
        await self.managers[-1].close()
        return (await self.manager()).lookup_name("m")

    async def bury(self, domain: DomainObject) -> None:
        """Of a manager that died nothing goes on; nothing is closed but its files."""
        tasks = list(domain.manager._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        domain.require_machine().detach()
        await asyncio.sleep(0)
        domain.manager.store.close()
        self.managers.pop()

    async def after_death(self) -> DomainObject:
        """The machine as the next one finds it."""
        domain = (await self.manager()).lookup_name("m")
        await idle(domain)
        return domain

    def connect(self) -> None:
        """To the serial line of the machine's newest run."""
        if self.line is not None:
            self.line.close()
        self.line = socket.socket(socket.AF_UNIX)
        self.line.connect(str(self.root / "line"))
        self.line.setblocking(False)

    def key(self) -> None:
        assert self.line is not None
        self.line.send(b"x")

    async def said(self, words: bytes) -> None:
        assert self.line is not None
        async with asyncio.timeout(SECONDS):
            while words not in self.text:
                try:
                    self.text += self.line.recv(4096)
                except BlockingIOError:
                    await asyncio.sleep(0.01)

    def log(self) -> str:
        return (self.root / "state/var/log/kvik/qemu/m.log").read_text()

    async def close(self) -> None:
        last = self.managers[-1] if self.managers else None
        for domain in last.domains() if last is not None else ():
            if domain.is_active:
                await domain.destroy()
        if last is not None:
            await last.close()
        if self.line is not None:
            self.line.close()


def live_disk(domain: DomainObject) -> Disk:
    """The machine's first."""
    assert domain.run is not None
    return domain.run.live.devices.disks[0]


def tops(domain: DomainObject) -> list[str]:
    documents = [domain.config.parse(), *([domain.run.live] if domain.run is not None else [])]
    found = [
        [Path(disk_.source.location or "").name for disk_ in one.devices.disks if disk_.source] for one in documents
    ]
    assert found[0] == found[-1]
    return found[0]


async def take(domain: DomainObject, name: str, flags: int = Create.DISK_ONLY) -> int:
    """Microseconds that the guest stood still."""
    await create.create(domain, f"<domainsnapshot><name>{name}</name></domainsnapshot>", flags)
    taken = domain.snapshots.snapshots[name].taken
    assert taken is not None and taken.pause is not None
    return taken.pause


async def idle(domain: DomainObject) -> None:
    async with domain.jobs.hold("see the end of", wait=20):
        pass


# Its disks' processes


def daemons(domain: DomainObject) -> list[tuple[int, int]]:
    assert domain.run is not None and domain.run.machine is not None
    return [(item["pid"], item["start_time"]) for item in domain.run.machine.handle()["sidecars"]]


async def until_again(world: World, before: int) -> None:
    await soon(lambda: world.log().count(AGAIN) > before)


async def kill(world: World, domain: DomainObject, number: int = 0) -> None:
    """The process that serves a disk; until there is another."""
    known, before = daemons(domain), world.log().count(AGAIN)
    os.kill(known[number][0], signal.SIGKILL)
    await until_again(world, before)
    assert len(daemons(domain)) == len(known) and known[number] not in daemons(domain)


# The guest


def writes(*drivers: BlkDriver, words: tuple[bytes, ...] = WORDS) -> bytes:
    """At the first key starts the disks; at each other one writes the next word to sector 16 of each, and says what is
    read there, and a dot."""
    code = wait_key() + b"".join(driver.start() for driver in drivers) + say(b"up.")
    for word in words:
        code += wait_key()
        for driver in drivers:
            code += driver.write(16, word) + driver.read(16) + say_memory(driver.data, len(word))
        code += say(b".")
    return code + IDLE


async def told(world: World, *words: bytes) -> None:
    world.text = b""
    world.key()
    await world.said(b"".join(words) + b".")


def two(world: World, words: tuple[bytes, ...] = WORDS) -> tuple[list[Path], bytes, str]:
    """Two images, a guest that writes to both, and their disks' documents."""
    paths = [image(world.root / "a.qcow2"), image(world.root / "b.qcow2")]
    drivers = BlkDriver(5), BlkDriver(6)
    return (
        paths,
        writes(*drivers, words=words),
        disk(paths[0]) + disk(paths[1], slot=6, dev="vdb", options=" cache='none'"),
    )


# The end of a manager


class Killed(BaseException):
    """The daemon died here."""


class Death:
    """After so many commands to the VMM and its disks' processes: none is sent, and nothing is written, ever again.
    What only asks does not count: how often that is done depends on how busy the host is."""

    def __init__(self, commands: int) -> None:
        self.left, self.came = commands, False

    def commands(self, original: Callable[..., Any]) -> Callable[..., Any]:
        async def execute(connection: QmpConnection, command: str, *given: Any, **more: Any) -> Any:
            told = command.startswith("x-kvik") and not command.startswith("x-kvik-query")
            counted = told or command in ("stop", "cont", "getfd")
            self.came = self.came or (counted and self.left <= 0)
            if self.came:
                raise Killed
            self.left -= counted
            return await original(connection, command, *given, **more)

        return execute

    def files(self, original: Callable[..., Any]) -> Callable[..., Any]:
        async def run(store: Store, *given: Any, **more: Any) -> Any:
            if self.came:
                raise Killed
            return await original(store, *given, **more)

        return run
