"""One running QEMU: what it has beyond `QmpMachine`, which is screens, keys and its own way to plug a device."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kvik.conf.devices.disk import Disk
from kvik.conf.devices.other import Lease
from kvik.conf.domain import Domain
from kvik.errors import OperationUnsupported
from kvik.host.process import ProcessHandle
from kvik.hypervisor.driver import Bitmap, EventSink
from kvik.hypervisor.machine import QmpMachine
from kvik.hypervisor.qemu import bitmaps, display, hotplug, leases, screenshot, settings, snapshots, state
from kvik.hypervisor.qemu.argv import disks
from kvik.hypervisor.qemu.backup import QemuBackups
from kvik.hypervisor.qemu.block_jobs import JobWatchers
from kvik.hypervisor.qemu.capabilities import QemuCapabilities
from kvik.hypervisor.qemu.disk_jobs import QemuDiskJobs
from kvik.hypervisor.qemu.iothreads import QemuIoThreads
from kvik.hypervisor.qemu.keys import qcodes
from kvik.hypervisor.sidecars.group import Sidecars
from kvik.hypervisor.state import StateSource, StateTarget
from kvik.qmp.protocol import Event

__all__ = ["QemuMachine"]


class QemuMachine(QmpMachine):
    def __init__(
        self,
        domain: Domain,
        directory: Path,
        process: ProcessHandle,
        capabilities: QemuCapabilities,
        sink: EventSink,
        *,
        sidecars: Sidecars | None = None,
    ) -> None:
        super().__init__(
            domain,
            directory,
            process,
            emulator=capabilities.binary,
            version=capabilities.version,
            sink=sink,
            sidecars=sidecars,
        )
        self.capabilities = capabilities
        self.job_watchers = JobWatchers()
        self.stored_bitmaps: dict[str, dict[str, Bitmap]] = {}  # of images that QEMU let go of, by node

    async def query_more(self) -> None:
        self.job_watchers.wake_all()
        await settings.query_graphics(self)

    @property
    def disk_jobs(self) -> QemuDiskJobs:
        return QemuDiskJobs(self)

    @property
    def backups(self) -> QemuBackups:
        return QemuBackups(self)

    @property
    def iothreads(self) -> QemuIoThreads:
        return QemuIoThreads(self)

    def heard(self, event: Event) -> None:
        self.job_watchers.heard(event)

    def top_node(self, disk: Disk) -> str:
        return disks.top_node(disk)

    async def disk_errors(self) -> Mapping[str, int]:
        """QEMU never takes back what it once noted of a disk: that counts only while the machine stands for it."""
        return await super().disk_errors() if await self.state() == "io-error" else {}

    # -- its state

    async def save_state(self, target: StateTarget) -> None:
        self.stored_bitmaps = await bitmaps.by_node(self)  # QEMU writes them into the images, and forgets them
        await state.save(self, target)

    async def resume(self) -> None:
        await super().resume()
        self.stored_bitmaps = {}

    async def load_state(self, source: StateSource) -> None:
        await state.load(self, source)

    # -- devices

    async def attach_device(self, device: Any, files: Mapping[str, int]) -> None:
        if isinstance(device, Lease):
            (fd,) = files.values()
            await leases.hold(self, device, fd)
            return
        await hotplug.attach(self, device, files)

    async def detach_device(self, device: Any) -> None:
        if isinstance(device, Lease):
            await leases.let_go(self, device)
            return
        if isinstance(device, Disk) and device.target.bus not in hotplug.PLUGGABLE_BUSES:
            raise OperationUnsupported(
                f"disks on bus {device.target.bus} cannot be unplugged from a running machine",
                remedy="--config: it is gone from the next start on",
            )
        await super().detach_device(device)

    async def clear_remains(self, device: Any) -> None:
        await hotplug.finish_detach(self, device)

    async def update_device(self, old: Any, new: Any) -> None:
        await hotplug.update(self, old, new)

    async def set_limits(self, disk: Disk) -> None:
        await settings.set_limits(self, disk)

    # -- snapshots

    async def next_image(self) -> int:
        return await hotplug.fresh_index(self)

    async def put_on_top(
        self,
        new: Sequence[Disk],
        old: Mapping[str, Disk],
        secrets: Mapping[str, int],
        within: Callable[[], Awaitable[None]] | None = None,
    ) -> int:
        return await snapshots.put_on_top(self, new, old, secrets)

    async def has_on_top(self, new: Sequence[Disk]) -> bool:
        return await snapshots.stands(self, new)

    async def clear_image(self, new: Sequence[Disk]) -> None:
        await snapshots.clear_snapshot(self, new)

    async def save_inside(self, tag: str, disks: Sequence[Disk]) -> None:
        await snapshots.inside(self, "snapshot-save", tag, disks)

    async def load_inside(self, tag: str, disks: Sequence[Disk]) -> None:
        await snapshots.inside(self, "snapshot-load", tag, disks)

    async def delete_inside(self, tag: str, disks: Sequence[Disk]) -> None:
        await snapshots.inside(self, "snapshot-delete", tag, disks)

    # -- interaction

    async def screenshot(self, screen: int) -> tuple[str, bytes]:
        return await screenshot.screenshot(self, screen)

    async def send_key(self, keycodes: Sequence[int], hold_ms: int) -> None:
        arguments: dict[str, Any] = {"keys": qcodes(keycodes)}
        if hold_ms > 0:
            arguments["hold-time"] = hold_ms
        await self.execute("send-key", arguments)

    async def open_graphics(self, index: int, skip_auth: bool) -> int:
        return await display.open_graphics(self, index, skip_auth)
