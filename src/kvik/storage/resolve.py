"""From a disk that names a volume of a pool to what its machine opens: a path, a device, or a place on the network."""

from __future__ import annotations

from kvik.conf.devices.disk import Auth, DiskSource, Host, Secret, SourceType
from kvik.conf.storage_volume import StorageVolume
from kvik.conf.tree import clone
from kvik.errors import ConfigError, ConfigUnsupported, OperationInvalid
from kvik.named import NamedTuple
from kvik.storage.pool import PoolObject
from kvik.storage.pools import Pools

__all__ = ["Resolved", "places", "places_of", "resolve"]

KINDS: dict[str, SourceType] = {"file": "file", "block": "block", "dir": "dir", "network": "network"}
PROTOCOLS = {"iscsi": "iscsi", "iscsi-direct": "iscsi", "rbd": "rbd", "gluster": "gluster"}


class Resolved(NamedTuple):
    """A volume as a disk's source.

    `type` and `source` are those of a disk that names the same thing itself: `file`, `dev`, `dir`, or `protocol`,
    `name`, `hosts` and `auth`; what else the reference said (startupPolicy, seclabels, slices, encryption) is kept.
    `format`: what the pool shows the volume as, by the first bytes of a file: for people, and for documents that are
    made for them. A running machine's disk never takes its format from there: a guest writes what it likes into a raw
    disk's first bytes. A disk without a format is raw.
    """

    type: SourceType
    source: DiskSource
    format: str
    pool_type: str


def resolve(pools: Pools, reference: DiskSource) -> Resolved:
    """What `<source pool= volume= mode=>` means now; from memory, at once. `reference` stays as it is.

    Raises NoStoragePool, NoStorageVolume, OperationInvalid (the pool is not active), ConfigError (what the reference
    asks for does not fit this pool), ResourceBusy (the volume is being made or destroyed).
    """
    here = "/domain/devices/disk/source"
    if not reference.pool or not reference.volume:
        raise ConfigError("a disk of type volume names a pool and a volume", path=here)
    pool = pools.lookup_name(reference.pool)
    if not pool.is_active:
        raise OperationInvalid(
            f"storage pool '{pool.name}' containing volume '{reference.volume}' is not active",
            remedy=f"start it: kvik pool-start {pool.name}",
        )
    volume, kind = pool.volume(reference.volume), pool.document.type
    pool.check_idle(volume.name)
    if reference.mode not in (None, "host", "direct"):
        raise ConfigError(f"a volume is not used in mode '{reference.mode}'", path=f"{here}/@mode")
    if reference.mode is not None and kind != "iscsi":
        raise ConfigError("disk source mode is only valid when storage pool is of iscsi type", path=f"{here}/@mode")
    source = clone(reference)
    source.pool = source.volume = source.mode = None
    direct = volume.type == "network" or reference.mode == "direct"
    if volume.type == "netdir" or (direct and kind not in PROTOCOLS):
        raise ConfigUnsupported(f"volume '{volume.name}' of pool '{pool.name}' cannot be a disk", path=here)
    type_: SourceType = "network" if direct else KINDS[volume.type or "file"]
    if reference.startup_policy is not None and type_ != "file":
        raise ConfigUnsupported("'startupPolicy' is only valid for 'file' type volume", path=f"{here}/@startupPolicy")
    if direct:
        _over_network(source, pool, volume)
    elif type_ == "block":
        source.dev = volume.path
    elif type_ == "dir":
        source.dir = volume.path
    else:
        source.file = volume.path
    return Resolved(type_, source, volume.format if type_ in ("file", "dir") else "raw", kind)


def places(source: DiskSource | None) -> set[str]:
    """What a network disk opens, by each server that leads to it. A server has as many as people have names for it."""
    if source is None or source.protocol is None or source.name is None:
        return set()
    return {f"{source.protocol}://{host.name}/{source.name}" for host in source.hosts}


def places_of(pool: PoolObject, volume: StorageVolume) -> set[str]:
    """The same of a volume; nothing of one that is no network disk."""
    source = DiskSource()
    if volume.type == "network":
        _over_network(source, pool, volume)
    return places(source)


def _over_network(source: DiskSource, pool: PoolObject, volume: StorageVolume) -> None:
    """Fill in where the machine's own client finds the volume, and by which secret it may."""
    origin = pool.document.origin
    source.protocol = PROTOCOLS[pool.document.type]
    source.hosts = [
        Host(name=host.name, port=str(host.port) if host.port is not None else None) for host in origin.hosts
    ]
    if source.protocol == "iscsi":
        # The kernel's and libiscsi's names of a unit both end with its number: "unit:0:0:1", "...-lun-1".
        unit = volume.name.rpartition(":")[2]
        source.name = f"{origin.device}/{unit}"
        for host in source.hosts:
            host.port = host.port or "3260"
    elif source.protocol == "rbd":
        source.name = f"{origin.name}/{volume.name}"
    else:
        directory = origin.dir.path.strip("/") if origin.dir is not None else ""
        source.name = "/".join(part for part in (origin.name, directory, volume.name) if part)
    if origin.auth is not None:
        secret = Secret(
            type="ceph" if origin.auth.type == "ceph" else "iscsi",
            uuid=origin.auth.secret.uuid,
            usage=origin.auth.secret.usage,
        )
        source.auth = Auth(username=origin.auth.username, secret=secret)
