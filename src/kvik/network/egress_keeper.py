"""What keeps allow-lists by name alive: their resolvers are watched, and what names resolved to lapses in time.

One thread for all machines, asleep until a resolver ends or a period is over. Without the daemon nothing is watched:
a machine whose resolver ends then can look up no more names, and what it may reach already does not lapse, until the
next daemon comes.
"""

from __future__ import annotations

import logging
import select
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from kvik.host.process import ProcessHandle

__all__ = ["Keeper"]

logger = logging.getLogger(__name__)

RESTARTS, RESTARTS_WITHIN = 5, 60.0  # of one resolver: so many at once in so many seconds, else once a period


class Keeper:
    """Calls, from a thread of its own, `ended(device)` when a resolver that is watched has ended, and `over()` every
    `period` seconds. Neither may raise."""

    def __init__(self, period: float, ended: Callable[[str], None], over: Callable[[], None]) -> None:
        self._period, self._ended, self._over = period, ended, over
        self._epoll = select.epoll()
        self._bell, self._ringer = socket.socketpair()
        self._epoll.register(self._bell, select.EPOLLIN)
        self._handles: dict[str, ProcessHandle] = {}
        self._restarts: dict[str, list[float]] = {}
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="kvik-egress", daemon=True)
        self._thread.start()

    def watch(self, device: str, handle: ProcessHandle) -> None:
        """Instead of what was watched for this interface; `handle` is closed here."""
        self.let_go(device)
        with self._lock:
            self._handles[device] = handle
            if handle.fileno() >= 0:  # else it has ended already: the end of the period finds that
                self._epoll.register(handle.fileno(), select.EPOLLIN)

    def let_go(self, device: str) -> None:
        with self._lock:
            handle = self._handles.pop(device, None)
            if handle is not None:
                with suppress(OSError, ValueError):
                    self._epoll.unregister(handle.fileno())
                handle.close()

    def forget(self, device: str) -> None:
        self.let_go(device)
        self._restarts.pop(device, None)

    def close(self) -> None:
        """End the thread. Must not be called from it."""
        self._ringer.close()
        self._thread.join()
        for device in list(self._handles):
            self.let_go(device)
        self._epoll.close()
        self._bell.close()

    def _run(self) -> None:
        due = time.monotonic() + self._period
        while True:
            for fd, _ in self._epoll.poll(max(0.0, due - time.monotonic())):
                if fd == self._bell.fileno():
                    return
                with self._lock:
                    device = next((name for name, one in self._handles.items() if one.fileno() == fd), None)
                if device is not None:
                    self.let_go(device)
                    if self._may_restart(device):
                        self._ended(device)
            if time.monotonic() >= due:
                self._over()
                due = time.monotonic() + self._period

    def _may_restart(self, device: str) -> bool:
        now = time.monotonic()
        recent = [moment for moment in self._restarts.get(device, ()) if moment > now - RESTARTS_WITHIN]
        if len(recent) >= RESTARTS:
            logger.error("the resolver of %s ended %d times within %g s: it waits", device, RESTARTS, RESTARTS_WITHIN)
            return False
        self._restarts[device] = [*recent, now]
        return True
