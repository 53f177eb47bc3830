"""Snapshots of disks while the guest runs: the VMM is told to write to all new images in one step.

The guest's processors go on; its requests to the disks wait while the images change, and how long that was is kept with
the snapshot. With `quiesce` the guest's agent writes its file systems out and holds them still around that step.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import ExitStack, asynccontextmanager
from typing import TYPE_CHECKING

from kvik.conf.devices.disk import Disk
from kvik.conf.enums import DomainSnapshotCreateFlags as Flags
from kvik.conf.enums import DomainState
from kvik.conf.snapshot import Snapshot, SnapshotTaken, format_snapshot
from kvik.errors import KvikError, OperationInvalid, OperationTimeout, OperationUnsupported
from kvik.hypervisor.driver import Feature, Machine
from kvik.hypervisor.names import alias_of
from kvik.manager import lifecycle
from kvik.manager.secrets import open_secrets
from kvik.manager.snapshots import apply
from kvik.manager.snapshots.images import wanted
from kvik.manager.snapshots.journal import Journal

if TYPE_CHECKING:
    from kvik.manager.domain import DomainObject

logger = logging.getLogger(__name__)

__all__ = ["check", "get_ready", "take"]

FREEZE_DEADLINE = 60.0  # seconds for a guest to write out what it has in memory
THAW_DEADLINE = 30.0


def check(domain: DomainObject, flags: int, targets: Collection[str]) -> None:
    """`OperationUnsupported`, `OperationInvalid` before anything is begun; `targets`: the disks of the snapshot."""
    if Feature.SNAPSHOTS not in domain.driver.features():
        raise OperationUnsupported(
            f"{domain.driver.name} cannot put new images on top of the disks of a machine that runs",
            remedy=f"shut it down first: kvik shutdown {domain.name}; a snapshot of it can be taken then",
        )
    machine = domain.require_machine()
    if domain.run is not None:
        machine.check_on_top([disk for disk in domain.run.live.devices.disks if disk.target.dev in targets])
    if flags & Flags.QUIESCE:
        if domain.state != DomainState.RUNNING:
            raise OperationInvalid(f"machine {domain.name!r} is not running: its agent cannot quiesce it")
        if domain.run is None or not domain.run.stages.has("agent"):
            raise OperationInvalid(
                f"machine {domain.name!r}: its agent is not connected, which quiescing needs",
                remedy="start qemu-guest-agent in the guest, or leave --quiesce out",
            )


async def get_ready(domain: DomainObject, journal: Journal, new: dict[str, str]) -> None:
    """The images are whole; from here on the VMM decides whether the snapshot was taken."""
    machine = domain.require_machine()
    for target, path in new.items():
        number = await machine.next_image()
        taken = [image[1] for image in journal.redo.live.values()]
        journal.redo.live[target] = (path, max(number, *[item + 1 for item in taken]) if taken else number)
    journal.phase = "ready"
    await apply.begin(domain, journal)


async def take(
    domain: DomainObject,
    journal: Journal,
    snapshot: Snapshot,
    flags: int,
    within: Callable[[], Awaitable[None]] | None = None,
) -> int | None:
    """For how many microseconds the guest was held up, if that is known. `within` is called while it stands still."""
    machine = domain.require_machine()
    assert domain.run is not None and snapshot.name is not None
    new = wanted(domain, journal.redo.live)
    aliases = {alias_of(disk) for disk in new}
    old = {alias_of(disk): disk for disk in domain.run.live.devices.disks if alias_of(disk) in aliases}
    paused = bool(flags & Flags.HALT) and domain.state == DomainState.RUNNING
    try:
        if paused:
            await machine.pause()
        async with _told_before(domain):
            with ExitStack() as lent:
                secrets = open_secrets(domain.manager.secrets, new, lent)
                held = await _step(machine, new, old, secrets, within, quiesce=bool(flags & Flags.QUIESCE))
    except KvikError as error:
        if not await _stands(domain, machine, journal, error):
            await apply.abandon(domain)
            if paused:
                await machine.resume()
            raise
        held = None
    if snapshot.name in journal.redo.write:
        snapshot.taken = snapshot.taken or SnapshotTaken()
        snapshot.taken.pause = held
        journal.redo.write[snapshot.name] = format_snapshot(snapshot, secure=True)
    await (apply.commit_disks if journal.unfinished else apply.commit)(domain, journal)
    if flags & Flags.HALT:
        await lifecycle.destroy(domain, False)
    return held


@asynccontextmanager
async def _told_before(domain: DomainObject) -> AsyncIterator[None]:
    """A VMM that stops its guest for that may be found stopped by the next daemon: the status says that it ran. Nothing
    where the guest stands still already, for its memory."""
    run = domain.run
    if Feature.SNAPSHOTS_STOP not in domain.driver.features() or run is None or run.unfinished:
        yield
        return
    running = domain.state == DomainState.RUNNING
    run.unfinished = {"operation": "snapshot", "run": running}
    await domain.save_status()
    run.pause_cause = "snapshot" if running else ""
    try:
        yield
    finally:
        run.unfinished, run.pause_cause = {}, ""
        await domain.save_quietly()


async def _step(
    machine: Machine,
    new: list[Disk],
    old: dict[str, Disk],
    secrets: dict[str, int],
    within: Callable[[], Awaitable[None]] | None,
    *,
    quiesce: bool,
) -> int:
    """Microseconds that the guest's requests waited at most."""
    if not quiesce:
        return await machine.put_on_top(new, old, secrets, within)
    try:
        await machine.agent("guest-fsfreeze-freeze", timeout=FREEZE_DEADLINE)
        return await machine.put_on_top(new, old, secrets)
    finally:
        # Also where freezing failed half-way: a guest whose file systems stand still is a guest that hangs.
        try:
            await machine.agent("guest-fsfreeze-thaw", timeout=THAW_DEADLINE)
        except KvikError as error:
            logger.warning("the guest's file systems were not thawed: %s", error)


async def _stands(domain: DomainObject, machine: Machine, journal: Journal, error: KvikError) -> bool:
    """Whether the VMM writes to the new images although something failed. Where it does not say, the journal stays:
    the next operation, or the next daemon, asks again."""
    try:
        return await machine.has_on_top(wanted(domain, journal.redo.live))
    except KvikError:
        raise OperationTimeout(
            f"machine {domain.name!r} does not say whether its snapshot was taken: {error}",
            remedy="the next operation on its snapshots asks again; nothing is lost either way",
        ) from error
