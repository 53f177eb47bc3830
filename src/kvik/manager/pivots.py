"""Disks that are about to change over to another image (`blockjob --pivot`), on disk until the definition names that.

<data>/qemu/pivot/UUID-TARGET.json   the disk of the machine as it is, and as it will be

    written --> the VMM is asked --> it has changed over --> definition --> removed

Between the second arrow and the fourth the guest may write to either image, and the definition names the old one, whose
contents are history if it was the other. While the VMM runs it says which. When it is gone, what counts:

    this daemon saw how the job ended         that
    the VMM left word in its directory        that (kvik-blk's file of changed tables; not after a loss of power)
    neither                                   nothing can tell: the images may differ, and the later one is not known by
                                              its times. The machine does not start, nor are its images merged, until
                                              somebody says which: blockjob --pivot, or --abort

An intent whose disk the definition has not any more (it names another image) has been settled by that.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import msgspec

from kvik.conf.devices.disk import Disk, DiskDriver
from kvik.conf.devices_xml import format_device, parse_device
from kvik.conf.domain import Domain
from kvik.conf.tree import clone
from kvik.errors import InvalidArgument, KvikError, OperationFailed
from kvik.host import files
from kvik.host.documents import DOCUMENT_LIMIT, set_aside
from kvik.host.reach import reach
from kvik.manager import block_chain, volume_disks
from kvik.manager.checkpoints import merges

if TYPE_CHECKING:
    from kvik.manager.domain import DomainObject
    from kvik.manager.run import Run
    from kvik.manager.store import Store

__all__ = ["Pivot", "Pivots", "decide", "machine_found", "machine_gone", "save_definition", "settle"]

logger = logging.getLogger(__name__)

_SUFFIX = ".json"


class _Written(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The file."""

    machine: str
    target: str
    before: str
    after: str


class Pivot:
    """One disk. `switched`: whether the guest went on in the new image, where that is known."""

    __slots__ = ("after", "before", "machine", "switched", "target")

    def __init__(self, machine: str, before: Disk, after: Disk) -> None:
        self.machine = machine  # its UUID
        self.target = before.target.dev or ""
        self.before = before
        self.after = after
        self.switched: bool | None = None

    def to_bytes(self) -> bytes:
        before, after = (format_device(disk, secure=True) for disk in (self.before, self.after))
        return msgspec.json.encode(_Written(machine=self.machine, target=self.target, before=before, after=after))

    @classmethod
    def from_bytes(cls, data: bytes) -> Pivot:
        """`KvikError` for anything that `to_bytes` would not write."""
        try:
            written = msgspec.json.decode(data, type=_Written)
        except msgspec.DecodeError as error:
            raise InvalidArgument(f"not a change of images: {error}") from error
        disks = [parse_device(text)[1] for text in (written.before, written.after)]
        before, after = (disk for disk in disks if isinstance(disk, Disk) and disk.target.dev == written.target)
        return cls(written.machine, before, after)


def image_of(disk: Disk) -> str:
    """For people: its path, or its name on the network."""
    return (disk.source.location or disk.source.name or "") if disk.source is not None else ""


class Pivots:
    """Of all machines of a scope."""

    def __init__(self, directory: Path, store: Store) -> None:
        self._directory, self._store = directory, store
        self._all: dict[tuple[str, str], Pivot] = {}

    async def load(self) -> list[str]:
        """Before machines are looked for. Warnings of what was set aside."""
        return await self._store.run(self._load)

    def _load(self) -> list[str]:
        warnings: list[str] = []
        if not self._directory.is_dir():
            return warnings
        files.remove_temporaries(self._directory, older_than=0)
        for path in sorted(self._directory.glob(f"*{_SUFFIX}")):
            try:
                pivot = Pivot.from_bytes(files.read_file(path, limit=DOCUMENT_LIMIT))
            except (KvikError, ValueError) as error:
                warnings.append(set_aside(path, str(error)))
                continue
            self._all[pivot.machine, pivot.target] = pivot
        return warnings

    def _path(self, pivot: Pivot) -> Path:
        return self._directory / f"{pivot.machine}-{quote(pivot.target, safe='')}{_SUFFIX}"

    def of(self, domain: DomainObject) -> list[Pivot]:
        return [pivot for (machine, _), pivot in list(self._all.items()) if machine == domain.uuid_text]

    def get(self, domain: DomainObject, target: str) -> Pivot | None:
        return self._all.get((domain.uuid_text, target))

    async def intend(self, domain: DomainObject, before: Disk, after: Disk) -> None:
        """Durable when this returns: the VMM may be asked. Raises `HostError`; `OperationFailed` where an earlier one
        of the disk is not in the definition, and cannot be written there."""
        pivot = Pivot(domain.uuid_text, before, after)
        earlier = self.get(domain, pivot.target)
        if earlier is not None and image_of(earlier.before) != image_of(before):
            await _end(domain, earlier, switched=True)

        def write() -> None:
            if not self._directory.is_dir():
                files.ensure_directory(self._directory)
                for parent in (self._directory.parent, self._directory.parent.parent):
                    files.fsync_directory(parent)
            files.atomic_write(self._path(pivot), pivot.to_bytes())

        await self._store.run(write)
        self._all[pivot.machine, pivot.target] = pivot

    async def forget(self, pivot: Pivot) -> None:
        """The definition is right, or nobody has it. One whose file cannot be removed is found void the next time."""
        try:
            await self._store.run(files.remove_file, self._path(pivot))
        except KvikError as error:
            logger.warning("%s", error)
        if self._all.get((pivot.machine, pivot.target)) is pivot:
            del self._all[pivot.machine, pivot.target]

    async def forget_all(self, domain: DomainObject) -> None:
        for pivot in self.of(domain):
            await self.forget(pivot)

    def images(self, domain: DomainObject) -> Iterator[Disk]:
        """What its definition does not name and may have to."""
        for pivot in self.of(domain):
            yield pivot.after


async def save_definition(domain: DomainObject, before: Disk, after: Disk) -> None:
    """The next start has the same disk, if the definition has that disk at all. Raises `KvikError`."""
    if not domain.persistent or block_chain.same_disk(before, domain.config.parse()) is None:
        return
    async with domain.manager.editing(domain) as document:
        kept = block_chain.same_disk(before, document)
        if kept is None:
            return
        chain = kept.backing_store is not None or after.source is None or before.source is None
        if chain or _rests_elsewhere(after):
            kept.backing_store = clone(after.backing_store) if after.backing_store is not None else None
        if after.source is not None and before.source != after.source:
            kept.type, kept.source = after.type, clone(after.source)
            volume_disks.name_volume(kept)
            if kept.driver is None:
                kept.driver = DiskDriver(name="qemu")
            kept.driver.type = after.driver.type if after.driver is not None else None


def _rests_elsewhere(disk: Disk) -> bool:
    """On what has to be named, since it does not lie beside it."""
    below = disk.backing_store.source if disk.backing_store is not None else None
    if disk.source is None or below is None or not disk.source.location or not below.location:
        return False
    return Path(disk.source.location).parent != Path(below.location).parent


async def _end(domain: DomainObject, pivot: Pivot, *, switched: bool) -> None:
    """Raises `OperationFailed` if the definition cannot be written; then it is tried again."""
    pivot.switched = switched
    if switched:
        try:
            await merges.moved(domain, pivot.before, pivot.after, None)
            await save_definition(domain, pivot.before, pivot.after)
        except KvikError as error:
            raise OperationFailed(
                f"machine {domain.name!r}: its disk {pivot.target} changed over to {image_of(pivot.after)}, and its "
                f"definition, which names {image_of(pivot.before)}, cannot be changed: {error}",
                remedy="mend what it says and try again: until then its images are left alone",
            ) from error
    await domain.manager.pivots.forget(pivot)
    image = pivot.after if switched else pivot.before
    domain.log.note(f"disk {pivot.target} is {image_of(image)}: what it was told when it ended is settled")


async def settle(domain: DomainObject, document: Domain | None = None) -> None:
    """Before anything is done with the images of a machine that is off. `document`: what it is to run, if not only its
    definition. `OperationFailed` where its disks may name an image that its guest did not write to last."""
    if domain.run is not None:
        return
    for pivot in domain.manager.pivots.of(domain):
        if pivot.switched is not None:
            await _end(domain, pivot, switched=pivot.switched)
        elif block_chain.same_disk(pivot.before, domain.config.parse()) is None:
            await domain.manager.pivots.forget(pivot)
        elif document is None or block_chain.same_disk(pivot.before, document) is not None:
            old, new = image_of(pivot.before), image_of(pivot.after)
            raise OperationFailed(
                f"machine {domain.name!r}: its disk {pivot.target} was being changed over from {old} to {new} when it "
                "ended together with the daemon or the host, and which of the two its guest wrote to last cannot be "
                "known",
                remedy=f"look into both (kvik img compare tells whether they differ), then say which: "
                f"kvik blockjob {domain.name} {pivot.target} --pivot for {new}, --abort for {old}; "
                "until then it does not start",
            )


async def decide(domain: DomainObject, name: str, *, new: bool) -> bool:
    """The user says which image the disk of a machine that is off goes on with; False if nothing is open."""
    for pivot in domain.manager.pivots.of(domain):
        if domain.run is None and name in (pivot.target, image_of(pivot.before)):
            await _end(domain, pivot, switched=new)
            return True
    return False


async def machine_gone(domain: DomainObject, run: Run) -> None:
    """Its VMM has ended on a host that goes on, and its directory is there still."""
    for pivot in domain.manager.pivots.of(domain):
        if not domain.persistent:
            await domain.manager.pivots.forget(pivot)
            continue
        disk = next((disk for disk in run.live.devices.disks if disk.target.dev == pivot.target), pivot.before)
        places = [image_of(pivot.before), image_of(pivot.after)]
        try:
            if pivot.switched is None:
                driver = domain.manager.driver_of(run.live)
                last = await reach(driver.written_last, run.directory, disk, places)
                pivot.switched = None if last is None else last == places[1]
            await settle(domain)
        except KvikError as error:
            domain.log.note(str(error))
            logger.warning("%s", error)


async def machine_found(domain: DomainObject, run: Run) -> None:
    """Its VMM runs, and what the last daemon knew of it is in its live document. Jobs go on for themselves."""
    for pivot in domain.manager.pivots.of(domain):
        disk = next((disk for disk in run.live.devices.disks if disk.target.dev == pivot.target), None)
        if disk is None or pivot.target in run.block_jobs:
            continue
        for image, switched in ((pivot.before, False), (pivot.after, True)):
            if image_of(disk) == image_of(image):
                await _end(domain, pivot, switched=switched)
                break
