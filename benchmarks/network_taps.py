"""Taps on bridges: what a machine's attachment costs on the host, whether the 200th costs more than the first, and what
a client waits for while 200 are there. Beside `ip`, and beside libvirtd and virsh. Needs root and QEMU.

    PYTHONPATH=src python benchmarks/network_taps.py [--taps 200] [--machines 8] [--alone]

`--alone`: only kvik's own taps beside `ip`, without daemons.
"""

from __future__ import annotations

import argparse
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack

import network_guests as guests
import peer
import wire
from report import Report

from kvik.conf.devices.common import Alias
from kvik.conf.devices.interface import Interface, Mac
from kvik.host.bridge import create_bridge
from kvik.host.namespace import Namespace
from kvik.host.netlink import Netlink
from kvik.network.attachment import Attachment
from kvik.network.taps import open_taps

FEW = 20
QUICK_MS = 5  # nobody notices
CARDS = 25  # of one machine: what a `pc` has slots for
ATTACHED = 2  # of the last machine's cards come while it runs
DOMAIN_ATTACH_DEVICE, DOMAIN_INTERFACE_STATS, LIST_ALL_NETWORKS, DOMAIN_INTERFACE_ADDRESSES = 8, 65, 283, 353

MACHINE = """<domain type='qemu'>
  <name>{name}</name>
  <memory unit='MiB'>32</memory>
  <vcpu>1</vcpu>
  <os><type arch='x86_64' machine='pc'>hvm</type></os>
  <features><acpi/></features>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
    {cards}
  </devices>
</domain>"""
CARD = """<interface type='network'><mac address='{mac}'/><source network='bench'/>
  <model type='virtio'/><rom enabled='no'/></interface>"""


def mac(machine: int, card: int) -> str:
    return f"52:54:00:0a:{machine:02x}:{card:02x}"


def taken(work: Callable[[], object]) -> float:
    """Milliseconds."""
    start = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - start)


def host_side(taps: int) -> Report:
    """In a namespace: kvik's taps on one bridge, as machines get them, and those of `ip` on another, in turns."""
    ours: list[float] = []
    theirs: list[float] = []
    with Netlink() as netlink, ExitStack() as close:
        for bridge in ("br0", "br1"):
            create_bridge(netlink, bridge, up=True, stp=False, forward_delay=0)
        attachment = Attachment(kind="bridge", device="br0")
        for number in range(taps):
            interface = Interface(type="bridge", mac=Mac(address=mac(number >> 8, number & 255)), alias=Alias(name="n"))
            ours.append(taken(lambda one=interface: open_taps([one], close, {"n": attachment})))
            made, joined = f"ip tuntap add t{number} mode tap vnet_hdr", f"ip link set t{number} master br1 up"
            theirs.append(
                taken(lambda a=made, b=joined: [subprocess.run(words.split(), check=True) for words in (a, b)])
            )
    report = Report(f"a tap on a bridge, {taps} times, medians")
    report.below(f"the first {FEW}", ours[:FEW], "ms", 5, theirs[:FEW])
    report.below(f"the last {FEW}", ours[-FEW:], "ms", 5, theirs[-FEW:])
    report.within(f"the last {FEW} (peer: the first)", ours[-FEW:], ours[:FEW], "ms", 2)
    report.told("longest", [max(ours)], [max(theirs)], "ms")
    return report


class Side:
    """A daemon with its machines; calls go over libvirt's wire, so that only the server is measured."""

    def __init__(self, daemon: peer.Daemon, machines: int, close: ExitStack) -> None:
        self.daemon = daemon
        self.machines = machines
        close.enter_context(guests.network(daemon))
        self.client = wire.WireClient(daemon.socket)
        close.callback(self.client.close)
        self.handles: list[bytes] = []
        self.devices: list[str] = []
        self.close = close

    def start(self, number: int) -> None:
        name = f"m{number}"
        last = number == self.machines - 1
        cards = "".join(CARD.format(mac=mac(number, card)) for card in range(CARDS - (ATTACHED if last else 0)))
        with tempfile.NamedTemporaryFile("w", suffix=".xml") as file:
            file.write(MACHINE.format(name=name, cards=cards))
            file.flush()
            self.daemon.run("create", file.name)
        self.close.callback(self.daemon.run, "destroy", name, check=False)
        self.handles.append(self.client.lookup(name))
        self.devices = [line.split()[0] for line in self.daemon.run("domiflist", name).splitlines()[2:] if line]

    def attach(self, card: int) -> float:
        device = wire.xdr_string(CARD.format(mac=mac(self.machines - 1, card)))
        return taken(lambda: self.client.call(DOMAIN_ATTACH_DEVICE, self.handles[-1] + device))

    def ask(self, what: str) -> float:
        device = wire.xdr_string(self.devices[0])
        questions = {
            "net-list": (LIST_ALL_NETWORKS, struct.pack(">iI", 1, 0)),
            "domiflist (the document)": (wire.DOMAIN_GET_XML_DESC, self.handles[-1] + struct.pack(">I", 0)),
            "domifstat": (DOMAIN_INTERFACE_STATS, self.handles[-1] + device),
            "domifaddr (leases)": (DOMAIN_INTERFACE_ADDRESSES, self.handles[-1] + struct.pack(">II", 0, 0)),
            "domifaddr (arp)": (DOMAIN_INTERFACE_ADDRESSES, self.handles[-1] + struct.pack(">II", 2, 0)),
        }
        return taken(lambda: self.client.call(*questions[what]))


QUESTIONS = ("net-list", "domiflist (the document)", "domifstat", "domifaddr (leases)", "domifaddr (arp)")


def of_daemons(machines: int, rounds: int) -> Report:
    report = Report(f"{machines} machines with {CARDS} cards each on one network, calls over the wire, medians")
    few: dict[str, list[float]] = {}
    with ExitStack() as close:
        kvikd = close.enter_context(peer.kvikd(own_network=True))
        libvirtd = close.enter_context(peer.libvirtd())
        sides = [Side(kvikd, machines, close), Side(libvirtd, machines, close)]
        samples: dict[str, list[list[float]]] = {what: [[], []] for what in (*QUESTIONS, "attach")}
        for number in range(machines):
            for side in sides:
                side.start(number)
            if not number:
                for what in QUESTIONS:
                    few[what] = [sides[0].ask(what) for _ in range(rounds)]
        for card in range(CARDS - ATTACHED, CARDS):
            for side, found in zip(sides, samples["attach"], strict=True):
                found.append(side.attach(card))
        for _ in range(rounds):
            for what in QUESTIONS:
                for side, found in zip(sides, samples[what], strict=True):
                    found.append(side.ask(what))
        report.told("attach-interface, QEMU's part with it", *samples["attach"], "ms")
        for what in QUESTIONS:
            ours, theirs = samples[what]
            report.below(what, ours, "ms", QUICK_MS, theirs)
            report.told(f"{what} (peer: ours with {CARDS} taps)", ours, few[what], "ms")
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--taps", type=int, default=200)
    parser.add_argument("--machines", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--alone", action="store_true")
    options = parser.parse_args()
    guests.need_root()
    with Namespace() as namespace:
        namespace.run(lambda: host_side(options.taps)).show()
    if not options.alone:
        of_daemons(options.machines, options.rounds).show()


if __name__ == "__main__":
    main()
