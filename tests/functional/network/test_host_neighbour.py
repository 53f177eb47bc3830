"""Forwarding databases and neighbour tables: what the kernel learned from real frames, and what it is told."""

from __future__ import annotations

import errno
import socket
from ipaddress import ip_address

import pytest

from kvik.errors import HostError
from kvik.host.bridge import Bridge, create_bridge, flush_fdb, read_bridge, set_bridge, set_port
from kvik.host.neighbour import (
    FdbEntry,
    add_fdb,
    delete_fdb,
    fdb,
    neighbours,
)
from kvik.host.netlink import Link, Netlink
from netns import in_namespace, new_namespace, until, until_ports_forward

GUEST = "02:00:00:00:00:07"
BROADCAST = b"\xff" * 6


def a_bridge(netlink: Netlink) -> tuple[Bridge, Link, Link]:
    """A bridge with two ports, v0 and w0, whose other ends are v1 and w1."""
    bridge = create_bridge(netlink, "br0", up=True)
    ports = []
    for name, peer in (("v0", "v1"), ("w0", "w1")):
        port = netlink.add_veth(name, peer, up=True)
        netlink.set_link(port.index, master=bridge.index)
        ports.append(port)
    until_ports_forward(netlink)
    return bridge, ports[0], ports[1]


def send(interface: str, source: str, target: bytes = BROADCAST) -> None:
    """A frame out of an interface, of a protocol that nobody knows (0x88b5: for experiments)."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sender:
        sender.bind((interface, 0))
        sender.send(target + bytes.fromhex(source.replace(":", "")) + b"\x88\xb5" + bytes(46))


def learned(netlink: Netlink, bridge: Bridge) -> dict[str, FdbEntry]:
    return {entry.mac: entry for entry in fdb(netlink, bridge=bridge.index) if entry.kind != "local"}


@in_namespace
def test_a_bridge_learns_where_a_guest_is_and_that_it_moved() -> None:
    with Netlink() as netlink:
        bridge, v0, w0 = a_bridge(netlink)
        send("v1", GUEST)
        until(lambda: GUEST in learned(netlink, bridge))
        entry = learned(netlink, bridge)[GUEST]
        assert (entry.index, entry.bridge, entry.kind, entry.vlan) == (v0.index, bridge.index, "dynamic", 0)
        assert entry.age < bridge.ageing_time
        assert read_bridge(netlink, "br0").fdb_learned in (0, len(learned(netlink, bridge)))  # 0: an older kernel
        send("w1", GUEST)
        until(lambda: learned(netlink, bridge)[GUEST].index == w0.index)
        flush_fdb(netlink, bridge.index)
        until(lambda: GUEST not in learned(netlink, bridge))


@in_namespace
def test_a_bridge_learns_no_more_addresses_than_it_may() -> None:
    """What one guest can make the host remember is bounded."""
    with Netlink() as netlink:
        bridge, _, _ = a_bridge(netlink)
        set_bridge(netlink, bridge.index, fdb_max_learned=10)
        if read_bridge(netlink, "br0").fdb_max_learned != 10:
            pytest.skip("this kernel does not bound what a bridge learns (6.7 and later do)")
        for number in range(50):
            send("v1", f"02:00:00:00:01:{number:02x}")
        until(lambda: len(learned(netlink, bridge)) == 10)
        assert read_bridge(netlink, "br0").fdb_learned == 10


@in_namespace
def test_a_port_that_does_not_learn_leaves_the_table_alone() -> None:
    with Netlink() as netlink:
        bridge, v0, _ = a_bridge(netlink)
        set_port(netlink, v0.index, learning=False)
        send("v1", GUEST)
        send("w1", "02:00:00:00:00:08")
        until(lambda: "02:00:00:00:00:08" in learned(netlink, bridge))
        assert GUEST not in learned(netlink, bridge)


@in_namespace
def test_entries_are_added_replaced_and_deleted() -> None:
    with Netlink() as netlink:
        bridge, v0, w0 = a_bridge(netlink)
        add_fdb(netlink, v0.index, GUEST)
        assert learned(netlink, bridge)[GUEST].kind == "static"
        with pytest.raises(HostError) as raised:
            add_fdb(netlink, w0.index, GUEST)
        assert raised.value.errno == errno.EEXIST
        add_fdb(netlink, w0.index, GUEST, replace=True, sticky=True)
        entry = learned(netlink, bridge)[GUEST]
        assert (entry.index, entry.sticky) == (w0.index, True)
        assert GUEST in {each.mac for each in fdb(netlink, port=w0.index)}
        assert GUEST not in {each.mac for each in fdb(netlink, port=v0.index)}
        add_fdb(netlink, v0.index, "02:00:00:00:00:08", kind="dynamic")
        add_fdb(netlink, v0.index, "02:00:00:00:00:09", kind="local")
        kinds = {each.mac: each.kind for each in fdb(netlink)}
        assert (kinds["02:00:00:00:00:08"], kinds["02:00:00:00:00:09"]) == ("dynamic", "local")
        delete_fdb(netlink, w0.index, GUEST)
        with pytest.raises(HostError) as raised:
            delete_fdb(netlink, w0.index, GUEST)
        assert raised.value.errno == errno.ENOENT
        for bad in ({"kind": "odd"}, {"vlan": 4095}):
            with pytest.raises(HostError, match="no"):
                add_fdb(netlink, v0.index, GUEST, **bad)  # type: ignore[arg-type]  # values of both kinds in one dict
        with pytest.raises(HostError, match="no MAC"):
            add_fdb(netlink, v0.index, "02:00")


@in_namespace
def test_a_static_entry_sends_frames_to_its_port_alone() -> None:
    with Netlink() as netlink:
        _, v0, w0 = a_bridge(netlink)
        add_fdb(netlink, v0.index, GUEST)
        until(lambda: netlink.link("w1").state == "up")
        target = bytes.fromhex(GUEST.replace(":", ""))
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x88B5)) as seen:
            seen.bind(("v1", 0x88B5))
            with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x88B5)) as unseen:
                unseen.bind(("w1", 0x88B5))
                before = netlink.link(w0.index).tx_packets
                with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sender:
                    sender.bind(("br0", 0))
                    sender.send(target + b"\x02\0\0\0\0\x01\x88\xb5" + bytes(46))
                seen.settimeout(5)
                assert seen.recv(100)[:6] == target
                unseen.setblocking(False)
                with pytest.raises(BlockingIOError):
                    unseen.recv(100)
                assert netlink.link(w0.index).tx_packets - before <= 5  # ND of its own, at most


@in_namespace
def test_an_isolated_port_does_not_reach_another() -> None:
    with Netlink() as netlink:
        bridge, v0, w0 = a_bridge(netlink)
        for port in (v0, w0):
            set_port(netlink, port.index, isolated=True)
        kind = socket.htons(0x88B5)
        with (
            socket.socket(socket.AF_PACKET, socket.SOCK_RAW, kind) as other,
            socket.socket(socket.AF_PACKET, socket.SOCK_RAW, kind) as host,
        ):
            other.bind(("w1", 0x88B5))
            host.bind(("br0", 0x88B5))
            other.setblocking(False)
            host.settimeout(5)
            send("v1", GUEST)
            assert host.recv(100)[6:12].hex(":") == GUEST  # the host still hears it
            with pytest.raises(BlockingIOError):
                other.recv(100)
            set_port(netlink, w0.index, isolated=False)
            send("v1", GUEST)
            other.settimeout(5)
            assert other.recv(100)[6:12].hex(":") == GUEST
        assert bridge.index


@in_namespace
def test_neighbours_are_found_by_arp_and_nd_and_told_by_hand() -> None:
    with new_namespace() as world, Netlink() as netlink:
        near = netlink.add_veth("near", "far", namespace=world.fd)
        netlink.set_link(near.index, up=True)
        netlink.add_address(near.index, "192.0.2.1/24")
        netlink.add_address(near.index, "2001:db8::1/64", detect_duplicates=False)

        def there() -> str:
            with Netlink() as inside:
                far = inside.link("far")
                inside.set_link(far.index, up=True)
                inside.add_address(far.index, "192.0.2.2/24")
                inside.add_address(far.index, "2001:db8::2/64", detect_duplicates=False)
                return far.mac

        mac = world.run(there)
        for family, address in ((socket.AF_INET, "192.0.2.2"), (socket.AF_INET6, "2001:db8::2")):
            with socket.socket(family, socket.SOCK_DGRAM) as sender:
                sender.sendto(b"who are you", (address, 9))
        addresses = {ip_address("192.0.2.2"), ip_address("2001:db8::2")}
        until(lambda: addresses <= {each.address for each in neighbours(netlink) if each.usable})
        found = {each.address: each for each in neighbours(netlink, index=near.index)}
        assert all(found[address].mac == mac for address in addresses)
        assert {each.address.version for each in neighbours(netlink, family=socket.AF_INET)} == {4}
