"""Which image files are needed, and by whom: counted anew each time from what documents and images themselves say.

There is no counter that could be wrong. What a machine's disks and a snapshot's disks name are tops; what those rest
on is read from the images' headers, but for those of other machines that their documents tell of: a raw image rests on
nothing, a chain that is written in full (as that of each machine which runs) is what the machine reads. So another
machine's storage that does not answer is in nobody's way, unless what its image rests on is told nowhere: then nothing
is removed or merged.
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
from kvik.host.files import Identity, fsync_directory, host_error
from kvik.host.identities import identities, look_up, may_be
from kvik.host.reach import reach
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
    "in_use",
    "kept_disks",
    "kind_of",
    "snapshot_in",
    "survey",
    "tops",
    "unlink",
]  # fmt: skip


class Top(NamedTuple):
    """An image that somebody's disk is kept in; `inside`: as a snapshot within the image. `chain`: that and what it
    rests on, (path, format) from the top down; None where its document does not say."""

    path: str
    format: str
    who: str
    machine: str
    inside: bool = False
    chain: tuple[tuple[str, str], ...] | None = None


class Survey(NamedTuple):
    """`locked`: the encrypted ones; `told`: those that were not looked at."""

    layers: dict[str, Layer]
    formats: dict[str, str]
    tops: list[Top]
    locked: frozenset[str] = frozenset()
    told: frozenset[str] = frozenset()


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
            yield Top(normpath(path), kind_of(disk), who, machine, chain=_told(disk, normpath(path)))


def _told(disk: Disk, path: str) -> tuple[tuple[str, str], ...] | None:
    """The images of a disk by its document alone; None where that does not go down to the last one."""
    chain = [(path, kind_of(disk))]
    below = disk.backing_store
    while chain[-1][1] not in ("raw", "luks"):
        if below is None:
            return None
        if below.type is None:
            break
        if below.source is None or below.format is None:
            return None
        if below.source.location is None:  # on the network, and so are those that it rests on
            break
        chain.append((normpath(below.source.location), below.format.type))
        below = below.backing_store
    return tuple(chain)


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
    return [top for domain in manager.domains() for top in _tops_of(manager, domain)]


def _tops_of(manager: Manager, domain: DomainObject) -> list[Top]:
    found: list[Top] = []
    who = f"machine {domain.name!r}"
    open_now: dict[str, tuple[tuple[str, str], ...]] = {}  # each image of a machine that runs, and all below it
    if domain.run is not None:
        found += _of_disks(manager, domain.run.live.devices.disks, who, domain.name)
        for chain in (top.chain for top in found if top.chain is not None):
            open_now |= {path: chain[number:] for number, (path, _) in enumerate(chain)}
    if domain.config.disks:
        found += _of_disks(manager, domain.config.parse().devices.disks, who, domain.name)
    found += _of_disks(manager, manager.pivots.images(domain), who, domain.name)
    for name, snapshot in domain.snapshots.snapshots.items():
        for disk, kind in kept_disks(snapshot):
            assert disk.source is not None and disk.source.location
            path = normpath(disk.source.location)
            who = f"snapshot {name!r} of machine {domain.name!r}"
            found.append(Top(path, kind_of(disk), who, domain.name, kind == "internal", _told(disk, path)))
    return [top if top.chain is not None else top._replace(chain=open_now.get(top.path)) for top in found]


async def in_use(manager: Manager, *, besides: DomainObject | None = None) -> tuple[set[Identity], set[str]]:
    """What machines which run have open, with all that rests on: the files, and their paths. Only those are looked at
    that were not when the machine was started."""
    places: set[str] = set()
    known: dict[str, Identity | None] = {}
    for domain in manager.domains():
        if domain.run is None or domain is besides:
            continue
        for disk in domain.run.live.devices.disks:
            places |= {layer.source.location for layer in chain_of(disk) if layer.source.location}
        known |= {use.path: use.identity for use in domain.run.uses if use.path in places}
    known |= await look_up(places - known.keys())
    return {identity for identity in known.values() if identity is not None}, places


async def survey(known: Iterable[Top], domain_name: str, made: Iterable[str]) -> Survey:
    """Who rests on what. `ResourceBusy` where that cannot be told of an image of this machine or of another that may
    rest on its files."""
    listed = list(known)
    found = Survey({}, {}, listed)
    mine = [top for top in listed if top.machine == domain_name]
    mine += [Top(path, "qcow2", f"a snapshot of machine {domain_name!r}", "") for path in made]
    found = await _walked(found, mine, domain_name)
    others = [top for top in listed if top.machine != domain_name]
    for top in others:
        if top.chain is None and top.path not in found.layers:
            found = await _walked(found, [top], domain_name)
    inside = {top.path for top in listed if top.inside}
    told: dict[str, Layer] = {}
    for chain in (top.chain for top in others if top.chain is not None):
        for number, (path, format) in enumerate(chain):
            below = chain[number + 1][0] if number + 1 < len(chain) else None
            if path not in found.layers:
                told[path] = Layer(path, below, 0, path in inside)
                found.formats[path] = format
    return found._replace(layers=found.layers | told, told=frozenset(told))


async def _walked(found: Survey, tops: list[Top], domain_name: str) -> Survey:
    try:
        more = await reach(_walk, tops, domain_name, frozenset(found.layers))
    except HostError as error:
        if len(tops) > 1 or error.errno != errno.ETIMEDOUT:
            raise
        raise _cannot_tell(tops[0].path, tops[0].who, error) from error
    return found._replace(
        layers=found.layers | more.layers, formats=found.formats | more.formats, locked=found.locked | more.locked
    )


def _cannot_tell(path: str, who: str, error: KvikError) -> ResourceBusy:
    return ResourceBusy(
        f"cannot tell which images {path} ({who}) rests on: {error}",
        remedy="make it readable, or undefine what names it; until then no image is removed or merged",
    )


def _walk(tops: list[Top], domain_name: str, done: frozenset[str]) -> Survey:
    """Looks at images and what is below them (blocking), but for those that are `done`."""
    layers: dict[str, Layer] = {}
    formats: dict[str, str] = {}
    locked: set[str] = set()
    inside = {top.path for top in tops if top.inside}
    waiting = [(top.path, top.format, top.who, top.machine) for top in tops]
    while waiting:
        path, format, who, machine = waiting.pop()
        if path in layers or path in done:
            continue
        try:
            facts = look(path, format)
        except KvikError as error:
            gone = isinstance(error, HostError) and error.errno == errno.ENOENT and Path(path).parent.is_dir()
            if gone or (machine != domain_name and format not in ("raw", "qcow2", "luks")):
                continue
            raise _cannot_tell(path, who, error) from error
        layers[path] = Layer(path, facts.backing, facts.allocated, bool(facts.internal) or path in inside)
        formats[path] = facts.format
        if facts.locked:
            locked.add(path)
        if facts.backing is not None:
            waiting.append((facts.backing, facts.backing_format or "raw", who, machine))
    return Survey(layers, formats, tops, frozenset(locked))


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
    known = await reach(identities, [path])
    if known[path] is None:
        return None
    known |= await look_up(kept)
    return next((who for there, who in kept.items() if may_be(path, there, known)), None)


async def unlink(manager: Manager, path: str, owner: str) -> bool:
    """Remove a file that a snapshot of machine `owner` made, unless anything needs it. Raises `HostError`, also where
    that cannot be told of an image; then it is there. Nobody begins to need it meanwhile: it counts as in use before
    the last look at who does."""
    known = await reach(identities, [path])
    mine = known[path]
    if mine is None:
        return True
    with manager.removing(mine, path, owner):
        known |= await look_up({top.path for top in tops(manager)} - {path})
        used, places = await in_use(manager)
        for top in tops(manager):  # one that came since was looked at by whoever took it
            if may_be(path, top.path, known):
                logger.error("%s is needed by %s and was not removed", path, top.who)
                return False
        if path in places or mine in used:
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
