"""What is done with the volumes of active pools: made, copied, deleted, resized, wiped, opened for a stream.

Nobody changes a volume that a running machine has open, or removes one that another volume shows through.
"""

from __future__ import annotations

import os
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial

from kvik.conf.prepare import located
from kvik.conf.storage_pool import bytes_of
from kvik.conf.storage_volume import StorageVolume, load_volume
from kvik.errors import (
    ConfigUnsupported,
    InvalidArgument,
    NoStorageVolume,
    OperationInvalid,
    ResourceBusy,
    StorageVolumeExists,
)
from kvik.storage.backend import Backend
from kvik.storage.pool import PoolObject
from kvik.storage.pools import Pools
from kvik.storage.sparse import size_of
from kvik.storage.threads import in_thread
from kvik.storage.wiping import overwrite, passes_of

__all__ = ["Opened", "copy", "create", "delete", "open_bytes", "resize", "wipe"]

MAX_BYTES = (1 << 63) - 1


async def create(
    pools: Pools, pool: PoolObject, xml: str, *, preallocate_metadata: bool = False, strict: bool = False
) -> StorageVolume:
    """A new volume. Raises ConfigError, StorageVolumeExists, HostError (the pool is full, say): then there is none."""
    backend = pool.active()
    document = _load(xml, backend, strict)
    with pool.working(_free(pool, document.name), "it is being created"):
        make = partial(backend.create_volume, document, preallocate_metadata=preallocate_metadata)
        volume = await in_thread(make)
        pool.note(volume, volume.name)
    await pool.measure()
    return volume


async def copy(
    pools: Pools,
    pool: PoolObject,
    xml: str,
    source_pool: PoolObject,
    source_name: str,
    *,
    preallocate_metadata: bool = False,
    reflink: bool = False,
    strict: bool = False,
) -> StorageVolume:
    """A new volume with the contents of another, at least as large as that one."""
    backend = pool.active()
    document = _load(xml, backend, strict, copies=True)
    if preallocate_metadata:
        raise InvalidArgument(f"metadata preallocation is not supported for copies of {document.format} volumes")
    source = source_pool.volume(source_name)
    if document.target is not None and document.target.format is None and source.target is not None:
        document.target.format = source.target.format
    if document.format != source.format:
        raise ConfigUnsupported(f"copying a {source.format} volume into a {document.format} one is not possible here")
    with located(xml):
        if document.size < source.size:
            document.capacity = bytes_of(source.size)
        if document.format != "raw" and document.size != source.size:
            raise ConfigUnsupported("a copy in this format has the capacity of its source", path="/volume/capacity")
        _same_form(document, source)
    if document.allocation is None or document.format != "raw":
        document.allocation = bytes_of(0)
    await _check_users(pools, source, "copied")
    with source_pool.working(source_name, "it is being copied") as holder:  # noqa: SIM117 - in this order
        with pool.working(_free(pool, document.name), "it is being created"):
            fd = await in_thread(holder.open_volume, source)
            try:
                volume = await in_thread(partial(backend.copy_volume, document, fd, reflink=reflink))
            finally:
                os.close(fd)
            pool.note(volume, volume.name)
    await pool.measure()
    return volume


async def delete(pools: Pools, pool: PoolObject, name: str) -> None:
    """What a running machine has open or another volume is written on top of stays."""
    volume = pool.volume(name)
    await _check_users(pools, volume, "deleted", reading_too=True)
    for other in pools.list():
        for each in other.contents.volumes.values():
            if each.backing_store is not None and each.backing_store.path == volume.path:
                raise OperationInvalid(
                    f"volume '{name}' cannot be deleted: volume '{each.name}' of pool '{other.name}' is based on it",
                    remedy="delete that one first, or give it another base: kvik img rebase",
                )
    with pool.working(name, "it is being deleted") as backend:
        await in_thread(backend.delete_volume, volume)
        pool.note(None, name)
    await pool.measure()


async def resize(
    pools: Pools,
    pool: PoolObject,
    name: str,
    size: int,
    *,
    delta: bool = False,
    shrink: bool = False,
    allocate: bool = False,
) -> None:
    """To `size` bytes, or by so many. Making it smaller loses its end, and needs `shrink`."""
    volume = pool.volume(name)
    await _check_users(pools, volume, "resized", remedy="a running machine's disk is resized by: kvik blockresize")
    if delta:
        size = max(0, volume.size - size) if shrink else volume.size + size
    if not 0 <= size <= MAX_BYTES:
        raise InvalidArgument(f"a volume cannot have {size} bytes")
    if size < volume.size and not shrink:
        raise InvalidArgument(
            "Can't shrink capacity below current capacity unless shrink flag explicitly specified",
            remedy="what lies beyond is lost: --shrink says that it may be",
        )
    with pool.working(name, "it is being resized") as backend:
        await in_thread(partial(backend.resize_volume, volume, size, allocate=allocate))
        await pool.look_again(volume)
    await pool.measure()


async def wipe(pools: Pools, pool: PoolObject, name: str, algorithm: int) -> None:
    """Overwrite all that it holds; it stays, and holds nothing."""
    volume, passes = pool.volume(name), passes_of(algorithm)
    await _check_users(pools, volume, "wiped", reading_too=True)

    def work(backend: Backend) -> None:
        fd = backend.open_volume(volume, writable=True)
        try:
            overwrite(fd, size_of(fd), passes)
        finally:
            os.close(fd)

    with pool.working(name, "it is being wiped") as holder:
        await in_thread(work, holder)
        await pool.look_again(volume)


class Opened:
    """The bytes of a volume from `start` to `end`, by a descriptor. `growing`: the end may be written beyond."""

    __slots__ = ("end", "fd", "growing", "start")

    def __init__(self, fd: int, start: int, end: int, growing: bool) -> None:
        self.fd, self.start, self.end, self.growing = fd, start, end, growing


@asynccontextmanager
async def open_bytes(
    pools: Pools, pool: PoolObject, name: str, offset: int, length: int, *, writable: bool
) -> AsyncIterator[Opened]:
    """For the time of a stream; `length` 0 is all of the rest."""
    volume = pool.volume(name)
    if writable:
        await _check_users(pools, volume, "written to", reading_too=True)
    with pool.working(name, "it is being uploaded" if writable else "it is being downloaded") as backend:
        fd = await in_thread(partial(backend.open_volume, volume, writable=writable))
        try:
            size = await in_thread(size_of, fd)
            end = offset + length if length else (MAX_BYTES if writable else size)
            if offset > size or end > MAX_BYTES or (not writable and end > size):
                raise InvalidArgument(f"volume '{name}' has {size} bytes: not {length} from byte {offset} on")
            yield Opened(fd, offset, end, volume.type == "file")
        finally:
            os.close(fd)
            if writable:
                await pool.look_again(volume)


def _load(xml: str, backend: Backend, strict: bool, *, copies: bool = False) -> StorageVolume:
    document = load_volume(xml, backend.formats, copies=copies)
    if strict and (warnings := document.warnings()):
        raise ConfigUnsupported("; ".join(warnings[:5]))
    return document


def _same_form(document: StorageVolume, source: StorageVolume) -> None:
    """A copy is made byte by byte: what its document says of an image's form must be what the source's has."""
    below = document.backing_store
    if below is not None and (source.backing_store is None or source.backing_store.path != below.path):
        raise ConfigUnsupported("a copy has the backing store of its source", path="/volume/backingStore")
    if document.format == "raw" or document.target is None or source.target is None:
        return
    for name, tag in (("compat", "compat"), ("cluster_size", "clusterSize"), ("features", "features")):
        wanted = getattr(document.target, name)
        if wanted is not None and wanted != getattr(source.target, name):
            raise ConfigUnsupported(f"a copy has the <{tag}> of its source", path=f"/volume/target/{tag}")


def _free(pool: PoolObject, name: str) -> str:
    if name in pool.contents.volumes:
        raise StorageVolumeExists(f"storage volume '{name}' exists already")
    return name


async def _check_users(
    pools: Pools, volume: StorageVolume, what: str, *, reading_too: bool = False, remedy: str = "shut that machine down"
) -> None:
    rows = [(path, machine) for path, machine, writes in pools.users() if writes or reading_too]
    machine = await in_thread(_user_of, volume.path, rows) if rows else ""
    if machine:
        raise ResourceBusy(
            f"volume '{volume.name}' cannot be {what}: machine '{machine}' is running from it", remedy=remedy
        )


def _user_of(path: str, rows: list[tuple[str, str]]) -> str:
    """The machine that has the file open, by whatever name it calls it."""
    try:
        wanted = os.stat(path)  # noqa: PTH116 - a block device is told by its number, not by its inode
    except OSError:
        return ""
    for other, machine in rows:
        with suppress(OSError):
            theirs = os.stat(other)  # noqa: PTH116
            if stat.S_ISBLK(wanted.st_mode) and theirs.st_rdev == wanted.st_rdev and stat.S_ISBLK(theirs.st_mode):
                return machine
            if os.path.samestat(theirs, wanted):
                return machine
    return ""


def find(pool: PoolObject, key: str) -> StorageVolume:
    """The volume of a pool that a wire reference means, by its key."""
    for volume in pool.volumes():
        if volume.key == key:
            return volume
    raise NoStorageVolume(f"no storage vol with matching key {key}")
