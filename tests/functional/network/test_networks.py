"""Virtual networks on a real kernel with a real dnsmasq, each test in a network namespace of its own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from functional.network.networks import ISOLATED, NAT, with_networks
from kvik.conf.enums import (
    NetworkEventLifecycleType,
    NetworkUpdateCommand,
    NetworkUpdateFlags,
    NetworkUpdateSection,
)
from kvik.errors import AlreadyExists, HostError, KvikError, MissingPackages, OperationInvalid, ResourceBusy
from kvik.host import nftables
from kvik.host.bridge import read_bridge
from kvik.host.namespace import Namespace
from kvik.host.netlink import Netlink
from kvik.host.process import find_program
from kvik.host.route import routes
from kvik.host.traffic import queues
from kvik.network import nat
from kvik.network.default import ensure_default
from kvik.network.dnsmasq import Dnsmasq
from kvik.network.networks import Networks
from kvik.network.runtime import Runtime
from kvik.paths import Paths

pytestmark = [
    pytest.mark.functional,
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: bridges"),
    pytest.mark.skipif(find_program("dnsmasq") is None, reason="needs dnsmasq (Debian: dnsmasq-base)"),
]

# Of the namespace that reads it. A new one has the host's setting, which may be either: a test begins with its own.
FORWARDING = Path("/proc/sys/net/ipv4/ip_forward")


@pytest.fixture
def space() -> Iterator[Namespace]:
    with Namespace() as made:
        yield made


def links(space: Namespace) -> set[str]:
    def look() -> set[str]:
        with Netlink() as netlink:
            return {link.name for link in netlink.links()} - {"lo"}

    return space.run(look)


def tables_here() -> set[str]:
    return {item["table"]["name"] for item in nftables.run([{"list": {"tables": None}}])}


def tables(space: Namespace) -> set[str]:
    return space.run(tables_here)


def test_a_nat_network_is_made_and_taken_away_without_a_trace(space: Namespace, tmp_path: Path) -> None:
    async def turn(networks: Networks) -> None:
        FORWARDING.write_text("0")
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
        assert FORWARDING.read_text().strip() == "1"
        assert (tmp_path / "run/kvik/network/default.xml").exists()
        await network.destroy()
        assert not network.is_active and not dnsmasq.alive
        assert not (tmp_path / "run/kvik/network/default.xml").exists()

    with_networks(space, tmp_path, turn)
    assert links(space) == set()
    assert tables(space) == set()


def test_an_isolated_network_serves_but_forwards_nothing(space: Namespace, tmp_path: Path) -> None:
    async def turn(networks: Networks) -> None:
        FORWARDING.write_text("0")
        network = await networks.create_xml(ISOLATED)
        assert not network.persistent and network.is_active
        assert FORWARDING.read_text().strip() == "0"
        await network.destroy()
        assert networks.list() == []

    with_networks(space, tmp_path, turn)
    assert links(space) == tables(space) == set()


async def until(true: Callable[[], object], seconds: float = 10.0) -> None:
    """Wait for something that another process or the kernel does; fails only if it never comes."""
    async with asyncio.timeout(seconds):
        while not true():
            await asyncio.sleep(0.01)


def test_the_next_daemon_finds_an_active_network_again(space: Namespace, tmp_path: Path) -> None:
    async def first(networks: Networks) -> int:
        network = await networks.define(NAT)
        await network.start()
        assert network.runtime is not None and network.runtime.dnsmasq.handle is not None
        return network.runtime.dnsmasq.handle.pid

    async def second(networks: Networks) -> None:
        network = networks.lookup_name("default")
        assert network.is_active and network.persistent and networks.warnings == []
        assert network.runtime is not None and network.runtime.dnsmasq.handle is not None
        assert network.runtime.dnsmasq.handle.pid == pid  # guests noticed nothing
        await network.destroy()

    pid = with_networks(space, tmp_path, first)
    with_networks(space, tmp_path, second)
    assert links(space) == tables(space) == set()


def test_a_dnsmasq_that_dies_is_started_again_with_its_leases(space: Namespace, tmp_path: Path) -> None:
    async def turn(networks: Networks) -> None:
        network = await networks.define(NAT)
        await network.start()
        assert network.runtime is not None
        server = network.runtime.dnsmasq
        first = server.handle
        assert first is not None
        lease = "4102444800 52:54:00:01:02:03 192.168.122.77 guest *\n"
        server.lease_file.write_text(lease)
        first.kill()
        await until(lambda: server.handle is not None and server.handle is not first and server.handle.alive)
        assert [(entry.address, entry.hostname) for entry in network.leases()] == [("192.168.122.77", "guest")]
        assert network.leases("52:54:00:01:02:03") and not network.leases("52:54:00:99:99:99")
        await network.destroy()

    with_networks(space, tmp_path, turn)
    assert links(space) == tables(space) == set()


def test_a_flushed_packet_filter_is_put_back(space: Namespace, tmp_path: Path) -> None:
    async def turn(networks: Networks) -> None:
        network = await networks.define(NAT)
        await network.start()
        before = nftables.run([{"list": {"ruleset": None}}])
        nftables.run([{"flush": {"ruleset": None}}])
        await until(lambda: any("table" in item for item in nftables.run([{"list": {"tables": None}}])))
        assert without_handles(nftables.run([{"list": {"ruleset": None}}])) == without_handles(before)
        await network.destroy()

    with_networks(space, tmp_path, turn)
    assert tables(space) == set()


def without_handles(ruleset: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {kind: {key: value for key, value in item.items() if key != "handle"} for kind, item in entry.items()}
        for entry in ruleset
    ]


def test_a_network_whose_bridge_is_deleted_ends(space: Namespace, tmp_path: Path) -> None:
    async def turn(networks: Networks) -> None:
        seen: list[tuple[str, int]] = []
        networks.subscribe(lambda network, event, detail: seen.append((network.name, event)))
        network = await networks.define(NAT)
        await network.start()
        with Netlink() as netlink:
            netlink.delete_link(netlink.link("virbr0").index)
        await until(lambda: not network.is_active)
        assert await network.start()
        await network.destroy()
        kinds = NetworkEventLifecycleType
        assert [event for _, event in seen] == [
            kinds.DEFINED, kinds.STARTED, kinds.STOPPED, kinds.STARTED, kinds.STOPPED,
        ]  # fmt: skip

    with_networks(space, tmp_path, turn)
    assert links(space) == tables(space) == set()


def test_what_is_somebody_elses_is_neither_used_nor_deleted(space: Namespace, tmp_path: Path) -> None:
    async def turn(networks: Networks) -> None:
        network = await networks.define(NAT)
        with Netlink() as netlink:
            theirs = netlink.add_link("virbr0", "bridge")
            with pytest.raises(AlreadyExists, match="virbr0"):
                await network.start()
            assert netlink.link("virbr0").index == theirs.index
            netlink.delete_link(theirs.index)
            # A route to the same addresses, by an interface of another name
            wire = netlink.add_veth("eth0", "world")
            netlink.set_link(wire.index, up=True)
            netlink.add_address(wire.index, "192.168.122.200/25")
        with pytest.raises(ResourceBusy, match=r"eth0.*192\.168\.123\.0/24 is free"):
            await network.start()
        assert not network.is_active

    with_networks(space, tmp_path, turn)
    assert links(space) == {"eth0", "world"}
    assert tables(space) == set()


def test_the_first_use_makes_a_default_on_a_subnet_that_is_free(space: Namespace, tmp_path: Path) -> None:
    def taken() -> None:
        with Netlink() as netlink:
            wire = netlink.add_veth("eth0", "world")
            netlink.set_link(wire.index, up=True)
            netlink.add_address(wire.index, "192.168.122.5/24")

    async def first(networks: Networks) -> None:
        network = await ensure_default(networks)
        assert network is not None and network.is_active and network.autostart and network.persistent
        assert network.document.ips[0].address == "192.168.123.1"
        assert any("192.168.122.0/24" in warning and "eth0" in warning for warning in networks.warnings)
        await network.destroy()
        await networks.undefine(network)

    async def second(networks: Networks) -> None:
        assert await ensure_default(networks) is None  # who removed it does not get it again
        assert networks.list() == []

    space.run(taken)
    with_networks(space, tmp_path, first)
    with_networks(space, tmp_path, second)
    assert links(space) == {"eth0", "world"}


def test_an_update_reaches_the_live_network_and_the_definition(space: Namespace, tmp_path: Path) -> None:
    async def turn(networks: Networks) -> None:
        network = await networks.define(NAT)
        await network.start()
        host = "<host mac='52:54:00:01:02:03' name='web' ip='192.168.122.50'/>"
        both = NetworkUpdateFlags.LIVE | NetworkUpdateFlags.CONFIG
        add, hosts = NetworkUpdateCommand.ADD_LAST, NetworkUpdateSection.IP_DHCP_HOST
        await network.update(add, hosts, -1, host, both)
        assert "192.168.122.50" in network.xml() and "192.168.122.50" in network.xml(inactive=True)
        assert network.runtime is not None and network.runtime.dnsmasq.handle is not None
        assert network.runtime.dnsmasq.handle.alive
        assert "dhcp-host=52:54:00:01:02:03,192.168.122.50,web" in network.runtime.dnsmasq.config_file.read_text()
        with pytest.raises(KvikError):  # twice
            await network.update(add, hosts, -1, host, both)
        assert network.is_active and network.runtime.dnsmasq.handle.alive
        await network.destroy()

    with_networks(space, tmp_path, turn)


def test_networks_that_would_not_get_along_are_refused(space: Namespace, tmp_path: Path) -> None:
    async def turn(networks: Networks) -> None:
        first = await networks.define(NAT)
        with pytest.raises(AlreadyExists, match="bridge name 'virbr0'"):
            await networks.define(NAT.replace(">default<", ">second<"))
        second = await networks.define(NAT.replace(">default<", ">second<").replace(" name='virbr0'", ""))
        assert second.bridge_name == "virbr1"
        again = await networks.define(NAT)  # without a UUID it is the same network still
        assert again is first and again.uuid == first.uuid
        with pytest.raises(AlreadyExists, match="already exists with uuid"):
            await networks.define(NAT.replace("<name>", f"<uuid>{'1' * 8}-1111-4111-8111-{'1' * 12}</uuid><name>"))
        await first.start()
        with pytest.raises(ResourceBusy, match=r"192\.168\.122\.0/24"):
            await second.start()
        with pytest.raises(OperationInvalid):
            await networks.create_xml(NAT)
        await networks.undefine(first)  # active: goes on, transient
        assert first.is_active and not first.persistent
        await first.destroy()
        assert [network.name for network in networks.list()] == ["second"]

    with_networks(space, tmp_path, turn)
    assert links(space) == tables(space) == set()


def test_what_fails_halfway_is_rolled_back(space: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise HostError("the disk is full", errno=28)

    async def turn(networks: Networks) -> None:
        network = await networks.define(NAT)
        for what, name in ((nftables, "run"), (Dnsmasq, "write"), (Dnsmasq, "start"), (Runtime, "note")):
            with monkeypatch.context() as patched:
                if name == "run":
                    patched.setattr(nat, "add", lambda document: [{"add": {"rule": {"family": "inet"}}}])
                elif name == "note":
                    patched.setattr("kvik.network.runtime.add_routes", refuse)
                else:
                    patched.setattr(what, name, refuse)
                with pytest.raises(HostError):
                    await network.start()
            assert not network.is_active
            assert not (tmp_path / "run/kvik/network/default.xml").exists()
            with Netlink() as netlink:
                assert {link.name for link in netlink.links()} == {"lo"}
            assert nftables.run([{"list": {"tables": None}}]) == []

    with_networks(space, tmp_path, turn)


def test_a_missing_dnsmasq_is_said_with_its_package(
    space: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def turn(networks: Networks) -> None:
        network = await networks.define(NAT)
        monkeypatch.setattr("kvik.network.dnsmasq.process.find_program", lambda name: None)
        with pytest.raises(MissingPackages, match="dnsmasq-base"):
            await network.start()
        bare = await networks.create_xml("<network><name>bare</name><bridge name='virbr9'/></network>")
        assert bare.is_active  # it serves nothing, so it needs none
        await bare.destroy()

    with_networks(space, tmp_path, turn)
    assert links(space) == tables(space) == set()


def test_a_reference_to_what_does_not_exist_is_refused(space: Namespace, tmp_path: Path) -> None:
    def document(inner: str) -> str:
        return f"<network><name>lan</name>{inner}</network>"

    async def turn(networks: Networks) -> None:
        bridged = document("<forward mode='bridge'/><bridge name='br0'/>")
        with pytest.raises(OperationInvalid, match="br0"):
            await networks.create_xml(bridged)
        direct = document("<forward mode='private'><interface dev='eth9'/></forward>")
        with pytest.raises(OperationInvalid, match="eth9"):
            await networks.create_xml(direct)
        with Netlink() as netlink:
            bridge, port = netlink.add_link("br0", "bridge"), netlink.add_veth("eth9", "world")
            netlink.set_link(port.index, master=bridge.index)
        with pytest.raises(OperationInvalid, match="port of br0"):
            await networks.create_xml(direct)
        network = await networks.create_xml(bridged)
        assert network.bridge_name == "br0"
        await network.destroy()

    with_networks(space, tmp_path, turn)
    assert links(space) == {"br0", "eth9", "world"}  # never ours


FIREWALLS = {
    "a drop policy": (
        ["nft add table inet foo", "nft add chain inet foo fw '{ type filter hook forward priority 0; policy drop; }'"],
        "the policy of chain fw in table inet foo",
    ),
    "a rule that drops DHCP": (
        [
            "nft add table inet foo",
            "nft add chain inet foo inp '{ type filter hook input priority 0; }'",
            "nft add rule inet foo inp udp dport 67 drop",
        ],
        "of chain inp in table inet foo",
    ),
    "answers dropped": (
        [
            "nft add table ip foo",
            "nft add chain ip foo fw '{ type filter hook forward priority 5; }'",
            "nft add rule ip foo fw oifname virbr0 drop",
        ],
        "an answer from the world does not reach the guest: dropped by rule",
    ),
    "Docker": (
        ["iptables -P FORWARD DROP", "iptables -N DOCKER-USER", "iptables -A FORWARD -j DOCKER-USER"],
        "the policy of chain FORWARD in table ip filter (Docker)",
    ),
}


@pytest.mark.parametrize("which", FIREWALLS)
def test_a_foreign_rule_set_is_named_with_the_rule_that_lets_the_network_through(
    space: Namespace, tmp_path: Path, which: str
) -> None:
    commands, words = FIREWALLS[which]
    if any(command.startswith("iptables") for command in commands) and find_program("iptables-nft") is None:
        pytest.skip("needs iptables (Debian: iptables)")

    def shell(command: str) -> None:
        subprocess.run(command, shell=True, check=True, capture_output=True)  # noqa: S602  the words a user would type

    async def turn(networks: Networks) -> None:
        network = await networks.define(NAT)
        await network.start()
        assert await network.probe() == []
        for command in commands:
            await networks.run(shell, command)
        (finding,) = await network.probe()
        assert words in str(finding)
        assert "virbr0" in str(finding) and finding.remedies
        for command in finding.remedies:
            await networks.run(shell, command)
        assert await network.probe() == []
        await network.destroy()

    with_networks(space, tmp_path, turn)
    assert links(space) == set()


def test_a_start_warns_by_itself_of_what_is_in_the_way(space: Namespace, tmp_path: Path) -> None:
    async def turn(networks: Networks) -> None:
        drop = {"family": "inet", "table": "foo", "name": "fw", "type": "filter", "hook": "forward", "prio": 0}
        nftables.run(
            [{"add": {"table": {"family": "inet", "name": "foo"}}}, {"add": {"chain": {**drop, "policy": "drop"}}}]
        )
        network = await networks.define(NAT)
        await network.start()
        await until(lambda: network.warnings)
        assert "table inet foo" in network.warnings[0]
        await network.destroy()

    with_networks(space, tmp_path, turn, probing=True)


FULL = """<network>
  <name>full</name>
  <forward mode='nat' dev='uplink'><nat ipv6='yes'><address start='203.0.113.5' end='203.0.113.9'/>
    <port start='2000' end='2999'/></nat></forward>
  <bridge name='virbr5' stp='on' delay='3'/>
  <mtu size='1400'/>
  <mac address='52:54:00:aa:bb:cc'/>
  <domain name='lan' localOnly='yes' register='no'/>
  <dns><forwarder addr='203.0.113.53'/><txt name='t' value='a b'/><host ip='10.9.0.1'><hostname>gw</hostname></host>
    <srv service='ldap' protocol='tcp' domain='lan' target='h.lan' port='389' priority='1' weight='2'/></dns>
  <ip address='10.9.0.1' netmask='255.255.254.0' localPtr='yes'>
    <tftp root='/'/>
    <dhcp><range start='10.9.0.10' end='10.9.1.20'><lease expiry='1' unit='hours'/></range>
      <host mac='52:54:00:00:00:02' name='web' ip='10.9.0.80'/><bootp file='pxelinux.0'/></dhcp>
  </ip>
  <ip family='ipv6' address='fd00:9::1' prefix='64'><dhcp><range start='fd00:9::10' end='fd00:9::ff'/></dhcp></ip>
  <ip family='ipv6' address='fd00:a::1' prefix='64'/>
  <route address='10.10.0.0' prefix='16' gateway='10.9.0.2'/>
  <route family='ipv6' address='fd00:b::' prefix='64' gateway='fd00:9::2' metric='5'/>
</network>"""


def test_every_element_reaches_kernel_and_dnsmasq(space: Namespace, tmp_path: Path) -> None:
    async def turn(networks: Networks) -> None:
        with Netlink() as netlink:
            wire = netlink.add_veth("uplink", "world", up=True)
            before = len(routes(netlink))
            network = await networks.create_xml(FULL)
            bridge = read_bridge(netlink, "virbr5")
            assert (bridge.stp, bridge.forward_delay, bridge.link.mtu) == (True, 3, 1400)
            addresses = {str(each.interface): each for each in netlink.addresses(bridge.link.index)}
            assert {"10.9.0.1/23", "fd00:9::1/64", "fd00:a::1/64"} <= set(addresses)
            assert not any(each.tentative for each in addresses.values())  # of use at once
            made = {str(route.network): (str(route.gateway), route.metric) for route in routes(netlink)}
            assert made["10.10.0.0/16"] == ("10.9.0.2", 1) and made["fd00:b::/64"] == ("fd00:9::2", 5)
            assert Path("/proc/sys/net/ipv6/conf/all/forwarding").read_text().strip() == "1"
            assert Path("/proc/sys/net/ipv6/conf/virbr5/accept_ra").read_text().strip() == "0"
            chains = {item["chain"]["name"] for item in nftables.run([{"list": {"chains": None}}]) if "chain" in item}
            assert chains == {"forward", "masquerade"}
            await network.destroy()
            assert len(routes(netlink)) == before
            netlink.delete_link(wire.index)

    with_networks(space, tmp_path, turn)
    assert links(space) == tables(space) == set()


def test_bandwidth_is_set_on_the_bridge_and_undone(space: Namespace, tmp_path: Path) -> None:
    bound = "<bandwidth><inbound average='1000' peak='2000' burst='64'/><outbound average='500'/></bandwidth>"

    async def turn(networks: Networks) -> None:
        network = await networks.create_xml(ISOLATED.replace("<ip ", f"{bound}<ip "))
        with Netlink() as netlink:
            kinds = {queue.kind: queue for queue in queues(netlink, netlink.link("virbr7").index) if queue.rate}
        assert (kinds["htb"].rate, kinds["htb"].ceiling) == (1_000_000, 2_000_000)
        await network.destroy()

    with_networks(space, tmp_path, turn)
    assert links(space) == set()


def test_without_ipv6_of_its_own_the_host_takes_no_part_in_the_bridges(space: Namespace, tmp_path: Path) -> None:
    async def turn(networks: Networks) -> None:
        network = await networks.create_xml(ISOLATED)
        assert Path("/proc/sys/net/ipv6/conf/virbr7/disable_ipv6").read_text().strip() == "1"
        await network.destroy()

    with_networks(space, tmp_path, turn)


def test_autostart_happens_once_per_boot(space: Namespace, tmp_path: Path) -> None:
    async def define(networks: Networks) -> None:
        network = await networks.define(NAT)
        await network.set_autostart(True)
        assert not network.is_active

    async def started(networks: Networks) -> None:
        network = networks.lookup_name("default")
        assert network.autostart and network.is_active
        await network.destroy()

    async def not_again(networks: Networks) -> None:
        assert not networks.lookup_name("default").is_active

    with_networks(space, tmp_path, define)
    (tmp_path / "run/kvik/network/autostarted").unlink()  # as if the host had been booted
    with_networks(space, tmp_path, started)
    with_networks(space, tmp_path, not_again)
    assert links(space) == set()


def test_files_that_cannot_be_read_are_set_aside(space: Namespace, tmp_path: Path) -> None:
    definitions, status = tmp_path / "etc/kvik/qemu/networks", tmp_path / "run/kvik/network"
    for directory in (definitions, status):
        directory.mkdir(parents=True)
    (definitions / "broken.xml").write_text("<network><name>broken</name>")
    (definitions / "other.xml").write_text(ISOLATED)  # copied: its name is another's
    (definitions / "byhand.xml").write_text("<network><name>byhand</name></network>")
    (status / "gone.xml").write_text("<networkstatus/>")

    async def turn(networks: Networks) -> None:
        assert [network.name for network in networks.list()] == ["byhand"]
        assert networks.lookup_name("byhand").uuid_text in (definitions / "byhand.xml").read_text()
        assert len(networks.warnings) == 3

    with_networks(space, tmp_path, turn)
    assert {path.name for path in definitions.iterdir()} == {
        "autostart", "broken.xml.corrupt-0", "byhand.xml", "other.xml.corrupt-0",
    }  # fmt: skip
    assert (status / "gone.xml.corrupt-0").exists()


def test_two_daemons_keep_out_of_each_others_way(space: Namespace, tmp_path: Path) -> None:
    async def first(networks: Networks) -> None:
        ours = await ensure_default(networks)
        assert ours is not None and ours.is_active and ours.bridge_name == "virbr0"
        others = Networks(Paths.system(tmp_path / "second"), probing=False)
        await others.open()
        theirs = await ensure_default(others)
        assert theirs is not None and theirs.is_active and theirs.bridge_name == "virbr1"
        assert theirs.document.ips[0].address == "192.168.123.1"
        await others.close()
        again = Networks(Paths.system(tmp_path / "second"), probing=False)
        await again.open()  # it finds its own, and leaves the first one's alone
        assert again.lookup_name("default").is_active and ours.is_active
        await again.lookup_name("default").destroy()
        await again.close()
        assert tables_here() == {"kvik-virbr0"}
        assert ours.runtime is not None and ours.runtime.dnsmasq.handle is not None
        assert ours.runtime.dnsmasq.handle.alive
        await ours.destroy()

    with_networks(space, tmp_path / "first", first)
    assert links(space) == tables(space) == set()


def test_who_hangs_up_leaves_a_network_that_is_whole(space: Namespace, tmp_path: Path) -> None:
    async def turn(networks: Networks) -> None:
        seen: list[int] = []
        networks.subscribe(lambda network, event, detail: seen.append(event))
        network = await networks.create_xml(NAT)
        for _ in range(2):
            stopping = asyncio.ensure_future(network.destroy())
            await asyncio.sleep(0.005)
            stopping.cancel()
            with pytest.raises(asyncio.CancelledError):
                await stopping
            assert not network.is_active and networks.list() == []
            creating = asyncio.ensure_future(networks.create_xml(NAT))
            await asyncio.sleep(0.02)
            creating.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await creating
            assert [each.is_active for each in networks.list()] in ([], [True])
            network = networks.list()[0] if networks.list() else await networks.create_xml(NAT)
        await network.destroy()
        assert list((tmp_path / "var/lib/kvik/network").iterdir()) == []  # what was transient leaves no files
        kinds = NetworkEventLifecycleType
        assert seen == [kinds.STARTED, kinds.STOPPED] * 3

    with_networks(space, tmp_path, turn)
    assert links(space) == tables(space) == set()


def test_a_name_is_only_a_name(space: Namespace, tmp_path: Path) -> None:
    async def turn(networks: Networks) -> None:
        name = "my net #1, \"x\" 'y' \\"
        network = await networks.create_xml(NAT.replace(">default<", f">{name}<"))
        assert network.name == name and network.leases() == []
        await network.destroy()

    with_networks(space, tmp_path / "a b", turn)
    assert links(space) == tables(space) == set()
