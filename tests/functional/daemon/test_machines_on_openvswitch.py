"""Machines on Open vSwitch, in a network namespace with a switch of its own (userspace datapath)."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvik.client.domain import Domain
from kvik.errors import KvikError
from kvik.host.process import find_program

from .conftest import AGENT, CONSOLE, Kvikd, until
from .processes import qemu_of
from .test_machines_on_networks import card, inside

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(
        find_program("ip") is None or not Path("/dev/net/tun").exists(), reason="needs iproute2 and tun"
    ),
    pytest.mark.skipif(
        find_program("ovs-vswitchd") is None, reason="needs Open vSwitch (apt install openvswitch-switch)"
    ),
]
RUN = "/run/openvswitch"
SERVERS = ("ovs-vswitchd", "ovsdb-server")
NAMESPACE = f"""set -e
mount -t sysfs sysfs /sys
ip link set lo up
mkdir -p {RUN}
mount -t tmpfs tmpfs {RUN}
ovsdb-tool create {RUN}/conf.db /usr/share/openvswitch/vswitch.ovsschema
options="--detach --no-chdir --log-file={RUN}/log"
ovsdb-server {RUN}/conf.db --remote=punix:{RUN}/db.sock --pidfile={RUN}/ovsdb-server.pid $options
ovs-vsctl --no-wait init
ovs-vswitchd unix:{RUN}/db.sock --pidfile={RUN}/ovs-vswitchd.pid $options
ovs-vsctl add-br ovsbr0 -- set bridge ovsbr0 datapath_type=netdev
ovs-vsctl add-port ovsbr0 world tag=5 -- set interface world type=internal
ip addr add 192.0.2.1/24 dev world
ip link set world up
exec "$@"
"""
NETWORK = """<network><name>ovs</name><uuid>8f49b9c4-0b3a-4f64-8a4f-0d8e6e1b7a60</uuid><forward mode='bridge'/>
<bridge name='ovsbr0'/><virtualport type='openvswitch'/>
<portgroup name='five'><vlan><tag id='5'/></vlan></portgroup>
<portgroup name='six' default='yes'><vlan><tag id='6'/></vlan>
<bandwidth><inbound average='1000' peak='2000' burst='64'/></bandwidth></portgroup>
<portgroup name='trunk'><vlan trunk='yes'><tag id='5' nativeMode='untagged'/><tag id='7'/></vlan></portgroup>
</network>
"""


class SwitchedKvikd(Kvikd):
    def start(self) -> None:
        directory = self.paths.networks
        if not directory.exists():
            (directory / "autostart").mkdir(parents=True)
            (directory / "ovs.xml").write_text(NETWORK)
            (directory / "autostart/ovs.xml").symlink_to(directory / "ovs.xml")
        super().start()


@pytest.fixture(scope="module")
def kvikd() -> Iterator[Kvikd]:
    daemon = SwitchedKvikd("unshare", "--mount", "--net", "sh", "-c", NAMESPACE, "sh")
    pids = [int(inside(daemon, "cat", f"{RUN}/{name}.pid")) for name in SERVERS]
    try:
        yield daemon
    finally:
        for domain in daemon.connection.domains(1):
            domain.destroy()
        assert daemon.end() == 0
        for pid in pids:
            os.kill(pid, signal.SIGTERM)
        shutil.rmtree(daemon.root, ignore_errors=True)


def vsctl(kvikd: Kvikd, *words: str) -> str:
    return inside(kvikd, "ovs-vsctl", *words).strip()


def taps(kvikd: Kvikd) -> list[str]:
    return [name for name in vsctl(kvikd, "list-ports", "ovsbr0").split() if name != "world"]


def heard(domain: Domain) -> set[tuple[str, str]]:
    return {(one.mac, one.address) for one in domain.interface_addresses(2)}


def test_portgroups_are_vlans_of_the_switch_and_carry_packets(make: Any, kvikd: Kvikd) -> None:
    alone = "<interface type='ethernet'><mac address='52:54:00:00:00:36'/><model type='virtio'/></interface>"
    domain = make("switched", CONSOLE + AGENT + card("ovs", 0x31, portgroup="five") + card("ovs", 0x32) + alone)
    domain.start()
    until(lambda: domain.stages().stages[4].state == 1)  # the agent
    live = domain.xml()
    assert live.count("<virtualport type='openvswitch'>") == 2 and live.count("interfaceid='") == 2
    five, six = sorted(taps(kvikd), key=lambda name: vsctl(kvikd, "get", "port", name, "tag"))
    assert [vsctl(kvikd, "get", "port", name, "tag") for name in (five, six)] == ["5", "6"]
    assert vsctl(kvikd, "get", "interface", five, "external_ids:attached-mac") == '"52:54:00:00:00:31"'
    assert vsctl(kvikd, "get", "interface", five, "external_ids:iface-id").strip('"') in live
    assert "htb" in inside(kvikd, "tc", "qdisc", "show", "dev", six)
    assert "htb" not in inside(kvikd, "tc", "qdisc", "show", "dev", five)
    script = "ip addr add 192.0.2.2/24 dev eth{}; ip link set eth{} up"
    domain.exec(["/bin/sh", "-c", script.format(0, 0)])
    until(lambda: domain.exec(["/bin/ping", "-c", "1", "-W", "1", "192.0.2.1"]).exitcode == 0)
    # What it says on its taps is heard: on the switch's, and on one that is on no bridge.
    domain.exec(["/bin/sh", "-c", "ip addr add 198.51.100.2/24 dev eth2; ping -c 1 -W 1 198.51.100.1"])
    until(lambda: heard(domain) >= {("52:54:00:00:00:31", "192.0.2.2"), ("52:54:00:00:00:36", "198.51.100.2")})
    domain.exec(["/bin/sh", "-c", "ip link set eth0 down; " + script.format(1, 1)])
    assert domain.exec(["/bin/ping", "-c", "2", "-W", "1", "192.0.2.1"]).exitcode != 0
    domain.destroy()
    until(lambda: taps(kvikd) == [])


def test_a_trunk_has_its_native_vlan(make: Any, kvikd: Kvikd) -> None:
    make("trunked", CONSOLE + card("ovs", 0x33, portgroup="trunk")).start()
    (tap,) = taps(kvikd)
    found = [vsctl(kvikd, "get", "port", tap, column) for column in ("vlan_mode", "tag", "trunks")]
    assert found == ["native-untagged", "5", "[5, 7]"]


def test_a_bridge_interface_may_say_that_it_is_open_vswitchs(make: Any, kvikd: Kvikd) -> None:
    device = (
        "<interface type='bridge'><source bridge='ovsbr0'/><mac address='52:54:00:00:00:34'/>"
        "<virtualport type='openvswitch'/><model type='virtio'/></interface>"
    )
    domain = make("direct", CONSOLE + device)
    defined = domain.xml(2)
    assert "<parameters interfaceid='" in defined
    domain.start()
    (tap,) = taps(kvikd)
    assert vsctl(kvikd, "get", "interface", tap, "external_ids:iface-id").strip('"') in defined


def test_its_port_goes_with_a_killed_machine_also_while_the_daemon_is_away(make: Any, kvikd: Kvikd) -> None:
    shot = make("shot", CONSOLE + card("ovs", 0x35))
    shot.start()
    assert len(taps(kvikd)) == 1
    pid = qemu_of(shot)
    os.kill(pid, signal.SIGKILL)
    until(lambda: taps(kvikd) == [])
    again = make("again", CONSOLE + card("ovs", 0x36))
    again.start()
    (holder,) = (int(inside(kvikd, "cat", f"{RUN}/{name}.pid")) for name in SERVERS[:1])
    assert kvikd.end(signal.SIGKILL) == -signal.SIGKILL
    os.kill(qemu_of(again), signal.SIGKILL)
    kvikd.prefix = ("nsenter", "-t", str(holder), "-m", "-n")
    kvikd.start()
    until(lambda: taps(kvikd) == [])


def test_a_start_that_fails_leaves_no_port(make: Any, kvikd: Kvikd) -> None:
    bad = "<interface type='bridge'><source bridge='none0'/><mac address='52:54:00:00:00:38'/></interface>"
    domain = make("fails", CONSOLE + card("ovs", 0x37) + bad)
    with pytest.raises(KvikError, match="none0"):
        domain.start()
    until(lambda: taps(kvikd) == [])
