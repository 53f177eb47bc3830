"""What the daemon keeps of a machine's past, a document each that may name its parent: snapshots and checkpoints."""

from __future__ import annotations

from kvik.errors import NotFound

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, ClassVar, Self

    from kvik.client.domain import Domain

__all__ = ["Recorded"]


class Recorded:
    """One of them. `KIND` is its word in the names of procedures, `MISSING` the error that says that there is none."""

    __slots__ = ("domain", "name")
    KIND: ClassVar[str]
    MISSING: ClassVar[type[NotFound]]

    def __init__(self, domain: Domain, name: str) -> None:
        self.domain = domain
        self.name = name

    @property
    def ref(self) -> tuple[str, tuple[str, bytes, int]]:
        return (self.name, self.domain.ref)

    def _call(self, what: str, *values: Any) -> Any:
        return self.domain.connection.call(f"DOMAIN_{self.KIND}_{what}", self.ref, *values)

    def xml(self, flags: int = 0) -> str:
        """`flags`: of its kind (virDomainSnapshotXMLFlags, virDomainCheckpointXMLFlags); 1 with passwords."""
        return str(self._call("GET_XML_DESC", flags)[0])

    def parent(self) -> Self | None:
        try:
            found = self._call("GET_PARENT", 0)[0]
        except self.MISSING:
            return None
        return type(self)(self.domain, found[0])

    def children(self, flags: int = 0) -> list[Self]:
        """Those that come from it; with 1 (DESCENDANTS) theirs in turn."""
        return [type(self)(self.domain, item[0]) for item in self._call("LIST_ALL_CHILDREN", 1, flags)[0]]

    def delete(self, flags: int = 0) -> None:
        """1 with all that come from it, 2 its metadata alone, 4 what comes from it and not itself."""
        self._call("DELETE", flags)
