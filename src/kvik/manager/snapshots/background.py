"""A snapshot whose memory is written while the guest goes on, as it was when the disks changed over.

    ready     memory's file begun, VMM watching, new images made               the guest runs
    instant   memory protected, variables and TPM copied, all disks changed    the guest stands still
    behind    journal: the disks alone; memory is written; journal: the snapshot   the guest runs

What fails before the instant is taken back as any. What fails behind it leaves disks with new images and no snapshot:
these are merged as a deleted snapshot's are (`collect`).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING
from uuid import uuid4

from kvik.conf.devices.disk import Disk
from kvik.conf.enums import DomainJobOperation, DomainState
from kvik.conf.enums import DomainSnapshotCreateFlags as Flags
from kvik.conf.snapshot import Snapshot, SnapshotTaken, format_snapshot
from kvik.errors import KvikError, OperationUnsupported
from kvik.host.threads import in_thread
from kvik.hypervisor.driver import Feature
from kvik.hypervisor.state import LiveSave
from kvik.manager.saved import machine as saved
from kvik.manager.saved.image import Writer
from kvik.manager.snapshots import apply, images, live
from kvik.manager.snapshots.collect import collect_quietly
from kvik.manager.snapshots.journal import Journal

if TYPE_CHECKING:
    from kvik.manager.domain import DomainObject

__all__ = ["LiveMemory", "begin", "take", "wanted"]


class LiveMemory:
    """A file that the VMM's memory is on its way to."""

    def __init__(self, domain: DomainObject, writer: Writer, save: LiveSave) -> None:
        self._domain, self._writer, self._save = domain, writer, save

    async def freeze(self) -> None:
        await self._save.freeze()

    async def finish(self) -> None:
        """It is in its place, durably."""
        await self._save.finish()
        if self._domain.run is not None:
            await in_thread(saved.sync_disks, self._domain.run.live)
        await in_thread(self._writer.place)
        await self._save.close()

    async def give_up(self) -> None:
        await self._save.close()
        await in_thread(self._writer.discard)


def wanted(domain: DomainObject, flags: int) -> bool:
    """Whether it is to be tried: there is a guest that would stand still otherwise, and goes on afterwards."""
    possible = Feature.SAVES_AT_AN_INSTANT in domain.driver.features()
    return possible and bool(flags & Flags.LIVE) and not flags & Flags.HALT and domain.state == DomainState.RUNNING


async def begin(domain: DomainObject, path: str) -> LiveMemory:
    """`OperationUnsupported` with why this machine has to stand still instead."""
    run = domain.run
    assert run is not None
    saved.check_can_save(domain)
    text = saved.saved_document(run.live, run.directory, domain.config.parse())
    writer = await in_thread(Writer, path, text, driver=domain.driver.name, token=uuid4().hex, running=True)
    try:
        writer.total = (run.live.memory or 0) * 1024
        save = await domain.require_machine().save_live(writer)
    except BaseException as error:
        await in_thread(writer.discard)
        if isinstance(error, OperationUnsupported):
            domain.log.note(f"it stands still for its snapshot: {error}")
        raise
    saved.follow(domain, writer, DomainJobOperation.SNAPSHOT)
    return LiveMemory(domain, writer, save)


async def take(
    domain: DomainObject,
    journal: Journal,
    snapshot: Snapshot,
    flags: int,
    *,
    memory: LiveMemory,
    keep: Callable[[], Awaitable[None]],
) -> None:
    """`keep` copies what else belongs to that instant. The journal is "ready", and knows what is unfinished."""
    assert snapshot.name is not None

    async def within() -> None:
        await memory.freeze()
        await keep()

    before, on_top = apply.redo_of(domain), images.wanted(domain, journal.redo.live)
    try:
        held = await live.take(domain, journal, snapshot, flags, within)
        await memory.finish()
        snapshot.taken = snapshot.taken or SnapshotTaken()
        snapshot.taken.pause = held
        redo = apply.redo_of(domain)
        if not flags & Flags.NO_METADATA:
            redo.write[snapshot.name] = format_snapshot(snapshot, secure=True)
            redo.current = snapshot.name
        else:  # nobody will ask for these files to be removed again
            redo.made, redo.originals = before.made, before.originals
        await apply.commit(domain, Journal(operation=journal.operation, phase="commit", redo=redo))
    except BaseException:
        await asyncio.shield(_take_back(domain, memory, on_top))
        raise


async def _take_back(domain: DomainObject, memory: LiveMemory, on_top: list[Disk]) -> None:
    await memory.give_up()
    rest = domain.snapshots.journal
    if rest is not None and rest.phase == "prepare":
        await apply.abandon(domain)
        domain.manager.spawn(_merge(domain, on_top))


async def _merge(domain: DomainObject, on_top: list[Disk]) -> None:
    """Once the machine's job is over. A disk whose process has died is served again first."""
    with contextlib.suppress(KvikError):
        await domain.require_machine().has_on_top(on_top)
    await collect_quietly(domain)
