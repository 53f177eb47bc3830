"""Links, addresses and taps, in a network namespace of the test's own."""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections.abc import Callable
from typing import TypeVar

import pytest

from kvik.errors import HostError
from kvik.host import netlink as nl
from kvik.host.netlink import Netlink
from kvik.host.tap import create_tap

T = TypeVar("T")
_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


def isolated(work: Callable[[], T]) -> T:
    """Run in a thread with its own network namespace, which ends with the thread."""
    if os.geteuid() != 0:
        pytest.skip("needs root: makes a network namespace")
    results: list[T] = []
    errors: list[BaseException] = []

    def body() -> None:
        if _libc.unshare(_CLONE_NEWNET):
            errors.append(OSError(ctypes.get_errno(), "unshare"))
            return
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join(30)
    if errors:
        if isinstance(errors[0], OSError) and errors[0].strerror == "unshare":
            pytest.skip("no network namespaces here")
        raise errors[0]
    return results[0]


def need_tun() -> None:
    if not os.path.exists("/dev/net/tun"):
        pytest.skip("needs /dev/net/tun")


def test_loopback_is_listed_with_its_figures() -> None:
    with Netlink() as netlink:
        lo = netlink.link("lo")
        assert lo.name == "lo" and lo.index == 1 and lo.mtu == 65536 and lo.mac == "00:00:00:00:00:00"
        assert netlink.link(1).name == "lo"
        assert "lo" in [link.name for link in netlink.links()]
        with pytest.raises(HostError) as raised:
            netlink.link("kvik-none")
        assert raised.value.errno == errno.ENODEV
        assert netlink.link("lo").name == "lo"  # the socket is still good after a refusal


@pytest.mark.parametrize("name", ["", "a/b", "a b", "..", "x" * 16, "a\nb", "a:b", "né"])
def test_bad_names_never_reach_the_kernel(name: str) -> None:
    with pytest.raises(HostError, match="no name"):
        nl.check_name(name)


@pytest.mark.root
def test_links_are_made_changed_and_deleted() -> None:
    def work() -> None:
        with Netlink() as netlink:
            bridge = netlink.add_link("br0", "bridge")
            assert bridge.kind == "bridge" and not bridge.up
            port = netlink.add_link("d0", "veth")
            netlink.set_link(port.index, up=True, master=bridge.index, mtu=1400, mac="02:00:00:00:00:01")
            port = netlink.link("d0")
            assert (port.up, port.master, port.mtu, port.mac) == (True, bridge.index, 1400, "02:00:00:00:00:01")
            netlink.set_link(port.index, master=0, up=False)
            assert (netlink.link("d0").master, netlink.link("d0").up) == (0, False)
            with pytest.raises(HostError) as raised:
                netlink.add_link("br0", "bridge")
            assert raised.value.errno == errno.EEXIST
            with pytest.raises(HostError):
                netlink.set_link(port.index, mac="02:00")
            netlink.delete_link(bridge.index)
            assert "br0" not in [link.name for link in netlink.links()]

    isolated(work)


@pytest.mark.root
def test_addresses_are_added_listed_and_deleted() -> None:
    def work() -> None:
        with Netlink() as netlink:
            index = netlink.add_link("d0", "veth").index
            netlink.set_link(index, up=True)
            netlink.add_address(index, "192.0.2.1/24")
            netlink.add_address(index, "2001:db8::1/64")
            found = {str(address.interface) for address in netlink.addresses(index)}
            assert {"192.0.2.1/24", "2001:db8::1/64"} <= found
            assert all(address.index == index for address in netlink.addresses(index))
            netlink.delete_address(index, "192.0.2.1/24")
            assert "192.0.2.1/24" not in {str(address.interface) for address in netlink.addresses()}
            with pytest.raises(HostError):
                netlink.add_address(index, "not an address")

    isolated(work)


@pytest.mark.root
def test_hundreds_of_links_are_listed_whole() -> None:
    def work() -> None:
        with Netlink() as netlink:
            for number in range(300):
                netlink.add_link(f"d{number}", "veth")
            names = {link.name for link in netlink.links()}
            assert {f"d{number}" for number in range(300)} <= names

    isolated(work)


@pytest.mark.root
def test_the_kernels_own_words_are_in_the_error() -> None:
    def work() -> None:
        with Netlink() as netlink, pytest.raises(HostError, match="Unknown device type"):
            netlink.add_link("x0", "kvik-no-such-kind")

    isolated(work)


@pytest.mark.root
def test_a_tap_is_up_in_its_bridge_and_goes_with_its_descriptor() -> None:
    need_tun()

    def work() -> None:
        with Netlink() as netlink:
            bridge = netlink.add_link("br0", "bridge")
            netlink.set_link(bridge.index, up=True, mtu=1400)
            tap = create_tap(bridge="br0", mac="fe:00:00:00:00:01")
            assert tap.name == "vnet0"
            link = netlink.link(tap.index)
            assert (link.kind, link.master, link.up, link.mtu) == ("tun", bridge.index, True, 1400)
            assert link.mac == "fe:00:00:00:00:01"
            second = create_tap(queues=4)
            assert second.name == "vnet1" and len(second.fds) == 4
            second.close()
            tap.close()
            assert [link.name for link in netlink.links() if link.kind == "tun"] == []

    isolated(work)


@pytest.mark.root
def test_a_tap_that_cannot_be_finished_leaves_nothing() -> None:
    need_tun()

    def work() -> None:
        before = set(os.listdir("/proc/self/fd"))
        with Netlink() as netlink:
            netlink.add_link("d0", "veth")
            for bridge in ("missing", "d0"):
                with pytest.raises(HostError, match=bridge):
                    create_tap("t0", bridge=bridge)
            assert "t0" not in [link.name for link in netlink.links()]
            tap = create_tap("t0")
            with pytest.raises(HostError, match="in use"):
                create_tap("t0")
            tap.close()
        assert set(os.listdir("/proc/self/fd")) <= before

    isolated(work)
