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
from .processes import qemu_of

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
    "shared": "<bridge name='virbr2'/><bandwidth><inbound average='1000' peak='2000'/></bandwidth>"
    "<ip address='192.168.151.1' prefix='24'/>",
    "fixed": "<bridge name='virbr3' stp='off' macTableManager='libvirt'/><ip address='192.168.152.1' prefix='24'><dhcp>"
    "<range start='192.168.152.2' end='192.168.152.254'/></dhcp></ip>",
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
    enter = ("nsenter", "-t", str(qemu_of(domain)), "-m", "-n")
    taps = [f"fe:54:00:00:00:{number:02x}" for number in (0x28, 0x29)]
    lines = [line for line in ports(kvikd, "virbr0").splitlines() if any(mac in line for mac in taps)]
    names = [line.split(":")[1].strip() for line in lines]
    assert kvikd.end(signal.SIGKILL) == -signal.SIGKILL
    # As if it was killed amid a move: one is on another bridge, one on none.
    for name, words in zip(names, (["master", "br0"], ["nomaster", "down"]), strict=True):
        subprocess.run([*enter, "ip", "link", "set", name, *words], check=True)
    kvikd.prefix = enter
    kvikd.start()
    assert connections(kvikd, "default") == "<network connections='2'>"
    assert all(mac in ports(kvikd, "virbr0") for mac in taps)
    assert kvikd.messages().count("where it belongs") == 2
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


def walls(kvikd: Kvikd) -> set[tuple[str, str, bool]]:
    """Of the ports of machines: bridge, address, isolation."""
    lines = [(bridge, line) for bridge in ("virbr0", "br0") for line in ports(kvikd, bridge).splitlines()]
    return {
        (bridge, line.split("link/ether ")[1].split()[0], "isolated on" in line)
        for bridge, line in lines
        if "vnet" in line
    }


def rates(kvikd: Kvikd, tap: str) -> str:
    return inside(kvikd, "tc", "class", "show", "dev", tap)


def test_domiftune_says_and_sets_bandwidth_as_virsh_does(make: Any, kvikd: Kvikd) -> None:
    mac = "52:54:00:00:00:31"
    bandwidth = "<bandwidth><inbound average='1000' peak='2000' burst='64'/></bandwidth>"
    domain = make("tuned", CONSOLE + card("default", 0x31, bandwidth))
    domain.start()
    (tap,) = [line.split()[0] for line in kvikd.virsh("-q", "domiflist", "tuned").stdout.splitlines() if mac in line]
    assert "rate 8Mbit ceil 16Mbit" in rates(kvikd, tap)
    for words in (
        ("domiftune", "tuned", tap),
        ("domiftune", "tuned", tap, "--inbound", "500,900", "--live"),
        ("domiftune", "tuned", mac, "--inbound", "700", "--outbound", "300,0,20", "--config"),
        ("domiftune", "tuned", mac, "--config"),
        ("domiftune", "tuned", tap, "--live"),
        ("domiftune", "tuned", tap, "--inbound", "0", "--live", "--config"),
        ("domiftune", "tuned", mac, "--config"),
        ("domiftune", "tuned", tap),
        ("domiftune", "tuned", "nope"),
        ("domiftune", "tuned", tap, "--inbound", "1,x"),
        ("domiftune", "tuned", tap, "--inbound", "0,5"),
        ("domiftune", "tuned", tap, "--outbound", "0,5"),
        ("domiftune", "tuned", tap, "--outbound", "5,5,5,5"),
        ("domiftune", "tuned", tap, "--inbound", "1,2,3,4,5"),
        ("domiftune", "tuned", tap, "--live", "--current"),
    ):
        theirs, ours = kvikd.virsh(*words), kvikd.kvik(*words)
        assert (ours.returncode, ours.stdout.split()) == (theirs.returncode, theirs.stdout.split()), words
        said = [line for line in theirs.stderr.splitlines() if "'nope'" not in line]
        assert all(line in ours.stderr for line in said), (words, ours.stderr, theirs.stderr)
        if words[2:] == (tap, "--inbound", "500,900", "--live"):
            assert "rate 4Mbit ceil 7200Kbit" in rates(kvikd, tap)
    assert rates(kvikd, tap) == ""
    assert "<outbound average='300' burst='20'/>" in domain.xml(2) and "<bandwidth>" not in domain.xml()


def test_a_running_interface_moves_and_its_walls_and_link_change(make: Any, kvikd: Kvikd) -> None:
    domain = make("moves", CONSOLE + card("default", 0x32) + card("apart", 0x33))
    domain.start()
    mac = "fe:54:00:00:00:32"

    def change(inner: str, network: str = "default", number: int = 0x32) -> None:
        domain.update_device(card(network, number, inner), 1)

    change("<port isolated='yes'/><bandwidth><outbound average='400'/></bandwidth>")
    assert "isolated on" in next(line for line in ports(kvikd, "virbr0").splitlines() if mac in line)
    assert "<outbound average='400'/>" in domain.xml()
    change("<link state='down'/>")
    assert "isolated off" in next(line for line in ports(kvikd, "virbr0").splitlines() if mac in line)
    assert "<link state='down'/>" in domain.xml() and "<bandwidth>" not in domain.xml()
    # Onto a bridge of the host, by a network and by its own name; there the network counts it, here no more.
    before = int(connections(kvikd, "default").partition("connections='")[2].split("'")[0])
    change("", "lan")
    assert mac in ports(kvikd, "br0") and mac not in ports(kvikd, "virbr0")
    assert connections(kvikd, "lan") == "<network connections='1'>"
    assert connections(kvikd, "default") == (f"<network connections='{before - 1}'>" if before > 1 else "<network>")
    assert "<source network='lan' portid='" in domain.xml() and "bridge='br0'" in domain.xml()
    # As libvirt has it: the bridge is not the network's own. Whoever sends that back has changed nothing.
    rows = {row.split()[4][-2:]: row.split()[1:3] for row in kvikd.kvik("-q", "domiflist", "moves").stdout.splitlines()}
    assert rows == {"32": ["bridge", "lan"], "33": ["network", "apart"]}
    assert kvikd.virsh("domif-setlink", "moves", "52:54:00:00:00:32", "down").returncode == 0
    shown = next(one for one in domain.xml().split("</interface>") if ":32'" in one).partition("<interface ")[2]
    assert shown.startswith("type='bridge'") and "<link state='down'/>" in shown
    domain.update_device(f"<interface {shown}</interface>", 1)
    assert connections(kvikd, "lan") == "<network connections='1'>"
    assert "<interface type='network'>" in domain.xml(2) and "<interface type='bridge'>" not in domain.xml(2)
    change("", "default")
    domain.update_device(
        "<interface type='bridge'><source bridge='br0'/><mac address='52:54:00:00:00:32'/></interface>", 1
    )
    assert mac in ports(kvikd, "br0") and connections(kvikd, "lan") == "<network>"
    domain.update_device(card("default", 0x32), 1)
    state = walls(kvikd)
    for device, words in (
        (card("default", 0x32, "<mtu size='1300'/>"), "the MTU of interface net0 cannot change"),
        (card("default", 0x32, "<driver queues='3'/>"), "the <driver> of interface net0 cannot change"),
        (card("default", 0x32).replace("virtio", "e1000e"), "the model of interface net0 cannot change"),
        (card("idle", 0x32), "not active"),
        (card("default", 0x32, "<vlan><tag id='5'/></vlan>"), "VLAN"),
        ("<interface type='user'><mac address='52:54:00:00:00:32'/></interface>", "the type of interface net0 cannot"),
        ("<interface type='bridge'><source bridge='lo'/><mac address='52:54:00:00:00:32'/></interface>", "no bridge"),
        (
            "<interface type='network'><source network='default'/><mac address='52:54:00:00:00:32'/>"
            "<virtualport type='openvswitch'/></interface>",
            "from a port of kind bridge to one of kind openvswitch",
        ),
    ):
        with pytest.raises(KvikError, match=words):
            domain.update_device(device, 1)
        assert walls(kvikd) == state, device
    domain.destroy()


def floored(number: int, floor: int, network: str = "shared") -> str:
    return card(network, number, f"<bandwidth><inbound floor='{floor}'/></bandwidth>")


def promised(kvikd: Kvikd) -> dict[str, str]:
    """Class -> rate, of the network's bridge."""
    found = {}
    for line in rates(kvikd, "virbr2").splitlines():
        words = line.split()
        found[words[2]] = words[words.index("rate") + 1]
    return found


def test_a_part_of_a_networks_bandwidth_is_promised_kept_and_given_back(make: Any, kvikd: Kvikd) -> None:
    free = {"1:1": "8Mbit", "1:2": "8Mbit"}
    assert promised(kvikd) == free
    domain = make("promised", CONSOLE + floored(0x41, 300) + floored(0x42, 200))
    domain.start()
    with_two = {"1:1": "8Mbit", "1:2": "4Mbit", "1:3": "2400Kbit", "1:4": "1600Kbit"}
    assert promised(kvikd) == with_two
    status = (kvikd.paths.run / "network/shared.xml").read_text()
    assert "<class_id bitmap='0-4'/>" in status and "<floor sum='500'/>" in status
    greedy = make("greedy", CONSOLE + floored(0x43, 1501))
    with pytest.raises(KvikError, match=r"cannot promise 1501 kB/s to .*:43: of its 2000 kB/s, 500 are promised"):
        greedy.start()
    with pytest.raises(KvikError, match="network 'default' has no inbound bandwidth of its own"):
        make("floorless", CONSOLE + floored(0x44, 10, "default")).start()
    with pytest.raises(KvikError, match="network 'lan' has a bridge or device that is not its own"):
        make("elsewhere", CONSOLE + floored(0x44, 10, "lan")).start()
    until(lambda: promised(kvikd) == with_two)

    # Plugged, changed, unplugged; a daemon that comes back knows whose each class is.
    domain.attach_device(floored(0x45, 100), 1)
    assert promised(kvikd)["1:5"] == "800Kbit" and promised(kvikd)["1:2"] == "3200Kbit"
    domain.set_interface_parameters("52:54:00:00:00:41", {"inbound.average": 0, "inbound.floor": 400}, 1)
    assert promised(kvikd)["1:3"] == "3200Kbit"
    with pytest.raises(KvikError, match="cannot promise"):
        domain.set_interface_parameters("52:54:00:00:00:41", {"inbound.average": 0, "inbound.floor": 1701}, 1)
    before = promised(kvikd)
    enter = ("nsenter", "-t", str(qemu_of(domain)), "-m", "-n")
    assert kvikd.end(signal.SIGKILL) == -signal.SIGKILL
    kvikd.prefix = enter
    kvikd.start()
    assert promised(kvikd) == before
    domain = kvikd.connection.lookup_name("promised")
    assert kvikd.virsh("net-destroy", "shared").returncode == 0, kvikd.messages()
    assert kvikd.virsh("net-start", "shared").returncode == 0
    until(lambda: sorted(promised(kvikd).values()) == sorted(before.values()))
    domain.set_interface_parameters("52:54:00:00:00:41", {"inbound.average": 50}, 1)
    assert len(promised(kvikd)) == len(before) - 1
    # The daemon and then the machine are killed.
    holder = subprocess.Popen([*enter, "sleep", "60"])
    kvikd.prefix = ("nsenter", "-t", str(holder.pid), "-m", "-n")
    assert kvikd.end(signal.SIGKILL) == -signal.SIGKILL
    os.kill(qemu_of(domain), signal.SIGKILL)
    kvikd.start()
    holder.kill()
    holder.wait()
    until(lambda: promised(kvikd) == free)
    status = (kvikd.paths.run / "network/shared.xml").read_text()
    assert "<class_id bitmap='0-2'/>" in status and "<floor sum='0'/>" in status


def test_on_a_bridge_that_learns_nothing_each_interface_has_its_entry_and_frames_pass(make: Any, kvikd: Kvikd) -> None:
    domain = make.ready("known", CONSOLE + AGENT + card("fixed", 0x51))
    line = next(line for line in ports(kvikd, "virbr3").splitlines() if "fe:54:00:00:00:51" in line)
    assert " learning off flood off " in line

    def entries() -> list[str]:
        found = inside(kvikd, "bridge", "fdb", "show", "br", "virbr3").splitlines()
        return [entry for entry in found if entry.startswith("52:54:00:00:00:5") and "master virbr3" in entry]

    assert len(entries()) == 1 and entries()[0].endswith("static")
    assert domain.exec(["/bin/ping", "-c", "1", "-W", "5", "192.168.152.1"]).exitcode == 0
    # Who sends in another's name is not learned.
    domain.exec(["/bin/sh", "-c", "ip link set eth0 address 52:54:00:00:00:52; ping -c 1 -W 1 192.168.152.1"])
    assert len(entries()) == 1
    domain.destroy()
    until(lambda: entries() == [])
