"""Going back to a snapshot: new images on those that keep it, so that it can be gone back to again and again.

What was written since the last snapshot of the state that is left is given up; every snapshot stays as it was.
"""

from __future__ import annotations

import os
from os.path import normpath
from typing import TYPE_CHECKING

from kvik.conf.domain import format_domain
from kvik.conf.enums import DomainSnapshotRevertFlags as Flags
from kvik.conf.snapshot import Snapshot
from kvik.errors import InvalidArgument, OperationInvalid
from kvik.host.reach import reach
from kvik.host.threads import in_thread
from kvik.hypervisor.firmware import pristine_variables, reset_variables
from kvik.manager import lifecycle, prepare, starting
from kvik.manager.backup.busy import check_no_backup
from kvik.manager.definition import Definition
from kvik.manager.saved.machine import Saved, without_sockets, without_taps
from kvik.manager.saved.managed import check_no_managed_save
from kvik.manager.snapshots import apply, collect, firmware, inside, memory
from kvik.manager.snapshots.create import free_name, make_overlays, makers, overlay_of, put_on_top
from kvik.manager.snapshots.files import kept_disks, kind_of
from kvik.manager.snapshots.journal import Journal
from kvik.storage import overlays
from kvik.storage.overlays import Facts

if TYPE_CHECKING:
    from kvik.manager.domain import DomainObject

__all__ = ["revert"]


async def revert(domain: DomainObject, name: str, flags: int) -> None:
    """The machine is off afterwards, or runs if it did when the snapshot was taken or `flags` say so."""
    if flags & Flags.RUNNING and flags & Flags.PAUSED:
        raise InvalidArgument("a machine cannot be both running and paused")
    async with domain.jobs.hold("revert", limit=apply.LONG):
        await apply.settle(domain)
        check_no_managed_save(domain, "going back")
        check_no_backup(domain, "going back")
        snapshot = domain.snapshots.get(name, domain.name)
        if snapshot.domain is None:
            raise OperationInvalid(
                f"snapshot '{name}' lacks domain '{domain.name}' rollback info", remedy="it was redefined without it"
            )
        if not domain.persistent:
            raise OperationInvalid(f"machine {domain.name!r} is transient", remedy="define it first")
        if flags & Flags.RESET_NVRAM:  # said before anything ends
            await reach(pristine_variables, snapshot.inactive or snapshot.domain)
        if inside.asked(snapshot):
            await _inside(domain, snapshot, flags)
            return
        forced = bool(flags & Flags.FORCE) and (snapshot.taken is None or snapshot.taken.memory is None)
        kept = None if forced else await memory.open_memory(domain, snapshot)
        try:
            if domain.is_active:
                await lifecycle.destroy(domain, False)
            new = await _disks(domain, name, snapshot)
            await _reset_variables(domain, flags)
            if kept is not None:
                # Before anything is collected: a disk that is not in the definition, only the machine that runs needs.
                await _go_on(domain, kept, new, flags)
            await collect.collect(domain)
            if kept is None and flags & (Flags.RUNNING | Flags.PAUSED):
                await starting.boot(domain, bool(flags & Flags.PAUSED), {})
        finally:
            if kept is not None:
                kept.close()


async def _inside(domain: DomainObject, snapshot: Snapshot, flags: int) -> None:
    """The images themselves go back; if it has memory, the VMM finds it in them."""
    assert snapshot.domain is not None
    _, found = await collect.planned(domain)
    await inside.check_can_go_back(domain, snapshot, found)
    if domain.is_active:
        await lifecycle.destroy(domain, False)
    document = (snapshot.inactive or snapshot.domain).copy()
    document.name, document.uuid = domain.name, domain.uuid_text
    redo = apply.redo_of(domain)
    redo.current = snapshot.name
    redo.apply = inside.places(snapshot)
    redo.definition = format_domain(document, secure=True, inactive=True)
    redo.restore = firmware.restores(domain, snapshot, document)
    await apply.commit(domain, Journal(operation=f"revert {snapshot.name}", phase="commit", redo=redo))
    await collect.collect(domain)
    await _reset_variables(domain, flags)
    tag = inside.tag_of(snapshot)
    if snapshot.memory is not None and snapshot.memory.snapshot == "internal" and tag is not None:
        live = without_sockets(snapshot.domain.copy(), domain.manager.paths.status)
        prepare.forget_run(live)
        without_taps(live, snapshot.inactive or snapshot.domain)
        live.name, live.uuid = domain.name, domain.uuid_text
        targets = frozenset(disk.target.dev or "" for disk in inside.disks_of(live, snapshot))
        paused = bool(flags & Flags.PAUSED) or not (snapshot.state == "running" or flags & Flags.RUNNING)
        kept = Saved(None, snapshot=True, inside=(tag, targets), running=not paused)
        await starting.boot(domain, paused, {}, config=Definition(live), saved=kept)
    elif flags & (Flags.RUNNING | Flags.PAUSED):
        await starting.boot(domain, bool(flags & Flags.PAUSED), {})


async def _reset_variables(domain: DomainObject, flags: int) -> None:
    """Not those that were kept with the snapshot, if so wanted."""
    if flags & Flags.RESET_NVRAM:
        await in_thread(reset_variables, domain.definition)


async def _go_on(domain: DomainObject, kept: Saved, new: dict[str, str], flags: int) -> None:
    """With its memory, on the new images; as it was then, unless `flags` say how."""
    document = await memory.document_of(domain, kept)
    put_on_top(document, new)
    paused = bool(flags & Flags.PAUSED) or not (kept.running or flags & Flags.RUNNING)
    await starting.boot(domain, paused, {}, config=Definition(document), saved=kept)


async def _disks(domain: DomainObject, name: str, snapshot: Snapshot) -> dict[str, str]:
    """The new images, by target."""
    assert snapshot.domain is not None
    document = (snapshot.inactive or snapshot.domain).copy()
    document.name, document.uuid = domain.name, domain.uuid_text
    below = await reach(_facts, snapshot)
    new = await reach(_names, below, name)
    journal = Journal(operation=f"revert {name}", phase="prepare", made=sorted(new.values()))
    await apply.begin(domain, journal)
    try:
        await in_thread(make_overlays, new, below, makers(domain.manager, document), tracked=True)
        put_on_top(document, new)
        redo = apply.redo_of(domain)
        redo.current = name
        redo.made = sorted({*redo.made, *new.values()})
        redo.originals = sorted(
            {*redo.originals, *(item.path for item in below.values() if item.path not in redo.made)}
        )
        redo.definition = format_domain(document, secure=True, inactive=True)
        redo.restore = firmware.restores(domain, snapshot, document)
    except BaseException:
        await apply.abandon(domain)
        raise
    journal.redo = redo
    await apply.commit(domain, journal)
    return new


def _facts(snapshot: Snapshot) -> dict[str, Facts]:
    return {
        disk.target.dev or "": overlays.look(normpath(disk.source.location or ""), kind_of(disk))
        for disk, _ in kept_disks(snapshot)
        if disk.source is not None
    }


def _names(below: dict[str, Facts], name: str) -> dict[str, str]:
    """Where each disk's new image goes (blocking)."""
    found: dict[str, str] = {}
    for target, facts in below.items():
        wanted = overlay_of(facts.path, f"{name}-now")
        found[target] = free_name(wanted, lambda path: os.path.lexists(path) or path in found.values())
    return found
