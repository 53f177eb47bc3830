"""Checkpoints and backups of a machine: libvirt's verbs in snake_case, each one call to the daemon.

`flags` are libvirt's of the procedure (virDomainCheckpointCreateFlags, ...ListFlags, ...DeleteFlags, ...XMLFlags).
"""

from __future__ import annotations

from kvik.client.recorded import Recorded
from kvik.errors import NoCheckpoint

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.client.domain import Domain

__all__ = ["Checkpoint", "backup_begin", "backup_xml", "checkpoints", "create", "lookup"]


class Checkpoint(Recorded):
    """One checkpoint that the daemon has."""

    __slots__ = ()
    KIND = "CHECKPOINT"
    MISSING = NoCheckpoint


def checkpoints(domain: Domain, flags: int = 0) -> list[Checkpoint]:
    found = domain.connection.call("DOMAIN_LIST_ALL_CHECKPOINTS", domain.ref, 1, flags)[0]
    return [Checkpoint(domain, item[0]) for item in found]


def lookup(domain: Domain, name: str) -> Checkpoint:
    """`NoCheckpoint` if there is none of this name."""
    return Checkpoint(domain, domain.connection.call("DOMAIN_CHECKPOINT_LOOKUP_BY_NAME", domain.ref, name, 0)[0][0])


def create(domain: Domain, xml: str, flags: int = 0) -> Checkpoint:
    """Begin to track what changes, or (1) tell the daemon of a checkpoint that is there."""
    return Checkpoint(domain, domain.connection.call("DOMAIN_CHECKPOINT_CREATE_XML", domain.ref, xml, flags)[0][0])


def backup_begin(domain: Domain, xml: str, checkpoint_xml: str | None = None, flags: int = 0) -> None:
    """Begin a backup, and with it a checkpoint; flags: 1 into files that are there."""
    domain.connection.call("DOMAIN_BACKUP_BEGIN", domain.ref, xml, checkpoint_xml, flags)


def backup_xml(domain: Domain) -> str:
    """The document of the backup under way; `NoBackup` if there is none."""
    return str(domain.connection.call("DOMAIN_BACKUP_GET_XML_DESC", domain.ref, 0)[0])
