"""What a network stands on and did not make is unplugged: before its start that is an error, or said; then, said."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from functional.network.networks import NAT, with_networks
from functional.network.test_networks import links, pytestmark, space, tables, until  # noqa: F401  the marks hold too
from kvik.errors import OperationInvalid
from kvik.host.bridge import create_bridge
from kvik.host.namespace import Namespace
from kvik.host.netlink import Netlink
from kvik.host.netlink_attributes import u32_attribute
from kvik.network.networks import Networks

IFLA_VXLAN_ID = 1
ROUTED = NAT.replace("<forward mode='nat'/>", "<forward mode='nat' dev='nic0'/>")
BRIDGED = "<network><name>lan</name><forward mode='bridge'/><bridge name='br0'/></network>"
DIRECT = "<network><name>lan</name><forward mode='bridge'><interface dev='nic0'/></forward></network>"


def plug() -> None:
    """A card of the host's: a VXLAN, which leads out of the host and needs no hardware."""
    with Netlink() as netlink:
        nic = netlink.add_link("nic0", "vxlan", data=u32_attribute(IFLA_VXLAN_ID, 5))
        netlink.set_link(nic.index, up=True)


def bridge_it() -> None:
    with Netlink() as netlink:
        made = create_bridge(netlink, "br0", up=True).link
        netlink.set_link(netlink.link("nic0").index, master=made.index)


def unplug(name: str = "nic0") -> None:
    with Netlink() as netlink:
        netlink.delete_link(netlink.link(name).index)


@pytest.mark.parametrize(
    ("document", "part"),
    [
        (ROUTED, "reach the world"),
        (DIRECT, "cards stand"),
        (BRIDGED, "a port of its bridge br0"),
        (BRIDGED, "br0, its"),
    ],
    ids=["routed", "direct", "port", "bridge"],
)
def test_while_it_is_active_it_is_said_and_the_network_can_be_stopped(
    space: Namespace,  # noqa: F811
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    document: str,
    part: str,
) -> None:
    gone = "br0" if part == "br0, its" else "nic0"

    async def turn(networks: Networks) -> None:
        plug()
        bridge_it() if document is BRIDGED else None
        network = await networks.define(document)
        await network.start()
        assert network.messages() == []
        unplug(gone)
        await until(lambda: "is not there" in caplog.text)
        (said,) = network.messages()
        assert f"interface {gone}," in said and part in said
        assert network.is_active
        await network.destroy()
        assert not network.is_active
        assert not [*(tmp_path / "run/kvik/network").glob("*.xml")]

    with caplog.at_level(logging.WARNING, "kvik.network"):
        with_networks(space, tmp_path, turn)
    assert links(space) == {"br0", "nic0"} - {gone} - (set() if document is BRIDGED else {"br0"})
    assert tables(space) == set()


@pytest.mark.parametrize(("document", "gone"), [(DIRECT, "nic0"), (BRIDGED, "br0")])
def test_unplugged_while_it_is_stopped_the_next_start_names_it(
    space: Namespace,  # noqa: F811
    tmp_path: Path,
    document: str,
    gone: str,
) -> None:
    async def turn(networks: Networks) -> None:
        plug()
        bridge_it() if document is BRIDGED else None
        network = await networks.define(document)
        await network.start()
        await network.destroy()
        unplug(gone)
        with pytest.raises(OperationInvalid, match=rf"network 'lan' is to use (interface|bridge) {gone}") as caught:
            await network.start()
        assert caught.value.remedy
        assert not network.is_active
        assert not [*(tmp_path / "run/kvik/network").glob("*.xml")]

    with_networks(space, tmp_path, turn)


def test_a_routed_network_starts_without_its_way_out_says_so_and_has_it_when_it_is_plugged(
    space: Namespace,  # noqa: F811
    tmp_path: Path,
) -> None:
    async def turn(networks: Networks) -> None:
        network = await networks.define(ROUTED)
        await network.start()
        (said,) = network.messages()
        assert said == "interface nic0, by which its machines reach the world, is not there"
        plug()
        assert network.messages() == []
        await network.destroy()

    with_networks(space, tmp_path, turn)
    assert links(space) == {"nic0"}


def test_the_next_daemon_says_what_was_unplugged_while_there_was_none(
    space: Namespace,  # noqa: F811
    tmp_path: Path,
) -> None:
    async def first(networks: Networks) -> None:
        plug()
        network = await networks.define(ROUTED)
        await network.start()

    async def second(networks: Networks) -> None:
        network = networks.lookup_name("default")
        (said,) = network.messages()
        assert "interface nic0" in said
        await network.destroy()

    with_networks(space, tmp_path, first)
    space.run(unplug)
    with_networks(space, tmp_path, second)
    assert links(space) == set() and tables(space) == set()
