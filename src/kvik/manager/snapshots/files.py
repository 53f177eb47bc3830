"""Which image files are needed, and by whom: counted anew each time from what documents and images themselves say.

There is no counter that could be wrong. What a machine's disks and a snapshot's disks name are tops; what those rest
on is read from the images' headers. What cannot be looked at keeps everything else from being removed.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterable, Iterator
from os.path import normpath
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from kvik.conf.devices.disk import Disk
from kvik.conf.snapshot import Snapshot
from kvik.errors import HostError, KvikError, ResourceBusy
from kvik.host.files import Identity, fsync_directory, host_error, identify
from kvik.host.reach import about, reach
from kvik.host.threads import in_thread
from kvik.hypervisor.layers import layers as chain_of
from kvik.manager.encrypted_images import encryption_of
from kvik.manager.snapshots.plan import Layer
from kvik.storage.overlays import look
from kvik.storage.resolve import resolve

if TYPE_CHECKING:
    from kvik.manager.domain import DomainObject
    from kvik.manager.manager import Manager

logger = logging.getLogger(__name__)

__all__ = [
    "Survey",
    "Top",
    "format_of",
    "kept_disks",
    "kind_of",
    "snapshot_in",
    "survey",
    "tops",
    "unlink",
    "used_by_running",
]  # fmt: skip


class Top(NamedTuple):
    """An image that somebody's disk is kept in; `inside`: as a snapshot within the image."""

    path: str
    format: str
    who: str
    machine: str
    inside: bool = False


class Survey(NamedTuple):
    """`locked`: the encrypted ones."""

    layers: dict[str, Layer]
    formats: dict[str, str]
    tops: list[Top]
    locked: frozenset[str] = frozenset()


def format_of(disk: Disk) -> str:
    return disk.driver.type if disk.driver and disk.driver.type else "raw"


def kind_of(disk: Disk) -> str:
    """The format as images name one another by it: what is encrypted as a whole is none that can be read."""
    kind = format_of(disk)
    return "luks" if kind == "raw" and encryption_of(disk) is not None else kind


def kept_disks(snapshot: Snapshot) -> Iterator[tuple[Disk, str]]:
    """The disks whose contents a snapshot keeps, as they were named then, and the kind of snapshot of each."""
    if snapshot.domain is None or snapshot.disks is None:
        return
    kinds = {disk.name: disk.snapshot for disk in snapshot.disks.disks}
    for disk in snapshot.domain.devices.disks:
        kind = kinds.get(disk.target.dev or "")
        if kind in ("external", "internal") and disk.source is not None and disk.source.location:
            yield disk, kind


def _of_disks(manager: Manager, disks: Iterable[Disk], who: str, machine: str) -> Iterator[Top]:
    for disk in disks:
        path = place(manager, disk) if disk.type in ("file", "block", "volume") else None
        if path:
            yield Top(normpath(path), kind_of(disk), who, machine)


def place(manager: Manager, disk: Disk) -> str | None:
    """Where a disk's image is, also if it is a volume; None for one whose pool cannot tell now."""
    if disk.source is None or disk.type != "volume":
        return disk.source.location if disk.source is not None else None
    try:
        return resolve(manager.pools, disk.source).source.location
    except KvikError:
        return None


def tops(manager: Manager) -> list[Top]:
    """Of every machine of the scope: its definition, its live document, its snapshots."""
    found: list[Top] = []
    for domain in manager.domains():
        who = f"machine {domain.name!r}"
        if domain.config.disks:
            found += _of_disks(manager, domain.config.parse().devices.disks, who, domain.name)
        if domain.run is not None:
            found += _of_disks(manager, domain.run.live.devices.disks, who, domain.name)
        found += _of_disks(manager, manager.pivots.images(domain), who, domain.name)
        for name, snapshot in domain.snapshots.snapshots.items():
            for disk, kind in kept_disks(snapshot):
                assert disk.source is not None and disk.source.location
                path = normpath(disk.source.location)
                who = f"snapshot {name!r} of machine {domain.name!r}"
                found.append(Top(path, kind_of(disk), who, domain.name, kind == "internal"))
    return found


def used_by_running(manager: Manager, *, besides: DomainObject | None = None) -> set[str]:
    """Paths of what machines which run have open, with all they rest on."""
    found: set[str] = set()
    for domain in manager.domains():
        if domain.run is None or domain is besides:
            continue
        for disk in domain.run.live.devices.disks:
            for layer in chain_of(disk):
                if layer.source.location:
                    found.add(layer.source.location)
    return found


def identities(paths: Iterable[str]) -> dict[str, Identity | None]:
    """What each path leads to (blocking)."""
    found = {}
    for path in paths:
        about(path)
        found[path] = identify(path)
    return found


def survey(known: Iterable[Top], domain_name: str, made: Iterable[str]) -> Survey:
    """Who rests on what (blocking). `ResourceBusy` where that cannot be told of an image of this machine or of another
    that may rest on its files."""
    layers: dict[str, Layer] = {}
    formats: dict[str, str] = {}
    locked: set[str] = set()
    listed = list(known)
    inside = {top.path for top in listed if top.inside}
    waiting = [(top.path, top.format, top.who, top.machine) for top in listed]
    waiting += [(path, "qcow2", f"a snapshot of machine {domain_name!r}", "") for path in made]
    while waiting:
        path, format, who, machine = waiting.pop()
        if path in layers:
            continue
        try:
            facts = look(path, format)
        except KvikError as error:
            gone = isinstance(error, HostError) and error.errno == errno.ENOENT and Path(path).parent.is_dir()
            if gone or (machine != domain_name and format not in ("raw", "qcow2", "luks")):
                continue
            raise ResourceBusy(
                f"cannot tell which images {path} ({who}) rests on: {error}",
                remedy="make it readable, or undefine what names it; until then no image is removed or merged",
            ) from error
        layers[path] = Layer(path, facts.backing, facts.allocated, bool(facts.internal) or path in inside)
        formats[path] = facts.format
        if facts.locked:
            locked.add(path)
        if facts.backing is not None:
            waiting.append((facts.backing, facts.backing_format or "raw", who, machine))
    return Survey(layers, formats, listed, frozenset(locked))


async def snapshot_in(manager: Manager, path: str) -> str | None:
    """ "snapshot 's1' of machine 'web'" if one is kept in this file."""
    kept: dict[str, str] = {}
    for domain in manager.domains():
        for name, snapshot in domain.snapshots.snapshots.items():
            for disk, _ in kept_disks(snapshot):
                there = (disk.source.location if disk.source else None) or ""
                kept.setdefault(there, f"snapshot {name!r} of machine {domain.name!r}")
    if path in kept or not path or not kept:
        return kept.get(path)
    known = await reach(identities, [path, *kept])
    mine = known[path]
    return next((who for there, who in kept.items() if mine is not None and known[there] == mine), None)


async def unlink(manager: Manager, path: str, owner: str) -> bool:
    """Remove a file that a snapshot of machine `owner` made, unless anything needs it. Raises `HostError`, also where
    that cannot be told of an image; then it is there. Nobody begins to need it meanwhile: it counts as in use before
    the last look at who does."""
    known = await reach(identities, [path])
    mine = known[path]
    if mine is None:
        return True
    with manager.removing(mine, path, owner):
        known |= await reach(identities, {top.path for top in tops(manager)} | used_by_running(manager))
        for top in tops(manager):
            if top.path == path or known.get(top.path, mine) == mine:
                logger.error("%s is needed by %s and was not removed", path, top.who)
                return False
        if any(known.get(used, mine) == mine for used in used_by_running(manager)):
            logger.error("%s is in use by a machine that runs and was not removed", path)
            return False
        await in_thread(_unlink, path)
    return True


def _unlink(path: str) -> None:
    try:
        os.unlink(path)  # noqa: PTH108
        fsync_directory(Path(path).parent)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise host_error("remove", path, error) from error
