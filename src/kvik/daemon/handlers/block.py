"""Disks of running machines: block jobs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvik.conf.enums import (
    DomainBlockCommitFlags,
    DomainBlockCopyFlags,
    DomainBlockJobAbortFlags,
    DomainBlockRebaseFlags,
    DomainBlockResizeFlags,
)
from kvik.daemon.handlers.common import UINT, ULLONG, check_flags
from kvik.errors import InvalidArgument

if TYPE_CHECKING:
    from kvik.daemon.connection import Connection

IN_BYTES = 1  # virDomainBlockJobInfoFlags, virDomainBlockJobSetSpeedFlags
PULL_IN_BYTES = DomainBlockRebaseFlags.BANDWIDTH_BYTES
MIB = 1 << 20
COPY_PARAMETERS = {"bandwidth": ULLONG, "granularity": UINT, "buf-size": ULLONG}


async def pull(connection: Connection, args: Any) -> None:
    reference, disk, bandwidth, flags = args
    check_flags(flags, PULL_IN_BYTES, "block pull")
    await connection.domain(reference).block_rebase(disk, None, bandwidth, flags)


async def rebase(connection: Connection, args: Any) -> None:
    reference, disk, base, bandwidth, flags = args
    check_flags(flags, DomainBlockRebaseFlags.mask(), "block rebase")
    await connection.domain(reference).block_rebase(disk, base, bandwidth, flags)


async def copy(connection: Connection, args: Any) -> None:
    reference, disk, xml, given, flags = args
    check_flags(flags, DomainBlockCopyFlags.mask(), "block copy")
    values: dict[str, int] = {}
    for name, kind, value in given:
        if name not in COPY_PARAMETERS:
            raise InvalidArgument(f"a copy has no parameter {name!r}", remedy=", ".join(COPY_PARAMETERS))
        if kind != COPY_PARAMETERS[name] or name in values:
            raise InvalidArgument(f"parameter {name!r} is given once, as libvirt types it")
        values[name] = value
    await connection.domain(reference).block_copy(disk, xml, values, flags)


async def commit(connection: Connection, args: Any) -> None:
    reference, disk, base, top, bandwidth, flags = args
    check_flags(flags, DomainBlockCommitFlags.mask(), "block commit")
    await connection.domain(reference).block_commit(disk, base, top, bandwidth, flags)


async def resize(connection: Connection, args: Any) -> None:
    reference, disk, size, flags = args
    check_flags(flags, DomainBlockResizeFlags.mask(), "block resize")
    size = size if flags & DomainBlockResizeFlags.BYTES else size * 1024
    to_capacity = bool(flags & DomainBlockResizeFlags.CAPACITY)
    await connection.domain(reference).block_resize(disk, size, to_capacity=to_capacity)


async def set_threshold(connection: Connection, args: Any) -> None:
    reference, device, threshold, flags = args
    check_flags(flags, 0, "block threshold")
    await connection.domain(reference).set_block_threshold(device, threshold)


async def abort(connection: Connection, args: Any) -> None:
    reference, disk, flags = args
    check_flags(flags, DomainBlockJobAbortFlags.mask(), "block job abort")
    await connection.domain(reference).block_job_abort(disk, flags)


async def info(connection: Connection, args: Any) -> tuple[int, int, int, int, int]:
    """Whether there is a job, its type, bandwidth, how far it is and how far it goes."""
    reference, disk, flags = args
    check_flags(flags, IN_BYTES, "block job information")
    found = await connection.domain(reference).block_job_info(disk)
    if found is None:
        return (0, 0, 0, 0, 0)
    bandwidth = found.bandwidth if flags & IN_BYTES else -(-found.bandwidth // MIB)
    return (1, found.type, bandwidth, found.cur, found.end)


async def set_speed(connection: Connection, args: Any) -> None:
    reference, disk, bandwidth, flags = args
    check_flags(flags, IN_BYTES, "block job speed")
    await connection.domain(reference).block_job_speed(disk, bandwidth, in_bytes=bool(flags & IN_BYTES))
