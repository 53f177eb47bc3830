"""Storage pools and their volumes: libvirt's verbs in snake_case, each one call to the daemon.

pool = storage.pool(connection, "default")
with pool.volume("disk.img").download() as stream: ...
"""

from __future__ import annotations

from kvik.client.handle import Handle
from kvik.client.stream import Stream
from kvik.errors import NoStoragePool, NoStorageVolume, NoSupport
from kvik.named import NamedTuple
from kvik.rpc.program import remote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from kvik.client.connection import Connection

STATES = ("inactive", "building", "running", "degraded", "inaccessible")  # virStoragePoolState
VOLUME_TYPES = ("file", "block", "dir", "network", "netdir", "ploop")  # virStorageVolType
INACTIVE, ACTIVE = 1 << 0, 1 << 1  # virConnectListAllStoragePoolsFlags
SPARSE = 1  # virStorageVolDownloadFlags, virStorageVolUploadFlags
PHYSICAL = 1  # virStorageVolInfoFlags


class PoolInfo(NamedTuple):
    """virStoragePoolInfo: `state` of STATES; bytes."""

    state: int
    capacity: int
    allocation: int
    available: int


class PoolFacts(NamedTuple):
    """What a list of pools shows of one."""

    name: str
    uuid: str
    active: bool
    autostart: bool
    persistent: bool
    info: PoolInfo


class VolumeInfo(NamedTuple):
    """virStorageVolInfo: `type` of VOLUME_TYPES; bytes."""

    type: int
    capacity: int
    allocation: int


class StorageVolume:
    """A handle: the pool's name, the volume's name, its key. Comparing compares keys."""

    __slots__ = ("connection", "key", "name", "pool_name")

    def __init__(self, connection: Connection, pool_name: str, name: str, key: str) -> None:
        self.connection = connection
        self.pool_name = pool_name
        self.name = name
        self.key = key

    def __repr__(self) -> str:
        return f"<StorageVolume {self.name} of {self.pool_name}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StorageVolume) and other.key == self.key

    def __hash__(self) -> int:
        return hash(self.key)

    @property
    def ref(self) -> tuple[str, str, str]:
        """How procedures name the volume."""
        return (self.pool_name, self.name, self.key)

    def _call(self, procedure: str, *values: Any) -> Any:
        return self.connection.call(procedure, self.ref, *values)

    def pool(self) -> StoragePool:
        return StoragePool(self.connection, *self._call("STORAGE_POOL_LOOKUP_BY_VOLUME")[0])

    def path(self) -> str:
        return str(self._call("STORAGE_VOL_GET_PATH")[0])

    def xml(self) -> str:
        return str(self._call("STORAGE_VOL_GET_XML_DESC", 0)[0])

    def info(self, *, physical: bool = False) -> VolumeInfo:
        """`physical`: the length of its file in place of what it takes."""
        if physical:
            return VolumeInfo(*self._call("STORAGE_VOL_GET_INFO_FLAGS", PHYSICAL))
        return VolumeInfo(*self._call("STORAGE_VOL_GET_INFO"))

    def delete(self, flags: int = 0) -> None:
        """virStorageVolDeleteFlags: 1 wiped first, 2 with its snapshots."""
        self._call("STORAGE_VOL_DELETE", flags)

    def resize(self, capacity: int, flags: int = 0) -> None:
        """virStorageVolResizeFlags: 1 allocate, 2 by so much, 4 smaller."""
        self._call("STORAGE_VOL_RESIZE", capacity, flags)

    def wipe(self, algorithm: int | None = None) -> None:
        """virStorageVolWipeAlgorithm; None: zeros."""
        if algorithm is None:
            self._call("STORAGE_VOL_WIPE", 0)
        else:
            self._call("STORAGE_VOL_WIPE_PATTERN", algorithm, 0)

    def download(self, offset: int = 0, length: int = 0, *, sparse: bool = False) -> Stream:
        """Its bytes from `offset` on, `length` of them or (0) all of the rest."""
        return self._stream("STORAGE_VOL_DOWNLOAD", offset, length, sparse)

    def upload(self, offset: int = 0, length: int = 0, *, sparse: bool = False) -> Stream:
        """Write bytes from `offset` on; all is on disk when the stream's `finish` returns."""
        return self._stream("STORAGE_VOL_UPLOAD", offset, length, sparse)

    def _stream(self, procedure: str, offset: int, length: int, sparse: bool) -> Stream:
        link = self.connection.link
        values = (self.ref, offset, length, SPARSE if sparse else 0)
        key, _ = link.open_stream(remote()[procedure], values)
        return Stream(link, key)


class StoragePool(Handle):
    """A handle: name and UUID. Comparing compares UUIDs."""

    __slots__ = ()

    @property
    def ref(self) -> tuple[str, bytes]:
        """How procedures name the pool."""
        return (self.name, self.uuid_bytes)

    def _call(self, procedure: str, *values: Any) -> Any:
        return self.connection.call(procedure, self.ref, *values)

    # --- life cycle ---

    def start(self, flags: int = 0) -> None:
        """virStoragePoolCreateFlags: 1 build first, 2 overwriting, 4 not overwriting."""
        self._call("STORAGE_POOL_CREATE", flags)

    def build(self, flags: int = 0) -> None:
        """virStoragePoolBuildFlags: 4 not overwriting, 8 overwriting."""
        self._call("STORAGE_POOL_BUILD", flags)

    def destroy(self) -> None:
        """Stop it; what it holds stays."""
        self._call("STORAGE_POOL_DESTROY")

    def delete(self, flags: int = 0) -> None:
        """Remove what it is kept in."""
        self._call("STORAGE_POOL_DELETE", flags)

    def undefine(self) -> None:
        self._call("STORAGE_POOL_UNDEFINE")

    def refresh(self) -> None:
        """Look at everything anew."""
        self._call("STORAGE_POOL_REFRESH", 0)

    # --- what it is ---

    def xml(self, flags: int = 0) -> str:
        """virStorageXMLFlags: 1 inactive."""
        return str(self._call("STORAGE_POOL_GET_XML_DESC", flags)[0])

    def info(self) -> PoolInfo:
        return PoolInfo(*self._call("STORAGE_POOL_GET_INFO"))

    def is_active(self) -> bool:
        return bool(self._call("STORAGE_POOL_IS_ACTIVE")[0])

    def is_persistent(self) -> bool:
        return bool(self._call("STORAGE_POOL_IS_PERSISTENT")[0])

    def autostart(self) -> bool:
        return bool(self._call("STORAGE_POOL_GET_AUTOSTART")[0])

    def set_autostart(self, on: bool) -> None:
        self._call("STORAGE_POOL_SET_AUTOSTART", int(on))

    def messages(self) -> list[str]:
        """What is to be said of it: what its document says that the daemon does not understand, and what lies in it
        that is no volume. Nothing from a daemon that is not ours."""
        try:
            return list(self.connection.call_kvik("STORAGE_POOL_MESSAGES", self.ref)[0])
        except NoSupport:
            return []

    # --- volumes ---

    def volumes(self) -> list[StorageVolume]:
        rows = self._call("STORAGE_POOL_LIST_ALL_VOLUMES", 1, 0)[0]
        return [StorageVolume(self.connection, *ref) for ref in rows]

    def volume(self, name: str) -> StorageVolume:
        return StorageVolume(self.connection, *self._call("STORAGE_VOL_LOOKUP_BY_NAME", name)[0])

    def create_volume(self, xml: str, flags: int = 0) -> StorageVolume:
        """virStorageVolCreateFlags: 1 preallocate metadata, 4 refuse what is not understood."""
        return StorageVolume(self.connection, *self._call("STORAGE_VOL_CREATE_XML", xml, flags)[0])

    def copy_volume(self, xml: str, source: StorageVolume, flags: int = 0) -> StorageVolume:
        """A new volume with what `source` holds. virStorageVolCreateFlags, also 2: share blocks."""
        return StorageVolume(self.connection, *self._call("STORAGE_VOL_CREATE_XML_FROM", xml, source.ref, flags)[0])


# --- of a connection ---


def pools(connection: Connection, flags: int = 0) -> list[StoragePool]:
    """All pools, or those that virConnectListAllStoragePoolsFlags select (1 inactive, 2 active...)."""
    rows = connection.call("CONNECT_LIST_ALL_STORAGE_POOLS", 1, flags)[0]
    return [StoragePool(connection, *ref) for ref in rows]


def pool_facts(connection: Connection, flags: int = 0) -> list[PoolFacts]:
    """What a list of pools shows; the questions about all of them are sent together."""
    names = ("STORAGE_POOL_IS_ACTIVE", "STORAGE_POOL_GET_AUTOSTART", "STORAGE_POOL_IS_PERSISTENT")
    for last in (False, False, True):
        found = pools(connection, flags)
        refs = [(pool.ref,) for pool in found]
        try:
            answers = [[bool(answer[0]) for answer in connection.call_many(name, refs)] for name in names]
            infos = [PoolInfo(*answer) for answer in connection.call_many("STORAGE_POOL_GET_INFO", refs)]
        except NoStoragePool:  # one went away since the list was made: look again
            if last:
                raise
        else:
            break
    rows = zip(found, *answers, infos, strict=True)
    return [PoolFacts(each.name, each.uuid, *facts) for each, *facts in rows]


def pool(connection: Connection, key: str) -> StoragePool:
    """The pool of a UUID or name, tried in this order as virsh does. NoStoragePool if there is none."""
    try:
        return lookup_pool_uuid(connection, key)
    except NoStoragePool:
        return lookup_pool_name(connection, key)


def lookup_pool_name(connection: Connection, name: str) -> StoragePool:
    return StoragePool(connection, *connection.call("STORAGE_POOL_LOOKUP_BY_NAME", name)[0])


def lookup_pool_uuid(connection: Connection, uuid: str) -> StoragePool:
    from kvik.client.handle import uuid_bytes

    raw = uuid_bytes(uuid)
    if raw is None:
        raise NoStoragePool(f"{uuid!r} is not a UUID")
    return StoragePool(connection, *connection.call("STORAGE_POOL_LOOKUP_BY_UUID", raw)[0])


def lookup_volume_key(connection: Connection, key: str) -> StorageVolume:
    return StorageVolume(connection, *connection.call("STORAGE_VOL_LOOKUP_BY_KEY", key)[0])


def lookup_volume_path(connection: Connection, path: str) -> StorageVolume:
    return StorageVolume(connection, *connection.call("STORAGE_VOL_LOOKUP_BY_PATH", path)[0])


def volume(connection: Connection, key: str, within: StoragePool | None = None) -> StorageVolume:
    """By name in that pool, then by key, then by path, as virsh does. NoStorageVolume if there is none."""
    if within is not None:
        try:
            return within.volume(key)
        except NoStorageVolume:
            pass
    try:
        return lookup_volume_key(connection, key)
    except NoStorageVolume:
        return lookup_volume_path(connection, key)


def define_pool(connection: Connection, xml: str, flags: int = 0) -> StoragePool:
    """Make or replace a persistent definition. `flags`: 1 refuses what is not understood."""
    return StoragePool(connection, *connection.call("STORAGE_POOL_DEFINE_XML", xml, flags)[0])


def create_pool(connection: Connection, xml: str, flags: int = 0) -> StoragePool:
    """Start a transient pool. virStoragePoolCreateFlags."""
    return StoragePool(connection, *connection.call("STORAGE_POOL_CREATE_XML", xml, flags)[0])


def find_sources(connection: Connection, type_: str, xml: str | None) -> str:
    """<sources> that pools of this type could be made from."""
    return str(connection.call("CONNECT_FIND_STORAGE_POOL_SOURCES", type_, xml, 0)[0])


def capabilities(connection: Connection) -> str:
    return str(connection.call("CONNECT_GET_STORAGE_POOL_CAPABILITIES", 0)[0])
