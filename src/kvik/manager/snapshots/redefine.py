"""Telling the daemon of a snapshot that is there: its document brought back, corrected, or given another name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvik.conf.enums import DomainSnapshotCreateFlags as Flags
from kvik.conf.snapshot import Snapshot, SnapshotMemory, format_snapshot
from kvik.errors import ConfigError, ConfigUnsupported, NoSnapshot
from kvik.manager.snapshots import apply
from kvik.manager.snapshots.journal import Journal
from kvik.manager.snapshots.store import check_snapshot_name

if TYPE_CHECKING:
    from kvik.manager.domain import DomainObject

__all__ = ["redefine"]


async def redefine(domain: DomainObject, snapshot: Snapshot, flags: int) -> str:
    """No image is touched; the machine's job is the caller's."""
    tree = domain.snapshots
    name = snapshot.name
    if name is None:
        raise ConfigError("a redefined snapshot must have a name", path="/domainsnapshot/name")
    check_snapshot_name(name)
    if snapshot.creation_time is None:
        raise ConfigError("missing creationTime from existing snapshot", path="/domainsnapshot/creationTime")
    if snapshot.state is None:
        raise ConfigError("missing state from existing snapshot", path="/domainsnapshot/state")
    before = tree.snapshots.get(name)
    if snapshot.domain is None and before is not None:
        snapshot.domain = before.domain
    if snapshot.domain is not None and snapshot.domain.uuid not in (None, domain.uuid_text):
        raise ConfigUnsupported(
            f"definition for snapshot {name} must use uuid {domain.uuid_text}", path="/domainsnapshot/domain/uuid"
        )
    # It names files that are read and removed: only what a snapshot has already is taken over, as when it is renamed.
    if not any(snapshot.taken == other.taken for other in tree.snapshots.values()):
        snapshot.taken = before.taken if before is not None else None
    snapshot.memory = snapshot.memory or SnapshotMemory(snapshot="no")
    step = snapshot.parent.name if snapshot.parent is not None else None
    if step == name:
        raise ConfigError(f"cannot set snapshot {name} as its own parent", path="/domainsnapshot/parent")
    if step is not None and step not in tree.snapshots:
        raise NoSnapshot(f"parent {step} for snapshot {name} not found")
    while step is not None:
        if step == name:
            raise ConfigError(f"parent of snapshot {name} would create cycle", path="/domainsnapshot/parent")
        step = tree.parent(step)
    redo = apply.redo_of(domain)
    redo.write[name] = format_snapshot(snapshot, secure=True)
    if flags & Flags.CURRENT:
        redo.current = name
    await apply.commit(domain, Journal(operation=f"redefine {name}", phase="commit", redo=redo))
    return name
