"""Work on the images of the disk while its guest goes on: a piece each turn of the loop, no faster than it may.

    running    from its making on
    settling   all is copied, and is being written out
    ready      all is copied, and what the guest writes goes on being copied, until it is told to change over
    ending     it comes to no good end; what it wrote to is being closed
    concluded  by itself, by `cancel` or by an error; known until it is dismissed

Until the last step the guest has the images that it had, and reads the same from them whatever was copied: a process
that is killed amid it loses the job, and nothing else. What the guest is answered waits for a piece at most.
"""

from __future__ import annotations

import _thread
import os
import time

from kvik.errors import KvikError
from kvik.vmm.blk.writer import reason

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from kvik.vmm.blk.image import FormatImage
    from kvik.vmm.virtio.blk import Blk

__all__ = ["STEP", "BlockJob"]

STEP = 1 << 20  # bytes that one turn of the loop copies: the guest's requests wait meanwhile
SETTLES = 10.0  # seconds for requests that are under way
WAITS = 0.02  # seconds
PAUSE = 0.005  # seconds until a slow image is looked at again
AGAIN = 1.0  # seconds until storage that does not answer is looked at again


class BlockJob:
    """Of the images of `device`. `ended` is called once."""

    def __init__(self, job: str, device: Blk, image: FormatImage, *, speed: int, ended: Callable[[], object]) -> None:
        self.job, self.speed = job, speed  # bytes a second, 0: no limit
        self.state, self.error = "running", ""
        self.current, self.total = 0, image.image.size
        self._device, self._image, self._ended = device, image, ended
        self._due = 0.0  # time.monotonic() of the next piece
        image.job = self
        device.loop.call_soon(self._turn)

    def report(self) -> dict[str, Any]:
        return {
            "job": self.job,
            "state": self.state,
            "total": self.total,
            "current": self.current,
            "speed": self.speed,
            "error": self.error,
        }

    # What each kind does, under the device's lock

    def step(self) -> int:
        """Copy the next piece, `STEP` bytes or few more; how many it were. `current` is `total` behind the last."""
        raise NotImplementedError  # each kind's own

    @property
    def written(self) -> int:
        """A descriptor of the image that is written to."""
        raise NotImplementedError  # each kind's own

    def finish(self) -> None:
        """Nothing is in flight: the images change places."""
        raise NotImplementedError  # each kind's own

    def waits(self) -> bool:
        """Whether it goes on although it has copied all."""
        return False

    def crowded(self) -> bool:
        """Whether so much waits to be written that nothing more should be copied yet."""
        return False

    def write_out(self) -> None:
        """Beside the loop, up to `written_out`: what is left for the standstill is little then."""
        _thread.start_new_thread(self._write_out, (os.dup(self.written),))

    def abandon(self) -> bool:
        """It comes to no good end. False: it concludes later."""
        return True

    def settled(self) -> bool:
        """Nothing is in flight, and what was is answered. False: the host's storage does not answer."""
        settled = self._device.image.drain(SETTLES)
        self._device._publish()
        return settled

    # Its course --------------------------------------------------------------------------------------------------

    def set_speed(self, speed: int) -> None:
        self.speed, self._due = speed, 0.0

    def _turn(self) -> None:
        if self.state != "running":
            return
        loop, now = self._device.loop, time.monotonic()
        if now < self._due:
            loop.call_later(min(self._due - now, AGAIN), self._turn)  # the limit may change
            return
        if self.crowded():
            loop.call_later(PAUSE, self._turn)
            return
        try:
            with self._device.lock:
                copied = self.step()
        except (KvikError, OSError) as error:
            self.failed(reason(error))
            return
        if self.speed:
            self._due = max(self._due, now) + copied / self.speed
        if self.current < self.total:
            loop.call_soon(self._turn)
        elif self.waits():
            loop.call_later(0 if copied else WAITS, self._turn)
        else:
            self.state = "settling"
            self.write_out()

    def _write_out(self, fd: int) -> None:
        error: OSError | None = None
        try:
            os.fdatasync(fd)
        except OSError as caught:
            error = caught
        finally:
            os.close(fd)
        self._device.loop.call_soon(lambda: self.written_out(reason(error)))

    def written_out(self, error: str) -> None:
        """`error`: what went wrong with that, or ""."""
        if self.state != "settling":
            return
        if error:
            self.failed(error)
            return
        with self._device.lock:
            if not self.settled():
                self._device.loop.call_later(AGAIN, lambda: self.written_out(""))
                return
            if self.waits():  # the guest wrote too much meanwhile
                self.state = "running"
                self._device.loop.call_soon(self._turn)
                return
            try:
                self.finish()
            except (KvikError, OSError) as caught:
                self.failed(reason(caught))
                return
        self.conclude()

    def failed(self, error: str) -> None:
        self.error = self.error or error
        with self._device.lock:
            self.cancel()

    def cancel(self) -> None:
        """It ends as it is, under the device's lock."""
        if self.state not in ("ending", "concluded"):
            self.state = "ending"
            if self.abandon():
                self.conclude()

    def conclude(self) -> None:
        self.state = "concluded"
        self._image.job = None
        self._ended()
