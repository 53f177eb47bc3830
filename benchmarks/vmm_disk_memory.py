"""What a disk with its I/O thread costs in memory: resident and private bytes of a kvik-vmm process by its disks.

    PYTHONPATH=src python benchmarks/vmm_disk_memory.py

Each row is a process of its own with a machine that was built and whose disks have started; nothing runs in it. Needs
/dev/kvm.
"""

from __future__ import annotations

import subprocess
import sys

ONE = """
import os, sys, tempfile
from kvik.vmm.config import DiskConfig, MachineConfig
from kvik.vmm.build import build
count, aio = int(sys.argv[1]), sys.argv[2]
config = MachineConfig()
config.memory.size = 64 << 20
with tempfile.NamedTemporaryFile() as image:
    image.truncate(1 << 20)
    for _ in range(count):
        disk = DiskConfig()
        disk.path, disk.lock, disk.aio = image.name, False, aio
        config.disks.append(disk)
    machine = build(config)
    with open("/proc/self/smaps_rollup") as rollup:
        table = {line.split()[0]: int(line.split()[1]) for line in list(rollup)[1:]}
    threads = len(os.listdir("/proc/self/task"))
    print(table["Rss:"], table["Private_Dirty:"], len(os.listdir("/proc/self/fd")), threads)
    machine.close()
"""


def measure(disks: int, aio: str) -> list[int]:
    """KiB resident, KiB private and written, descriptors, threads."""
    done = subprocess.run([sys.executable, "-c", ONE, str(disks), aio], check=True, stdout=subprocess.PIPE)
    return [int(word) for word in done.stdout.split()]


def main() -> None:
    for aio in ("io_uring", "threads"):
        print(f"{aio:>8} {'RSS KiB':>10}{'dirty KiB':>10}{'fds':>6}{'threads':>8}{'KiB a further disk':>20}")
        first = 0
        for disks in (0, 1, 2, 4, 8, 16):
            resident, dirty, fds, threads = measure(disks, aio)
            each = f"{(dirty - first) / (disks - 1):.0f}" if disks > 1 else ""
            first = dirty if disks == 1 else first  # the first one brings all the code with it
            print(f"{disks:>8} {resident:>10}{dirty:>10}{fds:>6}{threads:>8}{each:>20}")


if __name__ == "__main__":
    main()
