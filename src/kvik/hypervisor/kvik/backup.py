"""Checkpoints and backups of a running machine's disks, each of which a kvik-blk serves (`vmm/blk/backups.py`).

A machine's disks are in processes of their own. What is of one moment on several of them begins while none of them
answers its guest: what was answered before is in it on each disk, and nothing else. They go on when our session ends,
however that is. Everything else can be done again, or taken back, whichever daemon was killed amid it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from kvik.conf.devices.disk import Disk
from kvik.errors import (
    HypervisorError,
    KvikError,
    MonitorError,
    OperationTimeout,
    OperationUnsupported,
)
from kvik.host.files import host_error
from kvik.host.filesystem import shared_as
from kvik.host.reach import open_file
from kvik.hypervisor.chain import check_qcow2
from kvik.hypervisor.driver import BackupPart, Bitmap, JobState
from kvik.hypervisor.kvik import blk_monitor
from kvik.hypervisor.kvik.blk_monitor import DEADLINE, INTERVAL, Monitor, number
from kvik.hypervisor.layers import layers
from kvik.hypervisor.names import alias_of
from kvik.hypervisor.sidecars import kvik_blk
from kvik.image.lock import lock_for_hosts

if TYPE_CHECKING:
    from kvik.hypervisor.kvik.machine import KvikMachine

__all__ = ["KvikBackups"]

_GRANULARITY = 65536  # bytes, of what is counted
_WRITTEN_OUT = 600.0  # seconds that a target's last bytes may take


class KvikBackups:
    """Bitmaps and backups of one kvik-vmm's disks. Images are named by their numbers in the live document."""

    def __init__(self, machine: KvikMachine) -> None:
        self._machine = machine

    # -- the process that serves a disk

    def _check(self, disk: Disk) -> None:
        machine, target = self._machine, disk.target.dev
        if alias_of(disk) in machine.own_disks:
            raise OperationUnsupported(
                f"disk {target} of machine {machine.name} is one that kvik-vmm reads and writes itself, as it does raw "
                "images: it has no checkpoints and no backups while the machine runs",
                remedy="write <driver name='kvik-blk' type='raw'/> for full backups, or convert it to qcow2 for "
                f"incremental ones, too, and start the machine anew; or leave it out: <disk name='{target}' "
                "backup='no'/>",
            )
        if machine.storage_kind(disk) != kvik_blk.KIND:
            raise OperationUnsupported(
                f"disk {target} of machine {machine.name} is served by {machine.storage_kind(disk)}, which makes no "
                "backup here",
                remedy=f"leave it out: <disk name='{target}' backup='no'/>",
            )

    def _session(self, disk: Disk) -> contextlib.AbstractAsyncContextManager[Monitor]:
        self._check(disk)
        return blk_monitor.session(self._machine, disk, "checkpoints and no backups")

    async def _ask(self, disk: Disk, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
        async with self._session(disk) as connection:
            return await connection.execute(command, arguments, deadline=DEADLINE)

    def _serves(self, disk: Disk) -> bool:
        own = alias_of(disk) in self._machine.own_disks
        return not own and blk_monitor.serves(self._machine, disk)

    @contextlib.asynccontextmanager
    async def _held(self, sessions: Sequence[Monitor]) -> AsyncIterator[bool]:
        """None of several disks answers its guest for the block; whether there are several."""
        if len(sessions) < 2:
            yield False
            return
        try:
            await _all(sessions, "x-kvik-hold")
            yield True
        finally:
            with contextlib.suppress(KvikError):
                await asyncio.shield(_all(sessions, "x-kvik-release"))

    # -- bitmaps

    async def bitmaps(self, disk: Disk) -> dict[int, dict[str, Bitmap]]:
        reply = await self._ask(disk, "x-kvik-query-bitmaps")
        told = reply.get("layers") if isinstance(reply, dict) else None
        chain = list(layers(disk))
        if not isinstance(told, list) or len(told) != len(chain):
            raise HypervisorError(
                f"{self._machine.name}: kvik-blk of disk {disk.target.dev} has other images than the document"
            )
        return {layer.key: _bitmaps(items) for layer, items in zip(chain, told, strict=True)}

    async def track(self, new: Sequence[tuple[Disk, str]]) -> None:
        wanted = _by_disk(new)
        try:
            async with AsyncExitStack() as stack:
                sessions = [(await stack.enter_async_context(self._session(disk)), names) for disk, names in wanted]
                async with self._held([session for session, _ in sessions]) as held:
                    for session, names in sessions:
                        arguments = {"names": names, "held": held}
                        await session.execute("x-kvik-bitmap-add", arguments, deadline=DEADLINE)
        except MonitorError as error:
            if len(wanted) > 1:  # others may have theirs
                raise HypervisorError(str(error)) from error
            raise

    async def forget(self, disk: Disk, name: str) -> None:
        known = await self.bitmaps(disk)
        for place, layer in enumerate(layers(disk)):
            if name not in known[layer.key]:
                continue
            if not place:
                await self._ask(disk, "x-kvik-bitmap-remove", {"name": name})
                continue
            path = layer.source.location or ""
            fd = _open(path, os.O_RDWR | os.O_NONBLOCK)
            try:
                async with self._session(disk) as connection:
                    await connection.execute("getfd", {"fdname": "below"}, fds=[fd])
                    arguments = {"name": name, "layer": place, "image": "below"}
                    await connection.execute("x-kvik-bitmap-remove", arguments, deadline=DEADLINE)
            finally:
                os.close(fd)

    async def changed(self, disk: Disk, sources: Sequence[tuple[int, str]]) -> int:
        arguments = {"since": _since(disk, sources), "granularity": _GRANULARITY}
        reply = await self._ask(disk, "x-kvik-bitmap-count", arguments)
        count = reply.get("count") if isinstance(reply, dict) else None
        return count if isinstance(count, int) else 0

    async def carry(self, disk: Disk, images: Sequence[int], into: int, *, new: bool, written: bool = False) -> None:
        """Into the image that the guest writes to by the names that it has, into another one by all. Into a copy they
        go when the guest does."""
        chain = {layer.key: layer for layer in layers(disk)}
        arguments: dict[str, Any] = {"layers": [chain[image].number for image in images]}
        if into not in chain:
            await self._ask(disk, "x-kvik-copy-carry", arguments)
            return
        if not chain[into].number:
            await self._ask(disk, "x-kvik-bitmap-merge", arguments)
            return
        if written:
            await self._ask(disk, "x-kvik-bitmap-merge", arguments | {"into": chain[into].number})
            return
        fd = await open_file(chain[into].source.location or "", os.O_RDWR | os.O_NONBLOCK)
        try:
            async with self._session(disk) as connection:
                await connection.execute("getfd", {"fdname": "below"}, fds=[fd])
                arguments |= {"into": chain[into].number, "image": "below"}
                await connection.execute("x-kvik-bitmap-merge", arguments, deadline=DEADLINE)
        finally:
            os.close(fd)

    # -- a backup

    async def begin(
        self,
        parts: Sequence[BackupPart],
        *,
        pull: bool,
        track: Sequence[tuple[Disk, str]] = (),
        secrets: Mapping[str, int] = MappingProxyType({}),
    ) -> int:
        """As `QemuBackups.begin`, but that what was begun when it fails is left to `clear` and `forget`."""
        tracked = _by_disk(track)
        for disk in (*(part.disk for part in parts), *(disk for disk, _ in tracked)):
            self._check(disk)
        for part in parts:
            if part.secret:
                raise OperationUnsupported(
                    f"disk {part.disk.target.dev}: kvik-vmm encrypts no backups", remedy="leave <encryption> out"
                )
        tracks = {alias_of(disk): names for disk, names in tracked}
        try:
            async with AsyncExitStack() as stack:
                sessions = [(part, await stack.enter_async_context(self._session(part.disk))) for part in parts]
                backed = {alias_of(part.disk) for part in parts}
                others = [
                    (names, await stack.enter_async_context(self._session(disk)))
                    for disk, names in tracked
                    if alias_of(disk) not in backed
                ]
                for part, session in sessions:
                    await _add(session, part, pull=pull)
                began = time.monotonic()
                async with self._held([session for _, session in (*sessions, *others)]) as held:
                    for new, session in others:
                        await session.execute("x-kvik-bitmap-add", {"names": new, "held": held}, deadline=DEADLINE)
                    for part, session in sessions:
                        arguments = {"job": part.job, "track": tracks.get(alias_of(part.disk), []), "held": held}
                        await session.execute("x-kvik-backup-begin", arguments, deadline=DEADLINE)
                return int((time.monotonic() - began) * 1e6)
        except BaseException:
            with contextlib.suppress(KvikError):
                await asyncio.shield(self.clear(parts))
            raise

    async def serve(self, parts: Sequence[BackupPart], listening: int, certificates: int | None = None) -> None:
        """The first disk's process accepts the clients, and hands those over that ask for another's export."""
        if certificates is not None:
            raise OperationUnsupported(
                f"the backup of machine {self._machine.name}: kvik-vmm speaks NBD without TLS",
                remedy="use transport='unix', and take it from there, or push the backup",
            )
        names = [part.export for part in parts]
        async with AsyncExitStack() as stack:
            front = await stack.enter_async_context(self._session(parts[0].disk))
            links = []
            for number, part in enumerate(parts[1:]):
                ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                with ours, theirs:
                    link = f"link{number}"
                    await front.execute("getfd", {"fdname": link}, fds=[ours.fileno()])
                    links.append({"export": part.export, "socket": link})
                    async with self._session(part.disk) as session:
                        await session.execute("getfd", {"fdname": "front"}, fds=[theirs.fileno()])
                        others = [{"export": name, "socket": "front"} for name in names if name != part.export]
                        await self._serve(session, part, names, links=others)
            await front.execute("getfd", {"fdname": "nbd"}, fds=[listening])
            await self._serve(front, parts[0], names, links=links, socket="nbd")

    async def _serve(
        self, session: Monitor, part: BackupPart, names: list[str], *, links: list[dict[str, str]], **more: str
    ) -> None:
        arguments = {"job": part.job, "export": part.export, "exports": names, "links": links, **more}
        if part.bitmap:
            arguments["bitmap"] = part.bitmap
        await session.execute("x-kvik-backup-serve", arguments, deadline=DEADLINE)

    async def silence(self, parts: Sequence[BackupPart]) -> None:
        """No client reads any more. Raises `HypervisorError`."""
        for part in parts:
            if self._serves(part.disk):
                await self._ask(part.disk, "x-kvik-backup-silence", {"job": part.job})

    async def clear(self, parts: Sequence[BackupPart]) -> None:
        """Whatever there is of a backup goes. Can be done twice. Raises `HypervisorError`, `OperationTimeout`."""
        for part in parts:
            if self._serves(part.disk):
                await self._clear(part)

    async def _clear(self, part: BackupPart) -> None:
        try:
            async with asyncio.timeout(_WRITTEN_OUT):
                while True:
                    states = await self._states(part.disk)
                    if part.job not in states:
                        return
                    try:
                        await self._ask(part.disk, "x-kvik-backup-clear", {"job": part.job})
                    except MonitorError:  # its last bytes are on their way
                        await asyncio.sleep(INTERVAL)
        except TimeoutError:
            raise OperationTimeout(
                f"{self._machine.name}: what was backed up of disk {part.disk.target.dev} is still being written out"
            ) from None

    # -- its jobs

    async def _states(self, disk: Disk) -> dict[str, JobState]:
        try:
            reply = await self._ask(disk, "x-kvik-query-backups")
        except OperationUnsupported:  # an older kvik's
            return {}
        items = [item for item in reply if isinstance(item, dict)] if isinstance(reply, list) else []
        return {str(item.get("job")): _state(item) for item in items}

    async def states(self) -> dict[str, JobState]:
        found: dict[str, JobState] = {}
        for disk in self._machine.domain.devices.disks:
            if self._serves(disk):
                found |= await self._states(disk)
        return found

    def follow(self, job: str) -> AsyncIterator[JobState]:
        return blk_monitor.follow(self._machine, self.states, job)

    async def cancel(self, job: str) -> None:
        for disk in self._machine.domain.devices.disks:
            if self._serves(disk) and job in await self._states(disk):
                await self._ask(disk, "x-kvik-backup-cancel", {"job": job})


async def _all(sessions: Sequence[Monitor], command: str) -> None:
    """Of all at once; the first error when each has answered."""
    answers = await asyncio.gather(
        *(session.execute(command, deadline=DEADLINE) for session in sessions), return_exceptions=True
    )
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer


async def _add(connection: Monitor, part: BackupPart, *, pull: bool) -> None:
    """The target, or the scratch image, becomes known to the process that serves the disk."""
    flags = os.O_RDWR | os.O_NONBLOCK | (0 if part.block else os.O_NOFOLLOW)  # devices are called by links
    with ExitStack() as close:
        fd = _open(part.path, flags)
        close.callback(os.close, fd)
        if part.format == "qcow2":  # and one that leads to no other file
            check_qcow2(fd, part.path)
        if shared_as(fd):
            lock_for_hosts(fd, part.path, write=True)
        await connection.execute("getfd", {"fdname": "backup"}, fds=[fd])
    arguments: dict[str, Any] = {"job": part.job, "image": "backup", "filename": part.path, "format": part.format}
    if part.bitmap:
        arguments["since"] = _since(part.disk, part.since)
    await connection.execute("x-kvik-backup-add", arguments | {"pull": pull}, deadline=DEADLINE)


def _since(disk: Disk, sources: Sequence[tuple[int, str]]) -> list[dict[str, Any]]:
    places = {layer.key: place for place, layer in enumerate(layers(disk))}
    return [{"layer": places[image], "name": name} for image, name in sources]


def _by_disk(new: Sequence[tuple[Disk, str]]) -> list[tuple[Disk, list[str]]]:
    found: dict[str, tuple[Disk, list[str]]] = {}
    for disk, name in new:
        found.setdefault(alias_of(disk), (disk, []))[1].append(name)
    return list(found.values())


def _bitmaps(items: Any) -> dict[str, Bitmap]:
    return {
        item["name"]: Bitmap(
            granularity=number(item, "granularity"),
            count=number(item, "count"),
            recording=item.get("recording") is True,
            persistent=item.get("persistent") is True,
            inconsistent=item.get("inconsistent") is True,
        )
        for item in (items if isinstance(items, list) else ())
        if isinstance(item, dict) and isinstance(item.get("name"), str)
    }


def _state(item: Mapping[str, Any]) -> JobState:
    error = item.get("error")
    return JobState(
        current=number(item, "current"),
        total=number(item, "total"),
        concluded=item.get("state") == "concluded",
        error=error if isinstance(error, str) else "",
    )


def _open(path: str, flags: int) -> int:
    try:
        return os.open(path, flags | os.O_CLOEXEC)
    except OSError as error:
        raise host_error("open", path, error) from error
