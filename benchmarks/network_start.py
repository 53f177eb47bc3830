"""net-start and net-destroy of a NAT network beside virsh and libvirtd, interleaved; each daemon in a network namespace
of its own, with the same document: bridge, packet filter, dnsmasq."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import peer
from commands import timed
from report import Report

DOCUMENT = """<network>
  <name>bench</name>
  <forward mode='nat'/>
  <bridge name='virbr0' stp='on' delay='0'/>
  <ip address='192.168.122.1' netmask='255.255.255.0'>
    <dhcp><range start='192.168.122.2' end='192.168.122.254'/></dhcp>
  </ip>
</network>"""


def measure(rounds: int) -> Report:
    report = Report(f"NAT network, whole commands, {rounds} interleaved rounds, medians")
    samples: dict[str, dict[str, list[float]]] = {}
    with (
        tempfile.TemporaryDirectory(dir="/tmp") as directory,
        peer.libvirtd() as libvirtd,
        peer.kvikd(own_network=True) as kvikd,
    ):
        file = Path(directory) / "bench.xml"
        file.write_text(DOCUMENT)
        for daemon in (kvikd, libvirtd):
            daemon.run("net-list", "--all")
            existing = daemon.run("net-list", "--all", "--name").split()
            if "default" in existing:  # would hold the subnet
                daemon.run("net-destroy", "default", check=False)
            daemon.run("net-define", str(file))
            daemon.run("net-start", "bench")  # once unmeasured
            daemon.run("net-destroy", "bench")
        for _ in range(rounds):
            for daemon in (kvikd, libvirtd):
                for verb in ("net-start", "net-destroy"):
                    took = timed([*daemon.command, verb, "bench"], daemon.environ)
                    samples.setdefault(verb, {}).setdefault(daemon.name, []).append(took)
    for verb, by in samples.items():
        report.faster(verb, by["kvikd"], by["libvirtd"], "ms", 2)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    measure(parser.parse_args().rounds).show()


if __name__ == "__main__":
    main()
