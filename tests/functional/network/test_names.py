"""A machine's name has no AAAA record where it has no IPv6 address: that is an empty answer and no error."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from functional.network.networks import NAT, with_networks
from functional.network.questions import AAAA, MX, NOERROR, NXDOMAIN, REFUSED, A, ask
from kvik.host.namespace import Namespace
from kvik.host.netlink import Netlink
from kvik.host.process import find_program
from kvik.network.networks import Networks
from kvik.network.store import Store
from kvik.paths import Paths

pytestmark = [
    pytest.mark.functional,
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: bridges"),
    pytest.mark.skipif(find_program("dnsmasq") is None, reason="needs dnsmasq (Debian: dnsmasq-base)"),
]
LEASE = "4102444800 52:54:00:01:02:03 192.168.122.77 web *\n"
GATEWAY = "192.168.122.1"
HOSTS = "<dns>{}<host ip='192.168.122.9'><hostname>fixed.example</hostname></host></dns>"
DEAD = "<forwarder addr='192.0.2.99'/>"  # a name server that cannot be reached


@pytest.fixture
def space() -> Iterator[Namespace]:
    def raise_loopback() -> None:
        with Netlink() as netlink:
            netlink.set_link(netlink.link("lo").index, up=True)

    with Namespace() as made:
        made.run(raise_loopback)
        yield made


def answers(space: Namespace, root: Path, document: str, *questions: tuple[str, int]) -> list[tuple[int, str] | None]:
    """What the network's DNS says with a machine `web` that has a lease."""

    async def turn(networks: Networks) -> list[tuple[int, str] | None]:
        network = await networks.define(document)
        leases = Store(Paths.system(root)).data / "default.leases"
        leases.parent.mkdir(parents=True, exist_ok=True)
        leases.write_text(LEASE)
        await network.start()
        told = [await networks.run(lambda one=one: ask(one[0], GATEWAY, one[1], tries=1)) for one in questions]
        await network.destroy()
        return told

    return with_networks(space, root, turn)


@pytest.mark.parametrize("world", ["nobody to ask", "nobody within reach"])
def test_a_name_without_aaaa_is_an_empty_answer_whatever_the_world_says(
    space: Namespace, tmp_path: Path, world: str
) -> None:
    document = NAT.replace("<ip ", f"<domain name='lan'/>{HOSTS.format(DEAD if 'reach' in world else '')}<ip ")
    if world == "nobody to ask":
        document = document.replace("<forward mode='nat'/>", "")
    told = answers(
        space, tmp_path, document, ("web", A), ("web", AAAA), ("web.lan", A), ("web.lan", AAAA), ("web.lan", MX),
        ("fixed.example", A), ("nobody", AAAA), ("nobody.lan", A),
    )  # fmt: skip
    here = (NOERROR, "192.168.122.77")
    assert told[:5] == [here, (NOERROR, ""), here, (NOERROR, ""), (NOERROR, "")]
    assert told[5:] == [(NOERROR, "192.168.122.9"), (NXDOMAIN, ""), (NXDOMAIN, "")]
    if world == "nobody to ask":
        (own, other) = answers(space, tmp_path / "2", document, ("fixed.example", AAAA), ("example.org", A))
        assert own == (NOERROR, "")
        assert other == (REFUSED, ""), "not NXDOMAIN: a guest's other name server may know"


def test_who_wants_names_forwarded_says_so(space: Namespace, tmp_path: Path) -> None:
    document = NAT.replace("<ip ", f"<domain name='lan' localOnly='no'/><dns forwardPlainNames='yes'>{DEAD}</dns><ip ")
    told = answers(space, tmp_path, document, ("nobody", A), ("nobody.lan", A))
    assert told == [(REFUSED, ""), (REFUSED, "")], "asked outside, to where there is no way from here"
