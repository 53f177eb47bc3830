"""From a journal to the truth: what every operation ends with, and what the next daemon does with a broken one.

what is found   then
prepare         what the operation made is removed: it was never heard of
ready           the VMM says which image it writes to; if it is gone, images that nobody has written to are removed,
                and else the snapshot stands
commit          carried out again from the start; then what is unfinished goes, and images that nothing needs are merged
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from kvik.conf.domain import parse_domain
from kvik.conf.snapshot import parse_snapshot
from kvik.errors import KvikError, OperationFailed
from kvik.host.reach import about, reach
from kvik.host.threads import in_thread
from kvik.manager import pivots
from kvik.manager.definition import Definition
from kvik.manager.disks import renew_uses
from kvik.manager.snapshots import files, firmware, images, inside
from kvik.manager.snapshots.journal import Journal, Redo
from kvik.manager.snapshots.store import SnapshotStore
from kvik.storage import inside as images_inside
from kvik.storage import overlays

if TYPE_CHECKING:
    from kvik.manager.domain import DomainObject

logger = logging.getLogger(__name__)

LONG = 7 * 24 * 3600.0  # seconds that copying data may take

__all__ = ["LONG", "abandon", "begin", "commit", "commit_disks", "redo_of", "save_tree", "settle", "store_of"]


def store_of(domain: DomainObject) -> SnapshotStore:
    return SnapshotStore(domain.manager.paths.snapshots / domain.name)


def redo_of(domain: DomainObject) -> Redo:
    """Nothing changed yet."""
    tree = domain.snapshots
    return Redo(
        current=tree.current, made=sorted(tree.made), originals=sorted(tree.originals), inside=sorted(tree.inside)
    )


async def begin(domain: DomainObject, journal: Journal) -> None:
    """The intent is on disk when this returns."""
    await domain.manager.store.run(store_of(domain).write_journal, journal)
    domain.snapshots.journal = journal


async def abandon(domain: DomainObject) -> None:
    """Take back what was begun."""
    journal = domain.snapshots.journal
    if journal is None:
        return
    if journal.inside:
        domain.snapshots.inside.update(journal.inside)
        await domain.manager.store.run(store_of(domain).carry_out, redo_of(domain))
    await in_thread(store_of(domain).undo, journal)
    domain.snapshots.journal = None
    if journal.inside and await inside.collect(domain):
        await save_tree(domain)


async def commit(domain: DomainObject, journal: Journal) -> None:
    """From the moment that the journal is on disk the operation has been done, whatever comes."""
    journal.phase = "commit"
    await domain.manager.store.run(store_of(domain).write_journal, journal)
    domain.snapshots.journal = journal
    await _carry_out(domain, journal)


async def save_tree(domain: DomainObject) -> None:
    """Which files are whose, after some of them were removed."""
    store, tree = store_of(domain), domain.snapshots
    if tree.snapshots or tree.made or tree.inside:
        await domain.manager.store.run(store.carry_out, redo_of(domain))
    else:
        tree.originals.clear()
        await domain.manager.store.run(store.forget)


async def commit_disks(domain: DomainObject, journal: Journal) -> None:
    """`commit` where the snapshot itself is not whole yet: what it still needs stays known to be unfinished."""
    journal.phase = "commit"
    await domain.manager.store.run(store_of(domain).write_journal, journal)
    domain.snapshots.journal = journal
    rest = Journal(operation=journal.operation, phase="prepare", made=journal.unfinished)
    await _carry_out(domain, journal, then=rest)


async def _carry_out(domain: DomainObject, journal: Journal, then: Journal | None = None) -> None:
    manager, store, redo, tree = domain.manager, store_of(domain), journal.redo, domain.snapshots
    await manager.store.run(store.carry_out, redo)
    for path, tag in redo.apply:
        await in_thread(images_inside.go_back, path, tag)
    for copy, path in redo.restore.items():
        await in_thread(firmware.put_back, copy, path)
    if redo.definition is not None:
        document = parse_domain(redo.definition)
        if domain.persistent:
            await manager.store.save_definition(domain.name, redo.definition)
        domain.config = Definition(document, redo.definition)
    if domain.run is not None and domain.is_active and images.put_on_top(domain, redo.live):
        await renew_uses(domain.run)
        await domain.save_status()
    for name, text in redo.write.items():
        tree.snapshots[name] = parse_snapshot(text)
    for name in redo.remove:
        tree.snapshots.pop(name, None)
    tree.current = redo.current if redo.current in tree.snapshots else None
    tree.made, tree.originals, tree.inside = set(redo.made), set(redo.originals), set(redo.inside)
    for path in redo.unlink:
        if await reach(_is_directory, path):  # a copy of a TPM's state
            await in_thread(shutil.rmtree, path, ignore_errors=True)
        else:
            await files.unlink(manager, path, domain.name)
    if then is None and journal.unfinished:
        then = Journal(operation=journal.operation, phase="prepare", made=journal.unfinished)
        await in_thread(store.undo, then)
    elif then is not None:
        await begin(domain, then)
        return
    await manager.store.run(store.end_journal, last=not (tree.snapshots or tree.made or tree.inside))
    tree.journal = None


def _is_directory(path: str) -> bool:
    about(path)
    return Path(path).is_dir() and not Path(path).is_symlink()


async def settle(domain: DomainObject) -> None:
    """End what was broken off, before anything else is done with the machine's images. `OperationFailed` if that cannot
    be done now."""
    await pivots.settle(domain)
    journal = domain.snapshots.journal
    if journal is None:
        return
    try:
        if journal.phase == "commit":
            await _carry_out(domain, journal)
        elif journal.phase == "ready":
            await _settle_live(domain, journal)
        else:
            await abandon(domain)
    except (KvikError, OSError) as error:
        raise OperationFailed(
            f"machine {domain.name!r}: the operation {journal.operation!r} on its snapshots was broken off and cannot "
            f"be ended now: {error}",
            remedy="mend what it says and try again: until then its images are left alone",
        ) from error
    logger.warning("machine %s: the operation %r on its snapshots was ended", domain.name, journal.operation)


async def _settle_live(domain: DomainObject, journal: Journal) -> None:
    """It may have been told to write to the new images, and have done so for hours; or not."""
    if domain.is_active:
        machine = domain.require_machine()
        new = images.wanted(domain, journal.redo.live)
        stands = await machine.has_on_top(new)
        if not stands:
            await machine.clear_image(new)
    else:
        stands = not await in_thread(_untouched, [path for path, _ in journal.redo.live.values()])
    if stands:
        await commit(domain, journal)
    else:
        await abandon(domain)


def _untouched(paths: list[str]) -> bool:
    """Whether nobody has written to any of these images, which were made empty."""
    return all(overlays.is_empty(path) for path in paths)
