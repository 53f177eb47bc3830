"""firewalld is started anew: it has forgotten which interfaces were in which of its zones. The system's D-Bus tells."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from kvik.errors import KvikError
from kvik.host import firewalld
from kvik.host.dbus import SystemBus

__all__ = ["ZoneWatch"]

logger = logging.getLogger(__name__)

AGAIN = 10.0  # seconds until a bus that is not there is looked for again


class ZoneWatch:
    """Calls `changed` in the loop that made it, whenever firewalld comes or goes."""

    def __init__(self, changed: Callable[[], None], *, again: float = AGAIN) -> None:
        self._changed = changed
        self._again = again
        self._loop = asyncio.get_running_loop()
        self._bus: SystemBus | None = None
        self._task = self._loop.create_task(self._connect())

    def close(self) -> None:
        self._task.cancel()
        self._let_go()

    def _let_go(self) -> None:
        if self._bus is not None:
            self._loop.remove_reader(self._bus)
            self._bus.close()
            self._bus = None

    async def _connect(self) -> None:
        """Until there is a bus."""
        missed = False
        while True:
            try:
                bus = await asyncio.to_thread(firewalld.watch)
            except KvikError as error:
                logger.debug("firewalld is not watched: %s", error)
                missed = True
                await asyncio.sleep(self._again)
                continue
            self._bus = bus
            self._loop.add_reader(bus, self._read)
            if missed:
                self._changed()  # it may have come before the bus was asked to tell
            return

    def _read(self) -> None:
        assert self._bus is not None
        try:
            told = self._bus.receive_signal()
        except KvikError as error:  # the bus has ended; who starts it starts firewalld, too
            logger.debug("firewalld is not watched any more: %s", error)
            self._let_go()
            self._task = self._loop.create_task(self._connect())
            self._changed()
            return
        if told:
            self._changed()
