"""Work on the images of the disk while its guest goes on: a piece each turn of the loop, no faster than it may.

    running    from its making on
    settling   all is copied, and is being written out
    ready      all is copied, and what the guest writes goes on being copied, until it is told to change over
    concluded  by itself, by `cancel` or by an error; known until it is dismissed

Until the last step the guest has the images that it had, and reads the same from them whatever was copied: a process
that is killed amid it loses the job, and nothing else. What the guest is answered waits for a piece at most.
"""

from __future__ import annotations

import _thread
import os
import time

from kvik.errors import KvikError

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

    def abandon(self) -> None:
        """It comes to no good end."""

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
        try:
            with self._device.lock:
                copied = self.step()
        except (KvikError, OSError) as error:
            self._failed(error)
            return
        if self.speed:
            self._due = max(self._due, now) + copied / self.speed
        if self.current < self.total:
            loop.call_soon(self._turn)
        elif self.waits():
            loop.call_later(0 if copied else WAITS, self._turn)
        else:
            self.state = "settling"
            _thread.start_new_thread(self._write_out, (os.dup(self.written),))

    def _write_out(self, fd: int) -> None:
        """Beside the loop: what is left for the standstill is little then."""
        error: OSError | None = None
        try:
            os.fdatasync(fd)
        except OSError as caught:
            error = caught
        finally:
            os.close(fd)
        self._device.loop.call_soon(lambda: self._written_out(error))

    def _written_out(self, error: OSError | None) -> None:
        if self.state != "settling":
            return
        if error is not None:
            self._failed(error)
            return
        with self._device.lock:
            if not self.settled():
                self._device.loop.call_later(AGAIN, lambda: self._written_out(None))
                return
            try:
                self.finish()
            except (KvikError, OSError) as caught:
                self._failed(caught)
                return
        self._conclude()

    def _failed(self, error: Exception) -> None:
        self.error = (isinstance(error, OSError) and error.strerror) or str(error)
        with self._device.lock:
            self.cancel()

    def cancel(self) -> None:
        """It ends as it is, under the device's lock."""
        if self.state != "concluded":
            self.abandon()
            self._conclude()

    def _conclude(self) -> None:
        self.state = "concluded"
        self._image.job = None
        self._ended()
