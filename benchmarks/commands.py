"""Whole commands beside virsh: list, start, destroy and --version, interleaved in one run."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import peer
import wire
from control_plane import DOCUMENT, document
from report import Report


def timed(command: list[str], environ: dict[str, str]) -> float:
    """Milliseconds of wall time of one command, which must succeed."""
    start = time.perf_counter()
    subprocess.run(command, env=environ, check=True, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
    return 1e3 * (time.perf_counter() - start)


def bootable(name: str, disk: Path) -> str:
    """The document of `control_plane`, with a disk that exists."""
    return document(name).replace(f"/var/lib/images/{name}.qcow2", str(disk))


def measure(rounds: int, defined: int) -> Report:
    assert "{name}.qcow2" in DOCUMENT
    report = Report(f"whole commands, {rounds} interleaved rounds, medians")
    samples: dict[str, dict[str, list[float]]] = {}

    with tempfile.TemporaryDirectory(dir="/tmp") as directory, peer.libvirtd() as libvirtd, peer.kvikd() as kvikd:
        daemons = (kvikd, libvirtd)
        for daemon in daemons:
            disk = Path(directory) / f"{daemon.name}.qcow2"
            subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(disk), "64M"], check=True)
            file = Path(directory) / f"{daemon.name}.xml"
            file.write_text(bootable("bench", disk))
            daemon.run("define", str(file))

        def keep(what: str, daemon: peer.Daemon, *arguments: str) -> None:
            samples.setdefault(what, {}).setdefault(daemon.name, []).append(
                timed([*daemon.command, *arguments], daemon.environ)
            )

        for daemon in daemons:  # once unmeasured: both probe QEMU on the first start
            daemon.run("start", "bench")
            daemon.run("destroy", "bench")
        for _ in range(rounds):
            for daemon in daemons:
                keep("start", daemon, "start", "bench")
                keep("destroy", daemon, "destroy", "bench")
                keep("list", daemon, "list", "--all")
        for _ in range(2 * rounds):
            for daemon in daemons:
                samples.setdefault("version", {}).setdefault(daemon.name, []).append(
                    timed([daemon.command[0], *daemon.command[1:-2], "--version"], daemon.environ)
                )
        for daemon in daemons:
            client = wire.WireClient(daemon.socket)
            for index in range(defined):
                client.define(document(f"list-{index}"))
            client.close()
        for _ in range(rounds):
            for daemon in daemons:
                keep("list-many", daemon, "list", "--all")

        def pair(what: str) -> tuple[list[float], list[float]]:
            return samples[what]["kvikd"], samples[what]["libvirtd"]

        report.faster("start to machine running", *pair("start"), "ms", 2.5)
        report.faster("destroy", *pair("destroy"), "ms", 5)
        ours, theirs = pair("list")
        report.below("list", ours, "ms", 40, theirs)
        ours, theirs = pair("version")
        report.below("--version", ours, "ms", 25, theirs)
        report.faster(f"list --all of {defined}", *pair("list-many"), "ms", 2)
    return report


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--defined", type=int, default=1000)
    options = parser.parse_args()
    measure(options.rounds, options.defined).show()
    sys.exit(0)
