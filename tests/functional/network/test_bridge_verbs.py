"""kvik bridge on the kernel's own bridges, through a daemon in a namespace of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from functional.network.bridged_host import Host, until
from kvik.client.bridge import Bridges
from kvik.errors import AlreadyExists, HostError, InvalidArgument, KvikError, NotFound, OperationInvalid, ResourceBusy
from kvik.host.process import find_program

pytestmark = [
    pytest.mark.functional,
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(find_program("ip") is None, reason="needs iproute2"),
]
STRANGER = "52:54:00:00:00:77"


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    made = Host()
    try:
        for name in ("pa", "pb"):
            made.run(f"ip link add {name} type veth peer name {name}-far")
            made.run(f"ip link set {name}-far up")
        yield made
    finally:
        made.end()


@pytest.fixture
def bridges(host: Host) -> Iterator[Bridges]:
    made = Bridges(host.connection)
    yield made
    for one in made.all():
        made.delete(one.name, force=True)


def test_a_bridge_is_made_as_asked_and_deleted(host: Host, bridges: Bridges) -> None:
    bridges.add("br0", "52:54:00:00:00:10", ageing_time=60, priority=4096)
    (one,) = bridges.all()
    assert (one.name, one.mac, one.up, one.stp) == ("br0", "52:54:00:00:00:10", True, False)
    assert (one.ageing_time, one.priority, one.forward_delay) == (60, 4096, 0)
    assert one.bridge_id == one.root_id == "1000.525400000010"
    with pytest.raises(AlreadyExists, match="br0 exists"):
        bridges.add("br0")
    bridges.delete("br0")
    assert bridges.all() == []
    with pytest.raises(NotFound, match="no bridge br0"):
        bridges.show("br0")


def test_ports_come_and_go_with_their_states_and_counters(host: Host, bridges: Bridges) -> None:
    bridges.add("br0")
    bridges.add_port("br0", "pa")
    bridges.add_port("br0", "pb")
    bridges.add_port("br0", "pb")  # it is one: nothing to do
    until(lambda: all(port.state == "forwarding" for port in bridges.show("br0")[1]))
    one, ports = bridges.show("br0")
    assert one.ports == ["pa", "pb"]
    assert [(port.name, port.number, port.state, port.machine) for port in ports] == [
        ("pa", 1, "forwarding", None),
        ("pb", 2, "forwarding", None),
    ]
    bridges.set_port("br0", "pa", isolated=True, cost=50, flood=False)
    _, ports = bridges.show("br0")
    assert (ports[0].isolated, ports[0].cost, ports[0].flood) == (True, 50, False)
    send(host, "pa-far", STRANGER)
    assert bridges.show("br0")[1][0].rx_packets > 0
    with pytest.raises(ResourceBusy, match="has ports: pa, pb"):
        bridges.delete("br0")
    bridges.add("br1")
    with pytest.raises(ResourceBusy, match="a port of br0"):
        bridges.add_port("br1", "pa")
    with pytest.raises(OperationInvalid, match="no port of br1 but of br0"):
        bridges.delete_port("br1", "pa")
    bridges.delete_port("br0", "pa")
    assert bridges.show("br0")[0].ports == ["pb"]


def send(host: Host, interface: str, mac: str) -> None:
    """One frame from `mac`, an ARP-less broadcast of an experimental type (IEEE 802, 0x88b5)."""
    program = (
        "import socket, sys\n"
        "with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:\n"
        "    raw.bind((sys.argv[1], 0))\n"
        "    raw.send(b'\\xff' * 6 + bytes.fromhex(sys.argv[2].replace(':', '')) + b'\\x88\\xb5' + bytes(46))\n"
    )
    import shlex
    import sys

    host.run(f"{shlex.quote(sys.executable)} -c {shlex.quote(program)} {interface} {mac}")


def test_addresses_are_learned_fixed_and_forgotten(host: Host, bridges: Bridges) -> None:
    bridges.add("br0")
    bridges.add_port("br0", "pa")
    bridges.add_port("br0", "pb")
    send(host, "pa-far", STRANGER)
    assert [(row.port, row.kind) for row in bridges.fdb("br0") if row.mac == STRANGER] == [("pa", "dynamic")]
    bridges.flush_fdb("br0")
    assert STRANGER not in [row.mac for row in bridges.fdb("br0")]
    bridges.change_fdb("br0", "pb", STRANGER)
    send(host, "pa-far", STRANGER)  # a static entry is not moved by a frame
    assert [(row.port, row.kind) for row in bridges.fdb("br0") if row.mac == STRANGER] == [("pb", "static")]
    bridges.change_fdb("br0", "pb", STRANGER, remove=True)
    with pytest.raises(NotFound, match="pb has no entry"):
        bridges.change_fdb("br0", "pb", STRANGER, remove=True)


def test_spanning_tree_is_switched_and_tuned(host: Host, bridges: Bridges) -> None:
    bridges.add("br0", stp=True, forward_delay=4)
    bridges.set("br0", hello_time=1, max_age=6, priority=8192)
    one = bridges.show("br0")[0]
    assert (one.stp, one.forward_delay, one.hello_time, one.max_age, one.priority) == (True, 4, 1, 6, 8192)
    bridges.add_port("br0", "pa")
    assert bridges.show("br0")[1][0].state == "listening"
    bridges.set("br0", stp=False)
    assert not bridges.show("br0")[0].stp
    out = host.cli("bridge", "stp", "br0")
    assert "Root:           this bridge" in out
    with pytest.raises(HostError, match="hello_time 1 to 10"):
        bridges.set("br0", stp=True, hello_time=60)


def test_what_makes_no_sense_is_refused(host: Host, bridges: Bridges) -> None:
    bridges.add("br0")
    for wrong, words in (
        ({"colour": 1}, "no setting 'colour'"),
        ({"stp": "maybe"}, "stp of a bridge is on or off"),
        ({"priority": 1.5}, "priority of a bridge is a whole number"),
        ({"forward_delay": "long"}, "a number of seconds"),
    ):
        with pytest.raises(InvalidArgument, match=words):
            bridges.set("br0", **wrong)
    with pytest.raises(OperationInvalid, match="lo is no bridge"):
        bridges.show("lo")
    with pytest.raises(NotFound, match="no interface none0"):
        bridges.add_port("br0", "none0")
    with pytest.raises(KvikError):
        bridges.add("a-name-too-long-")
    host.run("ip addr add 203.0.113.1/24 dev br0")
    with pytest.raises(ResourceBusy, match=r"has the address 203.0.113.1/24"):
        bridges.delete("br0")


def test_vlans_are_set_or_the_kernel_is_named(host: Host, bridges: Bridges) -> None:
    """The lab's kernel filters VLANs; one that does not is said to."""
    bridges.add("br0")
    bridges.add_port("br0", "pa")
    try:
        bridges.set("br0", vlan_filtering=True)
    except HostError as error:
        assert "CONFIG_BRIDGE_VLAN_FILTERING" in str(error)
        return
    bridges.change_vlan("br0", "pa", 100, 199)
    bridges.change_vlan("br0", "pa", 10, 10, pvid=True, untagged=True)
    rows = [(row.first, row.last, row.pvid, row.untagged) for row in bridges.vlans("br0") if row.port == "pa"]
    assert (100, 199, False, False) in rows
    assert (10, 10, True, True) in rows
    bridges.change_vlan("br0", "pa", 100, 199, remove=True)
    assert 100 not in [row.first for row in bridges.vlans("br0") if row.port == "pa"]


def test_a_networks_bridge_is_the_networks(host: Host, bridges: Bridges) -> None:
    network = host.connection.create_network("<network><name>n</name><bridge name='virbr77'/></network>")
    try:
        with pytest.raises(ResourceBusy, match="virbr77 is the bridge of network 'n'"):
            bridges.delete("virbr77", force=True)
    finally:
        network.destroy()


def test_the_pictures(host: Host, bridges: Bridges) -> None:
    bridges.add("br0")
    bridges.add_port("br0", "pa")
    assert " br0    " in host.cli("bridge", "list")
    assert "forwarding" in host.cli("bridge", "show", "br0")
    assert "In pkt/s" in host.cli("bridge", "show", "br0", "--watch", "--iterations", "1")
    assert "local" in host.cli("bridge", "fdb", "br0")
