"""The first serial line's output, as it comes: the first byte is told, the last bytes show where a boot stalled."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

__all__ = ["Output"]

_KEPT = 16 * 1024  # bytes
_LIMIT = 4 * 1024 * 1024  # after this much we stop listening; the guest has spoken enough


class Output:
    def __init__(self, fd: int, loop: asyncio.AbstractEventLoop, first: Callable[[], None]) -> None:
        """Takes over `fd`, our end of the pipe into which the VMM copies the line; `first` is called once."""
        self.tail = b""
        self._fd = fd
        self._loop = loop
        self._first = first
        self._seen = 0
        loop.add_reader(fd, self._ready)

    def _ready(self) -> None:
        try:
            data = os.read(self._fd, 65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data and self._seen == 0:
            self._first()
        self._seen += len(data)
        self.tail = (self.tail + data)[-_KEPT:]
        if not data or self._seen > _LIMIT:
            self.close()

    def close(self) -> None:
        # A VMM ignores that nobody reads its log (EPIPE) and goes on.
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1
