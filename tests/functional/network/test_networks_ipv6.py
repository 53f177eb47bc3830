"""IPv6 of virtual networks: what is in its way is named; DHCPv6 with ranges and hosts, spoken as a client would."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from ipaddress import ip_address
from pathlib import Path

import pytest

from functional.network.networks import with_networks
from functional.network.questions import AAAA, NOERROR, ask
from functional.network.test_networks import links, pytestmark  # noqa: F401  the same needs
from kvik.host.namespace import Namespace
from kvik.host.netlink import Netlink
from kvik.network import probe
from kvik.network.dhcp6 import duid_of_mac, request, solicit
from kvik.network.networks import Networks
from kvik.network.probe import wire


@pytest.fixture
def space() -> Iterator[Namespace]:
    with Namespace() as made:
        yield made


ROUTED6 = """<network><name>routed</name><forward mode='route'/><bridge name='virbr0' stp='off' delay='0'/>
<ip family='ipv6' address='2001:db8:5::1' prefix='64'/></network>"""
SERVED6 = """<network><name>served</name><forward mode='nat'><nat ipv6='yes'/></forward>
<bridge name='virbr0' stp='off' delay='0'/><ip address='192.168.122.1' prefix='24'/>
<ip family='ipv6' address='fd00:77::1' prefix='64'><dhcp><range start='fd00:77::10' end='fd00:77::1f'/></dhcp></ip>
</network>"""
DROPS6 = {
    "a drop policy": (
        ROUTED6,
        "nft add chain inet foo fw '{ type filter hook forward priority 0; policy drop; }'",
        "a guest's IPv6 packet does not reach the world: dropped by the policy of chain fw in table inet foo",
    ),
    "a rule that drops DHCPv6": (
        SERVED6,
        "nft add chain inet foo fw '{ type filter hook input priority 0; }'"
        " && nft add rule inet foo fw udp dport 547 drop",
        "a guest gets no answer to its DHCPv6 request: dropped by rule 2 of chain fw in table inet foo",
    ),
}


@pytest.mark.parametrize("which", DROPS6)
def test_what_is_in_the_way_of_ipv6_is_named_too(
    space: Namespace, tmp_path: Path, which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    xml, command, words = DROPS6[which]

    def shell(command: str) -> None:
        subprocess.run(command, shell=True, check=True, capture_output=True)  # noqa: S602  the words a user would type

    async def turn(networks: Networks) -> None:
        network = await networks.define(xml)
        await network.start()
        assert await network.probe() == []
        await networks.run(shell, f"nft add table inet foo && {command}")
        if xml == SERVED6:
            monkeypatch.setattr(probe, "SIX_WAIT", 1.0)  # nobody will answer
        (finding,) = await network.probe()
        assert words in str(finding)
        for remedy in finding.remedies:
            await networks.run(shell, remedy)
        monkeypatch.undo()
        assert await network.probe() == []
        await network.destroy()

    with_networks(space, tmp_path, turn)
    assert links(space) == set()


SERVED4 = """<network><name>served</name><forward mode='nat'/><bridge name='virbr0' stp='off' delay='0'/>
<ip address='192.168.122.1' prefix='24'><dhcp><range start='192.168.122.2' end='192.168.122.9'/></dhcp></ip>
</network>"""


@pytest.mark.parametrize(
    ("xml", "family", "first"),  # of 86 and 28 bytes
    [
        (ROUTED6, "inet", "ip6 saddr != :: icmpv6 type nd-neighbor-solicit quota until 100 bytes drop"),
        (SERVED4, "arp", "arp operation request quota until 40 bytes drop"),
    ],
)
def test_a_question_for_a_neighbour_that_is_lost_is_no_finding(
    space: Namespace, tmp_path: Path, xml: str, family: str, first: str
) -> None:
    def nft(*words: str) -> str:
        text = words[2] if len(words) > 2 else None
        return subprocess.run(["nft", *words[:2]], input=text, capture_output=True, text=True, check=True).stdout

    async def turn(networks: Networks) -> None:
        network = await networks.define(xml)
        await network.start()
        for hook in ("input", "output"):
            rules = f"table {family} foo {{ chain fw {{ type filter hook {hook} priority 0; {first}; }}; }}"
            await networks.run(nft, "-f", "-", rules)
            assert await network.probe() == []
            assert "used" in await networks.run(nft, "list", f"table {family} foo"), "none was lost"
            await networks.run(nft, "delete", f"table {family} foo")
        await network.destroy()

    with_networks(space, tmp_path, turn)


HOSTS6 = """<network><name>six</name><bridge name='virbr0' stp='off' delay='0'/><domain name='lab'/>
<ip family='ipv6' address='fd00:6::1' prefix='64'><dhcp><range start='fd00:6::100' end='fd00:6::1ff'/>
<host id='0:3:0:1:52:54:0:0:0:1' name='byid' ip='fd00:6::11'/><host name='byname' ip='fd00:6::12'/>
</dhcp></ip></network>"""


def test_dhcpv6_lends_from_its_range_and_knows_hosts_by_id_and_by_name(space: Namespace, tmp_path: Path) -> None:
    async def turn(networks: Networks) -> None:
        network = await networks.define(HOSTS6)
        await network.start()
        with ExitStack() as close:
            guest = close.enter_context(Namespace())

            def plug() -> None:
                with Netlink() as netlink:
                    netlink.set_link(netlink.link("lo").index, up=True)  # by which the host asks itself
                    port = wire(netlink, guest, close)
                    netlink.set_link(port.index, master=netlink.link("virbr0").index)

            await networks.run(plug)

            def lent(mac: int, name: str = "") -> str:
                duid = duid_of_mac(bytes.fromhex(f"5254000000{mac:02x}"))
                offer = guest.run(lambda: solicit("eth0", duid, 20.0, name=name))
                assert offer is not None
                found = guest.run(lambda: request("eth0", duid, offer, 20.0, name=name))
                assert found == offer and found.dns == (ip_address("fd00:6::1"),)
                return str(found.address)

            assert await networks.run(lent, 1) == "fd00:6::11"
            assert await networks.run(lent, 2, "byname") == "fd00:6::12"
            anybody = ip_address(await networks.run(lent, 3, "other"))
            assert ip_address("fd00:6::100") <= anybody <= ip_address("fd00:6::1ff")
            while len(found := await networks.run(network.leases)) < 3:  # it writes them a moment after it answers
                await asyncio.sleep(0.02)
            leases = {lease.hostname: (lease.address, lease.mac) for lease in found}
            assert leases == {
                "byid": ("fd00:6::11", "52:54:00:00:00:01"),
                "byname": ("fd00:6::12", "52:54:00:00:00:02"),
                "other": (str(anybody), "52:54:00:00:00:03"),
            }
            for name, (address, _) in leases.items():
                assert await networks.run(partial(ask, f"{name}.lab", "fd00:6::1", AAAA)) == (NOERROR, address)
        await network.destroy()

    with_networks(space, tmp_path, turn)
