"""Guaranteed rates: what is promised is never more than there is, and every class has one owner."""

from __future__ import annotations

import pytest

from kvik.conf.network_status import NetworkStatus
from kvik.conf.network_validate import load_network
from kvik.errors import ConfigUnsupported, ResourceBusy
from kvik.network.floors import break_promise, check_floor, promise

XML = "<network><name>n</name>{}<ip address='192.168.151.1' prefix='24'/></network>"
MAC = "52:54:00:00:00:0{}"


def status(bandwidth: str = "<bandwidth><inbound average='1000'/></bandwidth>") -> NetworkStatus:
    return NetworkStatus(network=load_network(XML.format(bandwidth)))


def told(one: NetworkStatus) -> tuple[dict[str, tuple[int, int]], frozenset[int], int]:
    """Port -> class and floor; the classes taken; the sum."""
    floors = {each.port: (each.number, each.floor) for each in one.port_floors}
    return floors, one.classes - {0, 1, 2}, one.floor.sum if one.floor else 0


def test_each_promise_has_a_class_of_its_own_until_it_is_broken() -> None:
    one = status()
    assert promise(one, "a", MAC.format(1), 300) and promise(one, "b", MAC.format(2), 200)
    assert told(one) == ({"a": (3, 300), "b": (4, 200)}, {3, 4}, 500)
    assert not promise(one, "a", MAC.format(1), 300) and not promise(one, "c", MAC.format(3), 0)
    assert break_promise(one, "a") and not break_promise(one, "a")
    assert promise(one, "c", MAC.format(3), 800)
    assert told(one) == ({"b": (4, 200), "c": (3, 800)}, {3, 4}, 1000)
    assert promise(one, "b", MAC.format(2), 0)
    assert told(one) == ({"c": (3, 800)}, {3}, 800)


def test_more_than_there_is_is_refused_and_the_old_promise_stands() -> None:
    one = status()
    promise(one, "a", MAC.format(1), 700)
    before = told(one)
    with pytest.raises(ResourceBusy, match=r"cannot promise 301 kB/s to 52:54:00:00:00:02: of its 1000 kB/s, 700 are"):
        promise(one, "b", MAC.format(2), 301)
    with pytest.raises(ResourceBusy, match="of its 1000 kB/s, 0 are"):
        promise(one, "a", MAC.format(1), 1001)
    assert told(one) == before
    assert promise(one, "a", MAC.format(1), 1000)
    with_peak = status("<bandwidth><inbound average='1000' peak='3000'/></bandwidth>")
    assert promise(with_peak, "a", MAC.format(1), 3000)  # as libvirt: up to the peak where there is one


def test_only_a_network_with_a_rate_and_a_bridge_of_its_own_can_promise() -> None:
    check_floor(status().document, 5, "net0")
    with pytest.raises(ConfigUnsupported, match=r"net0 is promised 5 kB/s .* has no inbound bandwidth of its own"):
        check_floor(status("<bandwidth><outbound average='1000'/></bandwidth>").document, 5, "net0")
    bridged = load_network("<network><name>lan</name><forward mode='bridge'/><bridge name='br0'/></network>")
    with pytest.raises(ConfigUnsupported, match="a bridge or device that is not its own; leave floor out"):
        check_floor(bridged, 5, "net0")
