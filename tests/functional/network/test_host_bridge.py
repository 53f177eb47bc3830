"""Bridges and their ports, made, read and changed in the kernel."""

from __future__ import annotations

import errno
import time

import pytest

from kvik.errors import HostError
from kvik.host.bridge import (
    bridge_ports,
    bridges,
    create_bridge,
    read_bridge,
    set_bridge,
    set_port,
)
from kvik.host.netlink import Netlink
from netns import in_namespace


@in_namespace
def test_a_bridge_is_made_as_asked_in_one_request() -> None:
    with Netlink() as netlink:
        bridge = create_bridge(
            netlink, "br0", mac="52:54:00:00:00:01", mtu=1400, up=True,
            stp=True, priority=4096, forward_delay=4, hello_time=1, max_age=7, ageing_time=100.5,
            group_fwd_mask=0x4000, multicast_snooping=False, fdb_max_learned=50,
        )  # fmt: skip
        assert (bridge.link.mac, bridge.link.mtu, bridge.link.up) == ("52:54:00:00:00:01", 1400, True)
        assert (bridge.stp, bridge.stp_by, bridge.priority) == (True, "kernel", 4096)
        times = (bridge.forward_delay, bridge.hello_time, bridge.max_age, bridge.ageing_time)
        assert times == (4, 1, 7, 100.5)
        assert (bridge.group_fwd_mask, bridge.multicast_snooping) == (0x4000, False)
        assert bridge.bridge_id == bridge.root_id == "1000.525400000001"
        assert bridge.is_root and bridge.root_port == 0 and bridge.root_path_cost == 0
        assert bridge.group_address == "01:80:c2:00:00:00"
        assert bridge == read_bridge(netlink, bridge.index) or bridge.hello_timer  # all but the timers stand still
        assert [each.name for each in bridges(netlink)] == ["br0"]


@in_namespace
def test_libvirts_delay_of_zero_with_stp_becomes_the_least_that_the_standard_allows() -> None:
    with Netlink() as netlink:
        assert create_bridge(netlink, "br0", stp=True, forward_delay=0, up=True).forward_delay == 2
        assert create_bridge(netlink, "br1", stp=False, forward_delay=0, up=True).forward_delay == 0


@in_namespace
def test_settings_change_what_is_named_and_nothing_else() -> None:
    with Netlink() as netlink:
        bridge = create_bridge(netlink, "br0", stp=True, priority=4096, up=True)
        set_bridge(netlink, bridge.index, ageing_time=10)
        after = read_bridge(netlink, "br0")
        assert (after.ageing_time, after.priority, after.stp) == (10, 4096, True)
        set_bridge(netlink, bridge.index, stp=False, forward_delay=0)  # 0 is good only without STP
        after = read_bridge(netlink, "br0")
        assert (after.stp, after.forward_delay) == (False, 0)


@in_namespace
def test_times_out_of_the_standards_range_are_refused_with_the_range() -> None:
    with Netlink() as netlink:
        bridge = create_bridge(netlink, "br0", stp=True, up=True)
        with pytest.raises(HostError, match="2 to 30 s") as raised:
            set_bridge(netlink, bridge.index, forward_delay=31)
        assert raised.value.errno == errno.ERANGE
        with pytest.raises(HostError, match="cannot set priority"):
            set_bridge(netlink, bridge.index, priority=65536)
        with pytest.raises(HostError, match="hello_time"):
            create_bridge(netlink, "br1", hello_time=-1)
        assert [each.name for each in bridges(netlink)] == ["br0"]


@in_namespace
def test_vlan_filtering_where_the_kernel_lacks_it_is_refused_by_name() -> None:
    with Netlink() as netlink:
        try:
            bridge = create_bridge(netlink, "br0", vlan_filtering=True)
        except HostError as error:
            assert error.errno == errno.EOPNOTSUPP
            assert "VLAN filtering" in str(error) and "CONFIG_BRIDGE_VLAN_FILTERING" in str(error)
            assert bridges(netlink) == []  # and nothing is left
        else:
            assert bridge.vlan_filtering


@in_namespace
def test_what_is_no_bridge_is_not_read_as_one() -> None:
    with Netlink() as netlink:
        netlink.add_veth("v0", "v1")
        with pytest.raises(HostError, match="v0 is no bridge"):
            read_bridge(netlink, "v0")
        with pytest.raises(HostError) as raised:
            read_bridge(netlink, "none")
        assert raised.value.errno == errno.ENODEV
        assert bridges(netlink) == []


@in_namespace
def test_ports_are_read_and_changed() -> None:
    with Netlink() as netlink:
        bridge = create_bridge(netlink, "br0", up=True)
        other = create_bridge(netlink, "br1", up=True)
        port = netlink.add_veth("v0", "v1", up=True)
        netlink.set_link(port.index, master=bridge.index)
        netlink.set_link(netlink.link("v1").index, master=other.index)
        (before,) = bridge_ports(netlink, bridge.index)
        assert (before.name, before.number, before.cost, before.priority) == ("v0", 1, 2, 32)
        assert before.state == "forwarding" and before.learning and before.flood and not before.isolated
        assert before.designated_root == before.designated_bridge == read_bridge(netlink, "br0").bridge_id
        set_port(
            netlink, port.index, cost=7, priority=3, hairpin=True, guard=True, root_block=True,
            fast_leave=True, learning=False, flood=False, mcast_flood=False, bcast_flood=False, neigh_suppress=True,
            isolated=True, locked=True, proxy_arp=True,
        )  # fmt: skip
        set_port(netlink, port.index, state="disabled")
        (after,) = bridge_ports(netlink, bridge.index)
        assert (after.state, after.cost, after.priority) == ("disabled", 7, 3)
        on = (after.hairpin, after.guard, after.root_block, after.fast_leave, after.neigh_suppress, after.isolated)
        assert all(on) and after.locked and after.proxy_arp
        assert not (after.learning or after.flood or after.mcast_flood or after.bcast_flood)
        set_port(netlink, port.index, isolated=False)
        (after,) = bridge_ports(netlink, bridge.index)
        assert not after.isolated and after.cost == 7
        assert {each.name for each in bridge_ports(netlink)} == {"v0", "v1"}
        with pytest.raises(HostError, match="'up' is no state"):
            set_port(netlink, port.index, state="up")
        netlink.set_link(port.index, master=0)
        assert bridge_ports(netlink, bridge.index) == []
        with pytest.raises(HostError):
            set_port(netlink, port.index, cost=3)  # no port any more


@in_namespace
def test_the_spanning_tree_finds_its_root_and_breaks_the_loop() -> None:
    """Two bridges with two wires between them: the one of lower priority is the root; one of four ports is shut."""
    with Netlink() as netlink:
        root = create_bridge(netlink, "br0", stp=True, priority=4096, up=True, mac="52:54:00:00:00:01")
        leaf = create_bridge(netlink, "br1", stp=True, priority=8192, up=True, mac="52:54:00:00:00:02")
        for name, peer in (("a0", "a1"), ("b0", "b1")):
            link = netlink.add_veth(name, peer)
            netlink.set_link(link.index, master=root.index)
            netlink.set_link(link.lower, master=leaf.index)
            netlink.set_link(link.index, up=True)
            netlink.set_link(link.lower, up=True)
        for _ in range(600):
            seen = read_bridge(netlink, "br1")
            if seen.root_port:
                break
            wait()
        assert seen.root_id == root.bridge_id != seen.bridge_id and not seen.is_root
        assert seen.root_path_cost == 2 and seen.root_port == 1
        states = {port.name: port.state for port in bridge_ports(netlink, leaf.index)}
        assert states["b1"] == "blocking" and states["a1"] != "blocking"
        ports = {port.name: port for port in bridge_ports(netlink)}
        assert ports["a1"].designated_bridge == root.bridge_id
        assert ports["a1"].designated_port == ports["a0"].port_id


def wait() -> None:
    time.sleep(0.02)
