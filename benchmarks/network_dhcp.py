"""From a link that comes up to an address by DHCP: kvik's network beside libvirt's, a user-space switch, real guests.

    PYTHONPATH=src python benchmarks/network_dhcp.py [--rounds 5] [--clients]

The client is a few lines here that hold a tap as a VMM does: it asks as soon as the tap is up, and again after 10 ms,
20 ms and so on up to a second. What is counted are milliseconds from there to the server's DHCPACK. Of a real guest, on
its tap: from its first DHCPDISCOVER to the offer, and from its DHCPREQUEST to the DHCPACK. `--clients`: no guests.
Needs root, QEMU, dnsmasq, libvirtd.
"""

from __future__ import annotations

import argparse
import os
import select
import socket
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import network_guests as guests
import peer
from report import Report

from kvik.host.edge_port import bring_up_at_once
from kvik.host.namespace import open_namespace, run_in_namespace
from kvik.host.netlink import Netlink
from kvik.host.tap import create_tap
from kvik.network.switch.control import Switch

LIMIT_MS = 50
AGAIN, AGAIN_MOST = 0.01, 1.0  # seconds
PATIENCE = 20.0
DISCOVER, OFFER, REQUEST, ACK = 1, 2, 3, 5  # RFC 2132, 9.6
VNET_HEADER = bytes(10)  # struct virtio_net_hdr: nothing asked of anybody
LIBVIRT_DEFAULT = "stp='on' delay='0'"
SWITCH = {
    "name": "bench", "mac": "52:54:00:00:00:01", "ip": "192.168.122.1", "prefix": 24,
    "ranges": [["192.168.122.2", "192.168.122.254"]], "router": False,
}  # fmt: skip


def message(mac: bytes, transaction: int, kind: int, options: bytes = b"") -> bytes:
    """An Ethernet frame of a client without an address (RFC 2131, 4.1)."""
    body = struct.pack("!BBBBIHH16x6s202x", 1, 1, 6, 0, transaction, 0, 0x8000, mac)
    body += b"\x63\x82\x53\x63" + bytes([53, 1, kind]) + options + b"\xff"
    body = body.ljust(300, b"\0")
    datagram = struct.pack("!HHHH", 68, 67, 8 + len(body), 0) + body
    header = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(datagram), 0, 0, 64, 17, 0, bytes(4), b"\xff" * 4)
    total = sum(struct.unpack("!10H", header))
    total = (total & 0xFFFF) + (total >> 16)
    header = header[:10] + struct.pack("!H", ~total & 0xFFFF) + header[12:]
    return b"\xff" * 6 + mac + b"\x08\x00" + header + datagram


def heard(frame: bytes) -> tuple[int, int, str, bytes] | None:
    """(DHCP message type, transaction, yiaddr, server identifier) of a frame between DHCP's ports, else None."""
    if frame[12:14] != b"\x08\x00" or len(frame) < 282 or frame[23] != 17:
        return None
    at = 14 + (frame[14] & 15) * 4
    ports = struct.unpack_from("!HH", frame, at)
    if set(ports) != {67, 68}:
        return None
    body = frame[at + 8 :]
    options, found = body[240:], {}
    while len(options) > 1 and options[0] != 255:
        if options[0] == 0:
            options = options[1:]
            continue
        found[options[0]] = options[2 : 2 + options[1]]
        options = options[2 + options[1] :]
    kind = found.get(53, b"\0")[0]
    return kind, struct.unpack_from("!I", body, 4)[0], socket.inet_ntoa(body[16:20]), found.get(54, b"")


def lease(
    fd: int, send: Callable[[bytes], object], receive: Callable[[], list[bytes]], mac: bytes
) -> tuple[float, int]:
    """Milliseconds until an address is ours, and how many DHCPDISCOVERs that took."""
    transaction = int.from_bytes(os.urandom(4), "big")
    start = time.perf_counter()
    asked, said, pause = 0, b"", AGAIN
    while (now := time.perf_counter()) < start + PATIENCE:
        if not said:
            send(message(mac, transaction, DISCOVER))
            asked += 1
        again, pause = now + pause, min(2 * pause, AGAIN_MOST)
        while (left := again - time.perf_counter()) > 0:
            if not select.select([fd], [], [], left)[0]:
                break
            for frame in receive():
                answer = heard(frame)
                if answer is None or answer[1] != transaction:
                    continue
                if answer[0] == OFFER and not said:
                    said = bytes([50, 4]) + socket.inet_aton(answer[2]) + bytes([54, 4]) + answer[3]
                    send(message(mac, transaction, REQUEST, said))
                elif answer[0] == ACK:
                    return 1e3 * (time.perf_counter() - start), asked
    raise RuntimeError(f"no address within {PATIENCE:g} s")


def on_bridge(pid: int, bridge: str, *, at_once: bool = False) -> tuple[float, int]:
    """In the network namespace of a daemon, with a tap that comes up as it begins: as kvik does it, if `at_once`."""

    def client() -> tuple[float, int]:
        mac = b"\x52\x54\x00" + os.urandom(3)
        tap = create_tap("", bridge=bridge, up=False, mac="fe" + mac.hex(":")[2:])
        try:
            with Netlink() as netlink:
                if at_once:
                    bring_up_at_once(netlink, tap.index, bridge)
                else:
                    netlink.set_link(tap.index, up=True)
            return lease(
                tap.fds[0],
                lambda frame: os.write(tap.fds[0], VNET_HEADER + frame),
                lambda: [os.read(tap.fds[0], 4096)[len(VNET_HEADER) :]],
                mac,
            )
        finally:
            tap.close()

    namespace = open_namespace(pid)
    try:
        return run_in_namespace(namespace, client)
    finally:
        os.close(namespace)


def on_switch(switch: Switch) -> tuple[float, int]:
    """With a card that is plugged in as it begins."""
    mac = b"\x52\x54\x00" + os.urandom(3)
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            number, _ = switch.add_port(f"m{mac.hex()}", mac.hex(":"), theirs.fileno())

        def receive() -> list[bytes]:
            data, frames = ours.recv(65536), []
            while len(data) > 4:
                size = struct.unpack_from(">I", data)[0]
                frames.append(data[4 : 4 + size])
                data = data[4 + size :]
            return frames

        found = lease(ours.fileno(), lambda frame: ours.sendall(struct.pack(">I", len(frame)) + frame), receive, mac)
        switch.remove_port(number)
    return found


class Ear:
    """Hears a machine's DHCP on its tap, until it is told its address."""

    def __init__(self, pid: int) -> None:
        namespace = open_namespace(pid)
        try:
            self.socket = run_in_namespace(
                namespace, lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0003))
            )
        finally:
            os.close(namespace)
        self.socket.settimeout(60)
        self.first: dict[int, float] = {}  # DHCP message type -> when it was first seen
        self.asked = 0
        self.thread = threading.Thread(target=self._listen, daemon=True)
        self.thread.start()

    def _listen(self) -> None:
        with self.socket:
            while ACK not in self.first:
                frame, address = self.socket.recvfrom(4096)
                now = time.perf_counter()
                answer = heard(frame) if address[0].startswith("vnet") else None
                if answer is not None:
                    self.first.setdefault(answer[0], now)
                    self.asked += answer[0] == DISCOVER

    def result(self) -> tuple[float, float, int]:
        """Milliseconds that the guest waited for answers, and in all; how often it asked."""
        self.thread.join(90)
        asked, offered, wanted, told = (self.first[kind] for kind in (DISCOVER, OFFER, REQUEST, ACK))
        return 1e3 * (offered - asked + told - wanted), 1e3 * (told - asked), self.asked


def by_guest(daemon: peer.Daemon, document: str) -> tuple[float, float, int]:
    ear = Ear(daemon.pid)
    with tempfile.NamedTemporaryFile("w", suffix=".xml") as file:
        file.write(document)
        file.flush()
        daemon.run("create", file.name)
    try:
        return ear.result()
    finally:
        daemon.run("destroy", "guest")


def measure(rounds: int, *, with_guests: bool) -> Report:
    report = Report(f"link up to address by DHCP, {rounds} interleaved rounds, medians; the peer is libvirt's default")
    clients: dict[str, Callable[[], tuple[float, int]]] = {}
    machines: dict[str, peer.Daemon] = {}
    samples: dict[str, list[float]] = {}
    asked: dict[str, int] = {}

    def keep(what: str, took: float, count: int) -> None:
        samples.setdefault(what, []).append(took)
        asked[what] = max(asked.get(what, 0), count)

    with ExitStack() as close:
        directory = Path(close.enter_context(tempfile.TemporaryDirectory(dir="/tmp")))
        directory.chmod(0o755)
        plain = close.enter_context(peer.kvikd(own_network=True))
        spanning = close.enter_context(peer.kvikd(own_network=True))
        libvirtd = close.enter_context(peer.libvirtd())
        for daemon, bridge in (
            (plain, "stp='off' delay='0'"),
            (spanning, LIBVIRT_DEFAULT),
            (libvirtd, LIBVIRT_DEFAULT),
        ):
            close.enter_context(guests.network(daemon, bridge))
        switch = Switch.start(directory / "switch", SWITCH)
        close.callback(switch.stop)
        clients["bridge without STP"] = lambda: on_bridge(plain.pid, "virbr0", at_once=True)
        clients["bridge with STP"] = lambda: on_bridge(spanning.pid, "virbr0", at_once=True)
        clients["switch in user space"] = lambda: on_switch(switch)
        clients["libvirt"] = lambda: on_bridge(libvirtd.pid, "virbr0")
        document = ""
        if with_guests:
            machines = {"bridge without STP": plain, "bridge with STP": spanning, "libvirt": libvirtd}
            load = guests.load_program()
            image = guests.Image(directory, load)
            document = image.document(
                "guest", guests.run_document.interface_xml("network", "<source network='bench'/>")
            )
            subprocess.run(["rm", "-rf", load.parent], check=True)
        for _ in range(rounds):
            for what, client in clients.items():
                keep(f"client, {what}", *client())
            for what, daemon in machines.items():
                waited, whole, count = by_guest(daemon, document)
                keep(f"guest, {what}", waited, count)
                keep(f"guest with its own part, {what}", whole, count)
    for what, found in samples.items():
        who, _, where = what.partition(", ")
        theirs = samples[f"{who}, libvirt"]
        if who.endswith("part") and where != "libvirt":
            report.told(what, found, theirs, "ms")
        elif where != "libvirt":
            report.below(
                f"{what} (asked {asked[what]}x, peer {asked[f'{who}, libvirt']}x)", found, "ms", LIMIT_MS, theirs
            )
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clients", action="store_true")
    options = parser.parse_args()
    guests.need_root()
    measure(options.rounds, with_guests=not options.clients).show()


if __name__ == "__main__":
    main()
