"""What a backup's document leaves out, whether it fits the machine, and what the VMM is to be asked for.

`complete` fills the document so that it alone says what there is of the backup: the next daemon reads it again.
"""

from __future__ import annotations

import time
from dataclasses import replace
from os.path import normpath
from typing import TYPE_CHECKING

from kvik.conf.backup import Backup, BackupDisk, BackupDisks, BackupServer
from kvik.conf.devices.disk import Disk, DiskSource, Format
from kvik.conf.domain import Domain
from kvik.errors import ConfigError, ConfigUnsupported, ResourceBusy
from kvik.hypervisor.driver import BackupPart
from kvik.hypervisor.layers import has_medium, layers
from kvik.manager.checkpoints import chain
from kvik.manager.encrypted_images import encryption_of

if TYPE_CHECKING:
    from kvik.hypervisor.driver import DiskBackups
    from kvik.manager.domain import DomainObject

__all__ = ["JOB", "complete", "own_thread", "parts_of", "place_in", "with_changes"]

JOB = "backup-"  # before a disk's target: the name of its job, of its export in the VMM, of its own bitmap
DEFAULT_PORT = 10809  # IANA's for NBD
MAX_EXPORT_NAME = 255  # bytes; the protocol allows 4096
MAX_BITMAP_NAME = 1023  # bytes, in QEMU


def complete(domain: DomainObject, backup: Backup, suffix: str | None, *, reuse: bool) -> None:
    """Raises `ConfigError`s for what cannot be. `suffix` is for files that the document does not name;
    `reuse`: they are there."""
    assert domain.run is not None
    live = domain.run.live
    backup.mode = backup.mode or "push"
    _complete_server(backup)
    backup.disks = BackupDisks(disks=_disks(backup, live))
    disks = {disk.target.dev or "": disk for disk in live.devices.disks}
    if not backup.chosen:
        raise ConfigUnsupported(f"machine {domain.name!r} has no disk to back up")
    for item in backup.chosen:
        disk = disks[item.name]
        _check_disk(domain, disk)
        if backup.pull and own_thread(live, disk):
            # QEMU with the fix of CVE-2024-7409 (7.2.14, 9.1) fails an assertion in nbd_blockdev_client_closed there.
            raise ConfigUnsupported(
                f"disk '{item.name}' has an I/O thread: QEMU would end, and the guest with it, when a client that "
                "pulls from it leaves",
                remedy="push the backup, or run the disk without <driver iothread=...>",
            )
        _complete_changes(backup, item)
        _complete_place(backup, item, disk, suffix or str(int(time.time())), reuse=reuse)
        _check_secrecy(backup, item, disk)
        if backup.pull:
            item.export_name = item.export_name or item.name
            if item.backup_mode == "incremental":
                item.export_bitmap = item.export_bitmap or f"{JOB}{item.name}"
            _check_names(item)
        elif item.export_name is not None or item.export_bitmap is not None:
            raise ConfigError(f"disk {item.name!r}: a backup that is pushed has no exports", path="/domainbackup/disks")
    places = [normpath(place_in(item).location or "") for item in backup.chosen]
    if len(set(places)) != len(places):
        raise ConfigError("two disks cannot be backed up into the same image")
    exports = [item.export_name for item in backup.chosen if backup.pull]
    if len(set(exports)) != len(exports):
        raise ConfigError("two disks cannot have the same exportname")


def _complete_server(backup: Backup) -> None:
    server, path = backup.server, "/domainbackup/server"
    if not backup.pull:
        if server is not None:
            raise ConfigError("a backup that is pushed has no <server>", path=path)
        return
    server = backup.server = server or BackupServer()
    server.transport = server.transport or "tcp"
    if server.transport == "rdma":
        raise ConfigUnsupported("NBD does not go over rdma: transport is tcp or unix", path=path)
    if server.transport == "unix":
        if not server.socket or not server.socket.startswith("/"):
            raise ConfigError("a server on a Unix socket needs socket='/absolute/path'", path=path)
        if server.name is not None or server.port is not None:
            raise ConfigError("a server on a Unix socket has no name and no port", path=path)
        return
    if server.socket is not None:
        raise ConfigError("a server over tcp has no socket", path=path)
    server.name = server.name or "localhost"
    server.port = server.port or DEFAULT_PORT
    if server.port > 65535:
        raise ConfigError(f"there is no port {server.port}", path=path)


def _disks(backup: Backup, document: Domain) -> list[BackupDisk]:
    """One for each disk of the machine, in its order: all that can be written to, unless the document names some."""
    known = {disk.target.dev or "": disk for disk in document.devices.disks}
    wanted: dict[str, BackupDisk] = {}
    for number, item in enumerate(backup.disks.disks if backup.disks else [], 1):
        path = f"/domainbackup/disks/disk[{number}]"
        if item.name not in known:
            raise ConfigUnsupported(f"no disk named '{item.name}'", path=path)
        if item.name in wanted:
            raise ConfigUnsupported(f"disk '{item.name}' specified twice", path=path)
        wanted[item.name] = item
    found = []
    for name, disk in known.items():
        every = backup.disks is None and has_medium(disk) and not disk.readonly and disk.device == "disk"
        item = wanted.get(name) or BackupDisk(name=name, backup=every)
        item.backup = item.backup is not False
        found.append(item)
    return found


def _check_disk(domain: DomainObject, disk: Disk) -> None:
    target = disk.target.dev or ""
    if not has_medium(disk) or disk.type == "vhostuser":
        raise ConfigUnsupported(f"disk '{target}' has no image that could be backed up")
    if disk.transient is not None:
        raise ConfigUnsupported(
            f"disk '{target}' is transient: what is written to it is thrown away",
            remedy=f"leave it out: <disk name='{target}' backup='no'/>",
        )
    if domain.run is not None and target in domain.run.block_jobs:
        raise ResourceBusy(
            f"disk '{target}' already in active block job", remedy=f"kvik blockjob {domain.name} {target} --info"
        )


def _complete_changes(backup: Backup, item: BackupDisk) -> None:
    since = item.incremental or backup.incremental
    if item.backup_mode is None:
        item.backup_mode = "incremental" if since else "full"
    if item.backup_mode == "full":
        if item.incremental:
            raise ConfigError(f"disk '{item.name}': a full backup is not since checkpoint '{item.incremental}'")
        return
    if not since:
        raise ConfigError(f"incremental backup mode of disk '{item.name}' requires setting 'incremental' field")
    item.incremental = since


def own_thread(document: Domain, disk: Disk) -> bool:
    """Whether the VMM serves the disk in another thread than its main loop."""
    driver = disk.driver
    if driver is not None and (driver.iothread or driver.iothreads is not None):
        return True
    number = (disk.address.controller if disk.address is not None else 0) or 0
    return disk.target.bus == "scsi" and any(
        item.type == "scsi" and (item.index or 0) == number and item.driver is not None and bool(item.driver.iothread)
        for item in document.devices.controllers
    )


def place_in(item: BackupDisk) -> DiskSource:
    """Where the backup of a disk goes, or its scratch image is."""
    place = item.target or item.scratch
    assert place is not None
    return place


def _complete_place(backup: Backup, item: BackupDisk, disk: Disk, suffix: str, *, reuse: bool) -> None:
    path = f"/domainbackup/disks/disk[@name='{item.name}']"
    if (item.scratch if not backup.pull else item.target) is not None:
        wrong, right = ("target", "scratch") if backup.pull else ("scratch", "target")
        raise ConfigError(
            f"disk '{item.name}': a backup that is {backup.mode}ed has a <{right}>, no <{wrong}>", path=path
        )
    place = item.scratch if backup.pull else item.target
    item.type = item.type or ("block" if place is not None and place.dev else "file")
    if place is None:
        if item.type != "file" or disk.type != "file" or disk.source is None or not disk.source.file or reuse:
            raise ConfigUnsupported(f"refusing to generate file name for disk '{item.name}'", path=path)
        place = DiskSource(file=f"{disk.source.file}.{suffix}")
    place.encryption = place.encryption or encryption_of(disk)  # nothing of such a disk ever lies in plain text
    location = place.dev if item.type == "block" else place.file
    if not location or not location.startswith("/"):
        raise ConfigError(f"disk '{item.name}': the backup's image needs an absolute path", path=path)
    item.target, item.scratch = (None, place) if backup.pull else (place, None)
    item.driver = item.driver or Format(type="qcow2")
    kind = item.driver.type
    if backup.pull and kind != "qcow2":
        raise ConfigUnsupported(f"disk '{item.name}': a scratch image has the format qcow2, not {kind}", path=path)
    if kind not in ("qcow2", "raw"):
        raise ConfigUnsupported(f"disk '{item.name}': a backup has the format qcow2 or raw, not {kind}", path=path)
    if kind == "raw" and item.backup_mode == "incremental" and not reuse:
        raise ConfigUnsupported(
            f"disk '{item.name}': a new raw image cannot say which of its blocks were copied",
            path=path,
            remedy="use <driver type='qcow2'/>; or bring a raw copy of the disk up to date, with --reuse-external",
        )
    if kind == "qcow2" and item.type == "block" and not reuse:
        raise ConfigUnsupported(
            f"{location}: an image of format qcow2 on a block device has to be made first",
            path=path,
            remedy=f"kvik img create -f qcow2 {location} SIZE, then give --reuse-external",
        )


def _check_secrecy(backup: Backup, item: BackupDisk, disk: Disk) -> None:
    """What is encrypted on the disk is not sent in plain text to whoever asks."""
    server = backup.server
    if encryption_of(disk) is None or server is None or server.tls or server.transport == "unix":
        return
    raise ConfigUnsupported(
        f"disk '{item.name}' is encrypted, and anybody who reaches port {server.port} could read it",
        path="/domainbackup/server",
        remedy="use transport='unix', or tls='yes'",
    )


def _check_names(item: BackupDisk) -> None:
    for name, most in ((item.export_name, MAX_EXPORT_NAME), (item.export_bitmap, MAX_BITMAP_NAME)):
        if name is not None and (not 0 < len(name.encode()) <= most or not name.isprintable()):
            raise ConfigError(f"disk '{item.name}': {name[:40]!r} is no name for an export or its bitmap")


def parts_of(document: Domain, backup: Backup) -> list[BackupPart]:
    """What the VMM has to know of each disk; of changes nothing yet. Disks that are gone are left out."""
    disks = {disk.target.dev or "": disk for disk in document.devices.disks}
    found = []
    for item in backup.chosen:
        disk = disks.get(item.name)
        if disk is None:
            continue
        incremental = item.backup_mode == "incremental"
        found.append(
            BackupPart(
                disk=disk,
                job=f"{JOB}{item.name}",
                path=place_in(item).location or "",
                block=item.type == "block",
                format=item.driver.type if item.driver is not None else "qcow2",
                bitmap=(item.export_bitmap or f"{JOB}{item.name}") if incremental else "",
                export=item.export_name or "",
                secret=f"{JOB}{item.name}-luks" if place_in(item).encryption is not None else "",
            )
        )
    return found


async def with_changes(
    domain: DomainObject, backup: Backup, parts: list[BackupPart], backups: DiskBackups
) -> list[BackupPart]:
    """The parts with the bitmaps that tell what changed. Raises `NoCheckpoint`, `CheckpointInconsistent`."""
    since = {f"{JOB}{item.name}": item.incremental for item in backup.chosen}
    found = []
    for part in parts:
        name = since[part.job]
        if not part.bitmap or name is None:
            found.append(part)
            continue
        known = await backups.bitmaps(part.disk)
        sources = chain.sources(part.disk, domain.checkpoints.get(name), known)
        top = next((layer.key for layer in layers(part.disk)), 0)
        if part.bitmap in known.get(top, {}):
            raise ConfigUnsupported(
                f"disk '{part.disk.target.dev}' has a bitmap '{part.bitmap}' already",
                remedy="choose another exportbitmap, or delete the checkpoint of that name",
            )
        granularity = min(known[image][bitmap].granularity for image, bitmap in sources)
        found.append(replace(part, since=sources, granularity=granularity))
    return found
