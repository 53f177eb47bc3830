"""Links of every kind, addresses with all they say, VLANs' refusal, and the kernel's notices."""

from __future__ import annotations

import errno
import threading

import pytest

from kvik.errors import HostError
from kvik.host import nft_probe, nftables
from kvik.host.bridge import create_bridge
from kvik.host.bridge_vlan import add_vlan, delete_vlan, port_vlans
from kvik.host.netlink import Netlink
from kvik.host.netlink_monitor import Change, NetlinkMonitor
from netns import in_namespace, new_namespace


@in_namespace
def test_links_are_listed_by_bridge_and_by_kind() -> None:
    with Netlink() as netlink:
        bridge = create_bridge(netlink, "br0")
        port = netlink.add_veth("v0", "v1")
        netlink.set_link(port.index, master=bridge.index, alias="a machine's", promiscuous=True)
        assert [link.name for link in netlink.links(master=bridge.index)] == ["v0"]
        assert {link.name for link in netlink.links(kind="veth")} == {"v0", "v1"}
        assert [link.name for link in netlink.links(kind="bridge")] == ["br0"]
        link = netlink.link("v0")
        assert (link.alias, link.promiscuous, link.master_kind) == ("a machine's", True, "bridge")
        assert link.lower == netlink.link("v1").index


@in_namespace
def test_operational_state_follows_the_peer() -> None:
    with Netlink() as netlink:
        link = netlink.add_veth("v0", "v1", up=True)
        assert (link.up, link.carrier, link.state) == (True, True, "up")
        netlink.set_link(link.lower, up=False)
        link = netlink.link("v0")
        assert (link.up, link.carrier, link.state) == (True, False, "lowerlayerdown")


@in_namespace
def test_a_macvtap_stands_on_its_interface_in_each_mode() -> None:
    with Netlink() as netlink:
        lower = netlink.add_veth("v0", "v1", up=True)
        for mode in ("private", "vepa", "bridge"):
            link = netlink.add_macvtap(f"t-{mode}", lower.index, mode, mac="52:54:00:00:00:05", up=False)
            assert (link.kind, link.lower, link.mac) == ("macvtap", lower.index, "52:54:00:00:00:05")
            netlink.delete_link(link.index)
        through = netlink.add_macvtap("t0", lower.index, "passthrough")
        assert through.mac == lower.mac  # it takes the interface over
        with pytest.raises(HostError, match="'hub' is no mode"):
            netlink.add_macvtap("t1", lower.index, "hub")
        with pytest.raises(HostError):
            netlink.add_macvtap("t1", 9999, "bridge")


@in_namespace
def test_a_vlan_interface_is_made_or_its_lack_named() -> None:
    with Netlink() as netlink:
        lower = netlink.add_veth("v0", "v1")
        with pytest.raises(HostError, match="4095 is no VLAN"):
            netlink.add_vlan("v0.4095", lower.index, 4095)
        try:
            assert netlink.add_vlan("v0.7", lower.index, 7).kind == "vlan"
        except HostError as error:
            assert error.errno == errno.EOPNOTSUPP and "vlan" in str(error)


@in_namespace
def test_a_link_that_cannot_be_made_as_asked_is_not_made() -> None:
    with Netlink() as netlink:
        with pytest.raises(HostError):
            netlink.add_link("br0", "bridge", mtu=1 << 30)
        assert "br0" not in [link.name for link in netlink.links()]


@in_namespace
def test_a_link_moves_into_another_namespace() -> None:
    with new_namespace() as world, Netlink() as netlink:
        link = netlink.add_veth("v0", "v1")
        netlink.set_link(link.index, namespace=world.fd)
        assert "v0" not in [each.name for each in netlink.links()]
        assert "v0" in world.run(lambda: [each.name for each in Netlink().links()])


@in_namespace
def test_addresses_tell_all_they_are() -> None:
    with Netlink() as netlink:
        index = netlink.add_veth("v0", "v1", up=True).index
        netlink.add_address(index, "192.0.2.1/24", broadcast="192.0.2.255", label="v0:one")
        netlink.add_address(index, "192.0.2.2/24")
        netlink.add_address(index, "2001:db8::1/64", valid=1000, preferred=500, detect_duplicates=False)
        netlink.add_address(index, "2001:db8:1::1/64", prefix_route=False)
        found = {str(each.interface): each for each in netlink.addresses(index)}
        one = found["192.0.2.1/24"]
        assert (one.broadcast, one.label, one.scope, one.permanent) == ("192.0.2.255", "v0:one", 0, True)
        assert one.valid is None and one.preferred is None and not one.temporary
        assert found["192.0.2.2/24"].temporary  # that is: secondary
        two = found["2001:db8::1/64"]
        assert two.valid is not None and 900 < two.valid <= 1000
        assert two.preferred is not None and 400 < two.preferred <= 500
        assert not two.permanent and not two.tentative
        assert found["2001:db8:1::1/64"].tentative  # not through its check for duplicates
        assert any(each.scope == 253 for each in found.values())  # fe80::
        netlink.add_address(index, "2001:db8::1/64", replace=True)
        assert {str(each.interface): each for each in netlink.addresses(index)}["2001:db8::1/64"].valid is None
        with pytest.raises(HostError) as raised:
            netlink.add_address(index, "192.0.2.1/24")
        assert raised.value.errno == errno.EEXIST
        with pytest.raises(HostError, match="add address"):
            netlink.add_address(index, "192.0.2.3/24", broadcast="everybody")


@in_namespace
def test_vlans_of_a_port_work_or_their_lack_is_named() -> None:
    with Netlink() as netlink:
        bridge = create_bridge(netlink, "br0", up=True)
        port = netlink.add_veth("v0", "v1", up=True)
        netlink.set_link(port.index, master=bridge.index)
        for first, last in ((0, 0), (1, 4095), (9, 3)):
            with pytest.raises(HostError, match="no VLANs"):
                add_vlan(netlink, port.index, first, last)
        with pytest.raises(HostError, match="PVID"):
            add_vlan(netlink, port.index, 1, 5, pvid=True)
        try:
            add_vlan(netlink, port.index, 10, 20)
        except HostError as error:
            assert error.errno == errno.EOPNOTSUPP
            assert "no VLAN filtering (CONFIG_BRIDGE_VLAN_FILTERING)" in str(error)
            assert port_vlans(netlink) == []
        else:
            assert "10-20" in [str(vlan) for vlan in port_vlans(netlink, port.index)]
            delete_vlan(netlink, port.index, 10, 20)


@in_namespace
def test_the_kernel_tells_what_changes() -> None:
    with NetlinkMonitor("link") as links, NetlinkMonitor("table") as tables, Netlink() as netlink:
        assert links.read() is None and tables.read() is None
        bridge = create_bridge(netlink, "br0", up=True)
        port = netlink.add_veth("v0", "v1", up=True)
        netlink.set_link(port.index, master=bridge.index)
        netlink.delete_link(port.index)
        nftables.run([{"add": {"table": {"family": "inet", "name": "ours"}}}])
        nftables.run([{"delete": {"table": {"family": "inet", "name": "ours"}}}])
        changes = [change for read in iter(links.read, None) for change in read]
        made = {change.link.name for change in changes if change.link and not change.gone}
        assert {"br0", "v0", "v1"} <= made
        assert {change.link.name for change in changes if change.link and change.gone} == {"v0", "v1"}
        assert [change for read in iter(tables.read, None) for change in read] == [
            Change("table", False), Change("table", True)
        ]  # fmt: skip


@in_namespace
def test_a_reader_that_is_too_slow_is_told_that_it_missed_something() -> None:
    with NetlinkMonitor("link") as monitor, Netlink() as netlink:
        index = netlink.add_veth("v0", "v1").index
        for number in range(2000):
            netlink.set_link(index, mtu=1400 + number % 2)
        found = [change for read in iter(monitor.read, None) for change in read]
    assert Change("overrun", False) in found
    with pytest.raises(HostError, match="cannot watch weather"):
        NetlinkMonitor("weather")


@in_namespace
def test_every_probe_is_a_rule_that_is_understood_and_leaves_nothing() -> None:
    """A mistake in a probe would be an error of syntax, and raise; a kernel without the expression refuses it."""
    lacking = nft_probe.missing()
    assert not {"inet", "bridge", "masquerade", "dnat", "set", "dynset", "bridge-ether"} & set(lacking)
    for name, reason in lacking.items():
        assert name.replace("-", " ") in reason and "CONFIG_" in reason
        with pytest.raises(HostError):
            nftables.run(nft_probe.commands(name))
    assert nftables.run([{"list": {"ruleset": None}}]) == []
    assert nft_probe.missing("masquerade") == {}


@in_namespace
def test_threads_may_share_a_socket() -> None:
    errors: list[BaseException] = []

    def work(netlink: Netlink) -> None:
        try:
            for _ in range(100):
                assert netlink.link("v0").name == "v0"
                assert {link.name for link in netlink.links()} == {"lo", "v0", "v1"}
        except BaseException as error:
            errors.append(error)

    with Netlink() as netlink:
        netlink.add_veth("v0", "v1")
        threads = [threading.Thread(target=work, args=(netlink,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert errors == []
