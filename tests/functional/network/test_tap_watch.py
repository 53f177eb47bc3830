"""Addresses of machines, heard on their interfaces, from the kernel's own ARP and ND at the guest's end of a wire."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ipaddress import IPv4Address

import pytest

from kvik.host.macvtap import create_macvtap
from kvik.host.namespace import Namespace
from kvik.host.netlink import Netlink
from kvik.network import tap_watch
from kvik.network.tap_watch import ADDRESSES_MAX, TapWatch
from netns import in_namespace, new_namespace, until

MAC, OTHER = "52:54:00:00:00:01", "52:54:00:00:00:02"
ALL = b"\xff" * 6


def arp(address: str, mac: str = MAC) -> bytes:
    own = bytes.fromhex(mac.replace(":", ""))
    head = b"\x08\x06" + b"\0\1\x08\0\6\4\0\1"
    return ALL + own + head + own + IPv4Address(address).packed + bytes(6) + IPv4Address("10.0.0.254").packed


@contextmanager
def wire() -> Iterator[tuple[Namespace, Callable[..., None]]]:
    """A guest whose card has MAC, at vnet0, and `ip` in there."""
    with new_namespace() as guest, Netlink() as netlink:
        link = netlink.add_veth("vnet0", "eth0", namespace=guest.fd)
        netlink.set_link(link.index, up=True)

        def ip(*commands: str) -> None:
            for command in commands:
                guest.run(lambda command=command: subprocess.run(["ip", *command.split()], check=True))

        ip(f"link set eth0 address {MAC}", "link set lo up", "link set eth0 up")
        yield guest, ip


def sender(guest: Namespace) -> socket.socket:
    def opened() -> socket.socket:
        made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
        made.bind(("eth0", 0))
        return made

    return guest.run(opened)


@contextmanager
def watching() -> Iterator[TapWatch]:
    watch = TapWatch()
    try:
        yield watch
    finally:
        watch.close()


@in_namespace
def test_a_machine_with_an_address_of_its_own_is_heard() -> None:
    with wire() as (guest, ip), watching() as watch:
        watch.watch("vnet0", MAC)
        assert watch.heard("vnet0") == []
        ip("addr add fd00::5/64 dev eth0")  # the kernel asks whether it may have that
        until(lambda: "fd00::5" in watch.heard("vnet0"))
        ip("addr add 10.0.0.5/24 dev eth0")
        with guest.run(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as speaks:
            speaks.sendto(b"x", ("10.0.0.9", 9))  # the kernel asks for nobody's MAC
            until(lambda: watch.heard("vnet0")[:1] == ["10.0.0.5"])
        # Who watches anew (the next daemon) hears it when it speaks again.
        watch.watch("vnet0", MAC)
        assert watch.heard("vnet0") == []
        with sender(guest) as raw:
            raw.send(arp("10.0.0.5"))
            until(lambda: watch.heard("vnet0") == ["10.0.0.5"])


@in_namespace
def test_what_others_say_in_its_name_is_not_heard() -> None:
    with wire() as (guest, _), watching() as watch, sender(guest) as raw:
        watch.watch("vnet0", MAC)
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as host:
            host.bind(("vnet0", 0))
            host.send(arp("10.6.6.6"))  # towards the machine, with its MAC
        raw.send(arp("10.7.7.7", OTHER))
        raw.send(arp("10.0.0.5"))
        until(lambda: "10.0.0.5" in watch.heard("vnet0"))
        assert not {"10.6.6.6", "10.7.7.7"} & {*watch.heard("vnet0")}


@in_namespace
def test_a_machine_that_claims_without_end_costs_little_and_is_heard_again() -> None:
    with wire() as (guest, _), watching() as watch, sender(guest) as raw:
        watch.watch("vnet0", MAC)
        for number in range(20_000):
            raw.send(arp(f"10.{number >> 14}.{number >> 7 & 127}.{number & 127 | 128}"))
        heeded = watch._watched["vnet0"].socket  # the kernel counts what nobody took
        passed, dropped = struct.unpack("=II", heeded.getsockopt(263, 6, 8))  # SOL_PACKET, PACKET_STATISTICS
        assert dropped > passed / 2 > 5_000
        assert len(watch.heard("vnet0")) <= ADDRESSES_MAX
        until(lambda: raw.send(arp("10.0.0.5")) > 0 and "10.0.0.5" in watch.heard("vnet0"))
        assert len(watch.heard("vnet0")) <= ADDRESSES_MAX


@in_namespace
def test_an_interface_that_goes_down_is_heard_again_and_one_that_is_gone_is_forgotten() -> None:
    with wire() as (guest, _), watching() as watch, Netlink() as netlink, sender(guest) as raw:
        watch.watch("vnet0", MAC)
        heeded = watch._watched["vnet0"].socket
        index = netlink.link("vnet0").index
        netlink.set_link(index, up=False)
        netlink.set_link(index, up=True)
        until(lambda: raw.send(arp("10.0.0.5")) > 0 and watch.heard("vnet0") == ["10.0.0.5"])
        netlink.delete_link(index)
        until(lambda: watch.heard("vnet0") == [])
        until(lambda: heeded.fileno() == -1)


@in_namespace
def test_an_interface_that_is_deleted_while_it_is_down_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel tells a socket of the first alone (packet_notifier)."""
    monkeypatch.setattr(tap_watch, "LOOK", 0.05)
    with wire() as (guest, _), watching() as watch, Netlink() as netlink, sender(guest) as raw:
        watch.watch("vnet0", MAC)
        until(lambda: raw.send(arp("10.0.0.5")) > 0 and watch.heard("vnet0") == ["10.0.0.5"])
        index = netlink.link("vnet0").index
        netlink.set_link(index, up=False)
        until(lambda: len(watch._down) == 1)
        assert watch.heard("vnet0") == ["10.0.0.5"]
        netlink.delete_link(index)
        until(lambda: watch.heard("vnet0") == [] and not watch._down)


@in_namespace
def test_one_that_is_up_again_is_not_looked_at_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tap_watch, "LOOK", 0.05)
    with wire(), watching() as watch, Netlink() as netlink:
        watch.watch("vnet0", MAC)
        index = netlink.link("vnet0").index
        netlink.set_link(index, up=False)
        until(lambda: len(watch._down) == 1)
        netlink.set_link(index, up=True)
        until(lambda: not watch._down)


@in_namespace
def test_on_a_macvtap_what_the_machine_sends_goes_out() -> None:
    with new_namespace() as world, Netlink() as netlink, watching() as watch:
        below = netlink.add_veth("v0", "eth0", namespace=world.fd)
        netlink.set_link(below.index, up=True)
        world.run(lambda: subprocess.run(["ip", "link", "set", "eth0", "up"], check=True))
        tap = create_macvtap("v0", "bridge", name="macvtap0", mac=MAC)
        netlink.set_link(netlink.link("macvtap0").index, up=True)
        watch.watch("macvtap0", MAC, macvtap=True)
        frame = bytes(12) + arp("10.0.0.5").ljust(60, b"\0")  # a header of virtio-net first
        until(lambda: os.write(tap.fds[0], frame) > 0 and watch.heard("macvtap0") == ["10.0.0.5"])
        tap.close()
