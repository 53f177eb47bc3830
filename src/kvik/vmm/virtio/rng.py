"""virtio-rng (virtio 1.2, 5.4): random numbers of the host's kernel for the guest's."""

from __future__ import annotations

import os

from kvik.vmm.ratelimit import RateLimiter
from kvik.vmm.virtio.device import VirtioDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.vmm.device import State
    from kvik.vmm.virtio.queue import Queue

__all__ = ["Rng"]

MAX_BYTES = 64 << 10  # of one request: a driver that wants more asks again
ROUND = 64  # requests of one turn of the loop


class Rng(VirtioDevice):
    """`rate`: bytes a second the guest may draw, with a burst of one second's; 0: no limit."""

    kind = "virtio-rng"
    device_id = 4
    queue_sizes = (64,)

    def __init__(self, name: str, *, rate: int = 0) -> None:
        self.limit = RateLimiter(rate)
        self.bytes = 0
        self.paused = False
        self._waiting = False
        super().__init__(name)

    def queue_kicked(self, index: int) -> None:
        if self.paused or self._waiting:
            return
        queue = self.queues[index]
        for _ in range(ROUND):
            chain = queue.pop()
            if chain is None:
                self._rearm(queue)
                break
            wanted = min(chain.writable_size, MAX_BYTES)
            if wait := self.limit.take(wanted):
                queue.undo_pop(chain)
                self._waiting = True
                self.loop.call_later(wait, self._again)
                break
            # Without a block only before the host's own pool is filled, in the first second after its boot
            given = chain.write(os.getrandom(wanted)) if wanted else 0
            self.bytes += given
            queue.push(chain, given)
        else:
            self.loop.call_soon(lambda: self.kick(index))
        queue.flush()

    def _rearm(self, queue: Queue) -> None:
        """All is taken: let the driver kick again, and look once more if it put something meanwhile."""
        if queue.enable_notifications():
            self.loop.call_soon(lambda: self.kick(queue.index))

    def _again(self) -> None:
        self._waiting = False
        self.kick(0)

    def pause(self) -> None:
        with self.lock:
            self.paused = True

    def resume(self) -> None:
        with self.lock:
            self.paused = False
        self.loop.call_soon(lambda: self.kick(0))

    def state(self) -> State:
        return {**super().state(), "limit": self.limit.state()}

    def restore(self, state: State) -> None:
        super().restore(state)
        self.limit.restore(state["limit"])

    def stats(self) -> dict[str, int]:
        return {**super().stats(), "bytes": self.bytes, "throttled": self.limit.throttled}
