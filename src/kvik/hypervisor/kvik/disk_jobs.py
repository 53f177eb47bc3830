"""Block jobs on a running machine's disks, each of which a kvik-blk serves or, those that began as raw ones, the VMM
itself (`vmm/blk/block_jobs.py`).

What a killed kvik-blk was about is lost with it, and the one that takes its place serves the images of the document:
until a job's last step the guest reads the same from those.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping
from contextlib import ExitStack
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from kvik.conf.devices.disk import BackingStore, Disk, Mirror
from kvik.errors import ConfigUnsupported, HypervisorError, MonitorError, OperationUnsupported
from kvik.host.reach import open_file, reach
from kvik.hypervisor.copies import number_copy
from kvik.hypervisor.descriptors import Opened, open_disk
from kvik.hypervisor.driver import JobState
from kvik.hypervisor.kvik import blk_monitor, support
from kvik.hypervisor.kvik.blk_monitor import number
from kvik.hypervisor.layers import as_disk, layers, next_index
from kvik.hypervisor.names import alias_of, image_name
from kvik.hypervisor.sidecars import kvik_blk, storage_daemon

if TYPE_CHECKING:
    from kvik.hypervisor.kvik.machine import KvikMachine

__all__ = ["KvikDiskJobs"]

_LACKS = "block jobs"
_MOST_HELD = 1 << 30  # bytes that wait to be written to a copy


class KvikDiskJobs:
    """Block jobs on the disks of one kvik-vmm. Images are named by their numbers in the live document."""

    def __init__(self, machine: KvikMachine) -> None:
        self._machine = machine

    def merges(self, disk: Disk, *, active: bool) -> bool:
        return self._is_ours(disk) and all(layer.format == "qcow2" for layer in layers(disk) if not layer.number)

    def _is_ours(self, disk: Disk) -> bool:
        machine = self._machine
        return alias_of(disk) in machine.own_disks or machine.storage_kind(disk) == kvik_blk.KIND

    def _check(self, disk: Disk) -> None:
        machine, target = self._machine, disk.target.dev
        if not self._is_ours(disk):
            raise OperationUnsupported(
                f"disk {target} of machine {machine.name} is served by {machine.storage_kind(disk)}, whose images "
                "cannot be merged or copied while the machine runs",
                remedy=f"shut the machine down: kvik shutdown {machine.name}; then kvik img rebase, or kvik img commit",
            )

    async def _ask(self, disk: Disk, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
        return await blk_monitor.ask(self._machine, disk, command, arguments, lacks=_LACKS)

    # -- starting

    async def pull(self, job: str, disk: Disk, base: int | None, backing: str | None, *, speed: int = 0) -> None:
        """As `QemuDiskJobs.pull`."""
        arguments: dict[str, Any] = {"job": job, "speed": speed}
        if base is not None:
            arguments |= {"base": next(item.number for item in layers(disk) if item.key == base)}
            arguments |= {"backing-file": backing}
        self._check(disk)
        await self._ask(disk, "x-kvik-pull", arguments)

    async def number(self, disk: Disk, mirror: Mirror, *, fresh: bool) -> None:
        """See `copies.number_copy`. Raises `OperationUnsupported` for what cannot be copied, or not there."""
        machine = self._machine
        self._check(disk)
        _check_copy(machine, disk, mirror)
        index = next_index(machine.domain.devices.disks)
        await number_copy(disk, mirror, index, fresh=fresh, bases=machine.bases())
        _check_copy(machine, disk, mirror)  # with what lies below it

    async def copy(
        self,
        job: str,
        disk: Disk,
        mirror: Mirror,
        *,
        shallow: bool = False,
        fresh: bool = False,
        speed: int = 0,
        granularity: int = 0,
        buffer: int = 0,
        synchronous: bool = False,
        secrets: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        """As `QemuDiskJobs.copy`."""
        if synchronous:
            raise OperationUnsupported(
                f"kvik-vmm copies what the guest writes to disk {disk.target.dev} a moment later, not with it",
                remedy="leave --synchronous-writes out: a guest that changes over has all of it",
            )
        self._check(disk)
        target = as_disk(disk, mirror)
        if fresh:
            target.backing_store = BackingStore()
        assert target.source is not None and target.source.index is not None
        alias, path = alias_of(disk), target.source.location or ""
        arguments: dict[str, Any] = {
            "job": job,
            "node-name": f"{alias}-{target.source.index}-format",
            "shallow": shallow,
            "shared": shallow and fresh,
            "blank": fresh and mirror.type == "file",
            "speed": speed,
            "granularity": granularity,
            "buf-size": min(buffer, _MOST_HELD),
        }
        with ExitStack() as close, ExitStack() as undo:
            opened = Opened(close, undo, {}, self._machine.bases())
            opened.next_index = target.source.index
            await opened.beside(open_disk, target)
            names = {layer.number: f"copy{layer.number}-{alias}" for layer in layers(target)}
            fds = {name: opened.fds[image_name(alias, number)] for number, name in names.items()}
            arguments["images"] = [{"image": names[layer.number], "format": layer.format} for layer in layers(target)]
            if _is_direct(disk):
                arguments["data"] = data = f"data-{alias}"
                fds[data] = await open_file(path, os.O_RDWR | os.O_NONBLOCK, action="open for writing")
                close.callback(os.close, fds[data])
            await self._send(disk, "x-kvik-copy", arguments, fds)

    async def _send(self, disk: Disk, command: str, arguments: Mapping[str, Any], fds: Mapping[str, int]) -> None:
        """With descriptors, by their names in `arguments`. A VMM that changes over itself is given what its kvik-blks
        have: a file that says so when it is gone."""
        machine, alias = self._machine, alias_of(disk)
        async with blk_monitor.session(machine, disk, _LACKS) as connection:
            if alias in machine.own_disks:
                fd = storage_daemon.open_redo(storage_daemon.redo_path(machine.directory, alias), anew=True)
                try:
                    await connection.execute("getfd", {"fdname": f"note-{alias}"}, fds=[fd])
                finally:
                    os.close(fd)
                await connection.execute("x-kvik-note", {"file": f"note-{alias}"})
            for name, fd in fds.items():
                await connection.execute("getfd", {"fdname": name}, fds=[fd])
            await connection.execute(command, arguments, deadline=blk_monitor.DEADLINE)

    async def commit(self, job: str, disk: Disk, top: int, base: int, backing: str | None, *, speed: int = 0) -> None:
        """As `QemuDiskJobs.commit`."""
        chain = {layer.key: layer for layer in layers(disk)}
        place = chain[top].number
        written = {"image": chain[base]}
        if place > 1:
            written["above"] = next(layer for layer in chain.values() if layer.number == place - 1)
        arguments: dict[str, Any] = {"job": job, "top": place, "base": chain[base].number, "speed": speed}
        arguments |= {"backing-file": backing} if place else {"node-name": f"{alias_of(disk)}-{base}-format"}
        if not place and _is_direct(disk):
            written["data"] = chain[base]
        self._check(disk)
        with ExitStack() as close:
            fds = {}
            for name, layer in written.items():
                path = layer.source.location or ""
                fds[name] = await open_file(path, os.O_RDWR | os.O_NONBLOCK, action="open for writing")
                close.callback(os.close, fds[name])
            names = {name: f"{name}-{alias_of(disk)}" for name in fds}
            await self._send(disk, "x-kvik-commit", arguments | names, {names[name]: fd for name, fd in fds.items()})

    # -- while it runs

    async def _items(self, disk: Disk) -> list[dict[str, Any]]:
        try:
            reply = await self._ask(disk, "x-kvik-query-block-jobs")
        except OperationUnsupported:  # an older kvik's
            return []
        except MonitorError:
            if alias_of(disk) in self._machine.own_disks:  # it was unplugged just now
                return []
            raise
        return [item for item in reply if isinstance(item, dict)] if isinstance(reply, list) else []

    async def _every(self) -> AsyncIterator[tuple[Disk, dict[str, Any]]]:
        for disk in self._machine.domain.devices.disks:
            if blk_monitor.serves(self._machine, disk):
                for item in await self._items(disk):
                    yield disk, item

    async def states(self) -> dict[str, JobState]:
        return {str(item.get("job")): _state(item) async for _, item in self._every()}

    async def follow(self, job: str) -> AsyncIterator[JobState]:
        async for state in blk_monitor.follow(self._machine, self.states, job):
            yield state
            if state.concluded:
                return
        # Whoever worked on it has died, or never heard of it: what it did its images tell.
        yield JobState(concluded=True, error="it ended with the process that it ran in")

    async def speed(self, job: str) -> int:
        """The limit in bytes a second, 0 for none."""
        return next(iter([number(item, "speed") async for _, item in self._every() if item.get("job") == job]), 0)

    async def set_speed(self, job: str, speed: int) -> None:
        await self._tell(job, "x-kvik-block-job-speed", {"speed": speed})

    async def complete(self, job: str) -> None:
        await self._tell(job, "x-kvik-block-job-complete", {})

    async def cancel(self, job: str, *, force: bool) -> None:
        """Without `force` a copy that is ready ends as one that is whole."""
        await self._tell(job, "x-kvik-block-job-cancel", {} if force else {"force": False})

    async def _tell(self, job: str, command: str, arguments: Mapping[str, Any]) -> None:
        for disk in [disk async for disk, item in self._every() if item.get("job") == job]:
            await self._ask(disk, command, {"job": job, **arguments})

    # -- when it is over

    async def dismiss(self, job: str) -> None:
        await self._tell(job, "x-kvik-block-job-dismiss", {})

    async def chain(self, disk: Disk) -> list[int]:
        """Numbers of the images that the guest has now, by the files that whoever serves it has open. Raises
        `HypervisorError` while there is none, for one that died is started again."""
        if not blk_monitor.serves(self._machine, disk):
            raise HypervisorError(f"{self._machine.name}: nobody serves disk {disk.target.dev} now")
        reply = await self._ask(disk, "x-kvik-query-chain")
        images = [*layers(disk), *(layers(as_disk(disk, disk.mirror)) if disk.mirror is not None else ())]
        known = {await reach(blk_monitor.identity, layer.source.location): layer.key for layer in images}
        items = [item for item in reply if isinstance(item, dict)] if isinstance(reply, list) else []
        found = [(item.get("device"), item.get("inode")) for item in items]
        return [known[one] for one in found if one in known]

    async def tidy(self, disk: Disk) -> None:
        """kvik-blk let go of what left the chain when that did."""

    def image_of(self, disk: Disk, name: str) -> int | None:
        return None

    async def set_threshold(self, disk: Disk, image: int, threshold: int) -> None:
        raise OperationUnsupported(
            f"kvik-vmm: how far an image of disk {disk.target.dev} has grown is not watched",
            remedy=f"look at it: kvik domblkinfo {self._machine.name} {disk.target.dev}",
        )


def _is_direct(disk: Disk) -> bool:
    """Whether its data goes past the page cache, by an open file of its own."""
    return disk.driver is not None and disk.driver.cache in ("none", "directsync")


def _check_copy(machine: KvikMachine, disk: Disk, mirror: Mirror) -> None:
    """That the guest can go on in the copy, now and at the next start."""
    target = as_disk(disk, mirror)
    what = f"disk {disk.target.dev} of machine {machine.name}"
    if mirror.type not in ("file", "block"):
        raise OperationUnsupported(
            f"kvik-vmm copies {what} to files and block devices of this host only",
            remedy="copy it to a file, or run the machine with QEMU (<emulator>qemu-system-...</emulator>)",
        )
    for layer in layers(target):
        if layer.format not in kvik_blk.FORMATS or layer.source.encryption is not None:
            form = layer.format if layer.source.encryption is None else "encrypted"
            raise OperationUnsupported(
                f"kvik-vmm copies {what} to raw and qcow2 images only, and {layer.source.location} is {form}",
                remedy="--format raw or --format qcow2, without encryption",
            )
    try:
        support.check_device(target)
    except ConfigUnsupported as error:
        raise OperationUnsupported(
            f"{what} could not be started again with that copy: {error}", remedy=error.remedy
        ) from error


def _state(item: Mapping[str, Any]) -> JobState:
    error = item.get("error")
    return JobState(
        current=number(item, "current"),
        total=number(item, "total"),
        ready=item.get("state") == "ready",
        concluded=item.get("state") == "concluded",
        error=error if isinstance(error, str) else "",
    )
