"""Storage volumes: finding, looking, changing; their bytes by streams."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

from kvik.conf.enums import (
    StorageVolCreateFlags,
    StorageVolDeleteFlags,
    StorageVolDownloadFlags,
    StorageVolInfoFlags,
    StorageVolResizeFlags,
    StorageVolType,
    StorageVolUploadFlags,
    StorageVolWipeAlgorithm,
)
from kvik.conf.storage_volume import StorageVolume, format_volume
from kvik.daemon.handlers import loose_images
from kvik.daemon.handlers.common import LIST_MAX, check_flags
from kvik.daemon.volume_streams import VolumeDownload, VolumeUpload
from kvik.errors import InvalidArgument, NoStorageVolume, OperationInvalid
from kvik.manager.storage import volumes

if TYPE_CHECKING:
    from kvik.daemon.connection import Connection
    from kvik.manager.storage import PoolObject

CreateFlags, ResizeFlags = StorageVolCreateFlags, StorageVolResizeFlags
Reference = tuple[str, str, str]  # (pool, name, key)
TYPES = {
    "file": StorageVolType.FILE, "block": StorageVolType.BLOCK, "dir": StorageVolType.DIR,
    "network": StorageVolType.NETWORK, "netdir": StorageVolType.NETDIR,
}  # fmt: skip


def reference(pool: PoolObject, volume: StorageVolume) -> Reference:
    """How the wire names a volume."""
    return (pool.name, volume.name, volume.key or "")


def _found(connection: Connection, ref: Any) -> tuple[PoolObject, StorageVolume]:
    """What a wire reference means: by pool and name, as libvirt does."""
    if loose_images.is_loose(ref):
        raise OperationInvalid(
            f"'{ref[0].rstrip('/')}/{ref[1]}' is in no pool: it is neither changed nor deleted as a volume",
            remedy="make a pool of its directory (kvik pool-define-as NAME dir --target DIR), or remove it by hand",
        )
    pool = connection.manager.pools.lookup_name(ref[0])
    return pool, pool.volume(ref[1])


# --- finding ----------------------------------------------------------------------------------------------------------


def num_of(connection: Connection, args: Any) -> tuple[int]:
    return (len(connection.pool(args[0]).volumes()),)


def list_names(connection: Connection, args: Any) -> tuple[list[str]]:
    pool, wanted = args
    if not 0 <= wanted <= LIST_MAX:
        raise InvalidArgument(f"a list of {wanted} names is not possible (0 to {LIST_MAX})")
    return ([volume.name for volume in connection.pool(pool).volumes()][:wanted],)


def list_all(connection: Connection, args: Any) -> tuple[list[Reference], int]:
    ref, need_results, flags = args
    check_flags(flags, 0, "list storage volumes")
    pool = connection.pool(ref)
    found = pool.volumes()
    return ([reference(pool, volume) for volume in found] if need_results else [], len(found))


def lookup_by_name(connection: Connection, args: Any) -> tuple[Reference]:
    pool = connection.pool(args[0])
    return (reference(pool, pool.volume(args[1])),)


def lookup_by_key(connection: Connection, args: Any) -> tuple[Reference]:
    return (reference(*connection.manager.pools.lookup_key(args[0])),)


async def lookup_by_path(connection: Connection, args: Any) -> tuple[Reference]:
    try:
        return (reference(*connection.manager.pools.lookup_path(args[0])),)
    except NoStorageVolume:
        if not loose_images.may_look(connection):
            raise
        return await loose_images.lookup_by_path(connection, args)


# --- looking ----------------------------------------------------------------------------------------------------------


async def get_path(connection: Connection, args: Any) -> tuple[str]:
    if loose_images.is_loose(args[0]):
        return await loose_images.get_path(connection, args)
    return (_found(connection, args[0])[1].path,)


async def _now(connection: Connection, ref: Any) -> StorageVolume:
    """The volume, looked at once more: a guest that writes to it changes what it takes."""
    pool, volume = _found(connection, ref)
    await pool.look_again(volume)
    return pool.volume(volume.name)


async def get_info(connection: Connection, args: Any) -> tuple[int, int, int]:
    if loose_images.is_loose(args[0]):
        return await loose_images.get_info(connection, args)
    volume = await _now(connection, args[0])
    return (TYPES[volume.type or "file"], volume.size, volume.allocated)


async def get_info_flags(connection: Connection, args: Any) -> tuple[int, int, int]:
    ref, flags = args
    check_flags(flags, StorageVolInfoFlags.mask(), "storage volume")
    if loose_images.is_loose(ref):
        return await loose_images.get_info(connection, args)
    volume = await _now(connection, ref)
    physical = flags & StorageVolInfoFlags.GET_PHYSICAL and volume.physical is not None
    taken = volume.physical.value if physical and volume.physical is not None else volume.allocated
    return (TYPES[volume.type or "file"], volume.size, taken)


async def get_xml(connection: Connection, args: Any) -> tuple[str]:
    ref, flags = args
    check_flags(flags, 0, "storage volume document")
    if loose_images.is_loose(ref):
        return await loose_images.get_xml(connection, args)
    return (format_volume(await _now(connection, ref)),)


# --- changing ---------------------------------------------------------------------------------------------------------


async def create_xml(connection: Connection, args: Any) -> tuple[Reference]:
    ref, xml, flags = args
    check_flags(flags, CreateFlags.PREALLOC_METADATA | CreateFlags.VALIDATE, "create storage volume")
    pool = connection.pool(ref)
    made = await volumes.create(
        connection.manager.pools,
        pool,
        xml,
        preallocate_metadata=bool(flags & CreateFlags.PREALLOC_METADATA),
        strict=bool(flags & CreateFlags.VALIDATE),
    )
    return (reference(pool, made),)


async def create_xml_from(connection: Connection, args: Any) -> tuple[Reference]:
    ref, xml, original, flags = args
    check_flags(flags, CreateFlags.mask(), "create storage volume")
    pool = connection.pool(ref)
    made = await volumes.copy(
        connection.manager.pools,
        pool,
        xml,
        *_source(connection, original),
        preallocate_metadata=bool(flags & CreateFlags.PREALLOC_METADATA),
        reflink=bool(flags & CreateFlags.REFLINK),
        strict=bool(flags & CreateFlags.VALIDATE),
    )
    return (reference(pool, made),)


def _source(connection: Connection, ref: Any) -> tuple[PoolObject, str]:
    pool, volume = _found(connection, ref)
    return pool, volume.name


async def delete(connection: Connection, args: Any) -> None:
    ref, flags = args
    check_flags(flags, StorageVolDeleteFlags.ZEROED | StorageVolDeleteFlags.WITH_SNAPSHOTS, "delete storage volume")
    pool, volume = _found(connection, ref)
    if flags & StorageVolDeleteFlags.ZEROED:
        await volumes.wipe(connection.manager.pools, pool, volume.name, StorageVolWipeAlgorithm.ZERO)
    await volumes.delete(connection.manager.pools, pool, volume.name)


async def resize(connection: Connection, args: Any) -> None:
    ref, capacity, flags = args
    check_flags(flags, ResizeFlags.mask(), "resize storage volume")
    pool, volume = _found(connection, ref)
    await volumes.resize(
        connection.manager.pools,
        pool,
        volume.name,
        capacity,
        delta=bool(flags & ResizeFlags.DELTA),
        shrink=bool(flags & ResizeFlags.SHRINK),
        allocate=bool(flags & ResizeFlags.ALLOCATE),
    )


async def wipe(connection: Connection, args: Any) -> None:
    await wipe_pattern(connection, (args[0], StorageVolWipeAlgorithm.ZERO, args[1]))


async def wipe_pattern(connection: Connection, args: Any) -> None:
    ref, algorithm, flags = args
    check_flags(flags, 0, "wipe storage volume")
    pool, volume = _found(connection, ref)
    await volumes.wipe(connection.manager.pools, pool, volume.name, algorithm)


# --- bytes ------------------------------------------------------------------------------------------------------------


async def download(connection: Connection, args: Any, call: Any) -> None:
    check_flags(args[3], StorageVolDownloadFlags.mask(), "download storage volume")
    await _stream(connection, args, call, VolumeDownload)


async def upload(connection: Connection, args: Any, call: Any) -> None:
    check_flags(args[3], StorageVolUploadFlags.mask(), "upload storage volume")
    await _stream(connection, args, call, VolumeUpload)


async def _stream(
    connection: Connection, args: Any, call: Any, kind: type[VolumeDownload] | type[VolumeUpload]
) -> None:
    ref, offset, length, flags = args
    pool, volume = _found(connection, ref)
    held = AsyncExitStack()
    writable = kind is VolumeUpload
    opened = await held.enter_async_context(
        volumes.open_bytes(connection.manager.pools, pool, volume.name, offset, length, writable=writable)
    )
    if connection.closed:
        await held.aclose()
        return
    stream = kind(connection, call.key, opened, held, bool(flags & 1))
    try:
        connection.add_stream(call, stream)
    except BaseException:
        stream.close()
        raise
