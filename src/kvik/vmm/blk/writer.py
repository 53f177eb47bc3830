"""What a backup that is pushed, or a copy, takes from the disk, on its way into the target, which may be slow: a thread
of its own writes.

The disk's thread reads and hands over; the guest's requests wait for the target only when `ROOM` bytes do.
"""

from __future__ import annotations

import _thread
from _queue import Empty, SimpleQueue  # `queue` takes threading along

from kvik.errors import KvikError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from kvik.image.base import Image
    from kvik.vmm.loop import EventLoop

__all__ = ["Writer", "put", "reason"]

ROOM = 16 << 20  # bytes that are held


def put(target: Image, at: int, size: int, data: bytearray | None) -> None:
    """None: zeros. Raises `KvikError`, OSError."""
    if data is None:
        target.write_zeroes(at, size, discard=True)
    else:
        target.write(at, data)


def reason(error: BaseException | None) -> str:
    """What went wrong, in words; "" for None."""
    return (isinstance(error, OSError) and error.strerror) or str(error or "")


class Writer:
    """`target` is the thread's own from now on. When it is closed, after `finish` or `abandon`, `ended` is called on
    the loop, with what went wrong or "". `failed` is called there for a write that did; what follows is dropped.
    `room`: bytes that are held at most."""

    def __init__(
        self,
        target: Image,
        loop: EventLoop,
        failed: Callable[[str], None],
        ended: Callable[[str], None],
        *,
        room: int = ROOM,
    ) -> None:
        self._target, self._loop, self._failed, self._ended, self._room = target, loop, failed, ended, room
        self._todo: SimpleQueue[tuple[int, int, bytearray | None] | None] = SimpleQueue()  # None: no more comes
        self._done: SimpleQueue[int] = SimpleQueue()  # bytes
        self._held = 0
        self.given = 0  # bytes
        self._given_up = self._gives_back = False
        _thread.start_new_thread(self._run, ())

    # The disk's thread -------------------------------------------------------------------------------------------

    @property
    def crowded(self) -> bool:
        """Whether who can wait should."""
        self._settle(self._room)
        return self._held > self._room // 2

    @property
    def written(self) -> int:
        """How much of what was `given` so far is in the target; 0 after a failure."""
        self._settle(self._room)
        return self.given - self._held if not self._given_up else 0

    def put(self, at: int, size: int, data: bytearray | None) -> None:
        """None: zeros. Waits for room."""
        self._settle(self._room)
        self._todo.put((at, size, data))
        if data is not None:
            self._held += size
            self.given += size

    def _settle(self, most: int) -> None:
        try:
            while self._held:
                self._held -= self._done.get(block=self._held >= most)
        except Empty:
            pass

    def finish(self, *, give_back: bool = False) -> None:
        """`give_back`: the target is not closed but written out, and whoever passed it has it again."""
        self._gives_back = give_back
        self._todo.put(None)

    def abandon(self) -> None:
        """What waits is dropped."""
        self._given_up = True
        self._todo.put(None)

    # Its own -----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        target = self._target
        while (item := self._todo.get()) is not None:
            at, size, data = item
            if not self._given_up:
                try:
                    put(target, at, size, data)
                except (KvikError, OSError) as error:
                    self._given_up = True
                    self._tell(self._failed, error)
            if data is not None:
                self._done.put(size)
        try:
            if self._given_up:
                target.release()
            elif self._gives_back:
                target.flush()
            else:
                target.close()
        except (KvikError, OSError) as error:
            self._tell(self._ended, error)
        else:
            self._tell(self._ended)

    def _tell(self, whom: Callable[[str], None], error: Exception | None = None) -> None:
        words = reason(error)
        self._loop.call_soon(lambda: whom(words))
