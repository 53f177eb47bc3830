"""When the daemon comes back: which checkpoints there are, and what of one that was being made is taken back."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from kvik.conf.checkpoint import Checkpoint
from kvik.errors import KvikError
from kvik.manager.checkpoints.store import store_of

if TYPE_CHECKING:
    from kvik.manager.domain import DomainObject

logger = logging.getLogger(__name__)

__all__ = ["load", "settle", "take_back"]


async def load(domain: DomainObject) -> None:
    """Once, before anything else is done with the machine's checkpoints."""
    try:
        domain.checkpoints, warnings = await domain.manager.store.run(store_of(domain).load)
        domain.manager.warnings += warnings
    except KvikError as error:
        domain.manager.warnings.append(f"the checkpoints of machine {domain.name!r} cannot be read: {error}")


async def settle(domain: DomainObject) -> None:
    """Take back what was begun and never told of. While the machine is off its images are left alone: bitmaps of a
    checkpoint that never was are taken from them when it runs again."""
    if domain.run is None or domain.run.machine is None:
        return
    for checkpoint in list(domain.checkpoints.pending.values()):
        await take_back(domain, checkpoint)
        logger.warning("machine %s: checkpoint %s was not made to the end: taken back", domain.name, checkpoint.name)


async def take_back(domain: DomainObject, checkpoint: Checkpoint, *, bitmaps: bool = True) -> None:
    """As if it had never been asked for. Raises `KvikError`; then it is tried again before the next one is made."""
    if bitmaps and domain.run is not None and domain.run.machine is not None:
        backups = domain.run.machine.backups
        for disk in domain.run.live.devices.disks:
            name = checkpoint.bitmap_of(disk.target.dev or "")
            if name is not None:
                await backups.forget(disk, name)
    assert checkpoint.name is not None
    await domain.manager.store.run(store_of(domain).remove, checkpoint.name)
    domain.checkpoints.pending.pop(checkpoint.name, None)
    domain.checkpoints.all.pop(checkpoint.name, None)
