"""Checkpoints and backups of machines. The work is in `manager/checkpoints/` and `manager/backup/`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvik.conf.checkpoint import Checkpoint, format_checkpoint
from kvik.conf.enums import (
    DomainBackupBeginFlags,
    DomainCheckpointCreateFlags,
    DomainCheckpointDeleteFlags,
    DomainCheckpointListFlags,
    DomainCheckpointXMLFlags,
)
from kvik.daemon.dispatch import Access
from kvik.daemon.errors import OperationDenied
from kvik.daemon.handlers.common import check_flags, named, told
from kvik.errors import NoCheckpoint
from kvik.manager.backup import begin
from kvik.manager.backup import job as backup_job
from kvik.manager.checkpoints import create, delete, sizes

if TYPE_CHECKING:
    from kvik.daemon.connection import Connection
    from kvik.manager.domain import DomainObject

LISTS = DomainCheckpointListFlags.mask()


def _found(connection: Connection, wire: Any) -> tuple[DomainObject, str, Checkpoint]:
    """The checkpoint that a wire reference (name, domain) means."""
    name, domain_reference = wire
    domain = connection.domain(domain_reference)
    return domain, name, domain.checkpoints.get(name)


def list_all(connection: Connection, args: Any) -> tuple[list[Any], int]:
    wire, need_results, flags = args
    check_flags(flags, LISTS, "list of checkpoints")
    domain = connection.domain(wire)
    return told(domain, domain.checkpoints.listing(flags), need_results)


def list_all_children(connection: Connection, args: Any) -> tuple[list[Any], int]:
    wire, need_results, flags = args
    check_flags(flags, LISTS, "list of children")
    domain, name, _ = _found(connection, wire)
    return told(domain, domain.checkpoints.listing(flags, name), need_results)


def lookup(connection: Connection, args: Any) -> tuple[Any]:
    wire, name, flags = args
    check_flags(flags, 0, "checkpoint")
    domain = connection.domain(wire)
    domain.checkpoints.get(name)
    return (named(domain, name),)


def get_parent(connection: Connection, args: Any) -> tuple[Any]:
    check_flags(args[1], 0, "parent checkpoint")
    domain, name, _ = _found(connection, args[0])
    parent = domain.checkpoints.parent(name)
    if parent is None:
        raise NoCheckpoint(f"checkpoint '{name}' does not have a parent")
    return (named(domain, parent),)


async def get_xml(connection: Connection, args: Any) -> tuple[str]:
    wire, flags = args
    known = DomainCheckpointXMLFlags
    check_flags(flags, known.mask(), "checkpoint document")
    secure = bool(flags & known.SECURE)
    if secure and connection.access < Access.WRITE:
        raise OperationDenied("a read-only connection may not see passwords")
    if flags & known.SIZE and connection.access < Access.WRITE:
        raise OperationDenied("a read-only connection may not have the changes of disks counted")
    domain, _, checkpoint = _found(connection, wire)
    if flags & known.SIZE:
        checkpoint = await sizes.with_sizes(domain, checkpoint)
    return (format_checkpoint(checkpoint, secure=secure, domain=not flags & known.NO_DOMAIN),)


async def create_xml(connection: Connection, args: Any) -> tuple[Any]:
    wire, xml, flags = args
    check_flags(flags, DomainCheckpointCreateFlags.mask(), "checkpoint")
    domain = connection.domain(wire)
    return (named(domain, await create.create(domain, xml, flags)),)


async def remove(connection: Connection, args: Any) -> None:
    wire, flags = args
    check_flags(flags, DomainCheckpointDeleteFlags.mask(), "delete checkpoint")
    domain, name, _ = _found(connection, wire)
    await delete.delete(domain, name, flags)


async def backup_begin(connection: Connection, args: Any) -> None:
    wire, xml, checkpoint_xml, flags = args
    check_flags(flags, DomainBackupBeginFlags.mask(), "backup")
    await begin.begin(connection.domain(wire), xml, checkpoint_xml, flags)


def backup_xml(connection: Connection, args: Any) -> tuple[str]:
    check_flags(args[1], 0, "backup document")
    return (backup_job.document(connection.domain(args[0])),)
