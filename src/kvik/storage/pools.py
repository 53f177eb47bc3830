"""All storage pools of one scope: who they are, where they are kept, and how they come back with the daemon."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from typing import Any
from uuid import UUID

from kvik.conf.enums import StoragePoolEventLifecycleType as Event
from kvik.conf.prepare import located
from kvik.conf.storage_pool import StoragePool, complete_pool, format_pool, parse_pool, validate_pool
from kvik.conf.storage_volume import StorageVolume
from kvik.errors import AlreadyExists, NoStoragePool, NoStorageVolume, OperationInvalid, ResourceBusy
from kvik.host.files import Identity
from kvik.host.threads import in_thread
from kvik.paths import Paths
from kvik.storage import recover
from kvik.storage.backend import Backend, SecretReader, no_secrets
from kvik.storage.pool import PoolObject
from kvik.storage.store import Store, check_name
from kvik.storage.types import backend_of

__all__ = ["PoolObject", "Pools"]

logger = logging.getLogger(__name__)

REFRESHED = -1  # the event that is not one of the life cycle
Callback = Callable[[PoolObject, int], None]
Build = Callable[[Backend], None]
Users = Callable[[], Iterable[tuple[str, str, bool]]]  # (path, machine, whether it writes)


class Pools:
    """`open` it once, in the loop that it is used from."""

    def __init__(self, paths: Paths) -> None:
        self.paths = paths
        self.store = Store(paths)
        self.patience = 45.0  # seconds that a client waits for a pool's source to be started, stopped or looked at
        self.glance = 10.0  # seconds for a look at one volume, which is shown as it was if that takes longer
        self.warnings: list[str] = []  # what `open` had to put right or set aside
        self.users: Users = lambda: ()  # what running machines have open
        self.secret: SecretReader = no_secrets  # what a pool's <auth> names
        self.secret_for: Callable[[str], str | None] = lambda path: None  # UUID of a volume's own, by its path
        self._names: dict[str, PoolObject] = {}
        self._uuids: dict[bytes, PoolObject] = {}
        self._callbacks: dict[int, Callback] = {}
        self._next = 0
        self._changing = asyncio.Lock()  # of the set of pools
        self._tasks: set[asyncio.Future[Any]] = set()

    def close(self) -> None:
        """Let go. Pools stay as they are."""
        for task in self._tasks:
            task.cancel()

    async def open(self) -> None:
        """Load definitions, find active pools again, take away what a killed daemon left, start what starts with the
        host. `HostError` if the directories cannot be had; anything smaller is put right and warned of."""
        await recover.recover(self)
        await recover.autostart(self)

    # looking up

    def list(self) -> list[PoolObject]:
        return [*self._names.values()]

    def lookup_name(self, name: str) -> PoolObject:
        try:
            return self._names[name]
        except KeyError:
            raise NoStoragePool(
                f"no storage pool with matching name '{name}'", remedy="see which there are: kvik pool-list --all"
            ) from None

    def lookup_uuid(self, uuid: bytes) -> PoolObject:
        try:
            return self._uuids[uuid]
        except KeyError:
            text = str(UUID(bytes=uuid)) if len(uuid) == 16 else repr(uuid)
            raise NoStoragePool(f"no storage pool with matching uuid '{text}'") from None

    def lookup_target(self, path: str) -> PoolObject:
        """The pool, active or not, whose volumes are seen at `path`."""
        path = path.rstrip("/") or "/"
        for pool in self._names.values():
            if pool.document.path == path:
                return pool
        raise NoStoragePool(f"no storage pool with matching target path '{path}'")

    def lookup_key(self, key: str) -> tuple[PoolObject, StorageVolume]:
        for pool in self._names.values():
            for volume in pool.contents.volumes.values():
                if volume.key == key:
                    return pool, volume
        raise NoStorageVolume(f"no storage vol with matching key {key}")

    def lookup_path(self, path: str) -> tuple[PoolObject, StorageVolume]:
        directory, _, name = path.rpartition("/")
        for pool in self._names.values():
            volume = pool.contents.volumes.get(name) if pool.document.path == directory else None
            if volume is not None and volume.path == path:
                return pool, volume
            for volume in pool.contents.volumes.values() if pool.document.path != directory else ():
                if volume.path == path:
                    return pool, volume
        raise NoStorageVolume(f"no storage vol with matching path '{path}'")

    def check_idle(self, identity: Identity | set[str], path: str, writes: bool) -> None:
        """ResourceBusy if what is done with a volume keeps a machine that reads it, or `writes`, from starting.
        `identity`: of a file or device, or the places of a network disk (`resolve.places`)."""
        for pool in self._names.values():
            work = pool.work_on(identity, writes)
            if work is not None:
                raise ResourceBusy(
                    f"{path} is volume '{work.name}' of storage pool '{pool.name}': {work.what}",
                    remedy="try again when that is done",
                )

    # defining

    async def define(self, xml: str) -> PoolObject:
        """Define a pool, or change the definition of one; an active one goes on as it is. Raises ConfigError,
        AlreadyExists, HostError."""
        async with self._changing:
            document, known = self._prepare(xml)
            await in_thread(self.store.save, document.name, format_pool(document, inactive=True))
            if known is None:
                known = PoolObject(self, document, persistent=True)
                self.add(known)
            else:
                known.definition = document
                if not known.persistent:
                    known.persistent = True
                    await known.save_origin()
        self.emit(known, Event.DEFINED)
        return known

    async def create_xml(self, xml: str, build: Build | None = None) -> PoolObject:
        """Start a transient pool; or, with this document, a defined one of the same name that is inactive."""
        async with self._changing:
            document, pool = self._prepare(xml)
            if pool is not None and pool.is_active:
                raise OperationInvalid(f"storage pool '{pool.name}' is already active")
            if pool is None:
                pool = PoolObject(self, document, persistent=False)
                self.add(pool)
        await pool.start(build, document)  # others can be defined meanwhile
        return pool

    async def undefine(self, pool: PoolObject) -> None:
        """Forget the definition of an inactive pool."""
        async with pool.job("undefine"), self._changing:
            if pool.is_active:
                raise OperationInvalid(
                    f"storage pool '{pool.name}' is still active", remedy=f"stop it: kvik pool-destroy {pool.name}"
                )
            await in_thread(self.store.remove, pool.name)
            pool.persistent = pool.autostart = False
            self.forget(pool)
        self.emit(pool, Event.UNDEFINED)

    def _prepare(self, xml: str) -> tuple[StoragePool, PoolObject | None]:
        """The document, complete and valid beside all others, and the pool that it is already."""
        document = parse_pool(xml)
        with located(xml):
            same = self._names.get(document.name)
            if same is not None and document.uuid is None:
                document.uuid = same.uuid_text
            complete_pool(document)
            validate_pool(document)
            check_name(document.name)
        backend_of(document.type)
        known = self._uuids.get(UUID(document.uuid).bytes)
        if same is not None and known is not same:
            raise OperationInvalid(f"pool '{document.name}' already exists with uuid {same.uuid_text}")
        if known is not None and known is not same:
            raise OperationInvalid(f"pool '{known.name}' is already defined with uuid {known.uuid_text}")
        for other in self._names.values():
            if other is not same and source_of(other.document) == source_of(document):
                raise AlreadyExists(
                    f"Storage source conflict with pool: '{other.name}'",
                    remedy="two pools of one source would each change what the other shows",
                )
        return document, same

    # what pools tell of themselves

    def add(self, pool: PoolObject) -> None:
        self._names[pool.name] = pool
        self._uuids[pool.uuid] = pool

    def forget(self, pool: PoolObject) -> None:
        """It is neither defined nor active: nothing of it stays."""
        if self._names.get(pool.name) is pool:
            del self._names[pool.name]
        if self._uuids.get(pool.uuid) is pool:
            del self._uuids[pool.uuid]

    def subscribe(self, callback: Callback) -> Callable[[], None]:
        """Call `callback(pool, event)` from now on, in the loop, in order: libvirt's numbers of the life cycle, or
        REFRESHED. The returned function ends that."""
        key = self._next
        self._next += 1
        self._callbacks[key] = callback
        return lambda: self._callbacks.pop(key, None) and None

    def emit(self, pool: PoolObject, event: int) -> None:
        for callback in list(self._callbacks.values()):
            try:
                callback(pool, event)
            except Exception:
                logger.exception("a subscriber failed on event %s of storage pool %s", event, pool.name)

    def emit_refresh(self, pool: PoolObject) -> None:
        self.emit(pool, REFRESHED)

    def keep(self, task: asyncio.Future[Any]) -> None:
        """What goes on beside everything else, with nobody waiting for it."""
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Future[Any]) -> None:
        self._tasks.discard(task)
        error = task.exception() if not task.cancelled() else None
        if error is not None:
            logger.warning("what nobody waited for any more failed: %s", error)

    def warn(self, text: str) -> None:
        self.warnings.append(text)
        logger.warning("%s", text)


def source_of(document: StoragePool) -> tuple[object, ...]:
    """What two pools must not share: one directory, one device, one export, one group, one target."""
    source = document.origin
    hosts = tuple(sorted((host.name, host.port) for host in source.hosts))
    if document.type in ("dir", "fs", "netfs"):
        if document.type == "netfs" and source.dir is not None:
            return ("netfs", hosts, source.dir.path)
        return ("path", document.path) if document.type == "dir" else ("fs", source.device)
    if document.type == "disk":
        return ("disk", source.device)
    if document.type in ("iscsi", "iscsi-direct"):
        return ("iscsi", hosts, source.device)
    if document.type == "scsi" and source.adapter is not None:
        adapter = source.adapter
        return ("scsi", adapter.name, adapter.wwnn, adapter.wwpn)
    if document.type == "mpath":
        return ("mpath",)
    return (document.type, hosts, source.name)
