"""Before anything is started: the files a machine needs exist, and no other running machine uses them.

Two machines that write to one image destroy it. They may share it only if both say so (<shareable/>) or if neither
writes (<readonly/>, CD-ROMs). Identity is the file's, not its name's: links to one image are that image.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from kvik.conf.devices.disk import Disk, DiskSource
from kvik.conf.domain import Domain
from kvik.errors import HostError, ResourceBusy
from kvik.host.files import Identity, identify
from kvik.host.reach import about, reach

if TYPE_CHECKING:
    from kvik.manager.run import Run


class Use(NamedTuple):
    """One image in use: what it is on the host, and how it may be shared."""

    identity: Identity
    path: str
    shareable: bool
    readonly: bool

    def clashes(self, other: Use) -> bool:
        if self.identity != other.identity:
            return False
        return not ((self.readonly and other.readonly) or (self.shareable and other.shareable))


def use_of(disk: Disk) -> Use | None:
    if disk.type not in ("file", "block"):
        return None
    readonly = disk.readonly or disk.device == "cdrom"
    if disk.transient is not None and disk.transient.share_backing:
        readonly = True  # what is written goes elsewhere, and others may do the same
    return image_use(disk.source, shareable=disk.shareable, readonly=readonly)


def image_use(source: DiskSource | None, *, shareable: bool = False, readonly: bool = False) -> Use | None:
    """None for what is no file of this host, or is not there."""
    if source is None or not source.location:
        return None
    about(source.location)
    identity = identify(source.location)
    return Use(identity, source.location, shareable, readonly) if identity is not None else None


def uses(definition: Domain) -> list[Use]:
    """Of every image of every disk: what lies below is read, the copy that is being made is written."""
    return [use for disk in definition.devices.disks for use in uses_of(disk)]


def uses_of(disk: Disk) -> Iterator[Use]:
    top = use_of(disk)
    if top is not None:
        yield top
    mirror = disk.mirror
    if mirror is not None and (copy := image_use(mirror.source)) is not None:
        yield copy
    for chain in (disk, mirror):
        below = chain.backing_store if chain is not None else None
        while below is not None:
            lower = image_use(below.source, readonly=True)
            if lower is not None and not (mirror is not None and lower.identity == (copy.identity if copy else None)):
                yield lower
            below = below.backing_store


async def renew_uses(run: Run) -> None:
    """As the live document has them now; as they were where storage stopped to answer just now."""
    with contextlib.suppress(HostError):
        run.uses = await reach(uses, run.live)


def check_disk(disk: Disk, name: str) -> None:
    """`HostError` if the disk's file is missing or cannot be read."""
    source = disk.source
    if disk.type not in ("file", "block") or source is None or not source.location or source.fdgroup:
        return
    about(source.location)
    if source.startup_policy in ("optional", "requisite") and not Path(source.location).exists():
        return
    what = f"{disk.device} {disk.target.dev} of machine {name!r}"
    _check_file(source.location, what, writable=not (disk.readonly or disk.device == "cdrom" or disk.transient))


def check_files(definition: Domain, given: Iterable[str] = ()) -> None:
    """`HostError` naming the first path that is missing. `given`: names of files the caller passed as descriptors."""
    passed = set(given)
    for what, path in _boot_files(definition):
        if path not in passed:
            _check_file(path, f"{what} of machine {definition.name!r}", writable=False)
    for disk in definition.devices.disks:
        if not (disk.source and disk.source.location in passed):
            check_disk(disk, definition.name)


def _boot_files(definition: Domain) -> Iterator[tuple[str, str]]:
    loader = definition.os.loader
    for what, path in (
        ("kernel", definition.os.kernel),
        ("initrd", definition.os.initrd),
        ("dtb", definition.os.dtb),
        ("loader", loader.value if loader else None),
    ):
        if path:
            yield what, path


def _check_file(path: str, what: str, *, writable: bool) -> None:
    about(path)
    try:
        info = os.stat(path)  # noqa: PTH116
    except OSError as error:
        raise HostError(f"{what}: {path}: {error.strerror}", errno=error.errno or 0) from error
    if stat.S_ISDIR(info.st_mode):
        raise HostError(f"{what}: {path} is a directory")
    if not os.access(path, os.R_OK | (os.W_OK if writable else 0)):
        need = "read and written" if writable else "read"
        raise HostError(f"{what}: {path} cannot be {need}: permission denied", errno=13)


def check_unused(definition_uses: Iterable[Use], others: Iterable[tuple[str, Iterable[Use]]]) -> None:
    """`ResourceBusy` naming the machine (of `others`: name, its uses) that has one of the images."""
    mine = list(definition_uses)
    for name, theirs in others:
        for use in theirs:
            for own in mine:
                if own.clashes(use):
                    raise ResourceBusy(
                        f"{own.path} is in use by machine {name!r}",
                        remedy="shut that machine down, or give both <shareable/> if the guests can share a disk",
                    )
