"""Machines on virtual networks, in a network namespace: DHCP, the ports' walls, and who is counted on what."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from kvik.errors import KvikError
from kvik.host.process import find_program

from .conftest import AGENT, CONSOLE, Kvikd, until
from .test_bridge import qemu_of

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(
        find_program("ip") is None or not Path("/dev/net/tun").exists(), reason="needs iproute2 and tun"
    ),
    pytest.mark.skipif(find_program("dnsmasq") is None, reason="needs dnsmasq (apt install dnsmasq-base)"),
]
NAMESPACE = "mount -t sysfs sysfs /sys && ip link set lo up && ip link add br0 type bridge && ip link set br0 up"
NETWORKS = {
    "default": "<forward mode='nat'/><bridge name='virbr0'/><ip address='192.168.122.1' prefix='24'><dhcp>"
    "<range start='192.168.122.2' end='192.168.122.254'/>"
    "<host mac='52:54:00:00:00:21' name='first' ip='192.168.122.21'/></dhcp></ip>",
    "apart": "<bridge name='virbr1'/><mtu size='1400'/><port isolated='yes'/><ip address='192.168.150.1' prefix='24'/>",
    "lan": "<forward mode='bridge'/><bridge name='br0'/>",
    "idle": "<bridge name='virbr9'/>",
}
UUID = "8f49b9c4-0b3a-4f64-8a4f-0d8e6e1b7a5{}"


def card(network: str, number: int = 0x21, inside: str = "", portgroup: str = "") -> str:
    group = f" portgroup='{portgroup}'" if portgroup else ""
    return (
        f"<interface type='network'><source network='{network}'{group}/><mac address='52:54:00:00:00:{number:02x}'/>"
        f"<model type='virtio'/>{inside}</interface>"
    )


class NetworkedKvikd(Kvikd):
    """With networks that are there before its first start; all but `idle` are started by it."""

    networks: ClassVar = NETWORKS

    def start(self) -> None:
        directory = self.paths.networks
        if not directory.exists():
            (directory / "autostart").mkdir(parents=True)
            for number, (name, inside) in enumerate(self.networks.items()):
                path = directory / f"{name}.xml"
                path.write_text(f"<network><name>{name}</name><uuid>{UUID.format(number)}</uuid>{inside}</network>\n")
                if name != "idle":
                    (directory / "autostart" / path.name).symlink_to(path)
        super().start()


@pytest.fixture(scope="module")
def kvikd() -> Iterator[Kvikd]:
    daemon = NetworkedKvikd("unshare", "--mount", "--net", "sh", "-c", f'{NAMESPACE}; exec "$@"', "sh")
    try:
        yield daemon
    finally:
        for domain in daemon.connection.domains(1):
            domain.destroy()
        for name in daemon.virsh("net-list", "--name").stdout.split():
            assert daemon.virsh("net-destroy", name).returncode == 0
        assert daemon.end() == 0
        shutil.rmtree(daemon.root, ignore_errors=True)


def inside(kvikd: Kvikd, *command: str) -> str:
    enter = ["nsenter", "-t", str(kvikd.process.pid), "-m", "-n"]
    return subprocess.run([*enter, *command], capture_output=True, text=True, check=True).stdout


def ports(kvikd: Kvikd, bridge: str) -> str:
    return inside(kvikd, "ip", "-d", "-o", "link", "show", "master", bridge)


def test_a_machine_gets_an_address_from_its_network(make: Any, kvikd: Kvikd) -> None:
    domain = make("first", CONSOLE + AGENT + card("default"))
    domain.start()
    xml = domain.xml()
    assert "<source network='default' portid='" in xml and "bridge='virbr0'" in xml
    assert "portid" not in domain.xml(2) and "virbr0" not in domain.xml(2)
    assert "vnet" in ports(kvikd, "virbr0")
    found = domain.wait_ready(60)
    assert found.ready, found
    assert "192.168.122.21" in domain.exec(["/bin/ip", "addr"]).stdout.decode()
    assert domain.exec(["/bin/ping", "-c", "1", "-W", "5", "192.168.122.1"]).exitcode == 0
    domain.destroy()
    until(lambda: ports(kvikd, "virbr0") == "")


def test_ports_of_an_isolated_network_are_isolated_before_they_are_up(make: Any, kvikd: Kvikd) -> None:
    domain = make("alone", CONSOLE + card("apart", 0x22) + card("default", 0x23, "<port isolated='yes'/>"))
    domain.start()
    assert "isolated on" in ports(kvikd, "virbr1")
    assert "isolated on" in ports(kvikd, "virbr0")


def test_a_network_may_be_a_bridge_of_the_host(make: Any, kvikd: Kvikd) -> None:
    domain = make("office", CONSOLE + card("lan", 0x24))
    domain.start()
    line = ports(kvikd, "br0")
    assert "fe:54:00:00:00:24" in line and "isolated off" in line
    assert "bridge='br0'" in domain.xml()


def test_what_cannot_be_had_is_refused_and_leaves_nothing(make: Any, kvikd: Kvikd) -> None:
    before = ports(kvikd, "virbr0") + ports(kvikd, "br0")
    for number, (device, words) in enumerate(
        [
            (card("none"), "none"),
            (card("idle"), "network 'idle' is not active; start it: kvik net-start idle"),
            (card("default", portgroup="gold"), "no portgroup 'gold'"),
            (card("apart", 0x25, "<mtu size='9000'/>"), "MTU of 9000 on network 'apart'"),
        ]
    ):
        domain = make(f"refused-{number}", CONSOLE + card("default", 0x26) + device)
        with pytest.raises(KvikError, match=words):
            domain.start()
        assert ports(kvikd, "virbr0") + ports(kvikd, "br0") == before


def test_an_interface_is_plugged_into_a_network_and_out_of_it(make: Any, kvikd: Kvikd) -> None:
    domain = make.ready("plugs")
    domain.attach_device(card("default", 0x27), 1)
    assert "fe:54:00:00:00:27" in ports(kvikd, "virbr0")
    assert "portid" in domain.xml()
    domain.detach_device(card("default", 0x27), 1)
    until(lambda: "fe:54:00:00:00:27" not in ports(kvikd, "virbr0"))
    with pytest.raises(KvikError, match="not active"):
        domain.attach_device(card("idle", 0x27), 1)
    domain.attach_device(card("default", 0x27), 1)


def connections(kvikd: Kvikd, network: str) -> str:
    return kvikd.virsh("net-dumpxml", network).stdout.splitlines()[0]


def test_a_network_counts_its_machines_also_after_the_daemon_was_killed(make: Any, kvikd: Kvikd) -> None:
    assert connections(kvikd, "default") == "<network>"
    domain = make("counted", CONSOLE + card("default", 0x28) + card("default", 0x29))
    domain.start()
    assert connections(kvikd, "default") == "<network connections='2'>"
    enter = ("nsenter", "-t", str(qemu_of("counted")), "-m", "-n")
    assert kvikd.end(signal.SIGKILL) == -signal.SIGKILL
    kvikd.prefix = enter
    kvikd.start()
    assert connections(kvikd, "default") == "<network connections='2'>"
    kvikd.connection.lookup_name("counted").destroy()
    until(lambda: connections(kvikd, "default") == "<network>")


def test_machines_are_on_a_network_again_when_it_was_stopped_and_started(make: Any, kvikd: Kvikd) -> None:
    domain = make.ready("stays", CONSOLE + AGENT + card("default", 0x2A))
    assert kvikd.virsh("net-destroy", "default").returncode == 0
    assert "virbr0" not in inside(kvikd, "ip", "-o", "link")
    assert kvikd.virsh("net-start", "default").returncode == 0
    until(lambda: "fe:54:00:00:00:2a" in ports(kvikd, "virbr0"))
    assert connections(kvikd, "default") == "<network connections='1'>"
    # A bridge with STP forwards nothing from a new port for some seconds.
    until(lambda: domain.exec(["/bin/ping", "-c", "1", "-W", "1", "192.168.122.1"]).exitcode == 0)
