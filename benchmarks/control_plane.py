"""The daemon's calls beside libvirtd's, over the wire, interleaved in one run."""

from __future__ import annotations

import argparse
import struct
import time
import uuid
from collections.abc import Callable

import peer
import wire
from report import Report

DOCUMENT = """<domain type='qemu'>
  <name>{name}</name>
  <uuid>{uuid}</uuid>
  <memory unit='MiB'>256</memory>
  <vcpu>1</vcpu>
  <os><type arch='x86_64' machine='q35'>hvm</type></os>
  <features><acpi/><apic/></features>
  <clock offset='utc'/>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2'/>
      <source file='/var/lib/images/{name}.qcow2'/>
      <target dev='vda' bus='virtio'/>
    </disk>
    <interface type='user'><model type='virtio'/></interface>
    <serial type='pty'/>
    <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
    <rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>
  </devices>
</domain>"""

ALL = struct.pack(">iI", 1, 0)  # need_results, flags


def document(name: str) -> str:
    return DOCUMENT.format(name=name, uuid=uuid.uuid4())


def timed(call: Callable[..., object], *arguments: object) -> float:
    start = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - start


def measure(machines: int, rounds: int, seconds: float) -> Report:
    report = Report(f"control plane, {machines} defined machines, {rounds} interleaved rounds, medians")
    samples: dict[str, dict[str, list[float]]] = {}

    def keep(what: str, daemon: peer.Daemon, value: float) -> None:
        samples.setdefault(what, {}).setdefault(daemon.name, []).append(value)

    with peer.libvirtd() as libvirtd, peer.kvikd() as kvikd:
        daemons = (kvikd, libvirtd)
        clients = {daemon.name: wire.WireClient(daemon.socket) for daemon in daemons}
        crowds = {daemon.name: [wire.WireClient(daemon.socket) for _ in range(16)] for daemon in daemons}
        handles: dict[str, bytes] = {}
        batch = max(1, machines // rounds)
        for turn in range(rounds):
            for daemon in daemons:
                client = clients[daemon.name]
                documents = [document(f"bench-{turn}-{index}") for index in range(batch)]
                start = time.perf_counter()
                for text in documents:
                    handles[daemon.name] = client.define(text)
                keep("define", daemon, batch / (time.perf_counter() - start))
        for _ in range(rounds):
            for daemon in daemons:
                client, handle = clients[daemon.name], handles[daemon.name]
                keep("isActive", daemon, wire.rate(client, wire.DOMAIN_IS_ACTIVE, handle, seconds))
                keep(
                    "isActive16",
                    daemon,
                    wire.concurrent_rate(crowds[daemon.name], wire.DOMAIN_IS_ACTIVE, handle, seconds)[0],
                )
                xml = handle + struct.pack(">I", 0)
                keep("XMLDesc", daemon, wire.rate(client, wire.DOMAIN_GET_XML_DESC, xml, seconds))
                keep("list", daemon, 1e3 * timed(client.call, wire.LIST_ALL_DOMAINS, ALL))
                stats = struct.pack(">III", 0, 0, 0)  # all domains, all groups, no flags
                keep("stats", daemon, 1e3 * timed(client.call, wire.GET_ALL_DOMAIN_STATS, stats))
        for daemon in daemons:
            keep("rss", daemon, daemon.rss_mb())
        base = kvikd.socket.parent.parent.parent

        def pair(what: str) -> tuple[list[float], list[float]]:
            return samples[what]["kvikd"], samples[what]["libvirtd"]

        report.more("define (durable), one client", *pair("define"), "/s", 2)
        report.more("isActive, one client", *pair("isActive"), "/s", 1.2)
        report.more("isActive, 16 clients", *pair("isActive16"), "/s", 2)
        report.more("XMLDesc", *pair("XMLDesc"), "/s", 1.5)
        report.faster("listAllDomains", *pair("list"), "ms", 2)
        report.faster("getAllDomainStats", *pair("stats"), "ms", 2)
        report.below("resident memory", samples["rss"]["kvikd"], "MB", 60, samples["rss"]["libvirtd"])
        for crowd in crowds.values():
            for client in crowd:
                client.close()
        for client in clients.values():
            client.close()
        ready = []
        peer.stop_daemon(kvikd)
        for _ in range(3):
            start = time.perf_counter()
            with peer.kvikd(base=base):
                ready.append(time.perf_counter() - start)
        report.below(f"daemon ready again with {machines} machines", ready, "s", 1)
    return report


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--machines", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="length of one rate measurement")
    options = parser.parse_args()
    measure(options.machines, options.rounds, options.seconds).show()
