"""What a disk request costs in kvik-vmm: from the kick to the interrupt, with the mock driver; microseconds of the
processor's time, the best of five rounds. Neither the driver's half nor KVM is in the figures; the copy out of the page
cache is. `--overlay`: with an image on top, as after a live snapshot.

    PYTHONPATH=src python benchmarks/vmm_blk.py [--requests 6000] [--overlay]
"""

from __future__ import annotations

import argparse
import os
import struct
import tempfile
import time
from pathlib import Path

from kvik.image.create import create
from kvik.vmm.backends.block import BlockImage
from kvik.vmm.blk.overlay import Overlays
from kvik.vmm.virtio.blk import T_IN, T_OUT, Blk
from kvik.vmm.virtio.mock_machine import MockMachine

SIZE = 8 << 20


def put_on_top(disk: Blk, path: str, new: str) -> None:
    create(new, "qcow2", SIZE, backing_file=path, backing_format="raw")
    overlays = Overlays(disk)
    overlays.add(os.open(new, os.O_RDWR), os.open(path, os.O_RDONLY), -1, node="new", group="", name=new)
    overlays.put()
    Path(new).unlink()


def measure(path: str, kind: int, depth: int, requests: int, parts: int = 1, *, overlay: str = "") -> float:
    """`depth` requests wait at each kick, each of `parts` pages. `overlay`: where a new image may be made."""
    machine = MockMachine(64 << 20)
    disk = Blk("disk", BlockImage(path), loop=machine.loop)
    guest = machine.add_virtio(disk)
    guest.use_msix(2)
    guest.start(area=SIZE)
    if overlay:
        put_on_top(disk, path, overlay)
    queue, pages = guest.queues[0], [4096] * parts
    data = [bytes(4096)] * parts
    clock = time.thread_time_ns
    best = float("inf")
    rounds = max(requests // depth // 5, 1)
    for _ in range(5):
        spent = 0
        for number in range(rounds * depth):
            header = struct.pack("<IIQ", kind, 0, number * 7 % 1000 * 8)
            queue.add([header] if kind == T_IN else [header, *data], [*pages, 1] if kind == T_IN else [1])
            if (number + 1) % depth:
                continue
            queue.ask(interrupts=True)
            guest.kick(0, turn=False)
            start = clock()
            while queue.in_flight and machine.memory.u16(queue.used + 2) != queue._avail_index:
                machine.loop.run_once()
            spent += clock() - start
            assert all(done.data.endswith(b"\0") for done in queue.collect())
            machine.interrupts.sent.clear()
        best = min(best, spent / (rounds * depth) / 1000)
    machine.close()
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--requests", type=int, default=6000)
    parser.add_argument("--overlay", action="store_true")
    options = parser.parse_args()
    requests = options.requests
    with tempfile.NamedTemporaryFile() as file:
        file.write(os.urandom(SIZE))
        file.flush()
        overlay = f"{file.name}.new" if options.overlay else ""
        print(f"{'us a request':20}{'depth 1':>10}{'depth 8':>10}{'depth 32':>10}")
        for name, kind in (("read 4k", T_IN), ("write 4k", T_OUT)):
            figures = [measure(file.name, kind, depth, requests, overlay=overlay) for depth in (1, 8, 32)]
            print(f"{name:20}" + "".join(f"{figure:10.1f}" for figure in figures), flush=True)
        for name, kind in (("read 248k", T_IN), ("write 248k", T_OUT)):
            print(f"{name:20}{measure(file.name, kind, 1, requests // 10, 62, overlay=overlay):10.1f}", flush=True)


if __name__ == "__main__":
    main()
