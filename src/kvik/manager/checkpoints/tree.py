"""The checkpoints of one machine in memory: who comes from whom, and lists of them as libvirt filters.

Without redefining they are a line, each the child of the one before it: a machine does not go back to a checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping

from kvik.conf.checkpoint import Checkpoint
from kvik.conf.enums import DomainCheckpointListFlags as ListFlags
from kvik.errors import NoCheckpoint
from kvik.manager.ancestry import Ancestry

__all__ = ["Checkpoints"]


class Checkpoints(Ancestry):
    """`pending` are those that a daemon was about to make: nobody was told of them, bitmaps may be there."""

    __slots__ = ("all", "pending")

    def __init__(self) -> None:
        self.all: dict[str, Checkpoint] = {}
        self.pending: dict[str, Checkpoint] = {}

    @property
    def nodes(self) -> Mapping[str, Checkpoint]:
        return self.all

    def get(self, name: str) -> Checkpoint:
        try:
            return self.all[name]
        except KeyError:
            raise NoCheckpoint(f"no domain checkpoint with matching name '{name}'") from None

    @property
    def current(self) -> str | None:
        """What the next one comes from: the latest without children."""
        leaves = [name for name in self.all if not self.children(name)]
        return max(leaves, key=lambda name: (self.all[name].creation_time or 0, name), default=None)

    def listing(self, flags: int, start: str | None = None) -> list[str]:
        """The names that virDomainCheckpointListFlags ask for: of all, or of those that come from `start`."""
        found = self.family(start, first=bool(flags & ListFlags.ROOTS), topological=bool(flags & ListFlags.TOPOLOGICAL))
        leaves = flags & (ListFlags.LEAVES | ListFlags.NO_LEAVES)
        if leaves in (ListFlags.LEAVES, ListFlags.NO_LEAVES):
            found = [name for name in found if bool(self.children(name)) == (leaves == ListFlags.NO_LEAVES)]
        return found
