"""Virtual networks on a real kernel with a real dnsmasq, each test in a network namespace of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from functional.network.networks import ISOLATED, NAT, with_networks
from kvik.host import nftables
from kvik.host.bridge import read_bridge
from kvik.host.namespace import Namespace
from kvik.host.netlink import Netlink
from kvik.host.process import find_program
from kvik.network.networks import Networks

pytestmark = [
    pytest.mark.functional,
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: bridges"),
    pytest.mark.skipif(find_program("dnsmasq") is None, reason="needs dnsmasq (Debian: dnsmasq-base)"),
]


@pytest.fixture
def space() -> Iterator[Namespace]:
    with Namespace() as made:
        yield made


def links(space: Namespace) -> set[str]:
    def look() -> set[str]:
        with Netlink() as netlink:
            return {link.name for link in netlink.links()} - {"lo"}

    return space.run(look)


def tables(space: Namespace) -> set[str]:
    found = space.run(lambda: nftables.run([{"list": {"tables": None}}]))
    return {item["table"]["name"] for item in found}


def test_a_nat_network_is_made_and_taken_away_without_a_trace(space: Namespace, tmp_path: Path) -> None:
    async def turn(networks: Networks) -> None:
        network = await networks.define(NAT)
        assert not network.is_active and network.persistent
        assert await network.start() is True
        assert await network.start() is False  # idempotent
        assert network.is_active and network.bridge_name == "virbr0"
        assert network.runtime is not None and network.runtime.dnsmasq.handle is not None
        dnsmasq = network.runtime.dnsmasq.handle
        assert dnsmasq.alive
        with Netlink() as netlink:
            bridge = read_bridge(netlink, "virbr0")
            assert bridge.link.up and bridge.link.mac == network.document.mac.address
            assert [str(address.interface) for address in netlink.addresses(bridge.link.index)] == ["192.168.122.1/24"]
        assert Path("/proc/sys/net/ipv4/ip_forward").read_text().strip() == "1"
        assert (tmp_path / "run/kvik/network/default.xml").exists()
        await network.destroy()
        assert not network.is_active and not dnsmasq.alive
        assert not (tmp_path / "run/kvik/network/default.xml").exists()

    with_networks(space, tmp_path, turn)
    assert links(space) == set()
    assert tables(space) == set()


def test_an_isolated_network_serves_but_forwards_nothing(space: Namespace, tmp_path: Path) -> None:
    async def turn(networks: Networks) -> None:
        network = await networks.create_xml(ISOLATED)
        assert not network.persistent and network.is_active
        assert Path("/proc/sys/net/ipv4/ip_forward").read_text().strip() == "0"
        await network.destroy()
        assert networks.list() == []

    with_networks(space, tmp_path, turn)
    assert links(space) == tables(space) == set()
