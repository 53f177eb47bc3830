"""One running kvik-vmm: `QmpMachine` with its own way to plug a device. It has no screen and no keyboard."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from kvik.conf.devices.disk import Disk, IoTune
from kvik.conf.domain import Domain
from kvik.errors import HypervisorError, KvikError, OperationUnsupported
from kvik.host.process import ProcessHandle
from kvik.hypervisor import stats
from kvik.hypervisor.driver import EventKind, EventSink, MachineEvent
from kvik.hypervisor.kvik import changes, hotplug, snapshots, state
from kvik.hypervisor.kvik.back_ends import KINDS, BackEnds
from kvik.hypervisor.kvik.background import BackgroundSave
from kvik.hypervisor.kvik.backup import KvikBackups
from kvik.hypervisor.kvik.disk_jobs import KvikDiskJobs
from kvik.hypervisor.layers import next_index
from kvik.hypervisor.machine import SLOW_DEADLINE, QmpMachine
from kvik.hypervisor.names import alias_of
from kvik.hypervisor.sidecars import kvik_blk, storage_daemon
from kvik.hypervisor.sidecars.group import Sidecar, Sidecars
from kvik.hypervisor.state import StateSource, StateTarget
from kvik.qmp.aio import QmpConnection
from kvik.qmp.protocol import Event

__all__ = ["KvikMachine"]


_STORAGE_DEADLINE = 2.0
_SERVED_AGAIN = 5.0  # seconds


def _counted(number: int) -> tuple[str, ...]:
    """Figures of requests, which go past this VMM, and which the daemon does not count."""
    return tuple(f"block.{number}.{kind}." for kind in ("rd", "wr", "fl"))


def first_of(reply: Any, key: str) -> dict[str, Any]:
    """That member of a reply's first item, if it is what it should be."""
    item = reply[0] if isinstance(reply, list) and reply else None
    found = item.get(key) if isinstance(item, dict) else None
    return found if isinstance(found, dict) else {}


def own_aliases(domain: Domain) -> set[str]:
    """The disks that a VMM which starts with this document reads and writes itself."""
    return {alias_of(disk) for disk in domain.devices.disks if not storage_daemon.by_vhost_user(disk)}


class KvikMachine(QmpMachine):
    """`log` is the machine's log file: the side processes of devices that come later write there as well. `attached`:
    it ran already when this daemon began."""

    product = "kvik-vmm"

    def __init__(
        self,
        domain: Domain,
        directory: Path,
        process: ProcessHandle,
        *,
        emulator: str,
        version: int,
        sink: EventSink,
        sidecars: Sidecars,
        log: Path,
        attached: bool = False,
        own_disks: Iterable[str] | None = None,
    ) -> None:
        """`own_disks`: those of `handle`; None: what the document says, for a machine that was just started."""
        super().__init__(domain, directory, process, emulator=emulator, version=version, sink=sink, sidecars=sidecars)
        self.log = log
        self._attached = attached
        self._storages: dict[str, QmpConnection] = {}  # by alias: of those that tell events
        self.incoming: socket.socket | None = None  # our end of the connection that fills it
        self.back_ends = BackEnds(self)
        # By alias: disks that the VMM reads and writes itself, whatever image is on top of them by now.
        self.own_disks = set(own_aliases(domain) if own_disks is None else own_disks)
        self.overlays_in_doubt = False  # whether some of its disks may have new images on top and others not

    async def save_state(self, target: StateTarget) -> None:
        await state.save(self, target)

    async def save_live(self, target: StateTarget) -> BackgroundSave:
        save = BackgroundSave(self, target)
        try:
            await save.begin()
        except BaseException:
            await asyncio.shield(save.close())
            raise
        return save

    async def load_state(self, source: StateSource) -> None:
        await state.load(self, source)

    def top_node(self, disk: Disk) -> str:
        return hotplug.node_name(alias_of(disk))

    async def resume(self) -> None:
        await snapshots.settle(self)
        await super().resume()

    async def go_on(self) -> None:
        """`resume` where nothing is in doubt."""
        await super().resume()

    @property
    def backups(self) -> KvikBackups:
        return KvikBackups(self)

    @property
    def disk_jobs(self) -> KvikDiskJobs:
        return KvikDiskJobs(self)

    # -- snapshots

    async def next_image(self) -> int:
        return next_index(self.domain.devices.disks)

    def check_on_top(self, disks: Sequence[Disk]) -> None:
        snapshots.check(self, disks)

    async def put_on_top(
        self,
        new: Sequence[Disk],
        old: Mapping[str, Disk],
        secrets: Mapping[str, int],
        within: Callable[[], Awaitable[None]] | None = None,
    ) -> int:
        async with self.back_ends.changing:
            return await snapshots.put_on_top(self, new, old, within)

    async def has_on_top(self, new: Sequence[Disk]) -> bool:
        end = time.monotonic() + _SERVED_AGAIN
        while True:
            await self.back_ends.idle(end)
            try:
                return await snapshots.stands(self, new)
            except HypervisorError:  # one that died has not come again yet
                if time.monotonic() > end:
                    raise
            await asyncio.sleep(0.1)

    async def clear_image(self, new: Sequence[Disk]) -> None:
        await snapshots.clear(self, new)

    # -- disks that another process serves

    def served(self, disk: Disk) -> bool:
        """Whether a daemon of ours has its image: as when it started, whatever the format is by now."""
        return disk.type in ("file", "block") and alias_of(disk) not in self.own_disks

    def by_vhost_user(self, disk: Disk) -> bool:
        return self.served(disk) or disk.type == "vhostuser"

    def handle(self) -> dict[str, Any]:
        return {**super().handle(), "own_disks": sorted(self.own_disks)}

    def storage_kind(self, disk: Disk) -> str:
        """The program that serves it: the one that runs, whatever a newer manager would choose."""
        members: Iterator[Sidecar] = iter(self.sidecars)
        running = (member.kind for member in members if member.alias == alias_of(disk))
        return next(running, None) or storage_daemon.kind_of(disk)

    async def ask_storage(
        self,
        disk: Disk,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        deadline: float = _STORAGE_DEADLINE,
    ) -> Any:
        """A command for the process that serves `disk`, on its own monitor. Raises `HypervisorError`."""
        path = storage_daemon.monitor_path(self.directory, alias_of(disk))
        label = f"{self.storage_kind(disk)} of {alias_of(disk)}"
        connection = await storage_daemon.connect(path, label, _STORAGE_DEADLINE)
        try:
            return await connection.execute(command, arguments, deadline=deadline)
        finally:
            connection.close()

    async def resize_disk(self, disk: Disk, size: int) -> None:
        """The process that has the image makes it bigger; the VMM then asks it again, and tells the guest."""
        if self.by_vhost_user(disk):
            if disk.type == "vhostuser" or self.storage_kind(disk) != kvik_blk.KIND:
                raise OperationUnsupported(
                    f"what serves disk {disk.target.dev} of machine {self.name} tells no new size while it runs",
                    remedy="shut the machine down and resize its image: kvik img resize",
                )
            arguments = {"device": alias_of(disk), "size": size}
            await self.ask_storage(disk, "block_resize", arguments, deadline=SLOW_DEADLINE)
        await super().resize_disk(disk, size)

    def watch_sidecars(self, lost: Sequence[str] = ()) -> None:
        super().watch_sidecars(lost)
        for member in self.sidecars:
            self._listen(member)
        if self._attached:
            self.background(self.back_ends.take_up())

    def watch_sidecar(self, member: Sidecar) -> None:
        super().watch_sidecar(member)
        self._listen(member)

    @property
    def watched(self) -> bool:
        """Whether it runs, and is this daemon's to look after."""
        return not self.ended and not self._quitting

    def heard(self, event: Event) -> None:
        """Also one that runs may be lost to the VMM: it did not answer in time."""
        alias = event.data.get("device")
        if event.name == "VHOST_USER_DISCONNECTED" and event.data.get("waiting") is True and isinstance(alias, str):
            self.background(self.back_ends.revive(alias, str(event.data.get("reason") or "it was lost")))

    def _sidecar_died(self, member: Sidecar, how: str) -> None:
        super()._sidecar_died(member, how)
        if member.kind in KINDS and not self._quitting:
            self.background(self.back_ends.revive(member.alias, how))

    def note(self, text: str) -> None:
        """Into the machine's log."""
        self._emit(MachineEvent(EventKind.SIDECAR_ENDED, text, {}, time.time()))

    def tell_served(self, member: Sidecar) -> None:
        self._emit(MachineEvent(EventKind.SIDECAR_STARTED, f"{member.label} was started again", {}, time.time()))

    def background(self, work: Coroutine[Any, Any, None]) -> None:
        """Beside everything else, as long as this machine is watched."""
        self._background(work)

    def _listen(self, member: Sidecar) -> None:
        if member.kind == kvik_blk.KIND:
            self._background(self._hear(member))

    async def _hear(self, member: Sidecar) -> None:
        """Errors of an image are told by the process that has it."""
        path = storage_daemon.monitor_path(self.directory, member.alias)
        connection = await storage_daemon.connect(path, member.label, _STORAGE_DEADLINE, self._on_event)
        old = self._storages.pop(member.alias, None)
        if old is not None:
            old.close()
        self._storages[member.alias] = connection

    def _close_output(self) -> None:
        super()._close_output()
        for connection in self._storages.values():
            connection.close()
        self._storages.clear()

    async def stats(self, groups: frozenset[str]) -> dict[str, int | str]:
        figures = await super().stats(groups)
        if not groups or "block" in groups:
            for number, disk in enumerate(self.domain.devices.disks):
                if self.by_vhost_user(disk):  # this VMM sees no requests
                    figures = {key: figures[key] for key in figures if not key.startswith(_counted(number))}
                if self.served(disk):
                    blk = self.storage_kind(disk) == kvik_blk.KIND
                    with contextlib.suppress(KvikError):  # it has ended: the machine goes on without its figures
                        figures |= await (self._blk_figures if blk else self._storage_figures)(disk, f"block.{number}")
        return figures

    async def _storage_figures(self, disk: Disk, prefix: str) -> dict[str, int]:
        """Sizes in bytes: what the guest sees, what the image takes on the host, and where its last written byte is."""
        nodes = await self.ask_storage(disk, "query-named-block-nodes", {"flat": True})
        found: dict[str, int] = {}
        for item in nodes if isinstance(nodes, list) else []:
            image = item.get("image") if isinstance(item, dict) else None
            if item.get("node-name") == storage_daemon.top_node(disk) and isinstance(image, dict):
                for name, key in (("capacity", "virtual-size"), ("physical", "actual-size")):
                    if isinstance(image.get(key), int):
                        found[f"{prefix}.{name}"] = image[key]
        counted = await self.ask_storage(disk, "query-blockstats", {"query-nodes": True})
        for item in counted if isinstance(counted, list) else []:
            stats = item.get("stats") if isinstance(item, dict) else None
            highest = stats.get("wr_highest_offset") if isinstance(stats, dict) else None
            if isinstance(highest, int) and item.get("node-name") == storage_daemon.bottom_node(disk):
                found[f"{prefix}.allocation"] = highest
        return found

    async def _blk_figures(self, disk: Disk, prefix: str) -> dict[str, int]:
        """Counters and sizes, by kvik-blk, which has this one disk."""
        nodes = await self.ask_storage(disk, "query-named-block-nodes")
        counted = await self.ask_storage(disk, "query-blockstats")
        return stats.disk_figures(prefix, {"stats": first_of(counted, "stats")}, first_of(nodes, "image"))

    async def attach_device(self, device: Any, files: Mapping[str, int]) -> None:
        await hotplug.attach(self, device, files)

    async def clear_remains(self, device: Any) -> None:
        await hotplug.finish_detach(self, device)

    async def update_device(self, old: Any, new: Any) -> None:
        await changes.update(self, old, new)

    async def set_limits(self, disk: Disk) -> None:
        await changes.throttle(self, disk, disk.iotune or IoTune())

    # -- what it has not

    async def screenshot(self, screen: int) -> tuple[str, bytes]:
        self._no_screen()

    async def send_key(self, keycodes: Sequence[int], hold_ms: int) -> None:
        self._no_screen()

    async def open_graphics(self, index: int, skip_auth: bool) -> int:
        self._no_screen()

    def _no_screen(self) -> NoReturn:
        raise OperationUnsupported(
            f"machine {self.name} runs on kvik-vmm, which has neither screen nor keyboard",
            remedy=f"kvik console {self.name}",
        )
