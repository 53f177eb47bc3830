"""Deleting checkpoints: their bitmaps in every image of the chain, then their documents.

Every bitmap tells all that changed since its own checkpoint, whichever others there are: nothing has to be merged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvik.conf.checkpoint import CheckpointParent
from kvik.conf.enums import DomainCheckpointDeleteFlags as Flags
from kvik.errors import InvalidArgument
from kvik.manager.checkpoints.resume import settle
from kvik.manager.checkpoints.store import store_of

if TYPE_CHECKING:
    from kvik.manager.domain import DomainObject

__all__ = ["delete", "remove"]


async def delete(domain: DomainObject, name: str, flags: int) -> None:
    """virDomainCheckpointDelete. Killed in the middle, what is left can be deleted again."""
    if flags & Flags.CHILDREN and flags & Flags.CHILDREN_ONLY:
        raise InvalidArgument("a checkpoint is deleted with its children, or they alone: not both")
    async with domain.jobs.hold("checkpoint-delete"):
        await settle(domain)
        known = domain.checkpoints
        known.get(name)
        going = list(known.descendants(name))[::-1] if flags & (Flags.CHILDREN | Flags.CHILDREN_ONLY) else []
        if not flags & Flags.CHILDREN_ONLY:
            going.append(name)
        if not flags & Flags.METADATA_ONLY:
            domain.require_machine().backups  # noqa: B018 - asked for, not used
        for item in going:
            await remove(domain, item, bitmaps=not flags & Flags.METADATA_ONLY)


async def remove(domain: DomainObject, name: str, *, bitmaps: bool = True) -> None:
    """One checkpoint; its children become its parent's."""
    known, store = domain.checkpoints, store_of(domain)
    checkpoint = known.get(name)
    if bitmaps and domain.run is not None:
        backups = domain.require_machine().backups
        for disk in domain.run.live.devices.disks:
            bitmap = checkpoint.bitmap_of(disk.target.dev or "")
            if bitmap is not None:
                await backups.forget(disk, bitmap)
    heir = known.parent(name)
    for child in known.children(name):
        document = known.all[child]
        document.parent = CheckpointParent(name=heir) if heir is not None else None
        await domain.manager.store.run(store.write, document)
    await domain.manager.store.run(store.remove, name)
    known.all.pop(name, None)
