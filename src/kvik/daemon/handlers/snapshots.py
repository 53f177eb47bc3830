"""Snapshots of machines. The work is in `manager/snapshots/`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvik.conf.enums import (
    DomainSnapshotCreateFlags,
    DomainSnapshotDeleteFlags,
    DomainSnapshotListFlags,
    DomainSnapshotRevertFlags,
    DomainSnapshotXMLFlags,
)
from kvik.conf.snapshot import Snapshot, format_snapshot
from kvik.daemon.dispatch import Access
from kvik.daemon.errors import OperationDenied
from kvik.daemon.handlers.common import LIST_MAX, check_flags, named, told
from kvik.errors import InvalidArgument, NoSnapshot
from kvik.manager.snapshots import create, delete, revert

if TYPE_CHECKING:
    from kvik.daemon.connection import Connection
    from kvik.manager.domain import DomainObject

LISTS = DomainSnapshotListFlags.mask()


def _found(connection: Connection, wire: Any) -> tuple[DomainObject, str, Snapshot]:
    """The snapshot that a wire reference (name, domain) means."""
    name, domain_reference = wire
    domain = connection.domain(domain_reference)
    return domain, name, domain.snapshots.get(name, domain.name)


def _limited(names: list[str], wanted: int) -> list[str]:
    if wanted < 0:
        raise InvalidArgument(f"a negative number of entries ({wanted}) was asked for")
    return names[: min(wanted, LIST_MAX)]


# --- looking ----------------------------------------------------------------------------------------------------------


def num(connection: Connection, args: Any) -> tuple[int]:
    check_flags(args[1], LISTS, "number of snapshots")
    return (len(connection.domain(args[0]).snapshots.listing(args[1])),)


def list_names(connection: Connection, args: Any) -> tuple[list[str]]:
    wire, wanted, flags = args
    check_flags(flags, LISTS, "list of snapshots")
    return (_limited(connection.domain(wire).snapshots.listing(flags), wanted),)


def list_all(connection: Connection, args: Any) -> tuple[list[Any], int]:
    wire, need_results, flags = args
    check_flags(flags, LISTS, "list of snapshots")
    domain = connection.domain(wire)
    return told(domain, domain.snapshots.listing(flags), need_results)


def num_children(connection: Connection, args: Any) -> tuple[int]:
    check_flags(args[1], LISTS, "number of children")
    domain, name, _ = _found(connection, args[0])
    return (len(domain.snapshots.listing(args[1], name)),)


def list_children_names(connection: Connection, args: Any) -> tuple[list[str]]:
    wire, wanted, flags = args
    check_flags(flags, LISTS, "list of children")
    domain, name, _ = _found(connection, wire)
    return (_limited(domain.snapshots.listing(flags, name), wanted),)


def list_all_children(connection: Connection, args: Any) -> tuple[list[Any], int]:
    wire, need_results, flags = args
    check_flags(flags, LISTS, "list of children")
    domain, name, _ = _found(connection, wire)
    return told(domain, domain.snapshots.listing(flags, name), need_results)


def lookup(connection: Connection, args: Any) -> tuple[Any]:
    wire, name, flags = args
    check_flags(flags, 0, "snapshot")
    domain = connection.domain(wire)
    domain.snapshots.get(name, domain.name)
    return (named(domain, name),)


def has_current(connection: Connection, args: Any) -> tuple[int]:
    check_flags(args[1], 0, "current snapshot")
    return (int(connection.domain(args[0]).snapshots.current is not None),)


def current(connection: Connection, args: Any) -> tuple[Any]:
    check_flags(args[1], 0, "current snapshot")
    domain = connection.domain(args[0])
    name = domain.snapshots.current
    if name is None:
        raise NoSnapshot("the domain does not have a current snapshot")
    return (named(domain, name),)


def is_current(connection: Connection, args: Any) -> tuple[int]:
    check_flags(args[1], 0, "current snapshot")
    domain, name, _ = _found(connection, args[0])
    return (int(domain.snapshots.current == name),)


def has_metadata(connection: Connection, args: Any) -> tuple[int]:
    """Always: without metadata there is no snapshot that could be asked for."""
    check_flags(args[1], 0, "snapshot metadata")
    _found(connection, args[0])
    return (1,)


def get_parent(connection: Connection, args: Any) -> tuple[Any]:
    check_flags(args[1], 0, "parent snapshot")
    domain, name, _ = _found(connection, args[0])
    parent = domain.snapshots.parent(name)
    if parent is None:
        raise NoSnapshot(f"snapshot '{name}' does not have a parent")
    return (named(domain, parent),)


def get_xml(connection: Connection, args: Any) -> tuple[str]:
    wire, flags = args
    check_flags(flags, DomainSnapshotXMLFlags.SECURE, "snapshot document")
    secure = bool(flags & DomainSnapshotXMLFlags.SECURE)
    if secure and connection.access < Access.WRITE:
        raise OperationDenied("a read-only connection may not see passwords")
    return (format_snapshot(_found(connection, wire)[2], secure=secure),)


# --- changing ---------------------------------------------------------------------------------------------------------


async def create_xml(connection: Connection, args: Any) -> tuple[Any]:
    wire, xml, flags = args
    check_flags(flags, DomainSnapshotCreateFlags.mask(), "snapshot")
    domain = connection.domain(wire)
    return (named(domain, await create.create(domain, xml, flags)),)


async def revert_to(connection: Connection, args: Any) -> None:
    wire, flags = args
    check_flags(flags, DomainSnapshotRevertFlags.mask(), "revert to snapshot")
    domain, name, _ = _found(connection, wire)
    await revert.revert(domain, name, flags)


async def remove(connection: Connection, args: Any) -> None:
    wire, flags = args
    check_flags(flags, DomainSnapshotDeleteFlags.mask(), "delete snapshot")
    domain, name, _ = _found(connection, wire)
    await delete.delete(domain, name, flags)


async def plan(connection: Connection, args: Any) -> tuple[list[str]]:
    """What `remove` would do; nothing is done."""
    wire, name, flags = args
    check_flags(flags, DomainSnapshotDeleteFlags.mask(), "delete snapshot")
    return ((await delete.planned(connection.domain(wire), name, flags))[:LIST_MAX],)
