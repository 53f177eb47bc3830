"""All benchmarks in one run: what was measured where, then one table for each."""

from __future__ import annotations

import argparse
import os
import platform
import subprocess

import boot
import commands
import control_plane


def version(*command: str) -> str:
    """The first line of what a program says of itself."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.partition("\n")[0]


def machine() -> str:
    """The host in a line: figures from another one are comparable as ratios only."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    parts = [
        f"{os.cpu_count()} CPUs",
        f"{pages / 2**30:.0f} GiB",
        f"Linux {platform.release()}",
        f"Python {platform.python_version()}",
        version("qemu-system-x86_64", "--version"),
        version("libvirtd", "--version"),
        f"load at the start {load}",
    ]
    return "; ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few rounds: a look, not a result")
    quick = parser.parse_args().quick
    print(machine(), flush=True)
    control_plane.measure(1000, 5, 0.3 if quick else 1.0).show()
    commands.measure(4 if quick else 15, 200 if quick else 1000).show()
    boot.measure(2 if quick else 7).show()


if __name__ == "__main__":
    main()
