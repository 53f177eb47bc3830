"""A dnsmasq that does not stay: started again and again, more and more seldom, until it does."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from functional.network.networks import NAT, with_networks
from functional.network.tap_guest import TapGuest
from functional.network.test_networks import links, pytestmark, space, tables, until  # noqa: F401  the marks hold too
from functional.network.test_networks_killed import servers
from kvik.host.namespace import Namespace
from kvik.host.process import ProcessHandle
from kvik.network import network as module
from kvik.network.networks import NetworkObject, Networks


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(module, "PAUSE_FIRST", 0.01)
    monkeypatch.setattr(module, "PAUSE_LAST", 0.1)
    yield


def replaced(network: NetworkObject, gone: ProcessHandle) -> bool:
    return not gone.alive and network.runtime is not None and network.runtime.handle is not gone


def test_one_that_dies_each_time_is_said_and_comes_back_with_its_leases(
    space: Namespace,  # noqa: F811
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def turn(networks: Networks) -> None:
        network = await networks.define(NAT)
        await network.start()
        assert network.runtime is not None
        with closing(TapGuest("52:54:00:00:00:01", "virbr0")) as guest:
            address = guest.boot()
            for _ in range(8):  # something kills it each time it is there
                await until(lambda: network._unwatch is not None and network._serves)
                handle = network.runtime.handle
                assert handle is not None
                handle.kill()
                await until(partial(replaced, network, handle))
            await until(lambda: network._unwatch is not None and network._serves)
            (said,) = network.messages()
            assert said.startswith("no DHCP and DNS for now") and "5 times" in said
            assert caplog.text.count("no DHCP and DNS for now") == 1
            assert caplog.text.count("dnsmasq is started again") == 4
            monkeypatch.setattr(module, "STEADY", 0.0)  # as if a minute had passed
            assert network.messages() == []
            assert [lease.address for lease in network.leases()] == [address]
            assert guest.boot() == address
            assert len(servers(tmp_path)) == 1
        await network.destroy()

    with caplog.at_level(logging.WARNING, "kvik.network"):
        with_networks(space, tmp_path, turn)
    assert links(space) == tables(space) == set() and servers(tmp_path) == []


def test_one_that_cannot_start_does_as_soon_as_its_cause_is_gone(
    space: Namespace,  # noqa: F811
    tmp_path: Path,
) -> None:
    async def turn(networks: Networks) -> None:
        network = await networks.define(NAT)
        await network.start()
        assert network.runtime is not None and network.runtime.handle is not None
        with closing(TapGuest("52:54:00:00:00:01", "virbr0")) as guest:
            address = guest.boot()
            handle = network.runtime.handle
            with closing(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as thief:
                async with network.job("hold"):  # or a new one would be there first
                    handle.kill()
                    await until(lambda: taken(thief))
                await until(lambda: any("no DHCP" in text for text in network.messages()))
                (said,) = network.messages()
                assert "in use" in said  # in dnsmasq's own words
                assert servers(tmp_path) == []
            await until(lambda: network._serves)
            assert guest.boot() == address
        await network.destroy()

    with_networks(space, tmp_path, turn)
    assert links(space) == tables(space) == set() and servers(tmp_path) == []


def taken(thief: socket.socket) -> bool:
    """Whether it has the port of the network's DNS."""
    try:
        thief.bind(("192.168.122.1", 53))
        thief.listen()
    except OSError:
        return False
    return True


def test_a_network_that_stops_meanwhile_is_not_served_again(space: Namespace, tmp_path: Path) -> None:  # noqa: F811
    async def turn(networks: Networks) -> None:
        network = await networks.define(NAT)
        for _ in range(3):
            await network.start()
            assert network.runtime is not None and network.runtime.handle is not None
            network.runtime.handle.kill()
            await network.destroy()
        await network.start()
        await until(lambda: network._serves)
        assert len(servers(tmp_path)) == 1
        await network.destroy()

    with_networks(space, tmp_path, turn)
    assert servers(tmp_path) == []
