"""Throughput of two guests on kvik's bridge network beside the same two QEMUs with a bridge set up by hand.

    PYTHONPATH=src python benchmarks/network_throughput.py [--rounds 5] [--seconds 1.5]

One guest kernel, one initramfs, software emulation, one command line; all four guests run all the time, and one load at
a time: TCP from guest to guest, from a guest to its host and back, UDP round trips. Needs root, QEMU and gcc.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from contextlib import ExitStack
from pathlib import Path

import network_guests as guests
import peer
from report import Report

RESULT = re.compile(r"RESULT (\w+) ([\d.]+)")
LOADS = {
    "guest to guest, TCP": ("tx", "{other}", "MB/s"),
    "guest to guest, UDP round trips": ("rr", "{other}", "/s"),
    "guest to host, TCP": ("tx", guests.GATEWAY, "MB/s"),
    "host to guest, TCP": ("rx", guests.GATEWAY, "MB/s"),
    "guest and host, UDP round trips": ("rr", guests.GATEWAY, "/s"),
}
ADDRESSES = ("192.168.122.31", "192.168.122.32")


def settle(machines: list[guests.KvikMachine] | list[guests.HandMade]) -> None:
    """Addresses of our choice, and the second guest serves."""
    for machine, address in zip(machines, ADDRESSES, strict=True):
        guests.until(machine, "ip link show eth0", "LOWER_UP")
        machine.sh(f"killall udhcpc; ip addr flush dev eth0; ip addr add {address}/24 dev eth0")
    machines[1].sh("/load serve >/dev/null 2>&1 </dev/null &")
    guests.until(machines[0], f"ping -c 1 -W 1 {ADDRESSES[1]}", "1 packets received")
    guests.until(machines[0], f"ping -c 1 -W 1 {guests.GATEWAY}", "1 packets received")


def measure(rounds: int, seconds: float) -> Report:
    report = Report(
        f"kvik's network beside QEMU and a bridge by hand, {rounds} interleaved rounds of {seconds:g} s each, medians"
    )
    load = guests.load_program()
    with ExitStack() as close:
        directory = Path(close.enter_context(tempfile.TemporaryDirectory(dir="/tmp")))
        directory.chmod(0o755)
        image = guests.Image(directory, load)
        daemon = close.enter_context(peer.kvikd(own_network=True))
        ours_space = close.enter_context(guests.network(daemon))
        interface = guests.run_document.interface_xml("network", "<source network='bench'/>")
        ours = []
        for name in ("left", "right"):
            ours.append(guests.KvikMachine(daemon, name, image.document(name, interface)))
            close.callback(ours[-1].close)
        theirs_space = close.enter_context(
            guests.space("ip link add br0 up type bridge", f"ip addr add {guests.GATEWAY}/24 dev br0")
        )
        theirs = []
        for tap in ("tap0", "tap1"):
            argv = guests.by_hand(ours[0].qemu, image, directory, tap)
            theirs.append(guests.HandMade(theirs_space, argv, directory, tap))
            close.callback(theirs[-1].close)
        for machines, inside in ((ours, ours_space), (theirs, theirs_space)):
            settle(machines)
            close.enter_context(guests.serving(inside, load))
        samples: dict[str, dict[str, list[float]]] = {}
        for number in range(rounds):
            for what, (mode, target, unit) in LOADS.items():
                sides = [("ours", ours), ("theirs", theirs)]
                for side, machines in sides if number % 2 else reversed(sides):
                    said = machines[0].sh(f"/load {mode} {target.format(other=ADDRESSES[1])} {seconds}")
                    found = RESULT.search(said)
                    if found is None:
                        raise RuntimeError(f"{what}: {said}")
                    rate = float(found[2]) * (1e-6 if unit == "MB/s" else 1)
                    samples.setdefault(what, {}).setdefault(side, []).append(rate)
    subprocess.run(["rm", "-rf", load.parent], check=True)
    for what, (_, _, unit) in LOADS.items():
        report.more(what, samples[what]["ours"], samples[what]["theirs"], unit, 1)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.5)
    options = parser.parse_args()
    guests.need_root()
    measure(options.rounds, options.seconds).show()


if __name__ == "__main__":
    main()
