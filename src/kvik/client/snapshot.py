"""Snapshots of a machine: libvirt's verbs in snake_case, each one call to the daemon.

`flags` are libvirt's of the procedure (virDomainSnapshotCreateFlags, ...ListFlags, ...RevertFlags, ...DeleteFlags).
"""

from __future__ import annotations

from kvik.client.recorded import Recorded
from kvik.errors import NoSnapshot

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.client.domain import Domain

__all__ = ["Snapshot", "create", "current", "has_current", "lookup", "snapshots"]


class Snapshot(Recorded):
    """One snapshot that the daemon has."""

    __slots__ = ()
    KIND = "SNAPSHOT"
    MISSING = NoSnapshot

    def is_current(self) -> bool:
        return bool(self._call("IS_CURRENT", 0)[0])

    def has_metadata(self) -> bool:
        return bool(self._call("HAS_METADATA", 0)[0])

    def revert(self, flags: int = 0) -> None:
        """Bring the machine back to it: 1 running then, 2 paused."""
        self.domain.connection.call("DOMAIN_REVERT_TO_SNAPSHOT", self.ref, flags)

    def plan(self, flags: int = 0) -> list[str]:
        """What `delete` would do, a line each; nothing is done. NoSupport from a daemon that is not ours."""
        found = self.domain.connection.call_kvik("DOMAIN_SNAPSHOT_PLAN", self.domain.ref, self.name, flags)[0]
        return [str(line) for line in found]


def snapshots(domain: Domain, flags: int = 0) -> list[Snapshot]:
    found = domain.connection.call("DOMAIN_LIST_ALL_SNAPSHOTS", domain.ref, 1, flags)[0]
    return [Snapshot(domain, item[0]) for item in found]


def lookup(domain: Domain, name: str) -> Snapshot:
    """`NoSnapshot` if there is none of this name."""
    return Snapshot(domain, domain.connection.call("DOMAIN_SNAPSHOT_LOOKUP_BY_NAME", domain.ref, name, 0)[0][0])


def has_current(domain: Domain) -> bool:
    return bool(domain.connection.call("DOMAIN_HAS_CURRENT_SNAPSHOT", domain.ref, 0)[0])


def current(domain: Domain) -> Snapshot:
    return Snapshot(domain, domain.connection.call("DOMAIN_SNAPSHOT_CURRENT", domain.ref, 0)[0][0])


def create(domain: Domain, xml: str, flags: int = 0) -> Snapshot:
    """Take a snapshot, or (1) tell the daemon of one that is there."""
    return Snapshot(domain, domain.connection.call("DOMAIN_SNAPSHOT_CREATE_XML", domain.ref, xml, flags)[0][0])
