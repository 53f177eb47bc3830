"""Two daemons want one bridge or one subnet: one gets it, the other says who has it, and nothing is half done."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from functional.network.networks import NAT, with_networks
from functional.network.tap_guest import TapGuest
from functional.network.test_networks import links, pytestmark, space, tables  # noqa: F401  the marks hold here too
from functional.network.test_networks_killed import servers
from kvik.errors import AlreadyExists, KvikError, ResourceBusy
from kvik.host.namespace import Namespace
from kvik.host.netlink import Netlink
from kvik.network import bridge, runtime
from kvik.network.networks import Networks
from kvik.network.switch.session import SessionNetworks
from kvik.paths import Paths
from unit.network.switch.session import inside, session

ELSEWHERE = NAT.replace("virbr0", "virbr9")  # the same subnet on a bridge of another name


@pytest.mark.parametrize(("theirs", "kind"), [(NAT, AlreadyExists), (ELSEWHERE, ResourceBusy)])
def test_who_comes_second_is_told_who_has_it(
    space: Namespace,  # noqa: F811
    tmp_path: Path,
    theirs: str,
    kind: type[KvikError],
) -> None:
    async def turn(networks: Networks) -> None:
        network = await networks.define(NAT)
        await network.start()
        others = Networks(Paths.system(tmp_path / "second"), probing=False)
        await others.open()
        other = await others.define(theirs)
        if kind is AlreadyExists:  # the look at subnets comes first, and would do
            other.definition.ips[0].address = "10.50.0.1"
            other.definition.ips[0].dhcp = None
        with pytest.raises(kind) as caught:
            await other.start()
        assert f"kvik network default of {tmp_path}/first/run/kvik/network" in str(caught.value)
        assert caught.value.remedy
        assert not other.is_active
        assert not [*(tmp_path / "second/run/kvik/network").glob("*.xml")]
        assert links(space) == {"virbr0"} and tables(space) == {"kvik-virbr0"}
        assert network.runtime is not None and network.runtime.dnsmasq.handle is not None
        assert network.runtime.dnsmasq.handle.alive
        await network.destroy()
        if kind is ResourceBusy:  # as soon as it is free it can be had
            await other.start()
            await other.destroy()
        await others.close()

    with_networks(space, tmp_path / "first", turn)
    assert links(space) == tables(space) == set()


def at_once(space: Namespace, root: Path, documents: list[str]) -> list[str]:  # noqa: F811
    """Each document in a daemon of its own, all started together: "active", or the error's words."""
    said = [""] * len(documents)
    together = threading.Barrier(len(documents))

    def daemon(number: int) -> None:
        async def turn() -> None:
            networks = Networks(Paths.system(root / str(number)), probing=False)
            await networks.open()
            network = await networks.define(documents[number])
            together.wait(10)
            try:
                await network.start()
                said[number] = "active"
            except KvikError as error:
                said[number] = str(error)
            await networks.close()

        space.run(lambda: asyncio.run(turn()))

    threads = [threading.Thread(target=daemon, args=(number,)) for number in range(len(documents))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return said


def stop_all(space: Namespace, root: Path, count: int) -> None:  # noqa: F811
    async def stop(networks: Networks) -> None:
        for network in networks.list():
            if network.is_active:
                await network.destroy()

    for number in range(count):
        with_networks(space, root / str(number), stop)


@pytest.mark.parametrize("second", [NAT, ELSEWHERE])
def test_of_two_at_once_one_gets_it(space: Namespace, tmp_path: Path, second: str) -> None:  # noqa: F811
    for _ in range(5):
        said = at_once(space, tmp_path, [NAT, second])
        assert sorted(text == "active" for text in said) == [False, True], said
        (why,) = [text for text in said if text != "active"]
        assert "already" in why
        assert len(links(space)) == len(tables(space)) == 1
        assert len(servers(tmp_path)) == 1
        stop_all(space, tmp_path, 2)
        assert links(space) == tables(space) == set()
        assert servers(tmp_path) == []


def test_one_that_is_overtaken_between_its_look_and_its_bridge_takes_all_back(
    space: Namespace,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The other one's bridge appears at the worst moment."""
    real: Callable[..., object] = bridge.make_bridge
    tries: list[int] = []

    def overtaken(netlink: Netlink, *rest: object) -> object:
        tries.append(1)
        if len(tries) == 1:
            link = netlink.add_link("virbr9", "bridge")
            netlink.add_address(link.index, "192.168.122.1/24")
            netlink.set_link(link.index, up=True, alias="somebody's")
        return real(netlink, *rest)

    monkeypatch.setattr(runtime, "make_bridge", overtaken)

    async def turn(networks: Networks) -> None:
        network = await networks.define(NAT)
        with pytest.raises(ResourceBusy, match=r"192\.168\.122\.1/24 of virbr9 \(somebody's\) has already"):
            await network.start()
        assert not network.is_active
        assert not [*(tmp_path / "run/kvik/network").glob("*.xml")]

    with_networks(space, tmp_path, turn)
    assert links(space) == {"virbr9"} and tables(space) == set()
    assert servers(tmp_path) == []
    assert len(tries) == 1  # the second try saw it at once


def test_the_systems_network_and_a_sessions_have_one_name_and_one_subnet(
    space: Namespace,  # noqa: F811
    tmp_path: Path,
) -> None:
    own = inside("default", 5)
    theirs = NAT.replace("192.168.122.", "10.5.0.").replace("<forward mode='nat'/>", "")

    async def started(networks: Networks, *rest: object) -> None:
        network = await networks.define(own if rest else theirs)
        await network.start()

    async def plugged(networks: Networks, switches: SessionNetworks) -> None:
        await started(networks, switches)
        guest = home.plug(switches, "left", "default", "52:54:00:00:00:01")
        assert guest.boot().startswith("10.5.0.")
        assert links(space) == {"virbr0"}

    async def stopped(networks: Networks) -> None:
        network = networks.lookup_name("default")
        with closing(TapGuest("52:54:00:00:00:02", "virbr0")) as guest:
            assert guest.boot().startswith("10.5.0.")
        await network.destroy()

    with_networks(space, tmp_path / "system", started)
    with session(tmp_path) as home:
        space.run(lambda: home.turn(plugged))
        with_networks(space, tmp_path / "system", stopped)
    assert links(space) == tables(space) == set()
