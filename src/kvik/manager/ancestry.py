"""Who comes from whom among a machine's snapshots, or its checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

__all__ = ["Ancestry"]


class Parent(Protocol):
    @property
    def name(self) -> str | None: ...


class Child(Protocol):
    @property
    def parent(self) -> Parent | None: ...


class Ancestry:
    """What a tree of documents that name their parents can be asked."""

    __slots__ = ()

    @property
    def nodes(self) -> Mapping[str, Child]:
        """By name; each tree has its own."""
        raise NotImplementedError  # each tree's own

    def __len__(self) -> int:
        return len(self.nodes)

    def parent(self, name: str) -> str | None:
        """The name of its parent, if that is still there."""
        stated = self.nodes[name].parent
        return stated.name if stated is not None and stated.name in self.nodes else None

    def children(self, name: str | None) -> list[str]:
        """The children of one, or those without parents, by name."""
        return sorted(other for other in self.nodes if self.parent(other) == name)

    def descendants(self, name: str | None) -> Iterator[str]:
        """All that come from one (or all there are), parents before their children."""
        waiting = self.children(name)[::-1]
        while waiting:
            found = waiting.pop()
            yield found
            waiting += self.children(found)[::-1]

    def family(self, start: str | None, *, first: bool, topological: bool) -> list[str]:
        """What libvirt's lists begin with. `first` is the flag that means ROOTS without a `start`, and DESCENDANTS with
        one; without `topological` by name."""
        below = self.descendants(start) if (start is None) is not first else self.children(start)
        return list(below) if topological else sorted(below)
