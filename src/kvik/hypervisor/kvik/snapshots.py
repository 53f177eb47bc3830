"""New images on top of a running machine's disks, each of which a kvik-blk serves or, raw ones, the VMM itself: all of
them in one standstill.

    each of them opens its new image and writes out the old one     the guest runs
    guest stopped; each puts the new image on top; guest goes on
    each closes the old image for writing                           the guest runs

The same commands do it in both (`vmm/monitor/overlays.py`); the VMM is told which disk is meant.

As long as the guest stands still all of that can be taken back. Where a daemon was killed amid it, `settle` does that,
or sees that it was done, before the guest goes on (`vmm/blk/overlay.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import uuid4

from kvik.conf import tree
from kvik.conf.devices.disk import Disk, DiskDriver
from kvik.errors import ConfigError, ConfigUnsupported, HypervisorError, KvikError, MonitorError, OperationUnsupported
from kvik.host.files import host_error
from kvik.host.filesystem import shared_as
from kvik.host.reach import open_file
from kvik.host.threads import in_thread
from kvik.hypervisor.kvik import blk_monitor, support
from kvik.hypervisor.names import alias_of
from kvik.hypervisor.sidecars import kvik_blk, storage_daemon
from kvik.hypervisor.state import in_own_thread
from kvik.image.lock import lock_for_hosts

if TYPE_CHECKING:
    from kvik.hypervisor.kvik.machine import KvikMachine

__all__ = ["check", "clear", "put_on_top", "settle", "stands"]

logger = logging.getLogger(__name__)

_CONNECT = 5.0  # seconds
_DYING = 1.0  # seconds
_DEADLINE = 60.0  # seconds: what the guest wrote is written out first


class _Served(NamedTuple):
    disk: Disk
    monitor: blk_monitor.Monitor
    below: int  # our own descriptor of the image that comes to lie below


def _node(disk: Disk) -> str:
    if disk.source is None or disk.source.index is None:
        raise ConfigError(f"the new image of disk {disk.target.dev} has no number")
    return f"{alias_of(disk)}-{disk.source.index}-format"


def check(machine: KvikMachine, disks: Sequence[Disk]) -> None:
    """`OperationUnsupported` for a disk that can have no new image while the machine runs."""
    for disk in disks:
        if alias_of(disk) in machine.own_disks:
            _check_next_start(machine, disk)
        elif machine.storage_kind(disk) != kvik_blk.KIND:
            raise OperationUnsupported(
                f"disk {disk.target.dev} of machine {machine.name} is served by {machine.storage_kind(disk)}, which "
                "takes no new image while it runs",
                remedy=f"shut it down first: kvik shutdown {machine.name}; or leave the disk out: "
                f"--diskspec {disk.target.dev},snapshot=no",
            )


def _check_next_start(machine: KvikMachine, disk: Disk) -> None:
    """With a qcow2 image on top kvik-blk serves the disk from the next start on: it has to be able to."""
    next_time = tree.clone(disk)
    next_time.driver = next_time.driver or DiskDriver()
    next_time.driver.type = "qcow2"
    try:
        support.check_device(next_time)
    except ConfigUnsupported as error:
        raise OperationUnsupported(
            f"disk {disk.target.dev} of machine {machine.name} could not be started again with a new image on top: "
            f"{error}",
            remedy=f"{error.remedy}; or leave the disk out: --diskspec {disk.target.dev},snapshot=no",
        ) from error


async def put_on_top(
    machine: KvikMachine,
    new: Sequence[Disk],
    old: Mapping[str, Disk],
    within: Callable[[], Awaitable[None]] | None = None,
) -> int:
    """For how many microseconds the guest stood still; 0 if it did before. `within` is called meanwhile. Raises
    `MonitorError`, `HostError`; then nothing has changed. After any other error `stands` tells."""
    group = uuid4().hex
    async with AsyncExitStack() as stack:
        served: list[_Served] = []
        try:
            for disk in new:
                served.append(await _connect(machine, disk, old[alias_of(disk)], stack))
                await _add(served[-1], group)
            held = await _change_over(machine, served, within)
        except BaseException:
            machine.overlays_in_doubt = True
            await asyncio.shield(_all(served, "x-kvik-overlay-drop", quietly=True))
            raise
        await _all(served, "x-kvik-overlay-keep", quietly=True)
        for one in served:
            if shared_as(one.below):
                with contextlib.suppress(KvikError):
                    await in_thread(lock_for_hosts, one.below, str(one.disk.target.dev), write=False)
        return held


async def _connect(machine: KvikMachine, disk: Disk, old: Disk, stack: AsyncExitStack) -> _Served:
    alias = alias_of(disk)
    monitor: blk_monitor.Monitor = blk_monitor.Own(machine, alias)
    if alias not in machine.own_disks:
        path = storage_daemon.monitor_path(machine.directory, alias)
        connection = await storage_daemon.connect(path, f"kvik-blk of {alias}", _CONNECT)
        stack.callback(connection.close)
        monitor = connection
    location = old.source.location if old.source is not None else None
    if not location:
        raise ConfigError(f"disk {disk.target.dev} has no image")
    below = await open_file(location, os.O_RDONLY | os.O_NONBLOCK)
    stack.callback(os.close, below)
    if alias in machine.own_disks:  # the VMM's loop is not to wait for the medium
        await in_own_thread(lambda: _write_out(below, location))
    return _Served(disk, monitor, below)


def _write_out(fd: int, path: str) -> None:
    try:
        os.fdatasync(fd)
    except OSError as error:
        raise host_error("write out", path, error) from error


async def _add(one: _Served, group: str) -> None:
    disk, monitor = one.disk, one.monitor
    assert disk.source is not None and disk.source.file
    direct = disk.driver is not None and disk.driver.cache in ("none", "directsync")
    arguments = {"node-name": _node(disk), "group": group, "filename": disk.source.file}
    with ExitStack() as close:
        fds = {"below": one.below}
        for name in ("image", "data") if direct else ("image",):
            fds[name] = await open_file(disk.source.file, os.O_RDWR | os.O_NOFOLLOW)
            close.callback(os.close, fds[name])
        if shared_as(fds["image"]):
            await in_thread(lock_for_hosts, fds["image"], disk.source.file, write=True)
        for name, fd in fds.items():
            arguments[name] = f"{name}-{alias_of(disk)}"
            await monitor.execute("getfd", {"fdname": arguments[name]}, fds=[fd])
        try:
            await monitor.execute("x-kvik-overlay-add", arguments, deadline=_DEADLINE)
        except MonitorError as error:
            if error.qmp_class != "CommandNotFound":
                raise
            raise OperationUnsupported(
                f"disk {disk.target.dev}: the program that serves it was started by an older kvik, which could not do "
                "that while the machine runs",
                remedy="shut the machine down for this snapshot, or start it again",
            ) from error


async def _change_over(
    machine: KvikMachine, served: Sequence[_Served], within: Callable[[], Awaitable[None]] | None
) -> int:
    running = await machine.state() == "running"
    began = time.monotonic()
    try:
        if running:
            await machine.pause()
        if within is not None:
            await within()
        await _all(served, "x-kvik-overlay-put")
        if running:
            await machine.go_on()
    except BaseException:
        await asyncio.shield(_all(served, "x-kvik-overlay-drop", quietly=True))
        machine.overlays_in_doubt = True
        if running:
            await asyncio.shield(machine.resume())
        raise
    return int((time.monotonic() - began) * 1e6) if running else 0


async def _all(served: Sequence[_Served], command: str, *, quietly: bool = False) -> None:
    """Of all at once; the first error when each has answered."""
    answers = await asyncio.gather(
        *(one.monitor.execute(command, deadline=_DEADLINE) for one in served), return_exceptions=True
    )
    for answer in answers:
        if isinstance(answer, BaseException) and not (quietly and isinstance(answer, KvikError)):
            raise answer
        if isinstance(answer, BaseException):
            logger.warning("%s: %s", command, answer)


async def _reports(machine: KvikMachine, aliases: set[str] | None = None) -> dict[str, dict[str, Any]]:
    """What the VMM says of its own disks, and each kvik-blk that lives of its image, by alias. One of an older kvik
    has none on top."""
    found: dict[str, dict[str, Any]] = {}
    members = sorted(machine.own_disks if aliases is None else machine.own_disks & aliases)
    for member in list(machine.sidecars):
        wanted = member.kind == kvik_blk.KIND and member.process.alive
        if not wanted or (aliases is not None and member.alias not in aliases):
            continue
        members.append(member.alias)
    for alias in members:
        try:
            told = await _ask(machine, alias, "x-kvik-query-overlay")
        except MonitorError as error:
            if error.qmp_class != "CommandNotFound":
                raise
            told = {"state": "none", "top": ""}
        except KvikError:
            dying = [member for member in machine.sidecars if member.alias == alias and alias not in machine.own_disks]
            for member in dying:
                with contextlib.suppress(KvikError):
                    await member.process.wait_async(_DYING)
            if not dying or any(member.process.alive for member in dying):
                raise
            continue  # it died just now: what takes its place has what the document says
        if isinstance(told, dict):
            found[alias] = told
    return found


async def _ask(machine: KvikMachine, alias: str, command: str) -> Any:
    if alias in machine.own_disks:
        return await blk_monitor.Own(machine, alias).execute(command, deadline=_DEADLINE)
    path = storage_daemon.monitor_path(machine.directory, alias)
    connection = await storage_daemon.connect(path, f"kvik-blk of {alias}", _CONNECT)
    try:
        return await connection.execute(command, deadline=_DEADLINE)
    finally:
        connection.close()


async def settle(machine: KvikMachine) -> None:
    """Before the guest goes on: what was put on some disks and not on others is taken from all of them."""
    if not machine.overlays_in_doubt:
        return
    groups: dict[str, dict[str, str]] = {}
    for alias, told in (await _reports(machine)).items():
        if told.get("state") in ("added", "on-top"):
            groups.setdefault(str(told.get("group")), {})[alias] = told["state"]
    for states in groups.values():
        whole = all(state == "on-top" for state in states.values())
        for alias in states:
            await _ask(machine, alias, "x-kvik-overlay-keep" if whole else "x-kvik-overlay-drop")
    machine.overlays_in_doubt = False


async def stands(machine: KvikMachine, new: Sequence[Disk]) -> bool:
    """Whether the guest writes to these images. Raises `HypervisorError` where nobody says so."""
    await settle(machine)
    told = await _reports(machine, {alias_of(disk) for disk in new})
    on_top = [told[alias_of(disk)].get("top") == _node(disk) for disk in new if alias_of(disk) in told]
    if not on_top:
        raise HypervisorError(f"{machine.name}: no process that serves its disks says which images it writes to")
    if any(on_top) and not all(on_top):
        raise HypervisorError(f"{machine.name}: some of its disks have their new images, and others not")
    return all(on_top)


async def clear(machine: KvikMachine, new: Sequence[Disk]) -> None:
    for alias, told in (await _reports(machine, {alias_of(disk) for disk in new})).items():
        if told.get("state") != "none":
            await _ask(machine, alias, "x-kvik-overlay-drop")
