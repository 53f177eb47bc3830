"""The storage pools of a scope, as the manager composes them and the daemon sees them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from kvik.storage import volumes
from kvik.storage.capabilities import capabilities
from kvik.storage.pool import PoolObject
from kvik.storage.pools import REFRESHED, Pools
from kvik.storage.sparse import extents, punch
from kvik.storage.threads import in_thread
from kvik.storage.types import find_sources
from kvik.storage.volumes import Opened

if TYPE_CHECKING:
    from kvik.manager.manager import Manager

__all__ = [
    "REFRESHED", "Opened", "PoolObject", "Pools", "capabilities", "extents", "find_sources", "in_thread", "punch",
    "users", "volumes",
]  # fmt: skip


def users(manager: Manager) -> Iterator[tuple[str, str, bool]]:
    """What running machines have open: (path, machine, whether it writes)."""
    for domain in manager.domains():
        live = domain.live
        if live is None:
            continue
        for disk in live.devices.disks:
            if disk.source is None:
                continue
            writes = not disk.readonly and disk.device != "cdrom"
            if disk.source.location:
                yield disk.source.location, domain.name, writes
            store = disk.backing_store
            while store is not None and store.source is not None:
                if store.source.location:
                    yield store.source.location, domain.name, False
                store = store.backing_store
