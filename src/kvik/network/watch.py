"""What happens to networks behind our back: a bridge or another interface deleted, a packet filter flushed (`nft flush
ruleset`, as a reload of /etc/nftables.conf does). The kernel tells of both; what is heard is only a reason to look.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from kvik.errors import HostError
from kvik.host.netlink_monitor import NetlinkMonitor

__all__ = ["Watch"]

logger = logging.getLogger(__name__)

_DATAGRAMS = 256  # read at a time: the loop has others to serve


class Watch:
    """Calls `link_gone(name)` and `table_gone()` in the loop that made it, for its thread's network namespace. The
    name is "" where notices were lost: it may have been any."""

    def __init__(self, link_gone: Callable[[str], None], table_gone: Callable[[], None]) -> None:
        self._link_gone, self._table_gone = link_gone, table_gone
        self._loop = asyncio.get_running_loop()
        self._monitors: list[NetlinkMonitor] = []
        for what in ("link", "table"):
            try:
                monitor = NetlinkMonitor(what)
            except HostError as error:  # not root, or a kernel without: then nothing is put right by itself
                logger.info("changes of the host's networks are not watched: %s", error)
                continue
            self._monitors.append(monitor)
            self._loop.add_reader(monitor, self._read, monitor)

    def close(self) -> None:
        for monitor in self._monitors:
            self._loop.remove_reader(monitor)
            monitor.close()
        self._monitors.clear()

    def _read(self, monitor: NetlinkMonitor) -> None:
        for _ in range(_DATAGRAMS):
            if (changes := monitor.read()) is None:
                return
            for change in changes:
                if change.what == "overrun":
                    self._table_gone()
                    self._link_gone("")
                elif change.gone and change.link is not None:
                    self._link_gone(change.link.name)
                elif change.gone:
                    self._table_gone()
