"""Deleting snapshots. The documents go first, all at once; then data goes where it is still needed (`collect`)."""

from __future__ import annotations

from os.path import normpath
from typing import TYPE_CHECKING

from kvik.conf.enums import DomainSnapshotDeleteFlags as Flags
from kvik.conf.snapshot import SnapshotParent, format_snapshot
from kvik.errors import InvalidArgument, KvikError, OperationFailed
from kvik.manager.snapshots import apply, collect, firmware, inside
from kvik.manager.snapshots.files import kept_disks
from kvik.manager.snapshots.journal import Journal, Redo
from kvik.manager.snapshots.plan import BACK, FORWARD, needed

if TYPE_CHECKING:
    from kvik.manager.domain import DomainObject

__all__ = ["delete", "leaving", "planned"]


def leaving(domain: DomainObject, name: str, flags: int) -> list[str]:
    """The snapshots that go, parents first."""
    tree = domain.snapshots
    tree.get(name, domain.name)
    if flags & Flags.CHILDREN and flags & Flags.CHILDREN_ONLY:
        raise InvalidArgument("a snapshot can be deleted with its children, or its children alone; not both")
    found = [] if flags & Flags.CHILDREN_ONLY else [name]
    if flags & (Flags.CHILDREN | Flags.CHILDREN_ONLY):
        found += tree.descendants(name)
    return found


async def planned(domain: DomainObject, name: str, flags: int) -> list[str]:
    """What `delete` would do, a line each; nothing is done."""
    going = leaving(domain, name, flags)
    lines = [f"forget snapshot {item}" for item in going]
    for item in going:
        for child in domain.snapshots.children(item):
            if child not in going:
                heir = _heir(domain, item, set(going))
                lines.append(
                    f"snapshot {child} then comes from {heir}" if heir else f"snapshot {child} then has no parent"
                )
    if flags & Flags.METADATA_ONLY:
        return [*lines, "leave all images where they are"]
    for item in going:
        for path, tag in inside.places(domain.snapshots.snapshots[item]):
            lines.append(f"take snapshot {tag} out of {path}")
    steps, _ = await collect.planned(domain, frozenset(going))
    for step in steps:
        if step.kind == FORWARD:
            lines.append(f"copy up to {step.size} bytes from {step.path} into {step.into}, which rests on it")
            lines.append(f"remove {step.path}")
        elif step.kind == BACK:
            lines.append(f"copy up to {step.size} bytes from {step.path} into {step.into}, on which it rests")
            lines.append(f"remove {step.path}: {step.into} stands for it")
        else:
            lines.append(f"remove {step.path}")
    touched = {step.path for step in steps} | {step.into for step in steps}
    for item in going:
        for disk, _ in kept_disks(domain.snapshots.snapshots[item]):
            path = normpath((disk.source.location if disk.source else None) or "")
            if path not in touched:
                lines.append(f"leave {path}: {_why(domain, path, set(going))}")
                touched.add(path)
    return lines


def _why(domain: DomainObject, path: str, going: set[str]) -> str:
    for name, snapshot in domain.snapshots.snapshots.items():
        if name not in going and any(
            disk.source and normpath(disk.source.location or "") == path for disk, _ in kept_disks(snapshot)
        ):
            return f"snapshot {name} is kept in it"
    if domain.is_active:
        return "the machine has it open; dealt with when it is off"
    return "other images rest on it"


def _heir(domain: DomainObject, name: str, going: set[str]) -> str | None:
    """The nearest ancestor that stays."""
    step = domain.snapshots.parent(name)
    while step is not None and step in going:
        step = domain.snapshots.parent(step)
    return step


async def delete(domain: DomainObject, name: str, flags: int) -> None:
    """`OperationFailed` if the snapshots are gone but room could not be given back: what is left then is harmless."""
    async with domain.jobs.hold("delete-snapshot", limit=apply.LONG):
        await apply.settle(domain)
        going = leaving(domain, name, flags)
        if not going:
            return
        redo = _forget(domain, going)
        if flags & Flags.METADATA_ONLY:
            await _disown(domain, going, redo)
        await apply.commit(domain, Journal(operation=f"delete {name}", phase="commit", redo=redo))
        if flags & Flags.METADATA_ONLY:
            return
        try:
            await collect.collect(domain)
        except (KvikError, OSError) as error:
            raise OperationFailed(
                f"snapshot {name!r} is deleted, but not all of its room could be given back: {error}",
                remedy="every disk and snapshot is whole; it is tried again when the next snapshot is deleted, when "
                "the machine ends and when the daemon starts",
            ) from error


def _forget(domain: DomainObject, going: list[str]) -> Redo:
    tree, redo, gone = domain.snapshots, apply.redo_of(domain), set(going)
    redo.remove = going
    for item in going:
        for child in tree.children(item):
            if child in gone:
                continue
            heir = _heir(domain, item, gone)
            document = tree.snapshots[child]
            before, document.parent = document.parent, SnapshotParent(name=heir) if heir is not None else None
            redo.write[child] = format_snapshot(document, secure=True)
            document.parent = before
    copies = {path for item in going for path in firmware.copies_of(tree.snapshots[item])}
    kept = {  # of a renamed one
        path for name, item in tree.snapshots.items() if name not in gone for path in firmware.copies_of(item)
    }
    redo.unlink = sorted(copies - kept)
    redo.inside += [place for item in going for place in inside.places(tree.snapshots[item])]
    if redo.current in gone:
        redo.current = _heir(domain, redo.current, gone) if redo.current is not None else None
    return redo


async def _disown(domain: DomainObject, going: list[str], redo: Redo) -> None:
    """Without its metadata a snapshot's contents are the user's: nothing that they rest on is merged or removed."""
    theirs = {
        normpath(disk.source.location)
        for item in going
        for disk, _ in kept_disks(domain.snapshots.snapshots[item])
        if disk.source is not None and disk.source.location
    }
    _, found = await collect.planned(domain, frozenset(going))
    theirs = needed(found.layers, theirs - {top.path for top in found.tops})  # a renamed snapshot is kept in the same
    redo.inside = sorted(domain.snapshots.inside)
    redo.made = [path for path in redo.made if path not in theirs]
    own = str(apply.store_of(domain).directory)
    redo.unlink = [path for path in redo.unlink if path.startswith(f"{own}/")]  # not memory where a user wanted it
    redo.originals = [path for path in redo.originals if path not in theirs]
