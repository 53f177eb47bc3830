"""A machine's port on a bridge with STP: it forwards from the start, and a loop through it is cut all the same."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from functional.network.networks import NAT, with_networks
from kvik.conf.devices.common import Alias
from kvik.conf.devices.interface import Interface, Mac
from kvik.host.bridge import bridge_ports, create_bridge, read_bridge, set_bridge
from kvik.host.edge_port import bring_up_at_once
from kvik.host.netlink import Netlink
from kvik.host.process import find_program
from kvik.host.tap import Tap, create_tap
from kvik.network.attachment import Attachment
from kvik.network.networks import Networks
from kvik.network.taps import open_taps
from netns import in_namespace, new_namespace, until

pytestmark = pytest.mark.functional


def states(netlink: Netlink) -> dict[str, str]:
    return {port.name: port.state for port in bridge_ports(netlink)}


@in_namespace
def test_a_port_forwards_when_the_call_returns_and_stp_is_on() -> None:
    with Netlink() as netlink, ExitStack() as close:
        create_bridge(netlink, "br0", stp=True, forward_delay=0, up=True)
        for name in ("tap0", "tap1"):
            tap = create_tap(name, bridge="br0", up=False)
            close.callback(tap.close)
            bring_up_at_once(netlink, tap.index, "br0")
            bridge = read_bridge(netlink, "br0")
            assert (bridge.stp_by, bridge.forward_delay) == ("kernel", 2)
            assert set(states(netlink).values()) == {"forwarding"}


@in_namespace
def test_without_stp_none_is_switched_on() -> None:
    with Netlink() as netlink:
        create_bridge(netlink, "br0", stp=False, up=True)
        tap = create_tap("tap0", bridge="br0", up=False)
        bring_up_at_once(netlink, tap.index, "br0")
        assert (states(netlink), read_bridge(netlink, "br0").stp) == ({"tap0": "forwarding"}, False)
        tap.close()


@in_namespace
def test_a_port_that_comes_up_by_itself_goes_on_waiting() -> None:
    with Netlink() as netlink, ExitStack() as close:
        create_bridge(netlink, "br0", stp=True, forward_delay=2, up=True)
        for name, bring_up in (("slow", None), ("fast", bring_up_at_once)):
            tap = create_tap(name, bridge="br0", up=bring_up is None)
            close.callback(tap.close)
            if bring_up is not None:
                bring_up(netlink, tap.index, "br0")
        assert states(netlink) == {"slow": "listening", "fast": "forwarding"}


@in_namespace
def test_many_at_once_forward_all() -> None:
    with Netlink() as netlink, ExitStack() as close:
        create_bridge(netlink, "br0", stp=True, forward_delay=0, up=True)
        taps = [create_tap(f"tap{number}", bridge="br0", up=False) for number in range(8)]
        for tap in taps:
            close.callback(tap.close)
        threads = [threading.Thread(target=bring_up_at_once, args=(netlink, tap.index, "br0")) for tap in taps]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert set(states(netlink).values()) == {"forwarding"}
        assert read_bridge(netlink, "br0").stp


def carry(one: Tap, other: Tap, stop: threading.Event) -> list[threading.Thread]:
    """A guest that bridges its two cards: all that one gets it sends on by the other."""

    def carrier(source: int, target: int) -> Callable[[], None]:
        def work() -> None:
            while not stop.is_set():
                try:
                    os.write(target, os.read(source, 65536))
                except BlockingIOError:
                    stop.wait(0.001)

        return work

    pairs = [(one.fds[0], other.fds[0]), (other.fds[0], one.fds[0])]
    threads = [threading.Thread(target=carrier(*pair), daemon=True) for pair in pairs]
    for thread in threads:
        thread.start()
    return threads


@in_namespace
def test_a_guest_that_joins_two_of_its_cards_is_cut_off() -> None:
    with Netlink() as netlink:
        create_bridge(netlink, "br0", stp=True, forward_delay=0, hello_time=1, up=True)
        taps = [create_tap(name, bridge="br0", up=False) for name in ("tap0", "tap1")]
        for tap in taps:
            bring_up_at_once(netlink, tap.index, "br0")
        stop = threading.Event()
        threads = carry(*taps, stop)
        try:
            until(lambda: sorted(states(netlink).values()) == ["blocking", "forwarding"])
            third = create_tap("tap2", bridge="br0", up=False)
            bring_up_at_once(netlink, third.index, "br0")  # another machine's comes: the loop stays cut
            assert sorted(states(netlink).values()) == ["blocking", "forwarding", "forwarding"]
            third.close()
        finally:
            stop.set()
            for thread in threads:
                thread.join()
            for tap in taps:
                tap.close()


@in_namespace
def test_a_machine_on_a_network_without_delay_is_heard_at_once() -> None:
    with Netlink() as netlink, ExitStack() as close:
        create_bridge(netlink, "br0", stp=True, forward_delay=0, up=True)
        for name, at_once, state in (("n0", True, "forwarding"), ("n1", False, "listening")):
            interface = Interface(type="network", mac=Mac(address="52:54:00:00:00:01"), alias=Alias(name=name))
            attachment = Attachment("bridge", device="br0", owns_bridge=True, at_once=at_once)
            open_taps([interface], close, {name: attachment})
            assert interface.target is not None
            assert states(netlink)[interface.target.dev or ""] == state


@pytest.mark.root
@pytest.mark.skipif(find_program("dnsmasq") is None, reason="needs dnsmasq (Debian: dnsmasq-base)")
def test_a_daemon_that_comes_back_switches_stp_on_again(tmp_path: Path) -> None:
    spanning = NAT.replace("stp='off'", "stp='on'")

    async def killed_between(networks: Networks) -> None:
        await (await networks.define(spanning)).start()
        with Netlink() as netlink:
            set_bridge(netlink, netlink.link("virbr0").index, stp=False)

    async def back(networks: Networks) -> None:
        with Netlink() as netlink:
            assert read_bridge(netlink, "virbr0").stp_by == "kernel"
        await networks.lookup_name("default").destroy()

    with new_namespace() as space:
        with_networks(space, tmp_path, killed_between)
        with_networks(space, tmp_path, back)
