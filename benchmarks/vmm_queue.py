"""What a request costs in the device's half of a virtqueue: pop, push, flush; nanoseconds, the best of several rounds.

    PYTHONPATH=src python benchmarks/vmm_queue.py [--requests 20000]

Each request has one readable and two writable buffers, as a disk read has. The driver's half is not in the figures.
"""

from __future__ import annotations

import argparse
import time

from kvik.vmm.memory import GuestMemory
from kvik.vmm.virtio.mock import MockDriver
from kvik.vmm.virtio.packed import PackedQueue
from kvik.vmm.virtio.queue import EVENT_IDX, IN_ORDER, INDIRECT_DESC, RING_PACKED
from kvik.vmm.virtio.split import SplitQueue

SIZE = 256
CASES = {
    "split, direct": 0,
    "split, indirect": INDIRECT_DESC,
    "split, indirect, event index": INDIRECT_DESC | EVENT_IDX,
    "split, indirect, in order": INDIRECT_DESC | IN_ORDER,
    "packed, direct": RING_PACKED,
    "packed, indirect": RING_PACKED | INDIRECT_DESC,
    "packed, indirect, event index": RING_PACKED | INDIRECT_DESC | EVENT_IDX,
}


def measure(features: int, batch: int, requests: int) -> float:
    """ns a request, when `batch` of them wait at each kick."""
    memory = GuestMemory.allocate(16 << 20)
    queue = (PackedQueue if features & RING_PACKED else SplitQueue)(memory, 0, SIZE)
    driver = MockDriver(memory, queue, features=features)
    clock = time.perf_counter_ns
    best = float("inf")
    for _ in range(5):
        spent = 0
        for _ in range(max(requests // batch // 5, 1)):
            for _ in range(batch):
                driver.add([b"x" * 16], [4096, 1])
            start = clock()
            queue.disable_notifications()
            while (chain := queue.pop()) is not None:
                queue.push(chain, 4097)
            queue.flush()
            queue.enable_notifications()
            spent += clock() - start
            driver.collect()
        best = min(best, spent / (max(requests // batch // 5, 1) * batch))
    del queue, driver, chain
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--requests", type=int, default=20_000)
    requests = parser.parse_args().requests
    print(f"{'ns a request':32}{'depth 1':>10}{'depth 8':>10}{'depth 32':>10}")
    for name, features in CASES.items():
        figures = [measure(features, batch, requests) for batch in (1, 8, 32)]
        print(f"{name:32}" + "".join(f"{figure:10.0f}" for figure in figures), flush=True)


if __name__ == "__main__":
    main()
