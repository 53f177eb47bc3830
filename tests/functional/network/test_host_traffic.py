"""Bandwidth: frames really wait or are dropped, and nothing is left behind."""

from __future__ import annotations

import errno
import socket
import time

import pytest

from kvik.errors import HostError
from kvik.host.bridge import create_bridge
from kvik.host.netlink import Link, Netlink
from kvik.host.traffic import Rate, clear_traffic, queues, set_traffic, sweep_ifbs
from kvik.host.traffic_floor import add_floor, delete_floor, set_rest
from netns import in_namespace, until, until_ports_forward

FRAMES = 100


def a_tap_and_a_port(netlink: Netlink) -> tuple[Link, Link]:
    """v0 stands for a machine's tap, v1 for its card; w0 is another port of the bridge. No protocol speaks there."""
    bridge = create_bridge(netlink, "br0", multicast_snooping=False)
    made = []
    for name, peer in (("v0", "v1"), ("w0", "w1")):
        link = netlink.add_veth(name, peer)
        for index in (link.index, link.lower):
            with open(f"/proc/sys/net/ipv6/conf/{netlink.link(index).name}/disable_ipv6", "w") as quiet:
                quiet.write("1")
            netlink.set_link(index, up=True)
        netlink.set_link(link.index, master=bridge.index)
        made.append(link)
    with open("/proc/sys/net/ipv6/conf/br0/disable_ipv6", "w") as quiet:
        quiet.write("1")
    netlink.set_link(bridge.index, up=True)
    until_ports_forward(netlink)
    return made[0], made[1]


def flood(interface: str) -> None:
    """Send frames of 1000 bytes all at once."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sender:
        sender.bind((interface, 0))
        sender.setblocking(False)
        for _ in range(FRAMES):
            try:
                sender.send(b"\xff" * 6 + b"\x02\0\0\0\0\x07\x88\xb5" + bytes(986))
            except OSError as error:
                assert error.errno in (errno.ENOBUFS, errno.EAGAIN)  # dropped by the queue, or all of ours wait there


def all_arrive(netlink: Netlink, interface: str, at: str) -> None:
    before = netlink.link(at).rx_packets
    flood(interface)
    until(lambda: netlink.link(at).rx_packets - before == FRAMES)


def few_arrive(netlink: Netlink, interface: str, at: str) -> None:
    """4 KiB at once and then a frame a second: not half of them within the time of a test."""
    before = netlink.link(at).rx_packets
    flood(interface)
    until(lambda: netlink.link(at).rx_packets > before)
    time.sleep(0.2)
    assert netlink.link(at).rx_packets - before < FRAMES / 2


@in_namespace
def test_inbound_frames_wait_in_the_class() -> None:
    with Netlink() as netlink:
        tap, _ = a_tap_and_a_port(netlink)
        all_arrive(netlink, "v0", "v1")
        set_traffic(netlink, tap.index, inbound=Rate(average=1, burst=4))
        few_arrive(netlink, "v0", "v1")
        root = next(queue for queue in queues(netlink, tap.index) if queue.handle == "1:1")
        assert (root.kind, root.rate, root.ceiling) == ("htb", 1000, 1000)
        assert root.backlog > 0 or root.dropped > 0
        clear_traffic(netlink, tap.index)
        all_arrive(netlink, "v0", "v1")


@in_namespace
def test_outbound_frames_are_bounded_too() -> None:
    with Netlink() as netlink:
        tap, _ = a_tap_and_a_port(netlink)
        all_arrive(netlink, "v1", "w1")
        set_traffic(netlink, tap.index, outbound=Rate(average=1, burst=4))
        assert "ingress" in {queue.kind for queue in queues(netlink, tap.index)}
        few_arrive(netlink, "v1", "w1")
        all_arrive(netlink, "v0", "v1")  # the other way is free
        clear_traffic(netlink, tap.index)
        all_arrive(netlink, "v1", "w1")
        assert [link.name for link in netlink.links(kind="ifb")] == []


@in_namespace
def test_rates_are_as_asked_and_replaced_whole() -> None:
    with Netlink() as netlink:
        tap, _ = a_tap_and_a_port(netlink)
        set_traffic(netlink, tap.index, inbound=Rate(1000, 2000, 100), outbound=Rate(500))
        found = {queue.handle: queue for queue in queues(netlink, tap.index)}
        assert (found["1:1"].rate, found["1:1"].ceiling) == (1_000_000, 2_000_000)
        assert "ffff:" in found
        set_traffic(netlink, tap.index, inbound=Rate(10_000_000))  # ten gigabytes a second: more than 32 bits
        found = {queue.handle: queue for queue in queues(netlink, tap.index)}
        assert found["1:1"].rate == 10_000_000_000 and "ffff:" not in found
        assert [link.name for link in netlink.links(kind="ifb")] == []
        clear_traffic(netlink, tap.index)
        clear_traffic(netlink, tap.index)  # none is no error
        assert not {"htb", "ingress"} & {queue.kind for queue in queues(netlink, tap.index)}


@in_namespace
def test_an_intermediate_interface_does_not_outlive_its_tap_for_long() -> None:
    with Netlink() as netlink:
        tap, port = a_tap_and_a_port(netlink)
        set_traffic(netlink, tap.index, outbound=Rate(500))
        if not netlink.links(kind="ifb"):
            pytest.skip("this kernel has a policer, and needs no intermediate interface")
        netlink.delete_link(tap.index)
        assert [link.name for link in netlink.links(kind="ifb")] == [f"ifb-{tap.index}"]
        netlink.add_link("ifb-mine", "ifb")
        sweep_ifbs(netlink)
        assert [link.name for link in netlink.links(kind="ifb")] == ["ifb-mine"]
        assert netlink.link(port.index).up


@in_namespace
def test_what_is_refused_leaves_no_bound() -> None:
    with Netlink() as netlink:
        tap, _ = a_tap_and_a_port(netlink)
        for rate in (Rate(0), Rate(-1), Rate(1, burst=-1), Rate(1 << 33)):
            with pytest.raises(HostError, match="out of range"):
                set_traffic(netlink, tap.index, inbound=rate)
        netlink.add_link(f"ifb-{tap.index}", "veth")  # in the way of an IFB: the outbound half fails
        try:
            set_traffic(netlink, tap.index, inbound=Rate(5), outbound=Rate(5))
        except HostError as error:
            assert error.errno == errno.EEXIST
            assert not {"htb", "ingress"} & {queue.kind for queue in queues(netlink, tap.index)}
        else:
            clear_traffic(netlink, tap.index)
        with pytest.raises(HostError) as raised:
            set_traffic(netlink, 9999, inbound=Rate(5))
        assert raised.value.errno == errno.ENODEV


@in_namespace
def test_a_floor_is_a_class_that_its_machines_frames_find() -> None:
    """A network's bridge: what goes to a machine with a floor is in its class, the rest in 1:2."""
    whole = Rate(10_000, 20_000)
    with Netlink() as netlink:
        a_tap_and_a_port(netlink)
        bridge = netlink.link("br0").index
        set_traffic(netlink, bridge, inbound=whole, floors=True)
        add_floor(netlink, bridge, 3, "52:54:00:12:34:56", floor=4000, whole=whole)
        add_floor(netlink, bridge, 4, "52:54:00:12:34:57", floor=1000, whole=whole)
        set_rest(netlink, bridge, 5000, whole=whole)
        found = {queue.handle: queue for queue in queues(netlink, bridge)}
        rates = {handle: (found[handle].rate, found[handle].ceiling) for handle in ("1:1", "1:2", "1:3", "1:4")}
        assert rates == {
            "1:1": (10_000_000, 20_000_000),
            "1:2": (5_000_000, 20_000_000),
            "1:3": (4_000_000, 20_000_000),
            "1:4": (1_000_000, 20_000_000),
        }
        assert found["1:3"].parent == "1:1"

        def passed(target: str) -> dict[str, int]:
            before = {queue.handle: queue.packets for queue in queues(netlink, bridge) if queue.kind == "htb"}
            with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sender:
                sender.bind(("br0", 0))
                sender.send(bytes.fromhex(target.replace(":", "")) + b"\x02\0\0\0\0\x07\x88\xb5" + bytes(46))
            after = {queue.handle: queue.packets for queue in queues(netlink, bridge) if queue.kind == "htb"}
            return {handle: after[handle] - before[handle] for handle in ("1:2", "1:3", "1:4") if handle in after}

        assert passed("52:54:00:12:34:56") == {"1:2": 0, "1:3": 1, "1:4": 0}
        assert passed("52:54:00:12:34:57") == {"1:2": 0, "1:3": 0, "1:4": 1}
        assert passed("52:54:ff:12:34:56") == {"1:2": 1, "1:3": 0, "1:4": 0}
        delete_floor(netlink, bridge, 3)
        delete_floor(netlink, bridge, 3)  # none is no error
        assert passed("52:54:00:12:34:56") == {"1:2": 1, "1:4": 0}
        for number, floor in ((2, 10), (3, 0), (3, 20_001)):
            with pytest.raises(HostError, match="cannot promise"):
                add_floor(netlink, bridge, number, "52:54:00:12:34:56", floor=floor, whole=whole)
        with pytest.raises(HostError):
            add_floor(netlink, bridge, 4, "52:54:00:12:34:58", floor=10, whole=whole)  # the number is taken
        assert passed("52:54:00:12:34:57") == {"1:2": 0, "1:4": 1}  # and its promise stands
        clear_traffic(netlink, bridge)
        assert not [queue for queue in queues(netlink, bridge) if queue.kind == "htb"]
