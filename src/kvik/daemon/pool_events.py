"""From the storage pools' events to the clients that asked for them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvik.daemon.subscriptions import Subscriptions
from kvik.manager.storage import REFRESHED

if TYPE_CHECKING:
    from kvik.manager.storage import PoolObject, Pools

__all__ = ["PoolEvents"]

LIFECYCLE, REFRESH = 0, 1  # virStoragePoolEventID


class PoolEvents(Subscriptions):
    def __init__(self, pools: Pools) -> None:
        super().__init__("storage pools", (LIFECYCLE, REFRESH))
        self._unsubscribe = pools.subscribe(self._happened)

    def close(self) -> None:
        self._unsubscribe()

    def _happened(self, pool: PoolObject, event: int) -> None:
        if event == REFRESHED:
            self.deliver(pool.name, pool.uuid, REFRESH, "STORAGE_POOL_EVENT_REFRESH")
        else:
            self.deliver(pool.name, pool.uuid, LIFECYCLE, "STORAGE_POOL_EVENT_LIFECYCLE", event, 0)
