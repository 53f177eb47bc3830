"""Making a checkpoint: a persistent dirty bitmap on each disk, all from one moment on; and telling of one there is.

    document with all that it leaves out --> CHECKPOINT.pending --> bitmaps, in one transaction --> CHECKPOINT.xml

A daemon that died in between leaves the pending document: the next one takes the bitmaps back (`resume`).
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from kvik.conf.checkpoint import (
    Checkpoint,
    CheckpointDisk,
    CheckpointDisks,
    CheckpointParent,
    TrackedImage,
    TrackedImages,
    parse_checkpoint,
    place_of,
)
from kvik.conf.devices.disk import Disk
from kvik.conf.domain import Domain
from kvik.conf.enums import DomainCheckpointCreateFlags as Flags
from kvik.conf.enums import DomainState
from kvik.errors import (
    AlreadyExists,
    ConfigError,
    ConfigUnsupported,
    InvalidArgument,
    KvikError,
    MonitorError,
    NoCheckpoint,
    OperationInvalid,
    ResourceBusy,
)
from kvik.hypervisor.driver import DiskBackups, Machine
from kvik.hypervisor.layers import has_medium
from kvik.manager.checkpoints import chain
from kvik.manager.checkpoints.resume import settle, take_back
from kvik.manager.checkpoints.store import MAX_CHECKPOINTS, check_checkpoint_name, store_of

if TYPE_CHECKING:
    from kvik.manager.domain import DomainObject

logger = logging.getLogger(__name__)

__all__ = ["announce", "complete", "create", "keep", "new_bitmaps"]

FREEZE_DEADLINE = 60.0  # seconds for a guest to write out what it has in memory
THAW_DEADLINE = 30.0


async def create(domain: DomainObject, xml: str, flags: int) -> str:
    """virDomainCheckpointCreateXML; the new checkpoint's name."""
    if flags & Flags.REDEFINE_VALIDATE and not flags & Flags.REDEFINE:
        raise InvalidArgument("only what is redefined can be validated: the flag needs that for redefining")
    if flags & Flags.REDEFINE and flags & Flags.QUIESCE:
        raise InvalidArgument("a checkpoint that is redefined was taken already: there is nothing to be quiesced")
    checkpoint = parse_checkpoint(xml)
    async with domain.jobs.hold("checkpoint-create"):
        await settle(domain)
        if flags & Flags.REDEFINE:
            return await _redefine(domain, checkpoint, validate=bool(flags & Flags.REDEFINE_VALIDATE))
        machine = domain.require_machine()
        backups = machine.backups
        complete(domain, checkpoint)
        await announce(domain, checkpoint, backups)
        try:
            async with _quiesced(domain, machine, bool(flags & Flags.QUIESCE)):
                await backups.track(new_bitmaps(domain, checkpoint))
        except MonitorError:  # none of them is there
            await take_back(domain, checkpoint, bitmaps=False)
            raise
        except KvikError:
            with contextlib.suppress(KvikError):  # else it stays pending, and whoever comes next does it
                await take_back(domain, checkpoint)
            raise
        await keep(domain, checkpoint)
    assert checkpoint.name is not None
    return checkpoint.name


def complete(domain: DomainObject, checkpoint: Checkpoint) -> None:
    """What the document leaves out, and whether it fits the machine as it runs. Raises `ConfigError`s."""
    assert domain.run is not None
    live, known = domain.run.live, domain.checkpoints
    if checkpoint.name is None:
        checkpoint.name = str(int(time.time()))
    check_checkpoint_name(checkpoint.name)
    if checkpoint.name in known.all:
        raise AlreadyExists(f"domain checkpoint {checkpoint.name} already exists", remedy="choose another name")
    if len(known) >= MAX_CHECKPOINTS:
        raise OperationInvalid(f"machine {domain.name!r} has {len(known)} checkpoints: no more fit into a list")
    checkpoint.creation_time = int(time.time())
    checkpoint.parent = CheckpointParent(name=known.current) if known.current is not None else None
    checkpoint.disks = CheckpointDisks(disks=_disks(checkpoint, live))
    tracked = [disk for disk in live.devices.disks if disk.target.dev in checkpoint.tracked]
    if not tracked:
        raise ConfigUnsupported(
            f"no disk of machine {domain.name!r} is selected for the checkpoint",
            remedy="once a disk is named, others are left out: --diskspec DISK for each that it shall have",
        )
    for disk in tracked:
        _check_disk(domain, disk)
    checkpoint.images = _images(tracked)
    copy = live.copy()
    copy.id = None
    checkpoint.domain = copy


def _disks(checkpoint: Checkpoint, document: Domain) -> list[CheckpointDisk]:
    """One for each disk of the machine, in its order: all that can be written to, unless the document names some."""
    known = {disk.target.dev or "": disk for disk in document.devices.disks}
    paths = {place_of(disk.source): name for name, disk in known.items() if disk.source is not None}
    wanted: dict[str, CheckpointDisk] = {}
    for number, item in enumerate(checkpoint.disks.disks if checkpoint.disks else [], 1):
        path = f"/domaincheckpoint/disks/disk[{number}]"
        name = item.name if item.name in known else paths.get(item.name)
        if name is None:
            raise ConfigUnsupported(f"no disk named '{item.name}'", path=path)
        if name in wanted:
            raise ConfigUnsupported(f"disk '{name}' specified twice", path=path)
        if item.bitmap is not None and item.checkpoint == "no":
            raise ConfigError(f"disk checkpoint bitmap '{item.bitmap}' requires type='bitmap'", path=path)
        wanted[name] = item
    found = []
    for name, disk in known.items():
        frozen = disk.readonly or disk.device in ("cdrom", "floppy") or not has_medium(disk)
        default = "no" if checkpoint.disks is not None or frozen else "bitmap"
        given = wanted.get(name)
        kind = (given.checkpoint or "bitmap") if given is not None else default
        if kind == "bitmap" and frozen:
            raise ConfigUnsupported(f"disk '{name}' is empty or readonly: there is nothing to be tracked")
        bitmap = ((given.bitmap if given is not None else None) or checkpoint.name) if kind == "bitmap" else None
        found.append(CheckpointDisk(name=name, checkpoint="bitmap" if kind == "bitmap" else "no", bitmap=bitmap))
    return found


def _check_disk(domain: DomainObject, disk: Disk) -> None:
    target = disk.target.dev or ""
    kind = (disk.driver.type if disk.driver is not None else None) or "raw"
    if kind != "qcow2":
        raise ConfigUnsupported(
            f"checkpoint for disk {target} unsupported for storage type {kind}",
            remedy="only a qcow2 image can keep a bitmap: convert it, or name the disks that the checkpoint "
            "shall have: --diskspec DISK for each",
        )
    if disk.transient is not None:
        raise ConfigUnsupported(
            f"disk {target} is transient: what is written to it is thrown away",
            remedy="name the disks that the checkpoint shall have: --diskspec DISK for each",
        )
    if disk.shareable:
        raise ConfigUnsupported(f"disk {target} is shared with other machines, whose writes are not tracked")
    if domain.run is not None and target in domain.run.block_jobs:
        raise ResourceBusy(
            f"disk '{target}' already in active block job", remedy=f"kvik blockjob {domain.name} {target} --info"
        )


def _images(disks: list[Disk]) -> TrackedImages:
    """Where tracking begins: in what the disk writes to now."""
    places = ((disk.target.dev or "", place_of(disk.source)) for disk in disks if disk.source is not None)
    return TrackedImages(images=[TrackedImage(disk=target, path=place) for target, place in places if place])


def new_bitmaps(domain: DomainObject, checkpoint: Checkpoint) -> list[tuple[Disk, str]]:
    """The bitmaps that make it."""
    assert domain.run is not None
    found = ((disk, checkpoint.bitmap_of(disk.target.dev or "")) for disk in domain.run.live.devices.disks)
    return [(disk, name) for disk, name in found if name is not None]


async def announce(domain: DomainObject, checkpoint: Checkpoint, backups: DiskBackups) -> None:
    """From here on the next daemon knows which bitmaps to look for. Those that are somebody else's are refused."""
    for disk, name in new_bitmaps(domain, checkpoint):
        known = await backups.bitmaps(disk)
        if disk.source is not None and name in known.get(disk.source.index or 0, {}):
            raise ConfigUnsupported(
                f"disk {disk.target.dev} has a bitmap '{name}' already",
                remedy="choose another name for the checkpoint, or another bitmap: --diskspec "
                f"{disk.target.dev},bitmap=NAME",
            )
    await domain.manager.store.run(store_of(domain).write, checkpoint, pending=True)
    domain.checkpoints.pending[checkpoint.name or ""] = checkpoint


async def keep(domain: DomainObject, checkpoint: Checkpoint) -> None:
    """Its bitmaps are there: it is a checkpoint."""
    await domain.manager.store.run(store_of(domain).write, checkpoint)
    assert checkpoint.name is not None
    domain.checkpoints.pending.pop(checkpoint.name, None)
    domain.checkpoints.all[checkpoint.name] = checkpoint


@contextlib.asynccontextmanager
async def _quiesced(domain: DomainObject, machine: Machine, wanted: bool) -> AsyncIterator[None]:
    """The guest's file systems are written out and held still for the block."""
    if not wanted:
        yield
        return
    if domain.state != DomainState.RUNNING or domain.run is None or not domain.run.stages.has("agent"):
        raise OperationInvalid(
            f"machine {domain.name!r}: its agent is not connected, which quiescing needs",
            remedy="start qemu-guest-agent in the guest, or leave --quiesce out",
        )
    try:
        await machine.agent("guest-fsfreeze-freeze", timeout=FREEZE_DEADLINE)
        yield
    finally:  # also where freezing failed half-way
        try:
            await machine.agent("guest-fsfreeze-thaw", timeout=THAW_DEADLINE)
        except KvikError as error:
            logger.warning("the guest's file systems were not thawed: %s", error)


async def _redefine(domain: DomainObject, checkpoint: Checkpoint, *, validate: bool) -> str:
    """A checkpoint that is there: its document brought back or corrected. No image is touched."""
    known = domain.checkpoints
    name = checkpoint.name
    if name is None:
        raise ConfigError("a redefined checkpoint must have a name", path="/domaincheckpoint/name")
    check_checkpoint_name(name)
    if checkpoint.creation_time is None:
        raise ConfigError("missing creationTime from existing checkpoint", path="/domaincheckpoint/creationTime")
    before = known.all.get(name)
    if checkpoint.domain is None and before is not None:
        checkpoint.domain = before.domain
    if checkpoint.domain is None:
        raise ConfigError("missing <domain> from existing checkpoint", path="/domaincheckpoint/domain")
    if checkpoint.domain.uuid != domain.uuid_text:
        raise ConfigUnsupported(
            f"definition for checkpoint {name} must use uuid {domain.uuid_text}", path="/domaincheckpoint/domain/uuid"
        )
    step = checkpoint.parent.name if checkpoint.parent is not None else None
    if step == name:
        raise ConfigError(f"cannot set checkpoint {name} as its own parent", path="/domaincheckpoint/parent")
    if step is not None and step not in known.all:
        raise NoCheckpoint(f"parent {step} for checkpoint {name} not found")
    while step is not None:
        if step == name:
            raise ConfigError(f"parent of checkpoint {name} would create cycle", path="/domaincheckpoint/parent")
        step = known.parent(step)
    checkpoint.disks = CheckpointDisks(disks=_disks(checkpoint, checkpoint.domain))
    if checkpoint.images is None and before is not None:
        checkpoint.images = before.images
    if validate:
        backups = domain.require_machine().backups
        assert domain.run is not None
        for disk in domain.run.live.devices.disks:
            if disk.target.dev in checkpoint.tracked:
                chain.sources(disk, checkpoint, await backups.bitmaps(disk))
    await keep(domain, checkpoint)
    return name
