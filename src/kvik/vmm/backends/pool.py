"""Host I/O by threads that wait: works for every file, every operation, every kernel.

Threads are started as work comes, up to a limit, and sleep on a queue. The kernel calls release the interpreter lock,
so they run beside the vCPUs. Results come back through one eventfd in the device's loop.
"""

from __future__ import annotations

import os
import select
from _thread import start_new_thread

from kvik.vmm.backends.request import perform

TYPE_CHECKING = False
if TYPE_CHECKING:
    from queue import SimpleQueue

    from kvik.vmm.backends.request import Request
else:
    from _queue import SimpleQueue

__all__ = ["ThreadPool"]


class ThreadPool:
    """Not for two threads at once: the device's lock guards it. Only the workers run beside it."""

    name = "threads"

    def __init__(self, threads: int = 8) -> None:
        self.limit = threads
        self.in_flight = 0
        self._started = 0
        self._work: SimpleQueue[Request | None] = SimpleQueue()
        self._done: SimpleQueue[Request] = SimpleQueue()
        self._signalled = False
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    @property
    def fds(self) -> tuple[int, ...]:
        """Readable while results wait: the loop then has `reap` called."""
        return (self.fd,)

    def submit(self, request: Request) -> None:
        self.in_flight += 1
        if self._started < self.limit and self._started < self.in_flight:
            try:
                start_new_thread(self._worker, ())
                self._started += 1
            except RuntimeError:  # the host has no thread left, or a sandboxed thread may start none
                if not self._started:  # done here and now, since nobody else will
                    self._finished(request)
                    return
        self._work.put(request)

    def _finished(self, request: Request) -> None:
        request.result = perform(request)
        self._done.put(request)
        if not self._signalled:
            self._signalled = True
            os.eventfd_write(self.fd, 1)

    def flush(self) -> None:
        """Nothing is held back here."""

    def reap(self) -> None:
        """Calls `done` of whatever is complete. The loop calls this when `fd` is readable."""
        try:
            os.eventfd_read(self.fd)
        except BlockingIOError:
            pass
        # Cleared before the queue is looked at: a result that comes later signals again.
        self._signalled = False
        while self._done.qsize():
            request = self._done.get()
            self.in_flight -= 1
            if request.done is not None:
                request.done(request)

    def wait(self, seconds: float) -> bool:
        """Waits for one result or more and reaps. False: nothing came in that time."""
        ready = bool(select.select([self.fd], [], [], seconds)[0])
        self.reap()
        return ready

    def close(self) -> None:
        """Lets the workers end. A request that hangs in the kernel keeps its worker, and its buffers, until it ends."""
        if self.fd < 0:
            return
        while self.in_flight and self.wait(5):
            pass
        for _ in range(self._started):
            self._work.put(None)
        fd, self.fd = self.fd, -1
        if not self.in_flight:  # else a worker still writes to it: leaked on purpose, a reused number would be worse
            os.close(fd)

    def _worker(self) -> None:
        fd, work, done = self.fd, self._work, self._done
        while (request := work.get()) is not None:
            request.result = perform(request)
            done.put(request)
            if not self._signalled:
                self._signalled = True
                os.eventfd_write(fd, 1)
