"""How much changed since a checkpoint, and so how large an incremental backup is about to be."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvik.conf.checkpoint import Checkpoint
from kvik.conf.tree import clone
from kvik.errors import CheckpointInconsistent
from kvik.manager.checkpoints import chain

if TYPE_CHECKING:
    from kvik.manager.domain import DomainObject

__all__ = ["with_sizes"]


async def with_sizes(domain: DomainObject, checkpoint: Checkpoint) -> Checkpoint:
    """A copy of the document with each disk's `size`, in bytes; none where what changed is not known. The machine's job
    is held: the bitmaps are put together for counting."""
    shown = clone(checkpoint)
    async with domain.jobs.hold("checkpoint-size"):
        backups = domain.require_machine().backups
        assert domain.run is not None
        disks = {disk.target.dev: disk for disk in domain.run.live.devices.disks}
        for item in shown.disks.disks if shown.disks else ():
            disk = disks.get(item.name)
            if item.checkpoint != "bitmap" or disk is None:
                continue
            try:
                sources = chain.sources(disk, checkpoint, await backups.bitmaps(disk))
            except CheckpointInconsistent:
                continue
            item.size = await backups.changed(disk, sources)
    return shown
