"""A virtio device: what a guest takes for an entropy source (virtio 1.2, 5.4) gives the same bytes in every run.

For tests that must be repeatable. Linux's own virtio-rng driver binds to it.
"""

import random
from typing import Any

from kvik.vmm.virtio.device import VirtioDevice

MOST = 4096  # bytes a request


class RepeatableEntropy(VirtioDevice):
    kind = "repeatable-entropy"
    device_id = 4
    queue_sizes = (16,)

    def __init__(self, name: str, seed: int = 0) -> None:
        self.seed = seed
        self.source = random.Random(seed)
        self.given = 0
        super().__init__(name)

    def reset(self) -> None:
        super().reset()
        self.source.seed(self.seed)
        self.given = 0

    def queue_kicked(self, index: int) -> None:
        queue = self.queues[index]
        for chain in queue:  # hostile chains raise GuestFault here, and the base class deals with it
            data = self.source.randbytes(min(chain.writable_size, MOST))
            self.given += len(data)
            queue.push(chain, chain.write(data))
        queue.flush()

    def state(self) -> dict[str, Any]:
        version, words, gauss = self.source.getstate()
        return {**super().state(), "random": [version, list(words), gauss], "given": self.given}

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        version, words, gauss = state["random"]
        self.source.setstate((version, tuple(words), gauss))
        self.given = int(state["given"])

    def stats(self) -> dict[str, int]:
        return {**super().stats(), "bytes": self.given}
