"""One operation at a time on one machine, and nobody waits without an end.

A job has a name ("suspend", "attach-device"), a holder for as long as its `async with` block, and two deadlines: how
long a newcomer waits for the present holder, and how long the work itself may take. Who passes the first is told who
holds the machine and since when; who passes the second is cancelled, so that a stuck VMM cannot hold its machine for
ever. Reads take no job.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from kvik.errors import OperationTimeout

WAIT = 30.0  # seconds to wait for the present holder; libvirt's own figure
LIMIT = 120.0  # seconds the work may take


@dataclass(slots=True)
class Job:
    name: str
    since: float = field(default_factory=time.time)  # seconds since the epoch
    began: float = field(default_factory=time.monotonic)
    operation: int = 0  # virDomainJobOperation
    progress: Callable[[], tuple[int, int]] | None = None  # bytes that are done, and of how many
    cancel: Callable[[], object] | None = None  # ask it to give up

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.began

    def __str__(self) -> str:
        return f"{self.name} for {self.elapsed:.1f} s (since {time.strftime('%H:%M:%S', time.localtime(self.since))})"


class JobSlot:
    """The right to change one machine."""

    __slots__ = ("_lock", "current", "owner")

    def __init__(self, owner: str) -> None:
        self.owner = owner  # the machine's name, for errors
        self.current: Job | None = None
        self._lock: asyncio.Lock | None = None  # 1000 machines that are off need none

    @asynccontextmanager
    async def hold(self, name: str, *, wait: float = WAIT, limit: float = LIMIT) -> AsyncIterator[Job]:
        """Own the machine for the block. `OperationTimeout` past `wait` or `limit` seconds."""
        lock = self._lock = self._lock or asyncio.Lock()
        try:
            async with asyncio.timeout(wait):
                await lock.acquire()
        except TimeoutError:
            holder = f"it is held by {self.current}" if self.current else "it was held by others in turn"
            raise OperationTimeout(
                f"cannot {name} machine {self.owner!r}: {holder}, and {wait:g} s of waiting are over",
                remedy="try again when that is done, or destroy the machine",
            ) from None
        job = self.current = Job(name)
        try:
            async with asyncio.timeout(limit) as timer:
                yield job
        except TimeoutError as error:
            if not timer.expired():
                raise
            raise OperationTimeout(
                f"{name} of machine {self.owner!r} did not finish within {limit:g} s",
                remedy="the machine may be stuck: see its log, or destroy it",
            ) from error
        finally:
            self.current = None
            lock.release()
