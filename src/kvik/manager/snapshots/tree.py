"""The snapshots of one machine in memory: who comes from whom, which is current, and lists of them as libvirt filters.

Nothing here waits, reads or writes: the tree is what the last journal that was carried out says (`store`, `journal`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from kvik.conf.enums import DomainSnapshotListFlags as ListFlags
from kvik.conf.snapshot import Snapshot
from kvik.errors import NoSnapshot
from kvik.manager.ancestry import Ancestry

if TYPE_CHECKING:
    from kvik.manager.snapshots.journal import Journal

__all__ = ["Tree"]

_WITHIN = {  # groups of flags: within one any, between them all (libvirt's virDomainSnapshotListFlags)
    "leaves": ListFlags.LEAVES | ListFlags.NO_LEAVES,
    "metadata": ListFlags.METADATA | ListFlags.NO_METADATA,
    "state": ListFlags.INACTIVE | ListFlags.ACTIVE | ListFlags.DISK_ONLY,
    "place": ListFlags.INTERNAL | ListFlags.EXTERNAL,
}


class Tree(Ancestry):
    """`made` are image files that snapshots of this machine created and may take away again; `originals` those that
    were there before and that a snapshot put an image on: data may be merged into them, and they are never removed."""

    __slots__ = ("current", "inside", "journal", "made", "originals", "snapshots")

    def __init__(self) -> None:
        self.snapshots: dict[str, Snapshot] = {}
        self.current: str | None = None
        self.made: set[str] = set()
        self.originals: set[str] = set()
        self.inside: set[tuple[str, str]] = set()  # (image, name) of deleted ones that are still inside
        self.journal: Journal | None = None  # an operation that a daemon before us did not finish

    @property
    def nodes(self) -> Mapping[str, Snapshot]:
        return self.snapshots

    def get(self, name: str, machine: str) -> Snapshot:
        try:
            return self.snapshots[name]
        except KeyError:
            raise NoSnapshot(f"no domain snapshot with matching name '{name}' (machine {machine!r})") from None

    def is_ancestor(self, name: str, of: str) -> bool:
        step = self.parent(of)
        while step is not None:
            if step == name:
                return True
            step = self.parent(step)
        return False

    def listing(self, flags: int, start: str | None = None) -> list[str]:
        """The names that virDomainSnapshotListFlags ask for: of the whole tree, or of those that come from `start`."""
        found = self.family(start, first=bool(flags & ListFlags.ROOTS), topological=bool(flags & ListFlags.TOPOLOGICAL))
        for group in _WITHIN.values():
            chosen = flags & group
            if chosen and chosen != group:
                found = [name for name in found if self._bits(name) & chosen]
        return found

    def _bits(self, name: str) -> int:
        snapshot = self.snapshots[name]
        bits = ListFlags.METADATA | (ListFlags.NO_LEAVES if self.children(name) else ListFlags.LEAVES)
        if snapshot.state == "shutoff":
            bits |= ListFlags.INACTIVE
        elif snapshot.state == "disk-snapshot":
            bits |= ListFlags.DISK_ONLY
        else:
            bits |= ListFlags.ACTIVE
        return bits | (ListFlags.EXTERNAL if snapshot.external else ListFlags.INTERNAL)
