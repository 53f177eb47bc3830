"""Macvtaps: their queues carry frames, wherever their device node has to come from, and they go when they are told."""

from __future__ import annotations

import ctypes
import os
import socket
from pathlib import Path

import pytest

from kvik.errors import HostError
from kvik.host.macvtap import create_macvtap, delete_macvtap, free_name
from kvik.host.netlink import Netlink
from kvik.vmm.backends.tap import TapBackend
from netns import in_namespace, until

GUEST, OTHER = "52:54:00:00:00:05", "52:54:00:00:00:06"
FRAME = bytes.fromhex("ffffffffffff 525400000005 88b5") + b"from the guest".ljust(50)
HEADER = bytes(12)


def pair(netlink: Netlink) -> socket.socket:
    """An interface `v0` of this host, and what comes out at the other end of its wire."""
    netlink.add_veth("v0", "v1", up=True)
    world = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x88B5))
    world.bind(("v1", 0x88B5))
    world.settimeout(10)
    return world


def carries(fd: int, world: socket.socket) -> None:
    """Frames out and in by one queue of the guest's side."""
    os.write(fd, HEADER + FRAME)
    assert world.recv(2048)[: len(FRAME)] == FRAME
    answer = bytes.fromhex("525400000005 525400000099 88b5") + b"to the guest".ljust(50)
    world.send(answer)
    found: list[bytes] = []

    def arrived() -> bool:
        try:
            found.append(os.read(fd, 4096)[12:])
        except BlockingIOError:
            return False
        return answer in found

    until(arrived)


@in_namespace
def test_frames_pass_both_ways_and_it_is_there_until_it_is_deleted() -> None:
    with Netlink() as netlink:
        world = pair(netlink)
        for mode in ("bridge", "private", "vepa", "passthrough"):
            tap = create_macvtap("v0", mode, name=free_name(netlink, set()), mac=GUEST)
            assert (tap.name, netlink.link("macvtap0").mac) == ("macvtap0", GUEST)
            carries(tap.fds[0], world)
            tap.close()
            assert netlink.link("macvtap0").kind == "macvtap"  # a killed machine leaves it
            assert delete_macvtap(netlink, "macvtap0", GUEST)
            assert not delete_macvtap(netlink, "macvtap0", GUEST)
        world.close()


@in_namespace
def test_without_a_node_in_dev_and_without_our_sysfs_its_device_is_found_all_the_same() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.unshare(0x20000) == 0  # CLONE_NEWNS, of this thread alone, which ends with the test
    assert libc.mount(None, b"/", None, 0x44000, None) == 0  # MS_REC | MS_PRIVATE
    assert libc.mount(b"none", b"/dev", b"tmpfs", 0, None) == 0
    assert libc.mount(b"none", b"/sys", b"tmpfs", 0, None) == 0
    with Netlink() as netlink:
        world = pair(netlink)
        tap = create_macvtap("v0", "bridge", name="macvtap0", mac=GUEST)
        assert not Path(f"/dev/tap{tap.index}").exists()
        carries(tap.fds[0], world)
        tap.close()
        world.close()
        # One of another namespace's, or anybody's, by that name is not opened.
        index = netlink.add_macvtap("probe", netlink.link("v0").index, "bridge").index + 1
        os.mknod(f"/dev/tap{index}", 0o20600, os.makedev(1, 3))
        tap = create_macvtap("v0", "bridge", name="macvtap1", mac=OTHER)
        assert tap.index == index
        assert os.fstat(tap.fds[0]).st_rdev != os.makedev(1, 3)
        tap.close()


@in_namespace
def test_each_queue_is_a_descriptor_and_kvik_vmm_takes_them() -> None:
    with Netlink() as netlink:
        world = pair(netlink)
        tap = create_macvtap("v0", "bridge", name="macvtap0", mac=GUEST, queues=4)
        backend = TapBackend(tap.fds)
        assert (backend.name, backend.pairs) == ("macvtap0", 4)
        backend.set_pairs(2)
        backend.send(1, [memoryview(HEADER + FRAME)])
        assert world.recv(2048)[: len(FRAME)] == FRAME
        assert backend.ended() == ""
        backend.set_pairs(1)
        carries(backend.fd(0), world)
        netlink.delete_link(tap.index)
        assert "deleted" in backend.ended()
        backend.close()
        world.close()


@in_namespace
def test_passthrough_has_the_interface_for_itself_and_gives_its_address_back() -> None:
    with Netlink() as netlink:
        pair(netlink).close()
        before = netlink.link("v0").mac
        tap = create_macvtap("v0", "passthrough", name="macvtap0", mac=GUEST)
        assert netlink.link("v0").mac == GUEST
        with pytest.raises(HostError, match=r"mode passthrough needs v0 for one machine alone"):
            create_macvtap("v0", "passthrough", name="macvtap1", mac=OTHER)
        tap.close()
        assert delete_macvtap(netlink, "macvtap0", GUEST)
        assert netlink.link("v0").mac == before


@in_namespace
def test_what_cannot_be_made_leaves_nothing_and_says_why() -> None:
    with Netlink() as netlink:
        pair(netlink).close()
        bridge = netlink.add_link("br0", "bridge")
        port = netlink.add_veth("v2", "v3")
        netlink.set_link(port.index, master=bridge.index)
        before = {link.name for link in netlink.links()}
        for lower, more, words in (
            ("v2", {}, "it is a port of br0; attach to that bridge"),
            ("nothing", {}, "nothing"),
            ("v0", {"mtu": 9000}, "v0 has only 1500; give the interface at most 1500"),
            ("v0", {"queues": 257}, "1 to 256"),
            ("v0", {"name": "much-too-long-a-name"}, "no name"),
            ("v0", {"mac": "01:00:5e:00:00:01"}, "macvtap0"),
        ):
            with pytest.raises(HostError, match=words):
                create_macvtap(lower, "bridge", **{"name": "macvtap0", "mac": GUEST} | more)
            assert {link.name for link in netlink.links()} == before
        # Somebody else's of that name is not ours to delete.
        netlink.add_macvtap("macvtap0", netlink.link("v0").index, "bridge", mac=OTHER)
        assert not delete_macvtap(netlink, "macvtap0", GUEST)
        assert not delete_macvtap(netlink, "v0", netlink.link("v0").mac)
        assert free_name(netlink, {"macvtap1"}) == "macvtap2"
