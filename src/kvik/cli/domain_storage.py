"""undefine --storage, --remove-all-storage: the volumes that a machine's disks are kept in go with it."""

from __future__ import annotations

from kvik.cli import document
from kvik.errors import KvikError, NoStoragePool, NoStorageVolume, OperationInvalid

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.cli.context import Context
    from kvik.client import Domain
    from kvik.client.storage import StorageVolume

WITH_SNAPSHOTS = 1 << 1  # of virStorageVolDeleteFlags
INACTIVE = 1 << 1  # of virDomainXMLFlags

Found = tuple[str, str, "StorageVolume"]  # target, source


def volumes_of(ctx: Context, domain: Domain, wanted: str | None) -> list[Found]:
    """Those of the disks that `wanted` names by target or source, with commas between; None: of all.

    Of all, read-only ones, those that other machines share and media of drives are left alone: another machine may well
    need them. Raises `OperationInvalid` for one that runs, or has no such disk.
    """
    if domain.is_active():
        raise OperationInvalid("Storage volume deletion is supported only on stopped domains")
    names = [name for name in wanted.split(",") if name] if wanted is not None else None
    disks = [disk for disk in document.disks(document.parse(domain.xml(INACTIVE))) if disk.source]
    for name in names or ():
        if not any(name in (disk.target, disk.source) for disk in disks):
            raise OperationInvalid(f"Volume '{name}' was not found in domain's definition.")
    found: list[Found] = []
    for disk in disks:
        if names is not None and disk.target not in names and disk.source not in names:
            continue
        if names is None and _is_others_too(disk):
            ctx.warn(
                f"warning: '{disk.target}'({disk.source}) is read-only, shared or a medium: it stays. "
                f"--storage {disk.target} removes it as well"
            )
            continue
        volume = _volume(ctx, disk)
        if volume is None:
            ctx.warn(
                f"warning: Storage volume '{disk.target}'({disk.source}) is in no active pool. Remove it manually."
            )
        else:
            found.append((disk.target, disk.source, volume))
    return found


def _is_others_too(disk: document.Disk) -> bool:
    marks = (disk.element.find(name) is not None for name in ("readonly", "shareable"))
    return disk.device in ("cdrom", "floppy") or any(marks)


def _volume(ctx: Context, disk: document.Disk) -> StorageVolume | None:
    from kvik.client import storage

    try:
        source = disk.element.find("source")
        if disk.kind == "volume" and source is not None:
            return storage.lookup_pool_name(ctx.connection, source.get("pool", "")).volume(disk.source)
        found = storage.lookup_volume_path(ctx.connection, disk.source)
    except (NoStoragePool, NoStorageVolume, OperationInvalid):
        return None
    return None if found.pool_name.startswith("/") else found  # kvikd's name for the place of a file in no pool


def remove(ctx: Context, found: list[Found], *, wipe: bool, with_snapshots: bool) -> int:
    """The exit code: 1 if one of them is still there."""
    code = 0
    for target, source, volume in found:
        ctx.doing = f"Failed to {'wipe' if wipe else 'remove'} storage volume '{target}'({source})"
        try:
            if wipe:
                volume.wipe()
                ctx.doing = f"Failed to remove storage volume '{target}'({source})"
            volume.delete(WITH_SNAPSHOTS if with_snapshots else 0)
        except KvikError as error:
            ctx.error(error)
            code = 1
        else:
            ctx.say(f"Volume '{target}'({source}) removed.")
    return code
