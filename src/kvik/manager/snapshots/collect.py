"""Image files that snapshots made and nothing needs any more: removed, or merged with what rests on them.

A snapshot is deleted when its document is gone; what follows here only gives room back. Each step leaves every disk and
every snapshot as it was, so that it can fail (no space), be broken off (a kill) and be done again at any time: by the
next deletion, when the machine ends, or when the next daemon starts.
"""

from __future__ import annotations

import logging
from os.path import normpath
from typing import TYPE_CHECKING

from kvik.conf.domain import Domain, format_domain
from kvik.conf.snapshot import format_snapshot
from kvik.errors import KvikError
from kvik.host.identities import look_up
from kvik.host.reach import reach
from kvik.host.threads import in_thread
from kvik.manager import encrypted_images, volume_disks
from kvik.manager.checkpoints import merges
from kvik.manager.snapshots import apply, files, inside, running
from kvik.manager.snapshots.journal import Journal
from kvik.manager.snapshots.plan import BACK, FORWARD, REMOVE, Step, plan
from kvik.storage import overlays

if TYPE_CHECKING:
    from kvik.manager.domain import DomainObject
    from kvik.manager.snapshots.files import Survey, Top

logger = logging.getLogger(__name__)

__all__ = ["collect", "collect_quietly", "planned"]


async def planned(domain: DomainObject, leaving: frozenset[str] = frozenset()) -> tuple[list[Step], Survey]:
    """What `collect` would do once the snapshots `leaving` are gone."""
    tree, manager = domain.snapshots, domain.manager
    known = [top for top in files.tops(manager) if not _leaves(domain, top, leaving)]
    found = await files.survey(known, domain.name, sorted(tree.made))
    others = [top for top in known if top.machine != domain.name]
    # A document that names a whole chain would not follow if an image of that went into another.
    foreign = {path for top in others for path, _ in top.chain or ((top.path, top.format),)}
    layers = {path: layer._replace(pinned=layer.pinned or path in foreign) for path, layer in found.layers.items()}
    identity = await look_up(layers.keys() - found.told)
    used, places = await files.in_use(manager, besides=domain)

    def can(step: Step) -> bool:
        if running.chain_with(domain, step.path, step.into):
            return running.can(domain, step)
        if not {step.path, step.into} & found.locked:
            return True
        return step.kind == BACK and encrypted_images.can_merge(domain, step.path, layers, found.locked)

    steps = plan(
        layers,
        {top.path for top in known},
        tree.made,
        tree.originals,
        busy=lambda path: path in places or identity.get(path) in used,
        can=can,
    )
    return steps, found._replace(layers=layers, tops=known)


def _leaves(domain: DomainObject, top: Top, leaving: frozenset[str]) -> bool:
    return top.machine == domain.name and any(
        top.who == f"snapshot {name!r} of machine {domain.name!r}" for name in leaving
    )


async def collect(domain: DomainObject) -> None:
    """Everything that can be done now; the machine's job is the caller's. Raises `HostError` and others; then what was
    done is done, and the rest is done another time."""
    tree = domain.snapshots
    if tree.inside and await inside.collect(domain):
        await apply.save_tree(domain)
    if not tree.made:
        return
    steps, found = await planned(domain)
    gone = tree.made - found.layers.keys()  # removed by a daemon that could not write that down any more
    tree.made -= gone
    for step in steps:
        if step.kind == REMOVE:
            await remove(domain, step.path)
        elif step.kind == FORWARD:
            await _forward(domain, step, found)
        elif step.kind == BACK:
            await _back(domain, step, found)
    if steps or gone:
        await apply.save_tree(domain)
        await volume_disks.refresh_pools(domain.manager, [step.path for step in steps])


async def collect_quietly(domain: DomainObject) -> None:
    """For those who have nobody to tell."""
    try:
        await running.finish(domain)  # nothing else has to wait for that
        async with domain.jobs.hold("merge images of", limit=apply.LONG):
            await apply.settle(domain)
            await collect(domain)
    except KvikError as error:
        logger.warning("machine %s: images that no snapshot needs any more are still there: %s", domain.name, error)


async def remove(domain: DomainObject, path: str) -> None:
    if path in domain.snapshots.made and await files.unlink(domain.manager, path, domain.name):
        domain.snapshots.made.discard(path)


def _merge_forward(path: str, into: str, format: str, tracked: dict[str, bool]) -> None:
    top, below = overlays.look(into, "qcow2"), overlays.look(path, format)
    if top.backing is not None and normpath(top.backing) == path:
        overlays.merge_forward(top, below, tracked=tracked)


async def _forward(domain: DomainObject, step: Step, found: Survey) -> None:
    if running.chain_with(domain, step.path, step.into):
        await running.forward(domain, step, found.layers[step.path].backing)
    else:
        tracked = merges.tracked_in(domain, step.into)
        await in_thread(_merge_forward, step.path, step.into, found.formats[step.path], tracked)
        await merges.file_moved(domain, step.path, step.into)
    await remove(domain, step.path)


def _merge_back(path: str, into: str, format: str, tracked: dict[str, bool]) -> None:
    top = overlays.look(path, "qcow2")
    if top.backing is not None and normpath(top.backing) == into:
        overlays.merge_back(top, overlays.look(into, format), tracked=tracked)


def _rebase(above: list[str], into: str, format: str) -> None:
    below = overlays.look(into, format)
    for path in above:
        facts = overlays.look(path, "qcow2")
        if facts.backing is None or normpath(facts.backing) != into:
            overlays.rebase(path, below)


async def _back(domain: DomainObject, step: Step, found: Survey) -> None:
    tree = domain.snapshots
    format = found.formats[step.into]
    if running.chain_with(domain, step.path, step.into):
        await running.back(domain, step)
    elif step.path in found.locked:
        top = await reach(overlays.look, step.path, "qcow2")
        if top.backing is not None and normpath(top.backing) == step.into:
            tracked = merges.tracked_in(domain, step.path)
            await in_thread(encrypted_images.merge_back(domain, step.path))
            below = await reach(overlays.look, step.into, format)
            await in_thread(overlays.join_bitmaps, top, below, tracked)
        await merges.file_moved(domain, step.path, step.into)
    else:
        tracked = merges.tracked_in(domain, step.path)
        await in_thread(_merge_back, step.path, step.into, format, tracked)
        await merges.file_moved(domain, step.path, step.into)
    now = await files.survey(files.tops(domain.manager), domain.name, sorted(tree.made))
    above = [layer.path for layer in now.layers.values() if layer.backing == step.path]
    await in_thread(_rebase, above, step.into, format)
    if step.path not in domain.snapshots.made:  # the machine was undefined meanwhile: what is left is the user's
        return
    redo = apply.redo_of(domain)
    redo.made.remove(step.path)
    redo.unlink = [step.path]
    for name, snapshot in tree.snapshots.items():
        changed = _repoint(snapshot.domain, step, format)
        if _repoint(snapshot.inactive, step, format) or changed:
            redo.write[name] = format_snapshot(snapshot, secure=True)
    document = domain.config.parse()
    if _repoint(document, step, format):
        redo.definition = format_domain(document, secure=True, inactive=True)
    await apply.commit(domain, Journal(operation=f"merge {step.path}", phase="commit", redo=redo))


def _repoint(document: Domain | None, step: Step, format: str) -> bool:
    """Let disks that are in the file that goes be in the one that has its data."""
    changed = False
    for disk in document.devices.disks if document is not None else []:
        if disk.source is not None and disk.source.location and normpath(disk.source.location) == step.path:
            below = disk.backing_store
            if below is not None and below.source is not None and normpath(below.source.location or "") == step.into:
                # Its chain is written in full, with the secrets of each image.
                disk.source, disk.backing_store = below.source, below.backing_store
            else:
                disk.source.file, disk.source.dev = step.into, None
                disk.backing_store = None
            if disk.driver is not None:
                disk.driver.type = "raw" if format == "luks" else format
            changed = True
    return changed
