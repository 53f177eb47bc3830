"""How long a machine takes from exec to its first instruction, and what each vCPU, device and GiB adds to that.

The guest is a kernel of a few instructions, whose first is a byte to COM1: when that comes out at the other end of a
pipe the vCPU runs. So this measures the product as it is, on any KVM. The peer is `python -I -S -c pass`.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import pvh_kernel
from report import Report

SOURCE = Path(__file__).resolve().parent.parent / "src"
VMM = [sys.executable, "-I", "-S", str(SOURCE / "kvik/vmm/__main__.py")]


class Sample:
    """`first` and `whole`: ms to the guest's first byte and to the process's end; `cpu`: ms of CPU time."""

    def __init__(self, first: float, whole: float, cpu: float) -> None:
        self.first, self.whole, self.cpu = first, whole, cpu


def bare(command: Sequence[str]) -> Sample:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begun = time.perf_counter()
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    whole = 1e3 * (time.perf_counter() - begun)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Sample(whole, whole, 1e3 * (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime))


def start(arguments: Sequence[str]) -> Sample:
    """One machine, from exec to its end."""
    reader, writer = os.pipe()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begun = time.perf_counter()
    process = subprocess.Popen([*VMM, *arguments, "--serial", f"fd={writer}"], pass_fds=(writer,))
    os.close(writer)
    came = os.read(reader, 1)
    first = 1e3 * (time.perf_counter() - begun)
    code = process.wait()
    whole = 1e3 * (time.perf_counter() - begun)
    os.close(reader)
    if came != b"!" or code:
        raise RuntimeError(f"the machine did not run: {came!r}, exit code {code}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Sample(first, whole, 1e3 * (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime))


def cases(kernel: Path, disk: Path) -> dict[str, list[str]]:
    """Command lines by name."""
    plain = ["--kernel", str(kernel), "--pvpanic", "off"]
    base = [*plain, "--memory", "256M"]

    def disks(count: int) -> list[str]:
        return [word for _ in range(count) for word in ("--disk", f"{disk},lock=off,readonly=on")]

    return {
        "1 vCPU, 256 MiB, no device": base,
        **{f"{count} vCPUs": [*base, "--cpus", str(count)] for count in (2, 4, 8, 16, 32, 64)},
        **{f"{count} disks": [*base, *disks(count)] for count in (1, 2, 4, 8, 16)},
        **{f"{count} GiB": [*plain, "--memory", f"{count}G"] for count in (1, 4, 16, 64, 256)},
    }


def measure(rounds: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        kernel = pvh_kernel.write(Path(directory, "kernel"))
        disk = Path(directory, "disk")
        with disk.open("wb") as file:
            file.truncate(1 << 20)
        wanted = cases(kernel, disk)
        taken: dict[str, list[Sample]] = {name: [] for name in ("python -I -S -c pass", *wanted)}
        for _ in range(rounds):  # interleaved: what else the host does hits all alike
            taken["python -I -S -c pass"].append(bare([sys.executable, "-I", "-S", "-c", "pass"]))
            for name, arguments in wanted.items():
                taken[name].append(start(arguments))
    peer = [sample.first for sample in taken["python -I -S -c pass"]]
    report = Report("exec to the guest's first instruction, ms, beside an interpreter that does nothing")
    report.below("1 vCPU, 256 MiB, no device", [s.first for s in taken["1 vCPU, 256 MiB, no device"]], "ms", 20, peer)
    report.show()
    print(f"\n  {'':28}{'first byte':>12}{'fastest':>10}{'ended':>10}{'CPU time':>10}  (ms, medians)")
    for name, samples in taken.items():
        first = [sample.first for sample in samples]
        middle = [statistics.median(getattr(sample, field) for sample in samples) for field in ("whole", "cpu")]
        print(f"  {name:28}{statistics.median(first):12.1f}{min(first):10.1f}{middle[0]:10.1f}{middle[1]:10.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    measure(options.rounds)


if __name__ == "__main__":
    main()
