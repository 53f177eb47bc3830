"""Taking a snapshot: every disk gets a new image on top, and what was there is never written again.

off        journal "prepare", new images, journal "commit" with document and definition
running    journal "prepare", new images, "ready", the VMM told to write to them all in one step, "commit"
"""

from __future__ import annotations

import os
import time
from os.path import normpath
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from kvik.conf.devices.disk import BackingStore, Disk, DiskSource, Format
from kvik.conf.domain import Domain, format_domain
from kvik.conf.enums import DomainBlockJobType, DomainState
from kvik.conf.enums import DomainSnapshotCreateFlags as Flags
from kvik.conf.snapshot import (
    Kind,
    Snapshot,
    SnapshotDisk,
    SnapshotDisks,
    SnapshotMemory,
    SnapshotParent,
    SnapshotTaken,
    State,
    format_snapshot,
    parse_snapshot,
)
from kvik.errors import (
    AlreadyExists,
    ConfigError,
    ConfigUnsupported,
    InvalidArgument,
    OperationInvalid,
    OperationUnsupported,
    ResourceBusy,
)
from kvik.host.reach import about, reach
from kvik.host.threads import in_thread
from kvik.hypervisor.layers import forget_live, has_medium
from kvik.manager import volume_disks
from kvik.manager.backup.busy import check_no_backup
from kvik.manager.encrypted_images import Make, encryption_of, maker
from kvik.manager.saved.managed import check_no_managed_save
from kvik.manager.snapshots import apply, background, firmware, inside, live, memory
from kvik.manager.snapshots.files import format_of, kind_of
from kvik.manager.snapshots.journal import Journal
from kvik.manager.snapshots.redefine import redefine
from kvik.manager.snapshots.store import MAX_SNAPSHOTS, check_snapshot_name
from kvik.storage import overlays
from kvik.storage.overlays import Facts

if TYPE_CHECKING:
    from collections.abc import Callable, Set

    from kvik.manager.domain import DomainObject
    from kvik.manager.manager import Manager

__all__ = ["create", "free_name", "make_overlays", "makers", "overlay_of", "put_on_top"]

STATES: dict[int, State] = {
    DomainState.RUNNING: "running",
    DomainState.PAUSED: "paused",
    DomainState.PMSUSPENDED: "pmsuspended",
    DomainState.SHUTOFF: "shutoff",
}


async def create(domain: DomainObject, xml: str, flags: int) -> str:
    """The new snapshot's name. Raises `ConfigError`s for the document, and then nothing has changed; as well if the
    host or the VMM refuses."""
    snapshot = parse_snapshot(xml)
    if flags & Flags.CURRENT and not flags & Flags.REDEFINE:
        raise InvalidArgument("a new snapshot is the current one: the flag is for redefining one")
    if flags & Flags.QUIESCE and not flags & Flags.DISK_ONLY:
        raise InvalidArgument("only a snapshot of disks alone can quiesce the guest: add --disk-only")
    if flags & (Flags.LIVE | Flags.QUIESCE) and not domain.is_active:
        raise OperationInvalid(f"machine {domain.name!r} is not running: there is no guest to go on or to be quiesced")
    async with domain.jobs.hold("snapshot", limit=apply.LONG):
        await apply.settle(domain)
        if not flags & Flags.REDEFINE:
            check_no_managed_save(domain, "a snapshot")
        if flags & Flags.REDEFINE:
            return await redefine(domain, snapshot, flags)
        running = domain.run.live if domain.run is not None and domain.is_active else None
        document = volume_disks.by_path(domain.manager, running or domain.config.parse(), running)
        complete(domain, snapshot, document, flags)
        await _take(domain, snapshot, document, flags)
    assert snapshot.name is not None
    return snapshot.name


def complete(domain: DomainObject, snapshot: Snapshot, document: Domain, flags: int) -> None:
    """What the document leaves out, and whether its parts agree."""
    tree = domain.snapshots
    if snapshot.name is None:
        snapshot.name = str(int(time.time()))
    check_snapshot_name(snapshot.name)
    if snapshot.name in tree.snapshots:
        raise AlreadyExists(f"domain snapshot {snapshot.name} already exists", remedy="choose another name")
    if len(tree) >= MAX_SNAPSHOTS:
        raise OperationInvalid(f"machine {domain.name!r} has {len(tree)} snapshots: no more fit into a list")
    if not domain.persistent and flags & Flags.HALT:
        raise OperationInvalid(f"machine {domain.name!r} is transient: it cannot be halted after its snapshot")
    snapshot.creation_time = int(time.time())
    snapshot.parent = SnapshotParent(name=tree.current) if tree.current is not None else None
    within = inside.asked(snapshot)
    file = None if within else memory.place_of(domain, snapshot, apply.store_of(domain).directory, flags)
    disks_alone = domain.is_active and file is None and not within
    snapshot.state = "disk-snapshot" if disks_alone else STATES.get(domain.state, "shutoff")
    kind: Literal["internal", "external", "no"] = "external" if file else "no"
    snapshot.memory = SnapshotMemory(snapshot="internal" if within and domain.is_active else kind, file=file)
    snapshot.disks = SnapshotDisks(disks=_disks(snapshot, document, "internal" if within else "external", tree.made))
    if within:
        inside.check(domain, snapshot, document, flags)
    if not any(disk.snapshot in ("internal", "external") for disk in snapshot.disks.disks):
        raise ConfigUnsupported(f"no disk of machine {domain.name!r} is selected for the snapshot")
    _check_jobs(domain, snapshot.disks.disks)
    copy = document.copy()
    copy.id = None
    snapshot.domain = copy
    if domain.is_active and domain.persistent and domain.run is not None:
        snapshot.inactive = volume_disks.by_path(domain.manager, domain.config.parse(), domain.run.live)
    else:
        snapshot.inactive = None
    snapshot.cookie, snapshot.taken = [], None


def _check_jobs(domain: DomainObject, chosen: list[SnapshotDisk]) -> None:
    """A job that copies or merges a disk's images knows them as they are: none may come on top meanwhile."""
    busy = domain.run.block_jobs if domain.run is not None else {}
    for disk in chosen:
        if disk.name not in busy or disk.snapshot not in ("internal", "external"):
            continue
        if busy[disk.name].type == DomainBlockJobType.BACKUP:
            check_no_backup(domain, "a snapshot")
        if disk.snapshot == "external":
            raise ResourceBusy(
                f"disk {disk.name!r} of machine {domain.name!r} has a block job",
                remedy=f"wait for it, or end it: kvik blockjob {domain.name} {disk.name} --info, --pivot, --abort; or "
                f"leave it out: --diskspec {disk.name},snapshot=no",
            )


def _disks(snapshot: Snapshot, document: Domain, usual: Kind, made: Set[str]) -> list[SnapshotDisk]:
    """One for each disk of the machine, in its order; `usual`: the kind of those of which nothing is said."""
    wanted: dict[str, SnapshotDisk] = {}
    by_path = {
        disk.source.location: disk.target.dev or ""
        for disk in document.devices.disks
        if disk.source is not None and disk.source.location
    }
    known = {disk.target.dev or "": disk for disk in document.devices.disks}
    for number, item in enumerate(snapshot.disks.disks if snapshot.disks else [], 1):
        path = f"/domainsnapshot/disks/disk[{number}]"
        name = item.name if item.name in known else by_path.get(item.name)
        if name is None:
            raise ConfigUnsupported(f"no disk named '{item.name}'", path=path)
        if name in wanted:
            raise ConfigUnsupported(f"disk '{name}' specified twice", path=path)
        item.name = name
        wanted[name] = item
    taken = {*made, *(item.source.file for item in wanted.values() if item.source is not None)}
    return [_disk(disk, wanted.get(name), snapshot.name or "", usual, taken) for name, disk in known.items()]


def _disk(disk: Disk, wanted: SnapshotDisk | None, name: str, usual: Kind, taken: set[str | None]) -> SnapshotDisk:
    """`taken`: where nothing is put without being asked to, such as the image of a snapshot of this name that was
    deleted, which may have all that a later one needs; what is put here is added."""
    target = disk.target.dev or ""
    frozen = disk.readonly or disk.device in ("cdrom", "floppy") or not has_medium(disk)
    kind = (wanted.snapshot if wanted else None) or disk.snapshot or ("no" if frozen else usual)
    if kind in ("no", "manual"):
        return SnapshotDisk(name=target, snapshot=kind)
    if disk.type == "volume" and disk.source is not None:
        raise ConfigUnsupported(
            f"disk {target!r} is volume {disk.source.volume!r} of pool {disk.source.pool!r}, which is not there now",
            remedy=f"kvik pool-start {disk.source.pool}; or leave it out: --diskspec {target},snapshot=no",
        )
    if disk.type not in ("file", "block") or disk.source is None or not disk.source.location:
        raise ConfigUnsupported(
            f"disk {target!r} of type {disk.type!r} cannot have a snapshot",
            remedy=f"leave it out: --diskspec {target},snapshot=no",
        )
    if disk.transient is not None:
        raise ConfigUnsupported(
            f"disk {target!r} is transient: what is written to it is thrown away, and would not be in a snapshot",
            remedy=f"leave it out: --diskspec {target},snapshot=no",
        )
    if disk.shareable:
        raise ConfigUnsupported(
            f"disk {target!r} is shared with other machines, which would go on writing to it",
            remedy=f"leave it out: --diskspec {target},snapshot=no",
        )
    if format_of(disk) not in ("raw", "qcow2"):
        raise ConfigUnsupported(f"disk {target!r}: images of format {format_of(disk)} cannot be snapshotted")
    if kind == "internal":
        return SnapshotDisk(name=target, snapshot="internal")
    if wanted is not None and wanted.driver is not None and wanted.driver.type != "qcow2":
        raise ConfigUnsupported(f"disk {target!r}: a snapshot's image has the format qcow2, not {wanted.driver.type}")
    if wanted is not None and wanted.type not in (None, "file"):
        raise ConfigUnsupported(f"disk {target!r}: a snapshot's image is a file, not of type {wanted.type!r}")
    path = wanted.source.file if wanted is not None and wanted.source is not None else None
    if path is None:
        if disk.type != "file":
            raise ConfigUnsupported(
                f"disk {target!r} is a block device: where its new image shall be has to be said",
                remedy=f"--diskspec {target},file=/path/of/the/new/image.qcow2",
            )
        path = free_name(overlay_of(disk.source.location, name), taken.__contains__)
        taken.add(path)
    if not path.startswith("/"):
        raise ConfigError(f"disk {target!r}: the path {path!r} is not absolute")
    # What is written from now on is encrypted with the same secret.
    source = DiskSource(file=normpath(path), encryption=encryption_of(disk))
    return SnapshotDisk(name=target, snapshot="external", type="file", driver=Format(type="qcow2"), source=source)


def overlay_of(path: str, name: str) -> str:
    """As libvirt names it: the suffix of the file below replaced by the snapshot's name."""
    stem, dot, suffix = path.rpartition(".")
    return f"{stem if dot and '/' not in suffix else path}.{name}"


def free_name(path: str, is_taken: Callable[[str], bool]) -> str:
    """`path`, or the first of `path-1`, `path-2`, ... that is not taken."""
    number, found = 0, path
    while is_taken(found):
        number += 1
        found = f"{path}-{number}"
    return found


def put_on_top(document: Domain, overlays_: dict[str, str]) -> None:
    """Let the disks of a document have new images; what was there is what these rest on, by their own headers. Headers
    do not say which secrets images need, and what lies elsewhere has to be named: then the chain is written in full."""
    for disk in document.devices.disks:
        path = overlays_.get(disk.target.dev or "")
        if path is None:
            continue
        encryption, below = encryption_of(disk), None
        there = disk.source.location if disk.source is not None else None  # of a volume its pool knows
        elsewhere = there is not None and Path(there).parent != Path(path).parent
        if (encryption is not None or elsewhere) and disk.source is not None:
            forget_live(disk)
            disk.source.encryption, disk.encryption = encryption, None
            format = Format(type=format_of(disk))
            below = BackingStore(type=disk.type, format=format, source=disk.source, backing_store=disk.backing_store)
        disk.type, disk.source = "file", DiskSource(file=path, encryption=encryption_of(disk))
        disk.backing_store = below
        assert disk.driver is not None
        disk.driver.type = "qcow2"


def _look(document: Domain, names: dict[str, str]) -> dict[str, Facts]:
    found = {}
    for disk in document.devices.disks:
        if disk.target.dev in names and disk.source is not None and disk.source.location:
            found[disk.target.dev] = overlays.look(normpath(disk.source.location), kind_of(disk))
    return found


def makers(manager: Manager, document: Domain) -> dict[str, Make | None]:
    """How a new image on top of each disk of a document is made."""
    return {disk.target.dev or "": maker(manager, encryption_of(disk)) for disk in document.devices.disks}


def make_overlays(new: dict[str, str], below: dict[str, Facts], how: dict[str, Make | None], *, tracked: bool) -> None:
    """`tracked`: the bitmaps of what is below go on in them; a VMM that puts them on top does that itself."""
    for target, path in new.items():
        overlays.create_overlay(path, below[target], how.get(target), tracked=tracked)


async def _take_inside(domain: DomainObject, snapshot: Snapshot, document: Domain) -> None:
    """Journal "prepare" with what is being made; in every image, at once where the VMM does it; journal "commit"."""
    assert snapshot.name is not None
    tag = snapshot.name
    snapshot.taken = SnapshotTaken(tag=tag)
    there = inside.places(snapshot)
    await reach(inside.check_names, [path for path, _ in there], tag)
    kept = firmware.sources(domain, document, apply.store_of(domain).directory, tag)
    journal = Journal(
        operation=f"create {tag}", phase="prepare", made=[copy for _, copy in kept.values()], inside=there
    )
    standstill = memory.Standstill(domain)
    await apply.begin(domain, journal)
    try:
        if domain.is_active:
            await standstill.stop()
        snapshot.taken = await in_thread(firmware.keep, kept)
        snapshot.taken.tag = tag
        await inside.make(domain, snapshot, tag)
    except BaseException:
        await standstill.go_on()
        await apply.abandon(domain)
        raise
    journal.redo, journal.inside, journal.made = apply.redo_of(domain), [], []
    journal.redo.write[tag] = format_snapshot(snapshot, secure=True)
    journal.redo.current = tag
    journal.redo.inside = [place for place in journal.redo.inside if tuple(place) not in there]
    try:
        await apply.commit(domain, journal)
    finally:
        held = await standstill.go_on()
    if held is not None:
        await _note_pause(domain, snapshot, held)


async def _take(domain: DomainObject, snapshot: Snapshot, document: Domain, flags: int) -> None:
    assert snapshot.disks is not None and snapshot.name is not None
    if inside.asked(snapshot):
        await _take_inside(domain, snapshot, document)
        return
    new = {disk.name: disk.source.file for disk in snapshot.disks.disks if disk.source is not None and disk.source.file}
    if domain.is_active:
        live.check(domain, flags, new)
    if len(set(new.values())) != len(new):
        raise ConfigError("two disks cannot have the same new image")
    below = await reach(_look, document, new)
    reused = bool(flags & Flags.REUSE_EXT)
    await reach(_check_room, new, reused, below)
    images = [] if reused else sorted(new.values())
    file = snapshot.memory.file if snapshot.memory is not None else None
    directory = apply.store_of(domain).directory
    if file and Path(file).parent != directory:  # named by whoever asked
        await reach(memory.check_free, file)
    kept = {} if flags & Flags.NO_METADATA else firmware.sources(domain, document, directory, snapshot.name)
    copies = [copy for _, copy in kept.values()]
    made = [*images, *copies, *(memory.made(file) if file else ())]
    journal = Journal(operation=f"create {snapshot.name}", phase="prepare", made=made)
    standstill = memory.Standstill(domain)
    going: background.LiveMemory | None = None
    stood: str | None = None

    async def keep() -> None:
        taken = await in_thread(firmware.keep, kept)
        taken.memory = file if not flags & Flags.NO_METADATA else None
        taken.stood = stood
        snapshot.taken = taken if firmware.copies(taken) else None

    await apply.begin(domain, journal)
    try:
        if not reused:
            how = makers(domain.manager, document)
            await in_thread(make_overlays, new, below, how, tracked=not domain.is_active)
        if file and background.wanted(domain, flags):
            try:
                going = await background.begin(domain, file)
            except OperationUnsupported as error:
                stood = str(error)
        if file and going is None:
            await standstill.save(file, live=bool(flags & Flags.LIVE))
        if going is None:
            await keep()
        redo = apply.redo_of(domain)
        redo.originals = sorted(
            {*redo.originals, *(item.path for item in below.values() if item.path not in redo.made)}
        )
        redo.made = sorted({*redo.made, *images})
        if going is not None and file:  # for the disks alone, until its memory is there
            journal.unfinished = [*copies, *memory.made(file)]
        elif not flags & Flags.NO_METADATA:
            redo.write[snapshot.name] = format_snapshot(snapshot, secure=True)
            redo.current = snapshot.name
        else:  # nobody will ask for these files to be removed again
            redo.made, redo.originals = apply.redo_of(domain).made, apply.redo_of(domain).originals
        redo.definition = _definition(domain, new, below)
        journal.redo = redo
        if domain.is_active:
            await live.get_ready(domain, journal, new)
    except BaseException:
        if going is not None:
            await going.give_up()
        await apply.abandon(domain)
        await standstill.go_on()
        raise
    if going is not None:
        await background.take(domain, journal, snapshot, flags, memory=going, keep=keep)
        await volume_disks.refresh_pools(domain.manager, new.values())
        return
    if not domain.is_active:
        await apply.commit(domain, journal)
        await volume_disks.refresh_pools(domain.manager, new.values())
        return
    try:
        await live.take(domain, journal, snapshot, flags)
    finally:
        held = await standstill.go_on()
    await volume_disks.refresh_pools(domain.manager, new.values())
    if held is not None and snapshot.name in domain.snapshots.snapshots:
        await _note_pause(domain, snapshot, held)


async def _note_pause(domain: DomainObject, snapshot: Snapshot, held: int) -> None:
    """How long the guest stood still is known when it goes on."""
    assert snapshot.name is not None and snapshot.taken is not None  # its memory's file is in it
    snapshot.taken.pause = held
    redo = apply.redo_of(domain)
    redo.write[snapshot.name] = format_snapshot(snapshot, secure=True)
    await apply.commit(domain, Journal(operation=f"note {snapshot.name}", phase="commit", redo=redo))


def _definition(domain: DomainObject, new: dict[str, str], below: dict[str, Facts]) -> str | None:
    """With the new images where it has what they rest on; None for a machine that has none of its own."""
    if not domain.persistent and domain.is_active:
        return None
    definition = domain.config.parse()
    running = domain.run.live if domain.run is not None and domain.is_active else None
    same = {
        disk.target.dev or ""
        for disk in volume_disks.by_path(domain.manager, definition, running).devices.disks
        if disk.source is not None and disk.source.location and (facts := below.get(disk.target.dev or "")) is not None
        and normpath(disk.source.location) == facts.path
    }  # fmt: skip
    put_on_top(definition, {target: path for target, path in new.items() if target in same})
    return format_domain(definition, secure=True, inactive=True)


def _check_room(new: dict[str, str], reused: bool, below: dict[str, Facts]) -> None:
    """`ConfigError` where a new image cannot be; with `reused` each has to be there, to be whole and to fit."""
    for target, path in new.items():
        about(path)
        if not reused:
            if os.path.lexists(path):
                raise ConfigUnsupported(
                    f"external snapshot file for disk {target} already exists: {path}",
                    remedy="remove it, name another one, or use it: --reuse-external",
                )
            if not Path(path).parent.is_dir():
                raise InvalidArgument(f"disk {target!r}: there is no directory {Path(path).parent}")
            continue
        overlays.check_reusable(path, below[target])
