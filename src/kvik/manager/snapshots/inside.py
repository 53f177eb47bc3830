"""Snapshots inside qcow2 images ("internal"): of machines that are off by `image/`, of one that runs by its VMM, which
puts the memory into the first image and keeps the guest still for as long as that takes.

The guest goes on writing to the image that they are in. So an image that anything rests on, or that an external
snapshot is kept in, is never gone back inside of: that would change what the others show. What is deleted is first
forgotten and noted (`Tree.inside`), then taken out of the images when that can be done: by the VMM that has them open,
or when they are not in use.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from os.path import normpath
from typing import TYPE_CHECKING

from kvik.conf.devices.disk import Disk
from kvik.conf.domain import Domain
from kvik.conf.enums import DomainSnapshotCreateFlags as Flags
from kvik.conf.snapshot import Snapshot
from kvik.errors import ConfigUnsupported, KvikError, NoSnapshot, OperationInvalid, OperationUnsupported
from kvik.host.reach import about
from kvik.host.threads import in_thread
from kvik.hypervisor.driver import Feature
from kvik.manager.snapshots.files import Survey, format_of, kept_disks
from kvik.storage import inside

if TYPE_CHECKING:
    from kvik.manager.domain import DomainObject

logger = logging.getLogger(__name__)

__all__ = ["asked", "check", "check_can_go_back", "collect", "disks_of", "make", "places", "tag_of"]


def asked(snapshot: Snapshot) -> bool:
    return snapshot.internal


def tag_of(snapshot: Snapshot) -> str | None:
    """Its name inside the images; None for one that has none."""
    return snapshot.taken.tag if snapshot.taken is not None else None


def places(snapshot: Snapshot) -> list[tuple[str, str]]:
    """(image, name inside it)."""
    tag = tag_of(snapshot)
    if tag is None:
        return []
    found = [disk for disk, kind in kept_disks(snapshot) if kind == "internal"]
    return [(normpath(disk.source.location), tag) for disk in found if disk.source and disk.source.location]


def disks_of(document: Domain, snapshot: Snapshot) -> list[Disk]:
    """Those of `document` that are kept inside their images."""
    targets = {item.name for item in (snapshot.disks.disks if snapshot.disks else []) if item.snapshot == "internal"}
    return [disk for disk in document.devices.disks if disk.target.dev in targets]


def check(domain: DomainObject, snapshot: Snapshot, document: Domain, flags: int) -> None:
    """What cannot be one. Raises `ConfigUnsupported`, `OperationUnsupported`; nothing has changed."""
    kinds = {disk.snapshot for disk in snapshot.disks.disks} if snapshot.disks else set()
    if "external" in kinds:
        raise ConfigUnsupported(
            "a snapshot is kept inside all of its images or beside all of them, not both",
            remedy="say snapshot=internal, or snapshot=no, of every disk",
        )
    if flags & (Flags.DISK_ONLY | Flags.LIVE | Flags.QUIESCE | Flags.REUSE_EXT | Flags.NO_METADATA | Flags.HALT):
        raise ConfigUnsupported("a snapshot inside its images takes none of these options", remedy="leave them out")
    if domain.is_active and Feature.SNAPSHOTS_INSIDE not in domain.driver.features():
        raise OperationUnsupported(
            f"{domain.driver.name} cannot put a machine's memory into an image", remedy="leave snapshot=internal out"
        )
    for disk in disks_of(document, snapshot):
        if format_of(disk) != "qcow2":
            raise ConfigUnsupported(
                f"disk {disk.target.dev!r}: an image of format {format_of(disk)} can have no snapshot inside",
                remedy="qcow2 can; or leave snapshot=internal out",
            )


def check_names(paths: Iterable[str], tag: str) -> None:
    """`ConfigUnsupported` where somebody has put one of this name (blocking)."""
    for path in paths:
        about(path)
        if tag in inside.names(path):
            raise ConfigUnsupported(f"{path} has a snapshot {tag!r} inside already", remedy="choose another name")


async def make(domain: DomainObject, snapshot: Snapshot, tag: str) -> None:
    """In every image; the journal that undoes it is on disk."""
    if domain.is_active and domain.run is not None:
        await domain.require_machine().save_inside(tag, disks_of(domain.run.live, snapshot))
        return
    assert snapshot.domain is not None
    for disk in disks_of(snapshot.domain, snapshot):
        assert disk.source is not None and disk.source.location
        await in_thread(inside.put, disk.source.location, tag)


async def check_can_go_back(domain: DomainObject, snapshot: Snapshot, found: Survey) -> None:
    """`OperationInvalid` where others would see it; `NoSnapshot` where it is no more."""
    tag = tag_of(snapshot)
    if tag is None:
        raise OperationInvalid(f"what snapshot {snapshot.name!r} is called inside its images is not known")
    for path, _ in places(snapshot):
        above = next((layer.path for layer in found.layers.values() if layer.backing == path), None)
        mine = f"machine {domain.name!r}"
        others = (top.who for top in found.tops if top.path == path and not top.inside and top.who != mine)
        keeper = next(others, "")
        if above is not None or keeper:
            who = keeper or f"{above}, which rests on it"
            raise OperationInvalid(
                f"{path} cannot go back to what it was in snapshot {snapshot.name!r}: that would change {who}",
                remedy="delete what rests on it first; kvik img convert -l makes a new image of a snapshot inside one",
            )
        if tag not in await in_thread(inside.names, path):
            raise NoSnapshot(f"{path} has no snapshot {tag!r} inside any more")


async def collect(domain: DomainObject) -> bool:
    """Take out of the images what was deleted and can be taken out now; whether anything was."""
    tree, changed = domain.snapshots, False
    needed = {place for snapshot in tree.snapshots.values() for place in places(snapshot)}
    for place in sorted(tree.inside - needed):
        try:
            if not await _take_out(domain, *place):
                continue
        except KvikError as error:
            logger.warning("snapshot %r is still inside %s: %s", place[1], place[0], error)
            continue
        tree.inside.discard(place)
        changed = True
    return changed


async def _take_out(domain: DomainObject, path: str, tag: str) -> bool:
    if domain.run is None:
        await in_thread(inside.take_out, path, tag)
        return True
    for disk in domain.run.live.devices.disks:
        if disk.source is not None and disk.source.location and normpath(disk.source.location) == path:
            await domain.require_machine().delete_inside(tag, [disk])
            return True
    return False  # something below a disk, or of another branch: when the machine is off
