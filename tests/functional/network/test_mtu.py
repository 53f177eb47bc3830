"""MTUs that do not fit together are found when a network starts and when a machine joins it."""

from __future__ import annotations

import logging
import os
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from functional.network.networks import NAT, with_networks
from functional.network.tap_guest import TapGuest
from functional.network.test_networks import pytestmark, space  # noqa: F401  the marks hold here too
from kvik.conf.devices.interface import Interface
from kvik.conf.domain import parse_domain
from kvik.errors import ConfigUnsupported
from kvik.host.bridge import create_bridge
from kvik.host.namespace import Namespace
from kvik.host.netlink import Netlink
from kvik.host.route import add_route
from kvik.network.attachment import resolve
from kvik.network.networks import Networks
from kvik.network.tap_changes import change_tap
from kvik.network.taps import open_taps

PUBLIC = "<network><name>public</name><forward mode='bridge'/><bridge name='br0'/></network>"


def card(where: str, mtu: int | None) -> Interface:
    size = f"<mtu size='{mtu}'/>" if mtu else ""
    xml = f"<interface {where}<mac address='52:54:00:00:00:01'/>{size}<alias name='net0'/></interface>"
    document = f"<domain type='test'><name>a</name><os><type>hvm</type></os><devices>{xml}</devices></domain>"
    (made,) = parse_domain(document).devices.interfaces
    return made


def mtu(name: str) -> int:
    with Netlink() as netlink:
        return netlink.link(name).mtu


def uplink(size: int) -> None:
    with Netlink() as netlink:
        wire = netlink.add_veth("uplink", "far")
        netlink.set_link(netlink.link("far").index, mtu=size, up=True)
        netlink.set_link(wire.index, mtu=size, up=True)
        netlink.add_address(wire.index, "203.0.113.1/24")
        add_route(netlink, "0.0.0.0/0", gateway="203.0.113.2", index=wire.index)


def test_a_way_out_that_takes_less_than_the_bridge_is_said_at_start(
    space: Namespace,  # noqa: F811
    tmp_path: Path,
) -> None:
    async def turn(networks: Networks) -> None:
        network = await networks.define(NAT)
        await network.start()
        assert network.warnings == []  # there is no way out
        await network.destroy()
        uplink(1450)
        await network.start()
        (said,) = network.warnings
        for word in ("virbr0", "1500", "uplink", "1450", "<mtu size='1450'/>", "net-edit default"):
            assert word in said
        await network.destroy()
        network = await networks.define(  # as it says
            NAT.replace("<name>", f"<uuid>{network.uuid_text}</uuid><name>").replace("<ip", "<mtu size='1450'/><ip", 1)
        )
        await network.start()
        assert network.warnings == [] and mtu("virbr0") == 1450
        await network.destroy()

    with_networks(space, tmp_path, turn)


def test_a_port_of_a_public_bridge_that_takes_less_than_the_bridge_is_said_at_start(
    space: Namespace,  # noqa: F811
    tmp_path: Path,
) -> None:
    async def turn(networks: Networks) -> None:
        uplink(1500)
        with Netlink() as netlink:
            bridge = create_bridge(netlink, "br0", mtu=1500, up=True).link
            netlink.set_link(netlink.link("uplink").index, master=bridge.index)
        network = await networks.define(PUBLIC)
        await network.start()
        assert network.warnings == []
        await network.destroy()
        with Netlink() as netlink:
            netlink.set_link(bridge.index, mtu=9000)
        await network.start()
        (said,) = network.warnings
        for word in ("br0", "9000", "uplink", "1500"):
            assert word in said
        await network.destroy()

    with_networks(space, tmp_path, turn)


def test_a_machine_brings_its_network_down_to_nothing_and_is_told(
    space: Namespace,  # noqa: F811
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def turn(networks: Networks) -> None:
        network = await networks.define(NAT)
        await network.start()
        where = "type='network'><source network='default'/>"
        with ExitStack() as close:
            small = card(where, 1400)
            attachment = resolve(small, networks)
            assert attachment is not None
            open_taps([small], close, {"net0": attachment})
            assert small.target is not None and small.target.dev is not None
            assert (mtu("virbr0"), mtu(small.target.dev)) == (1500, 1400)
            assert "MTU of 1400, bridge virbr0 1500" in caplog.text
            large = card(where, 9000)
            attachment = resolve(large, networks)
            assert attachment is not None
            before = links_here()
            with pytest.raises(ConfigUnsupported, match="MTU of 9000, bridge virbr0 only 1500"):
                open_taps([large], close, {"net0": attachment})
            assert links_here() == before
            # Moved to where it would not fit it stays where it was.
            with Netlink() as netlink:
                create_bridge(netlink, "br9", mtu=1280, up=True)
            there = resolve(card("type='bridge'><source bridge='br9'/>", 1400), networks)
            here = resolve(small, networks)
            assert there is not None
            with pytest.raises(ConfigUnsupported, match="MTU of 1400, bridge br9 only 1280"):
                change_tap(small, here, there)
            with Netlink() as netlink:
                assert netlink.link(small.target.dev).master == netlink.link("virbr0").index
                assert netlink.link(small.target.dev).up
        await network.destroy()

    with caplog.at_level(logging.WARNING, "kvik.network"):
        with_networks(space, tmp_path, turn)


def links_here() -> set[str]:
    with Netlink() as netlink:
        return {link.name for link in netlink.links()}


def test_frames_of_a_networks_whole_mtu_pass_whoever_else_is_on_it(
    space: Namespace,  # noqa: F811
    tmp_path: Path,
) -> None:
    async def turn(networks: Networks) -> None:
        network = await networks.define(NAT.replace("<ip", "<mtu size='9000'/><ip", 1))
        await network.start()
        assert mtu("virbr0") == 9000
        with ExitStack() as stack:
            one, two, small = (
                stack.enter_context(closing(TapGuest(f"52:54:00:00:00:0{number}", "virbr0"))) for number in (1, 2, 3)
            )
            with Netlink() as netlink:
                netlink.set_link(netlink.link(small.tap.name).index, mtu=1400)
            one.boot(), two.boot()
            frame = two.mac + one.mac + b"\x88\xb5" + os.urandom(9000)
            one.send(frame)
            while two.frame() != frame:
                pass
        await network.destroy()

    with_networks(space, tmp_path, turn)
