"""A network that has no address left says so, and what to do; who has one keeps it, and one that is freed is given."""

from __future__ import annotations

import logging
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from functional.network.networks import NAT, with_networks
from functional.network.tap_guest import TapGuest
from functional.network.test_networks import pytestmark, space  # noqa: F401  the marks hold here too
from kvik.conf.enums import NetworkUpdateCommand, NetworkUpdateFlags, NetworkUpdateSection
from kvik.host.namespace import Namespace
from kvik.network.networks import Networks

RESERVED = "52:54:00:00:00:0f"
SMALL = NAT.replace(
    "<range start='192.168.122.2' end='192.168.122.254'/>",
    "<range start='192.168.122.10' end='192.168.122.12'/>"
    f"<host mac='{RESERVED}' ip='192.168.122.12'/><host mac='52:54:00:00:00:0e' ip='192.168.122.99'/>",
)


def test_it_is_said_leases_go_on_and_a_freed_address_is_given(
    space: Namespace,  # noqa: F811
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def turn(networks: Networks) -> None:
        network = await networks.define(SMALL)
        await network.start()
        with ExitStack() as stack:
            one, two, three, reserved, outside = (
                stack.enter_context(closing(TapGuest(mac, "virbr0")))
                for mac in (*(f"52:54:00:00:00:0{n}" for n in (1, 2, 3)), RESERVED, "52:54:00:00:00:0e")
            )
            first = one.boot()
            assert network.messages() == []
            assert {first, two.boot()} == {"192.168.122.10", "192.168.122.11"}
            assert not three.wants_address(0.5)
            (said,) = network.messages()
            assert said.startswith("all 3 addresses")
            assert "net-dhcp-leases default" in said and "net-update" in said
            network.leases()
            assert [record.message for record in caplog.records if "gets none" in record.message] == [
                f"network default: {said}"
            ]
            # Leases are renewed, and what is kept for a card is given to it, inside of the range and outside.
            assert one.boot() == first
            assert (reserved.boot(), outside.boot()) == ("192.168.122.12", "192.168.122.99")
            two.release(two.gateway)
            assert three.boot() not in (first, "")
            assert not two.wants_address(0.5)
            # As the message advises.
            await network.update(
                NetworkUpdateCommand.ADD_LAST, NetworkUpdateSection.IP_DHCP_RANGE, -1,
                "<range start='192.168.122.20' end='192.168.122.29'/>",
                NetworkUpdateFlags.LIVE | NetworkUpdateFlags.CONFIG,
            )  # fmt: skip
            assert network.messages() == []
            assert two.boot().startswith("192.168.122.2")
            assert one.boot() == first
        await network.destroy()

    with caplog.at_level(logging.WARNING, "kvik.network"):
        with_networks(space, tmp_path, turn)


def test_a_network_that_starts_without_a_free_address_is_not_said_to_be_cut_off(
    space: Namespace,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kvik.network.network.PROBE_DELAY", 0.0)
    monkeypatch.setattr("kvik.network.network.probe", lambda *rest: pytest.fail("nobody would be answered"))

    async def turn(networks: Networks) -> None:
        network = await networks.define(SMALL)
        for _ in range(2):  # the second start finds the leases of the first
            await network.start()
            with (
                closing(TapGuest("52:54:00:00:00:01", "virbr0")) as one,
                closing(TapGuest("52:54:00:00:00:02", "virbr0")) as two,
            ):
                one.boot(), two.boot()
            await networks.run(network.leases)
            while networks._tasks:
                await next(iter(networks._tasks))
            (said,) = network.messages()
            assert said.startswith("all 3")
            await network.destroy()

    with_networks(space, tmp_path, turn)
