"""Storage pools: finding, looking, changing; their events."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvik.conf.enums import (
    ConnectListAllStoragePoolsFlags,
    StoragePoolBuildFlags,
    StoragePoolCreateFlags,
    StoragePoolDefineFlags,
    StoragePoolDeleteFlags,
    StoragePoolState,
    StorageXMLFlags,
)
from kvik.conf.storage_pool import parse_pool
from kvik.daemon.handlers import loose_images
from kvik.daemon.handlers.common import LIST_MAX, check_flags
from kvik.errors import ConfigUnsupported, InvalidArgument, OperationUnsupported
from kvik.manager.storage import capabilities, find_sources, in_thread

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvik.daemon.connection import Connection
    from kvik.manager.storage import PoolObject

Flags = ConnectListAllStoragePoolsFlags
BuildFlags, CreateFlags = StoragePoolBuildFlags, StoragePoolCreateFlags
Reference = tuple[str, bytes]
MESSAGES_MAX = 256  # of our own protocol
TYPE_FLAGS = {
    "dir": Flags.DIR, "fs": Flags.FS, "netfs": Flags.NETFS, "logical": Flags.LOGICAL, "disk": Flags.DISK,
    "iscsi": Flags.ISCSI, "iscsi-direct": Flags.ISCSI_DIRECT, "scsi": Flags.SCSI, "mpath": Flags.MPATH,
    "rbd": Flags.RBD, "gluster": Flags.GLUSTER, "zfs": Flags.ZFS,
}  # fmt: skip
ALL_TYPES = sum(TYPE_FLAGS.values()) | Flags.SHEEPDOG | Flags.VSTORAGE


def reference(pool: PoolObject) -> Reference:
    """How the wire names a pool."""
    return (pool.name, pool.uuid)


# --- finding ----------------------------------------------------------------------------------------------------------


def lookup_by_name(connection: Connection, args: Any) -> tuple[Reference]:
    return (reference(connection.manager.pools.lookup_name(args[0])),)


def lookup_by_uuid(connection: Connection, args: Any) -> tuple[Reference]:
    return (reference(connection.manager.pools.lookup_uuid(args[0])),)


def lookup_by_target_path(connection: Connection, args: Any) -> tuple[Reference]:
    return (reference(connection.manager.pools.lookup_target(args[0])),)


async def lookup_by_volume(connection: Connection, args: Any) -> tuple[Reference]:
    if loose_images.is_loose(args[0]):
        return await loose_images.lookup_pool(connection, args)
    return (reference(connection.manager.pools.lookup_name(args[0][0])),)


def _names(pools: Iterable[PoolObject], active: bool, wanted: int) -> tuple[list[str]]:
    if not 0 <= wanted <= LIST_MAX:
        raise InvalidArgument(f"a list of {wanted} names is not possible (0 to {LIST_MAX})")
    return ([pool.name for pool in pools if pool.is_active is active][:wanted],)


def num_of_active(connection: Connection, args: Any) -> tuple[int]:
    return (sum(pool.is_active for pool in connection.manager.pools.list()),)


def list_active(connection: Connection, args: Any) -> tuple[list[str]]:
    return _names(connection.manager.pools.list(), True, args[0])


def num_of_inactive(connection: Connection, args: Any) -> tuple[int]:
    return (sum(not pool.is_active for pool in connection.manager.pools.list()),)


def list_inactive(connection: Connection, args: Any) -> tuple[list[str]]:
    return _names(connection.manager.pools.list(), False, args[0])


def list_all(connection: Connection, args: Any) -> tuple[list[Reference], int]:
    """CONNECT_LIST_ALL_STORAGE_POOLS: of each group of filters, none or both let everything through."""
    need_results, flags = args
    check_flags(flags, Flags.mask(), "list storage pools")
    found = [pool for pool in connection.manager.pools.list() if _selected(pool, flags)]
    if not need_results:
        return ([], len(found))
    if len(found) > LIST_MAX:
        raise OperationUnsupported(f"{len(found)} pools do not fit into one answer (at most {LIST_MAX})")
    return ([reference(pool) for pool in found], len(found))


def _selected(pool: PoolObject, flags: int) -> bool:
    if flags & ALL_TYPES and not flags & TYPE_FLAGS[pool.definition.type]:
        return False
    groups = (
        (pool.is_active, Flags.ACTIVE, Flags.INACTIVE),
        (pool.persistent, Flags.PERSISTENT, Flags.TRANSIENT),
        (pool.autostart, Flags.AUTOSTART, Flags.NO_AUTOSTART),
    )
    return all(not flags & (yes | no) or flags & (yes if is_so else no) for is_so, yes, no in groups)


async def find_pool_sources(connection: Connection, args: Any) -> tuple[str]:
    type_, xml, flags = args
    check_flags(flags, 0, "find storage pool sources")
    return (await in_thread(find_sources, type_, xml),)


async def get_capabilities(connection: Connection, args: Any) -> tuple[str]:
    check_flags(args[0], 0, "storage pool capabilities")
    return (await in_thread(capabilities),)


# --- looking ----------------------------------------------------------------------------------------------------------


async def is_active(connection: Connection, args: Any) -> tuple[int]:
    if loose_images.is_loose_pool(args[0]):
        return await loose_images.pool_is_active(connection, args)
    return (int(connection.pool(args[0]).is_active),)


def is_persistent(connection: Connection, args: Any) -> tuple[int]:
    return (int(connection.pool(args[0]).persistent),)


def get_autostart(connection: Connection, args: Any) -> tuple[int]:
    return (int(connection.pool(args[0]).autostart),)


async def get_info(connection: Connection, args: Any) -> tuple[int, int, int, int]:
    if loose_images.is_loose_pool(args[0]):
        return await loose_images.get_pool_info(connection, args)
    pool = connection.pool(args[0])
    state = StoragePoolState.RUNNING if pool.is_active else StoragePoolState.INACTIVE
    if pool.is_building:
        state = StoragePoolState.BUILDING
    return (state, pool.contents.capacity, pool.contents.allocation, pool.contents.available)


async def get_xml(connection: Connection, args: Any) -> tuple[str]:
    pool, flags = args
    check_flags(flags, StorageXMLFlags.mask(), "storage pool document")
    if loose_images.is_loose_pool(pool):
        return await loose_images.get_pool_xml(connection, args)
    return (connection.pool(pool).xml(inactive=bool(flags & StorageXMLFlags.INACTIVE)),)


def messages(connection: Connection, args: Any) -> tuple[list[str]]:
    """What its document says that nobody here understands, who else may use it, and what the last look at it found."""
    pool = connection.pool(args[0])
    return (pool.remarks()[:MESSAGES_MAX],)


# --- changing ---------------------------------------------------------------------------------------------------------


async def define_xml(connection: Connection, args: Any) -> tuple[Reference]:
    xml, flags = args
    check_flags(flags, StoragePoolDefineFlags.mask(), "define storage pool")
    if flags & StoragePoolDefineFlags.VALIDATE and (warnings := parse_pool(xml).warnings()):
        raise ConfigUnsupported("; ".join(warnings[:5]))
    return (reference(await connection.manager.pools.define(xml)),)


def _building(flags: int) -> Callable[[Any], None] | None:
    """What is done to a pool's backend before it is started, by virStoragePoolCreateFlags."""
    check_flags(flags, CreateFlags.mask(), "start storage pool")
    if not flags:
        return None
    overwrite = bool(flags & CreateFlags.WITH_BUILD_OVERWRITE)
    no_overwrite = bool(flags & CreateFlags.WITH_BUILD_NO_OVERWRITE)
    return _builder(overwrite, no_overwrite)


def _builder(overwrite: bool, no_overwrite: bool) -> Callable[[Any], None]:
    if overwrite and no_overwrite:
        raise InvalidArgument("flags 'overwrite' and 'no-overwrite' are mutually exclusive")

    def build(backend: Any) -> None:
        backend.build(overwrite=overwrite, no_overwrite=no_overwrite)

    return build


async def create_xml(connection: Connection, args: Any) -> tuple[Reference]:
    xml, flags = args
    return (reference(await connection.manager.pools.create_xml(xml, _building(flags))),)


async def create(connection: Connection, args: Any) -> None:
    """STORAGE_POOL_CREATE: start it."""
    pool, flags = args
    build = _building(flags)
    await connection.pool(pool).start(build)


async def build(connection: Connection, args: Any) -> None:
    pool, flags = args
    check_flags(flags, BuildFlags.OVERWRITE | BuildFlags.NO_OVERWRITE, "build storage pool")
    work = _builder(bool(flags & BuildFlags.OVERWRITE), bool(flags & BuildFlags.NO_OVERWRITE))
    await connection.pool(pool).build(work)


async def destroy(connection: Connection, args: Any) -> None:
    await connection.pool(args[0]).destroy()


async def delete(connection: Connection, args: Any) -> None:
    pool, flags = args
    check_flags(flags, StoragePoolDeleteFlags.NORMAL, "delete storage pool")
    await connection.pool(pool).delete()


async def undefine(connection: Connection, args: Any) -> None:
    await connection.manager.pools.undefine(connection.pool(args[0]))


async def refresh(connection: Connection, args: Any) -> None:
    pool, flags = args
    check_flags(flags, 0, "refresh storage pool")
    if loose_images.is_loose_pool(pool):
        await loose_images.refresh_pool(connection, args)
        return
    await connection.pool(pool).refresh()


async def set_autostart(connection: Connection, args: Any) -> None:
    await connection.pool(args[0]).set_autostart(bool(args[1]))


# --- events -----------------------------------------------------------------------------------------------------------


def register(connection: Connection, args: Any) -> tuple[int]:
    number, pool = args
    uuid = connection.pool(pool).uuid if pool is not None else None
    return (connection.server.pool_events.add(connection, number, uuid),)


def deregister(connection: Connection, args: Any) -> None:
    connection.server.pool_events.remove(connection, args[0])
