"""A backup of a running machine's disks: one job a disk, all begun in one transaction.

push    blockdev-backup copies the disk, or what a bitmap marks of it, into the target
pull    blockdev-backup with sync=none keeps what the guest is about to overwrite in a scratch image that lies on the
        disk: read through that, the disk is as it was. The scratch is exported over NBD, read-only, with the bitmap.

Targets, scratch images and the listening socket are opened by the daemon and passed as descriptors.

Which write belongs where: the bitmap of a new checkpoint is added before the moment of the backup, and may mark what
the backup has already: too much is copied the next time, never too little. Reference: QEMU's docs/interop/bitmaps.rst,
docs/interop/live-block-operations.rst and qapi/block-export.json.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from kvik.conf.devices.disk import Disk
from kvik.errors import ConfigUnsupported, HostError, KvikError, MonitorError, OperationTimeout
from kvik.hypervisor.chain import check_qcow2
from kvik.hypervisor.descriptors import Opened
from kvik.hypervisor.driver import BackupPart, Bitmap, JobState
from kvik.hypervisor.names import alias_of
from kvik.hypervisor.qemu import bitmaps, block_jobs
from kvik.hypervisor.qemu.argv.options import Props, node_name
from kvik.hypervisor.qemu.disk_jobs import format_node
from kvik.hypervisor.qemu.hotplug import Undo, add_fd, lend, remove_nodes

if TYPE_CHECKING:
    from kvik.hypervisor.qemu.machine import QemuMachine

__all__ = ["QemuBackups"]

_DEADLINE = 30.0
_EXPORTS_GONE = 10.0  # seconds for NBD clients to be cut off
_SERVER = "backup-nbd"  # the listening socket's name in QEMU
_CREDENTIALS = "backup-tls"


class QemuBackups:
    """Bitmaps and backups of one QEMU's disks. Images are named by their numbers in the live document."""

    def __init__(self, machine: QemuMachine) -> None:
        self._machine = machine

    # -- bitmaps

    async def bitmaps(self, disk: Disk) -> dict[int, dict[str, Bitmap]]:
        return await bitmaps.bitmaps_of(self._machine, disk)

    async def track(self, new: Sequence[tuple[Disk, str]]) -> None:
        await bitmaps.add(self._machine, new)

    async def forget(self, disk: Disk, name: str) -> None:
        await bitmaps.remove(self._machine, disk, name)

    async def changed(self, disk: Disk, sources: Sequence[tuple[int, str]]) -> int:
        return await bitmaps.count(self._machine, disk, sources)

    async def carry(self, disk: Disk, images: Sequence[int], into: int, *, new: bool, written: bool = False) -> None:
        await bitmaps.carry(self._machine, disk, images, into, new=new, written=written)

    # -- a backup

    async def begin(
        self,
        parts: Sequence[BackupPart],
        *,
        pull: bool,
        track: Sequence[tuple[Disk, str]] = (),
        secrets: Mapping[str, int] = MappingProxyType({}),
    ) -> int:
        """All jobs and the bitmaps of a new checkpoint from one moment on, or nothing; how long the disks' requests
        were held back at most, in microseconds. Raises `MonitorError`, `HostError`; after `OperationTimeout` it may
        have begun: `clear` ends it."""
        machine = self._machine
        undone = Undo(machine)
        try:
            for part in parts:
                if part.secret:
                    await self._add_secret(part, secrets[part.job], undone)
                await self._add_nodes(part, undone, pull=pull)
            actions = [bitmaps.add_action(format_node(disk), name, persistent=True) for disk, name in track]
            for part in parts:
                marked = _marked(part)
                # A client that is shown too much reads what is not needed; a job must not be told too little.
                actions += [_job(part, pull=True), *marked] if pull else [*marked, _job(part, pull=False)]
            began = time.monotonic()
            await machine.execute("transaction", {"actions": actions}, deadline=_DEADLINE)
            return int((time.monotonic() - began) * 1e6)
        except (MonitorError, HostError, ConfigUnsupported):
            await undone.run()
            raise

    async def _add_secret(self, part: BackupPart, fd: int, undone: Undo) -> None:
        machine = self._machine
        fdset, path = await lend(machine, fd, part.secret)
        try:
            item = {"qom-type": "secret", "id": part.secret, "format": "raw", "file": path}
            await machine.execute("object-add", item, deadline=_DEADLINE)
            undone.add("object-del", id=part.secret)
        finally:  # QEMU has read it, or will not
            await machine.execute("remove-fd", {"fdset-id": fdset})

    async def _add_nodes(self, part: BackupPart, undone: Undo, *, pull: bool) -> None:
        machine = self._machine
        flags = os.O_RDWR | os.O_NONBLOCK | (0 if part.block else os.O_NOFOLLOW)  # devices are called by links
        with contextlib.ExitStack() as close, contextlib.ExitStack() as undo:
            opened = Opened(close, undo, {})
            await opened.beside(_open_image, part, flags)
            fd = opened.fds[_opaque(part)]
            path = await add_fd(machine, fd, _opaque(part))
        undone.add("remove-fd", fdset_id=int(path.rsplit("/", 1)[-1]))
        driver = "host_device" if part.block else "file"
        storage = {"driver": driver, "filename": path, "node-name": _storage(part), "discard": "unmap"}
        image: Props = {"driver": part.format, "file": _storage(part), "node-name": _image(part), "discard": "unmap"}
        if part.format == "qcow2":
            image["backing"] = format_node(part.disk) if pull else None
        if part.secret and part.format == "qcow2":
            image["encrypt"] = {"format": "luks", "key-secret": part.secret}
        elif part.secret:
            image |= {"driver": "luks", "key-secret": part.secret}
        for node in (storage, image):
            await machine.execute("blockdev-add", node, deadline=_DEADLINE)
            undone.add("blockdev-del", node_name=node["node-name"])

    async def serve(self, parts: Sequence[BackupPart], listening: int, certificates: int | None = None) -> None:
        """What `begin` keeps becomes readable for NBD clients of a socket: over TLS with the `certificates` of a
        directory, and then only for those whose own are signed by its authority. Raises `MonitorError`."""
        machine = self._machine
        await machine.execute("getfd", {"fdname": _SERVER}, fds=[listening])
        start: Props = {"addr": {"type": "fd", "data": {"str": _SERVER}}}
        if certificates is not None:
            await self._add_credentials(certificates)
            start["tls-creds"] = _CREDENTIALS
        await machine.execute("nbd-server-start", start)
        for part in parts:
            export: Props = {"type": "nbd", "id": part.job, "node-name": _image(part), "name": part.export}
            if part.bitmap:
                export["bitmaps"] = [part.bitmap]
            await machine.execute("block-export-add", export, deadline=_DEADLINE)

    async def _add_credentials(self, directory: int) -> None:
        """QEMU reads them now, and not later."""
        machine = self._machine
        fdset, path = await lend(machine, directory, _CREDENTIALS)
        try:
            wanted = {"qom-type": "tls-creds-x509", "id": _CREDENTIALS, "dir": path, "endpoint": "server"}
            await machine.execute("object-add", {**wanted, "verify-peer": True}, deadline=_DEADLINE)
        finally:
            await machine.execute("remove-fd", {"fdset-id": fdset})

    async def silence(self, parts: Sequence[BackupPart]) -> None:
        """No client reads any more: what it would be shown may be wrong from now on. Raises `OperationTimeout`."""
        machine = self._machine
        ours = {part.job for part in parts}
        for name in ours & await self._exports():
            with contextlib.suppress(MonitorError):
                await machine.execute("block-export-del", {"id": name, "mode": "hard"})
        with contextlib.suppress(MonitorError):
            await machine.execute("nbd-server-stop")
        with contextlib.suppress(MonitorError):
            await machine.execute("closefd", {"fdname": _SERVER})
        with contextlib.suppress(MonitorError):
            await machine.execute("object-del", {"id": _CREDENTIALS})
        try:
            async with asyncio.timeout(_EXPORTS_GONE):
                while ours & await self._exports():
                    await asyncio.sleep(0.02)
        except TimeoutError:
            raise OperationTimeout(f"{machine.name}: QEMU does not let go of the exports of a backup") from None

    async def _exports(self) -> set[str]:
        reply = await self._machine.execute("query-block-exports")
        return {str(item.get("id")) for item in reply if isinstance(item, dict)} if isinstance(reply, list) else set()

    async def clear(self, parts: Sequence[BackupPart]) -> None:
        """Whatever there is of a backup goes: exports, jobs, nodes, descriptors, its own bitmaps. Can be done twice.

        Raises `HypervisorError` from a VMM that does not answer.
        """
        machine = self._machine
        await self.silence(parts)
        known = await block_jobs.list_jobs(machine)
        for part in parts:
            if part.job in known:
                await block_jobs.cancel_job(machine, part.job)
                with contextlib.suppress(KvikError):
                    await block_jobs.conclude(machine, part.job)
                await block_jobs.dismiss_job(machine, part.job)
        await remove_nodes(machine, [name for part in parts for name in (_image(part), _storage(part))])
        for part in parts:
            if part.secret:
                with contextlib.suppress(MonitorError):
                    await machine.execute("object-del", {"id": part.secret})
            if part.bitmap:
                top = (await self.bitmaps(part.disk)).get(_index(part.disk), {}).get(part.bitmap)
                if top is not None and not top.persistent:
                    with contextlib.suppress(MonitorError):
                        await machine.execute(
                            "block-dirty-bitmap-remove", {"node": format_node(part.disk), "name": part.bitmap}
                        )
        await self._drop_descriptors({_opaque(part) for part in parts})

    # -- its jobs

    async def states(self) -> dict[str, JobState]:
        return await self._machine.disk_jobs.states()

    def follow(self, job: str) -> AsyncIterator[JobState]:
        return self._machine.disk_jobs.follow(job)

    async def cancel(self, job: str) -> None:
        await self._machine.disk_jobs.cancel(job, force=True)

    async def _drop_descriptors(self, names: set[str]) -> None:
        reply: Any = await self._machine.execute("query-fdsets")
        for item in reply if isinstance(reply, list) else []:
            if any(entry.get("opaque") in names for entry in item.get("fds", [])):
                with contextlib.suppress(MonitorError):
                    await self._machine.execute("remove-fd", {"fdset-id": item["fdset-id"]})


def _open_image(opened: Opened, part: BackupPart, flags: int) -> None:
    fd = opened.open(_opaque(part), part.path, flags)
    if part.format == "qcow2":  # and one that leads to no other file
        check_qcow2(fd, part.path)


def _index(disk: Disk) -> int:
    return disk.source.index or 0 if disk.source is not None else 0


def _opaque(part: BackupPart) -> str:
    return f"backup:{alias_of(part.disk)}"


def _storage(part: BackupPart) -> str:
    return node_name(part.job, 0, "storage")


def _image(part: BackupPart) -> str:
    return node_name(part.job, 0, "format")


def _marked(part: BackupPart) -> list[Props]:
    """A bitmap of the backup's own, with all that the checkpoint's bitmaps of the chain tell."""
    if not part.bitmap:
        return []
    node = format_node(part.disk)
    return [
        bitmaps.add_action(node, part.bitmap, disabled=True, granularity=part.granularity),
        bitmaps.merge_actions(part.disk, node, part.bitmap, part.since),
    ]


def _job(part: BackupPart, *, pull: bool) -> Props:
    data: Props = {
        "job-id": part.job,
        "device": format_node(part.disk),
        "target": _image(part),
        "auto-dismiss": False,  # its end is seen by whichever daemon is there then
    }
    if pull:
        data["sync"] = "none"
    elif part.bitmap:
        data |= {"sync": "bitmap", "bitmap": part.bitmap, "bitmap-mode": "never"}
    else:
        data["sync"] = "full"
    return {"type": "blockdev-backup", "data": data}
