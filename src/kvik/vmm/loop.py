"""The event loop: descriptors, timers and calls from other threads, on one thread.

Not asyncio, whose import alone costs more than the start of a whole machine, and whose tasks nobody needs here: a
device reacts to a descriptor, and returns.
"""

from __future__ import annotations

import _thread
import os
import select
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    import heapq
    from collections import deque
    from collections.abc import Callable
else:
    import _heapq as heapq  # what is behind `heapq` and `collections`, which take longer
    from _collections import deque

__all__ = ["EventLoop", "IoThread", "Timer"]

MAX_CANCELLED = 64  # timers that were cancelled and still wait in the list
CROWDED = 4096  # calls that wait: whoever makes more shall wait too


class Timer:
    """A call that is due at `due` (monotonic seconds)."""

    __slots__ = ("_loop", "callback", "due")

    def __init__(self, loop: EventLoop, due: float, callback: Callable[[], None]) -> None:
        self._loop = loop
        self.due = due
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        if self.callback is not None:
            self.callback = None
            self._loop._cancelled += 1

    def __lt__(self, other: Timer) -> bool:
        return self.due < other.due


EVENTS = 32  # of one round; epoll begins the next with those that had no place


class EventLoop:
    """Runs callbacks on the thread that calls `run`. Only `call_soon` and `stop` may be used from other threads."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._wake, select.EPOLLIN)
        self._readers: dict[int, Callable[[], None]] = {}
        self._writers: dict[int, Callable[[], None]] = {}
        self._held: dict[int, Callable[[], None]] = {}
        self._edges: set[int] = set()
        self._soon: deque[Callable[[], None]] = deque()
        self._timers: list[Timer] = []
        self._cancelled = 0  # of them; those that ran meanwhile are no harm
        self._thread = 0
        self._stopping = False
        self.on_error: Callable[[BaseException], None] | None = None

    # Descriptors -------------------------------------------------------------------------------------------------

    def add_reader(self, fd: int, callback: Callable[[], None], *, edge: bool = False) -> None:
        """Call back whenever `fd` is readable, hung up or broken, until it is removed. `edge`: only when something is
        added to it (EPOLLET); nobody then needs to read an eventfd."""
        known = fd in self._readers or fd in self._writers
        if edge:
            self._edges.add(fd)
        self._readers[fd] = callback
        self._update(fd, known)

    def add_writer(self, fd: int, callback: Callable[[], None]) -> None:
        known = fd in self._readers or fd in self._writers
        self._writers[fd] = callback
        self._update(fd, known)

    def hold_reader(self, fd: int, seconds: float = 1.0) -> None:
        """Do not look at `fd` for a while: it is readable, and nothing can be done about it now. A listening socket
        for example, when no descriptor is left."""
        callback = self._readers.get(fd)
        if callback is not None:
            self.remove_reader(fd)
            self._held[fd] = callback

            def again() -> None:
                if self._held.get(fd) is callback:
                    self.add_reader(fd, self._held.pop(fd))

            self.call_later(seconds, again)

    def remove_reader(self, fd: int) -> None:
        self._held.pop(fd, None)
        self._edges.discard(fd)
        if self._readers.pop(fd, None) is not None:
            self._update(fd, True)

    def remove_writer(self, fd: int) -> None:
        if self._writers.pop(fd, None) is not None:
            self._update(fd, True)

    def _update(self, fd: int, known: bool) -> None:
        mask = (select.EPOLLIN if fd in self._readers else 0) | (select.EPOLLOUT if fd in self._writers else 0)
        mask |= select.EPOLLET if mask and fd in self._edges else 0
        if not mask:
            try:
                self._epoll.unregister(fd)
            except OSError:
                pass  # it was closed already, and epoll forgot it then
        elif known:
            self._epoll.modify(fd, mask)
        else:
            self._epoll.register(fd, mask)

    # Calls -------------------------------------------------------------------------------------------------------

    def call_soon(self, callback: Callable[[], None]) -> None:
        """From any thread: run `callback` on the loop's."""
        self._soon.append(callback)
        os.eventfd_write(self._wake, 1)

    def call_later(self, seconds: float, callback: Callable[[], None]) -> Timer:
        timer = Timer(self, time.monotonic() + seconds, callback)
        if self._cancelled > MAX_CANCELLED:
            # A guest that sets a far alarm again and again would else fill the list until the alarm is due.
            self._timers = [timer for timer in self._timers if timer.callback is not None]
            heapq.heapify(self._timers)
            self._cancelled = 0
        heapq.heappush(self._timers, timer)
        return timer

    @property
    def crowded(self) -> bool:
        """Whether so many calls wait that those who can wait should: vCPUs, whose exits make calls."""
        return len(self._soon) > CROWDED

    def in_loop(self) -> bool:
        return self._thread == _thread.get_ident()

    @property
    def running(self) -> bool:
        """Whether a thread is in `run`: if not, no other thread can be in a callback."""
        return self._thread != 0

    # Running -----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Until `stop`."""
        self._thread = _thread.get_ident()
        try:
            while not self._stopping:
                self.run_once()
        finally:
            self._stopping = False
            self._thread = 0

    def run_once(self, timeout: float = -1) -> None:
        """Wait for something to happen, at most `timeout` seconds (-1: no limit), and deal with it."""
        if self._timers:
            left = max(self._timers[0].due - time.monotonic(), 0.0)
            timeout = left if timeout < 0 else min(left, timeout)
        if self._soon:
            timeout = 0
        for fd, mask in self._epoll.poll(timeout, EVENTS):
            if fd == self._wake:
                os.eventfd_read(fd)
                continue
            # Looked up now, not before: an earlier callback of this round may have removed it.
            if mask & ~select.EPOLLOUT and (reader := self._readers.get(fd)) is not None:
                self._call(reader)
            if mask & ~select.EPOLLIN and (writer := self._writers.get(fd)) is not None:
                self._call(writer)
        for _ in range(len(self._soon)):
            self._call(self._soon.popleft())
        while self._timers and self._timers[0].due <= time.monotonic():
            if (callback := heapq.heappop(self._timers).callback) is not None:
                self._call(callback)

    def _call(self, callback: Callable[[], None]) -> None:
        try:
            callback()
        except Exception as error:
            if self.on_error is None:
                raise
            self.on_error(error)

    def stop(self) -> None:
        """From any thread: `run` returns when the current round is done."""
        self._stopping = True
        os.eventfd_write(self._wake, 1)

    def close(self) -> None:
        if self._wake >= 0:
            self._epoll.close()
            os.close(self._wake)
            self._wake = -1


class IoThread:
    """An event loop on a thread of its own, for devices that must not wait for others."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.loop = EventLoop()
        self.thread_id = 0  # the kernel's
        self.on_start: Callable[[], None] | None = None  # run first, on the thread (its seccomp filter)
        self._ended = _thread.allocate_lock()
        self._begun = _thread.allocate_lock()
        self._error: BaseException | None = None

    def start(self) -> None:
        """Raises what `on_start` raised: then there is no thread."""
        self._ended.acquire()
        self._begun.acquire()
        _thread.start_new_thread(self._main, ())
        self._begun.acquire()
        if self._error is not None:
            self._ended.acquire()
            self._ended.release()
            self.loop.close()
            raise self._error

    def _main(self) -> None:
        self.thread_id = _thread.get_native_id()
        try:
            try:
                if self.on_start is not None:
                    self.on_start()
            except Exception as error:
                self._error = error
                return
            finally:
                self._begun.release()
            self.loop.run()
        except BaseException as error:
            print(f"kvik-vmm: I/O thread {self.name} ended: {error!r}", file=sys.stderr, flush=True)
            raise
        finally:
            self._ended.release()

    def call(self, function: Callable[[], None]) -> None:
        """Run `function` on the thread and wait until it is done; what it raises is raised here."""
        if self.loop.in_loop():
            function()
            return
        done = _thread.allocate_lock()
        done.acquire()
        errors: list[BaseException] = []

        def run() -> None:
            try:
                function()
            except BaseException as error:
                errors.append(error)
            finally:
                done.release()

        self.loop.call_soon(run)
        done.acquire()
        if errors:
            raise errors[0]

    def stop(self) -> None:
        """End the thread and wait for it."""
        if self.thread_id or self._ended.locked():
            self.loop.stop()
            self._ended.acquire()
            self._ended.release()
        self.loop.close()
