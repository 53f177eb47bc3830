"""A process that serves a disk of a running kvik-vmm and has died is started again, with the disk as it is by now.

    sidecar dies         the VMM's device waits (vmm/virtio/vhost_user.py): the guest's requests stay in its rings
    here                 the images of the live document are opened, the program started, its limits set
    both sockets         to the VMM, which hands over the memory where requests in flight were noted
    new sidecar          does those again, then goes on

What the dead process had answered is in the page cache, and the way to it in the machine's directory
(`image/qcow2/redo.py`). qemu-storage-daemon keeps changed qcow2 tables in its memory: such a disk fails for good unless
each write waits for the medium. So does one whose process dies `TRIES` times within `WITHIN` seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import struct
import time
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvik.conf.devices.disk import Disk
from kvik.conf.tree import clone
from kvik.errors import HypervisorError, KvikError, MonitorError
from kvik.host import process
from kvik.host.process import boot_id, describe_exit
from kvik.host.reach import reach
from kvik.hypervisor.cpus import boot_vcpus
from kvik.hypervisor.descriptors import Opened, open_disk
from kvik.hypervisor.kvik import blk_monitor
from kvik.hypervisor.layers import as_disk, on_image
from kvik.hypervisor.names import alias_of, life_name, vhost_user_name
from kvik.hypervisor.sidecars import kvik_blk, storage_daemon
from kvik.hypervisor.sidecars.group import Sidecar
from kvik.image.qcow2.redo import ALONE, HEADER, MAGIC

if TYPE_CHECKING:
    from kvik.hypervisor.kvik.machine import KvikMachine

__all__ = ["KINDS", "BackEnds", "written_last"]

KINDS = (kvik_blk.KIND, storage_daemon.KIND)
TRIES = 5
WITHIN = 60.0  # seconds
_SETTLES = 0.3  # seconds: at a VMM's end, and when a disk is unplugged, its process ends a moment before we see why
_NOTICED = 5.0  # seconds for the VMM to see that its back end has gone
_REPAIRED = 300.0  # seconds: an image that was not closed has its references counted anew, whatever its size
_WRITTEN_AT_ONCE = frozenset({"raw", "vmdk", "vdi", "vpc", "vhdx"})  # qemu-storage-daemon keeps no tables of these


class BackEnds:
    """Of one machine."""

    def __init__(self, machine: KvikMachine) -> None:
        self._machine = machine
        self._under_way: set[str] = set()
        self._deaths: dict[str, deque[float]] = {}
        self.changing = asyncio.Lock()  # held while disks get other images, and while one is opened again

    async def revive(self, alias: str, how: str) -> None:
        """Whoever served that disk has ended, or does not answer: then it is ended. Nothing is raised: what goes wrong
        is told by the disk's failure."""
        if alias in self._under_way:
            return
        self._under_way.add(alias)
        try:
            await asyncio.sleep(_SETTLES)
            dead = [member for member in self._machine.sidecars if member.alias == alias and not member.process.alive]
            how = describe_exit(dead[0].process.code) if dead else how
            told = ""
            while self._machine.watched:
                try:
                    await self._revive(alias, how)
                    return
                except KvikError as error:
                    if str(error) != told:
                        told = str(error)
                        self._machine.note(f"disk {alias} was not served again: {told}")
                    if isinstance(error, MonitorError):  # the VMM has said no
                        return
                await asyncio.sleep(2.0)  # its monitor does not answer just now
        finally:
            self._under_way.discard(alias)

    async def idle(self, end: float) -> None:
        """Until nobody's place has to be taken, or it is `end` (time.monotonic)."""
        while self._under_way and time.monotonic() < end:
            await asyncio.sleep(0.05)

    async def take_up(self) -> None:
        """After this daemon's start: what happened to back ends while none ran."""
        machine = self._machine
        while machine.watched:
            try:
                told = await self._report()
                break
            except MonitorError:  # of an older kvik, which has no such command
                return
            except KvikError:
                await asyncio.sleep(1.0)
        else:
            return
        members = {member.alias for member in machine.sidecars}
        for item in told.values():
            if item.get("waiting") is True:
                machine.background(self.revive(str(item["id"]), "while nobody watched"))
            elif item.get("connected") is True and item["id"] not in members:
                self._adopt(str(item["id"]), str(item.get("process") or ""))

    def _adopt(self, alias: str, told: str) -> None:
        """The daemon before us had started it, and was killed before it could note that."""
        kind, _, numbers = told.partition(" ")
        pid, _, start = numbers.partition(" ")
        if kind not in KINDS or not (pid.isdecimal() and start.isdecimal()):
            return
        handle = process.find(int(pid), int(start), boot_id())
        if handle is not None:
            member = Sidecar(kind, alias, handle)
            self._machine.sidecars.adopt(member)
            self._machine.watch_sidecar(member)

    async def _report(self) -> dict[str, dict[str, Any]]:
        told = await self._machine.execute("x-kvik-query-back-ends")
        items = [item for item in told if isinstance(item, dict)] if isinstance(told, list) else []
        return {str(item.get("id")): item for item in items}

    async def _waits(self, alias: str) -> bool:
        end = time.monotonic() + _NOTICED
        while True:
            item = (await self._report()).get(alias, {})
            if item.get("waiting") is True:
                return True
            if item.get("connected") is not True or time.monotonic() > end:
                return False
            await asyncio.sleep(0.05)

    async def _revive(self, alias: str, how: str) -> None:
        machine = self._machine
        deaths = self._deaths.setdefault(alias, deque(maxlen=TRIES))
        pause, kind = 0.2, ""
        while machine.process.alive and machine.watched and await self._waits(alias):
            deaths.append(time.monotonic())
            disk = next((disk for disk in machine.domain.devices.disks if alias_of(disk) == alias), None)
            if disk is None:
                return
            kind = kind or machine.storage_kind(disk)
            lasting = _why_not(disk, kind)
            if lasting or (len(deaths) == TRIES and deaths[-1] - deaths[0] < WITHIN):
                often = "" if lasting else f" {TRIES} times within {WITHIN:.0f} s, last"
                reason = f"{kind} of disk {disk.target.dev} ended{often}: {how}{lasting}"
                await machine.execute("x-kvik-back-end-give-up", {"id": alias, "reason": reason})
                return
            try:
                async with self.changing:
                    member = await self._start(disk)
                machine.watch_sidecar(member)
                if (await self._report()).get(alias, {}).get("waiting") is not True:
                    machine.tell_served(member)
                    return
                how = "the VMM lost it at once"
            except KvikError as error:
                how = str(error)
                machine.note(f"{kind} of {alias} could not be started again: {how}")
            await asyncio.sleep(pause)
            pause = min(2 * pause, 5.0)

    async def _start(self, disk: Disk) -> Sidecar:
        machine, alias = self._machine, alias_of(disk)
        with ExitStack() as close, ExitStack() as undo:
            await machine.sidecars.end(alias)  # one that is dead is forgotten; one that runs lets go of the images
            opened = Opened(close, undo, {}, machine.bases())
            disk = await reach(_now, disk, storage_daemon.redo_path(machine.directory, alias))
            again = clone(disk)
            await opened.beside(open_disk, again)
            log_fd = os.open(machine.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            close.callback(os.close, log_fd)
            vcpus = boot_vcpus(machine.domain)
            # What was numbered anew is a copy's: nodes keep the live document's names.
            node = storage_daemon.top_node(disk)
            try:
                daemon = storage_daemon.start(
                    again, machine.directory, opened, machine.sidecars, vcpus=vcpus, log_fd=log_fd, again=node
                )
                if daemon is None:
                    raise HypervisorError(f"disk {disk.target.dev} is served by somebody else")
                await daemon.ready(_REPAIRED)
                await self._hand_over(alias, opened, daemon.member)
            except BaseException:
                await asyncio.shield(machine.sidecars.end(alias))
                raise
            undo.pop_all()
            return daemon.member

    async def _hand_over(self, alias: str, opened: Opened, member: Sidecar) -> None:
        machine = self._machine
        names = {"fd": f"vublk-{alias}", "lifefd": f"life-{alias}"}
        given = {"fd": opened.fds[vhost_user_name(alias)], "lifefd": opened.fds[life_name(alias)]}
        try:
            for key, name in names.items():
                await machine.execute("getfd", {"fdname": name}, fds=[given[key]])
            which = f"{member.kind} {member.process.pid} {member.process.start_time}"
            await machine.execute("x-kvik-back-end-connect", {"id": alias, **names, "process": which}, deadline=20.0)
        except BaseException:
            for name in names.values():
                with contextlib.suppress(KvikError):
                    await machine.execute("closefd", {"fdname": name})
            raise


def _now(disk: Disk, redo: Path) -> Disk:
    """The disk that the dead one served: amid the end of a commit or a copy the document does not say yet that its
    guest went on in the base, or in the copy (`vmm/blk/active_commit.py`, `vmm/blk/block_copy.py`)."""
    mirror = disk.mirror
    source = mirror.source if mirror is not None else None
    if mirror is None or source is None or source.index is None or not source.location:
        return disk
    if written_last(redo, [source.location], alone=True) is None:
        return disk
    if mirror.job == "copy":
        return as_disk(disk, mirror)
    return on_image(disk, source.index) or disk


def written_last(redo: Path, places: Sequence[str], *, alone: bool = False) -> str | None:
    """Which of these images is the one that a kvik-blk wrote to last, by its file of changed tables. `alone`: only one
    that lay below others before. Looks at files that may not answer."""
    try:
        with redo.open("rb") as file:
            magic, device, inode, _ = HEADER.unpack(file.read(HEADER.size))
    except (OSError, struct.error):
        return None
    if magic not in ((ALONE,) if alone else (ALONE, MAGIC)):
        return None
    return next((place for place in places if blk_monitor.identity(place) == (device, inode)), None)


def _why_not(disk: Disk, kind: str) -> str:
    """Why its process must not be started again, as the end of a sentence; "" if it may."""
    if disk.transient is not None:
        return "; what was written to a transient disk was its own"
    if kind == kvik_blk.KIND or disk.readonly:
        return ""
    cache = disk.driver.cache if disk.driver is not None else None
    form = (disk.driver.type if disk.driver is not None else None) or "raw"
    if cache in ("writethrough", "directsync") or form in _WRITTEN_AT_ONCE:
        return ""
    return f"; it had tables of the {form} image in memory, and writes that the guest relies on with them"
