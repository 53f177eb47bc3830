"""What is done with the volumes of active pools: made, copied, deleted, resized, wiped, opened for a stream.

Nobody changes a volume that a running machine has open, or removes one that another volume shows through.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from functools import partial

from kvik.conf.storage_pool import bytes_of
from kvik.conf.storage_volume import StorageVolume, VolumeFormat, load_volume
from kvik.errors import (
    ConfigUnsupported,
    HostError,
    InvalidArgument,
    NoStorageVolume,
    OperationInvalid,
    OperationUnsupported,
    ResourceBusy,
    StorageVolumeExists,
)
from kvik.host.files import identify
from kvik.host.identities import look_up, may_be
from kvik.host.threads import in_thread, settled
from kvik.image.lock import lock_image
from kvik.storage.backend import Backend
from kvik.storage.chains import image_format, open_volume_image
from kvik.storage.encryption import encryption_of
from kvik.storage.pool import Bars, PoolObject
from kvik.storage.pools import Pools
from kvik.storage.resolve import places_of
from kvik.storage.sparse import size_of
from kvik.storage.wiping import passes_of

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
        volume: StorageVolume = await settled(make, partial(_made, pool, document))
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
    source = source_pool.volume(source_name)
    target = document.target
    if target is not None and target.format is None and source.format in backend.formats:
        target.format = VolumeFormat(type=source.format)
    if preallocate_metadata and document.format != "qcow2":
        raise InvalidArgument(f"metadata preallocation is not supported for {document.format} volumes")
    converts = preallocate_metadata or _converts(document, source)
    if converts and reflink:
        raise ConfigUnsupported("a copy in another format shares no blocks with its source")
    if document.size < source.size:
        document.capacity = bytes_of(source.size)
    if document.allocation is None or document.format != "raw":
        document.allocation = bytes_of(0)
    async with _held(pools, source_pool, source, "copied", bars="writers") as holder:
        with pool.working(_free(pool, document.name), "it is being created"):
            volume: StorageVolume
            if converts:
                work = partial(_convert, pools, backend, document, holder, source, metadata=preallocate_metadata)
                volume = await settled(work, partial(_made, pool, document))
            else:
                async with _open(holder, source) as fd:
                    make = partial(backend.copy_volume, document, fd, reflink=reflink)
                    volume = await settled(make, partial(_made, pool, document))
    await pool.measure()
    return volume


def _made(pool: PoolObject, document: StorageVolume, volume: StorageVolume) -> None:
    """Show it, with the secret that its document named: it is written nowhere on it."""
    wanted, has = encryption_of(document), encryption_of(volume)
    if wanted is not None and has is not None:
        has.secrets = wanted.secrets
    pool.note(document.name, volume)


def _converts(document: StorageVolume, source: StorageVolume) -> bool:
    """Whether it takes more than the same bytes to make what the document asks for of the source."""
    encryption = encryption_of(document)
    if encryption is not None and (encryption.secrets or encryption_of(source) is None):
        return True
    kind = image_format(source) if document.format in ("raw", "qcow2") else document.format
    if source.type != "block" and document.format == source.format != "raw":
        below, target, theirs = document.backing_store, document.target, source.target
        if below is not None and (source.backing_store is None or source.backing_store.path != below.path):
            return True
        if document.size > source.size:
            return True
        forms = ("compat", "cluster_size", "features")
        return any(
            getattr(target, form) is not None and getattr(target, form) != getattr(theirs, form, None) for form in forms
        )
    return (source.type != "block" and kind != "raw") or document.format == "qcow2"


def _convert(
    pools: Pools, backend: Backend, document: StorageVolume, holder: Backend, source: StorageVolume, *, metadata: bool
) -> StorageVolume:
    with open_volume_image(pools, holder, source) as image:
        return backend.convert_volume(document, image, encryption_of(source), preallocate_metadata=metadata)


async def delete(pools: Pools, pool: PoolObject, name: str) -> None:
    """What a running machine has open or another volume is written on top of stays."""
    volume = pool.volume(name)
    for other in pools.list():
        for each in other.contents.volumes.values():
            if each.backing_store is not None and each.backing_store.path == volume.path:
                raise OperationInvalid(
                    f"volume '{name}' cannot be deleted: volume '{each.name}' of pool '{other.name}' is based on it",
                    remedy="delete that one first, or give it another base: kvik img rebase",
                )
    async with _held(pools, pool, volume, "deleted") as backend:
        await settled(partial(backend.delete_volume, volume), lambda _: pool.note(name, None))
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
    if delta:
        size = max(0, volume.size - size) if shrink else volume.size + size
    if not 0 <= size <= MAX_BYTES:
        raise InvalidArgument(f"a volume cannot have {size} bytes")
    if size < volume.size and not shrink:
        raise InvalidArgument(
            "Can't shrink capacity below current capacity unless shrink flag explicitly specified",
            remedy="what lies beyond is lost: --shrink says that it may be",
        )
    remedy = "a running machine's disk is resized by: kvik blockresize"
    async with _held(pools, pool, volume, "resized", bars="writers", remedy=remedy) as backend:
        try:
            await in_thread(partial(backend.resize_volume, volume, size, allocate=allocate))
        finally:
            await pool.look_again(volume)
    await pool.measure()


async def wipe(pools: Pools, pool: PoolObject, name: str, algorithm: int) -> None:
    """Overwrite all that it holds; it stays, and holds nothing."""
    volume, passes = pool.volume(name), passes_of(algorithm)

    async with _held(pools, pool, volume, "wiped") as holder:
        try:
            await in_thread(holder.wipe_volume, volume, passes)
        finally:
            await pool.look_again(volume)
    await pool.measure(written=True)


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
    bars: Bars = "all" if writable else ""
    async with _held(pools, pool, volume, "written to" if writable else "read", bars=bars) as backend:
        try:
            async with _open(backend, volume, writable=writable) as fd:
                size = await in_thread(size_of, fd)
                end = offset + length if length else (MAX_BYTES if writable else size)
                if offset > size or end > MAX_BYTES or (not writable and end > size):
                    raise InvalidArgument(f"volume '{name}' has {size} bytes: not {length} from byte {offset} on")
                yield Opened(fd, offset, end, volume.type == "file")
        finally:
            if writable:
                await pool.look_again(volume)
                await pool.measure(written=True)


@asynccontextmanager
async def _open(backend: Backend, volume: StorageVolume, *, writable: bool = False) -> AsyncIterator[int]:
    stack = ExitStack()
    try:
        yield await in_thread(lambda: stack.enter_context(backend.opened(volume, writable=writable)))
    finally:
        await in_thread(stack.close)


def _load(xml: str, backend: Backend, strict: bool, *, copies: bool = False) -> StorageVolume:
    document = load_volume(xml, backend.formats, copies=copies)
    if strict and (warnings := document.warnings()):
        raise ConfigUnsupported("; ".join(warnings[:5]))
    return document


def _free(pool: PoolObject, name: str) -> str:
    if name in pool.contents.volumes:
        raise StorageVolumeExists(f"storage volume '{name}' exists already")
    return name


@asynccontextmanager
async def _held(
    pools: Pools,
    pool: PoolObject,
    volume: StorageVolume,
    what: str,
    *,
    bars: Bars = "all",
    remedy: str = "shut that machine down",
) -> AsyncIterator[Backend]:
    """Be the only one to change a volume, with no machine of those that `bars` names on it, from now to the end."""
    with pool.working(volume.name, f"it is being {what}", bars) as work:
        work.places = places_of(pool, volume)
        work.identity = await in_thread(identify, volume.path)
        # A machine that starts from now on sees this work; one that did before is among the users.
        rows = [(path, machine) for path, machine, writes in pools.users() if bars == "all" or (bars and writes)]
        machine = next((machine for path, machine in rows if path in work.places), "")
        if rows and work.identity is not None and not machine:  # by whatever name a machine calls it
            known = {volume.path: work.identity, **await look_up({path for path, _ in rows} - {volume.path})}
            machine = next((machine for path, machine in rows if may_be(volume.path, path, known)), "")
        if machine:
            raise ResourceBusy(
                f"volume '{volume.name}' cannot be {what}: machine '{machine}' is running from it", remedy=remedy
            )
        descriptors: list[int] = []
        try:
            if bars and volume.type in ("file", "network"):
                await settled(partial(_lock, work.backend, volume, bars == "all"), descriptors.extend)
            yield work.backend
        finally:
            for fd in descriptors:
                os.close(fd)


def _lock(backend: Backend, volume: StorageVolume, alone: bool) -> list[int]:
    """Hold the image as its only user, or one of its readers: against what is no machine of ours, and machines of other
    hosts. A descriptor, or none where it is no such file any more: whoever works on it says so. ResourceBusy."""
    try:
        fd = backend.open_volume(volume)
    except (HostError, OperationInvalid, OperationUnsupported):
        return []
    try:
        lock_image(fd, volume.path, write=alone)
    except HostError:  # a file system without locks
        return [fd]
    except BaseException:
        os.close(fd)
        raise
    return [fd]


def find(pool: PoolObject, key: str) -> StorageVolume:
    """The volume of a pool that a wire reference means, by its key."""
    for volume in pool.volumes():
        if volume.key == key:
            return volume
    raise NoStorageVolume(f"no storage vol with matching key {key}")
