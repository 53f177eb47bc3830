"""When the daemon comes back: what snapshots there are, what was broken off, and what is left to be cleared away."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from kvik.errors import KvikError
from kvik.manager.snapshots import apply
from kvik.manager.snapshots.collect import collect_quietly

if TYPE_CHECKING:
    from kvik.manager.manager import Manager

__all__ = ["load"]

logger = logging.getLogger(__name__)


def _named(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()} if directory.is_dir() else set()


async def load(manager: Manager) -> None:
    """After machines were found again. What cannot be ended now is tried again before the next operation."""
    there = await manager.store.run(_named, manager.paths.snapshots)
    for domain in manager.domains():
        if domain.name not in there:
            continue
        try:
            domain.snapshots, warnings = await manager.store.run(apply.store_of(domain).load)
            manager.warnings += warnings
        except KvikError as error:
            manager.warnings.append(f"the snapshots of machine {domain.name!r} cannot be read: {error}")
    # Only now: whether a file is needed depends on the snapshots of all machines.
    for domain in manager.domains():
        try:
            await apply.settle(domain)
        except KvikError as error:
            logger.warning("%s", error)
            manager.warnings.append(str(error))
        if domain.snapshots.made or domain.snapshots.inside:
            manager.spawn(collect_quietly(domain))
