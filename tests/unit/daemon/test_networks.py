"""The calls about networks: what a client gets to hear of them, what it may do, and their events."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from uuid import UUID

import pytest
from daemon_harness import running
from fake_manager import FakeManager

from kvik.conf.devices.interface import Interface, InterfaceSource, Mac
from kvik.conf.network import parse_network
from kvik.errors import (
    ConfigUnsupported,
    InvalidArgument,
    KvikError,
    NoMetadata,
    NoNetwork,
    NoNetworkPort,
    OperationInvalid,
    OperationUnsupported,
)
from kvik.network.dnsmasq import LeaseEntry

XML = """<network>
  <name>{name}</name>
  <bridge name='virbr{number}'/>
  <ip address='192.168.{number}.1' prefix='24'/>
</network>"""
MACVTAP = "<network><name>v</name><forward mode='vepa'><interface dev='eth0'/></forward></network>"


def xml(name: str, number: int = 7) -> str:
    return XML.format(name=name, number=number)


async def three(client: Any) -> dict[str, Any]:
    """An active one that starts with the host, an inactive one, a transient one."""
    (on,) = await client.call("NETWORK_DEFINE_XML", xml("on", 1))
    await client.call("NETWORK_SET_AUTOSTART", on, 1)
    await client.call("NETWORK_CREATE", on)
    (off,) = await client.call("NETWORK_DEFINE_XML_FLAGS", xml("off", 2), 0)
    (brief,) = await client.call("NETWORK_CREATE_XML", xml("brief", 3))
    return {"on": on, "off": off, "brief": brief}


async def test_the_old_lists_count_and_name_active_and_inactive_ones() -> None:
    async with running(FakeManager()) as daemon:
        client = await daemon.client()
        await three(client)
        assert tuple(await client.call("CONNECT_NUM_OF_NETWORKS")) == (2,)
        assert tuple(await client.call("CONNECT_NUM_OF_DEFINED_NETWORKS")) == (1,)
        assert (await client.call("CONNECT_LIST_NETWORKS", 100))[0] == ["on", "brief"]
        assert (await client.call("CONNECT_LIST_NETWORKS", 1))[0] == ["on"]
        assert (await client.call("CONNECT_LIST_DEFINED_NETWORKS", 100))[0] == ["off"]
        for wrong in (-1, 16385):
            with pytest.raises(InvalidArgument):
                await client.call("CONNECT_LIST_NETWORKS", wrong)


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (0, "on off brief"),
        (1, "off"),
        (2, "on brief"),
        (3, "on off brief"),
        (4, "on off"),
        (8, "brief"),
        (16, "on"),
        (32, "off brief"),
        (2 | 4 | 16, "on"),
        (1 | 16, ""),
    ],
)
async def test_a_list_is_filtered(flags: int, names: str) -> None:
    async with running(FakeManager()) as daemon:
        client = await daemon.client()
        await three(client)
        found, count = await client.call("CONNECT_LIST_ALL_NETWORKS", 1, flags)
        assert [network[0] for network in found] == names.split()
        assert count == len(found)
        assert tuple(await client.call("CONNECT_LIST_ALL_NETWORKS", 0, flags)) == ([], count)


async def test_unknown_flags_are_refused() -> None:
    async with running(FakeManager()) as daemon:
        client = await daemon.client()
        net = (await three(client))["on"]
        for name, *arguments in (
            ("CONNECT_LIST_ALL_NETWORKS", 1, 64),
            ("NETWORK_GET_XML_DESC", net, 2),
            ("NETWORK_GET_DHCP_LEASES", net, None, 1, 1),
            ("NETWORK_DEFINE_XML_FLAGS", xml("x"), 2),
            ("NETWORK_CREATE_XML_FLAGS", xml("x"), 2),
            ("NETWORK_UPDATE", net, 3, 4, -1, "<host/>", 4),
            ("NETWORK_GET_METADATA", net, 1, None, 4),
            ("NETWORK_SET_METADATA", net, 1, "a", None, None, 4),
        ):
            with pytest.raises(InvalidArgument, match="unsupported flags"):
                await client.call(name, *arguments)


async def test_one_is_found_by_name_and_by_uuid_and_called_by_uuid() -> None:
    async with running(FakeManager()) as daemon:
        client = await daemon.client()
        net = (await three(client))["on"]
        assert (await client.call("NETWORK_LOOKUP_BY_NAME", "on"))[0] == net
        assert (await client.call("NETWORK_LOOKUP_BY_UUID", net[1]))[0] == net
        assert (await client.call("NETWORK_IS_ACTIVE", ("another name", net[1])))[0] == 1
        for name, *arguments in (
            ("NETWORK_LOOKUP_BY_NAME", "none"),
            ("NETWORK_LOOKUP_BY_UUID", bytes(16)),
            ("NETWORK_IS_ACTIVE", ("on", bytes(16))),
        ):
            with pytest.raises(NoNetwork):
                await client.call(name, *arguments)


async def test_what_one_is() -> None:
    async with running(FakeManager()) as daemon:
        client = await daemon.client()
        nets = await three(client)

        async def answers(procedure: str) -> list[Any]:
            return [(await client.call(procedure, nets[name]))[0] for name in ("on", "off", "brief")]

        assert await answers("NETWORK_IS_ACTIVE") == [1, 0, 1]
        assert await answers("NETWORK_IS_PERSISTENT") == [1, 1, 0]
        assert await answers("NETWORK_GET_AUTOSTART") == [1, 0, 0]
        assert await answers("NETWORK_GET_BRIDGE_NAME") == ["virbr1", "virbr2", "virbr3"]
        (text,) = await client.call("NETWORK_GET_XML_DESC", nets["off"], 1)
        assert parse_network(text).name == "off"
        (macvtap,) = await client.call("NETWORK_DEFINE_XML", MACVTAP)
        with pytest.raises(KvikError, match="does not have a bridge name"):
            await client.call("NETWORK_GET_BRIDGE_NAME", macvtap)


async def test_a_life() -> None:
    async with running(FakeManager()) as daemon:
        client = await daemon.client()
        (net,) = await client.call("NETWORK_DEFINE_XML", xml("a"))
        with pytest.raises(OperationInvalid):
            await client.call("NETWORK_DESTROY", net)
        await client.call("NETWORK_CREATE", net)
        await client.call("NETWORK_CREATE", net)  # idempotent
        await client.call("NETWORK_UNDEFINE", net)
        assert (await client.call("NETWORK_IS_PERSISTENT", net))[0] == 0
        await client.call("NETWORK_DESTROY", net)
        with pytest.raises(NoNetwork):
            await client.call("NETWORK_CREATE", net)


async def test_strict_validation_refuses_what_is_not_understood() -> None:
    unknown = xml("a").replace("<bridge", "<frob/><bridge")
    async with running(FakeManager()) as daemon:
        client = await daemon.client()
        for procedure in ("NETWORK_DEFINE_XML_FLAGS", "NETWORK_CREATE_XML_FLAGS"):
            with pytest.raises(ConfigUnsupported, match="frob"):
                await client.call(procedure, unknown, 1)
        assert (await client.call("CONNECT_LIST_ALL_NETWORKS", 1, 0))[1] == 0
        (net,) = await client.call("NETWORK_DEFINE_XML_FLAGS", unknown, 0)
        assert "frob" in (await client.call("NETWORK_MESSAGES", net, program="kvik"))[0][0]
        (net,) = await client.call("NETWORK_CREATE_XML_FLAGS", xml("b"), 1)
        assert (await client.call("NETWORK_MESSAGES", net, program="kvik"))[0] == []


async def test_what_was_found_since_the_start_is_told() -> None:
    manager = FakeManager()
    async with running(manager) as daemon:
        client = await daemon.client()
        (net,) = await client.call("NETWORK_CREATE_XML", xml("a"))
        manager.networks.all[0].warnings.append("chain FORWARD of docker drops its packets")
        assert (await client.call("NETWORK_MESSAGES", net, program="kvik"))[0] == [
            "chain FORWARD of docker drops its packets"
        ]


async def test_an_update_arrives_as_it_was_sent() -> None:
    manager = FakeManager()
    async with running(manager) as daemon:
        client = await daemon.client()
        net = (await three(client))["on"]
        assert (await client.call("CONNECT_SUPPORTS_FEATURE", 16))[0] == 1  # the order of command and section
        await client.call("NETWORK_UPDATE", net, 3, 4, -1, "<host mac='a'/>", 3)
        assert manager.networks.all[0].updates == [(3, 4, -1, "<host mac='a'/>", 3)]


async def test_leases() -> None:
    manager = FakeManager()
    async with running(manager) as daemon:
        client = await daemon.client()
        nets = await three(client)
        manager.networks.all[0].lent = [
            LeaseEntry("virbr1", 1700000000, "192.168.1.5", 24, "52:54:00:00:00:01", "web", "01:52:54", ""),
            LeaseEntry("virbr1", 0, "fd00::5", 64, "52:54:00:00:00:02", "", "00:01", "77"),
        ]
        rows, count = await client.call("NETWORK_GET_DHCP_LEASES", nets["on"], None, 1, 0)
        assert [tuple(row) for row in rows] == [
            ("virbr1", 1700000000, 0, "52:54:00:00:00:01", None, "192.168.1.5", 24, "web", "01:52:54"),
            ("virbr1", 0, 1, "52:54:00:00:00:02", "77", "fd00::5", 64, None, "00:01"),
        ]
        assert count == 2
        rows, count = await client.call("NETWORK_GET_DHCP_LEASES", nets["on"], "52:54:0:0:0:2", 1, 0)
        assert (len(rows), count, rows[0][5]) == (1, 1, "fd00::5")
        assert tuple(await client.call("NETWORK_GET_DHCP_LEASES", nets["on"], None, 0, 0)) == ([], 2)
        assert tuple(await client.call("NETWORK_GET_DHCP_LEASES", nets["off"], None, 1, 0)) == ([], 0)
        with pytest.raises(InvalidArgument, match="invalid MAC address"):
            await client.call("NETWORK_GET_DHCP_LEASES", nets["on"], "zz", 1, 0)


async def test_metadata_of_the_live_document_and_of_the_definition() -> None:
    async with running(FakeManager()) as daemon:
        client = await daemon.client()
        nets = await three(client)
        with pytest.raises(NoMetadata):
            await client.call("NETWORK_GET_METADATA", nets["on"], 1, None, 0)
        await client.call("NETWORK_SET_METADATA", nets["on"], 1, "live title", None, None, 0)
        await client.call("NETWORK_SET_METADATA", nets["on"], 1, "kept title", None, None, 2)
        await client.call("NETWORK_SET_METADATA", nets["off"], 0, "words", None, None, 0)
        assert (await client.call("NETWORK_GET_METADATA", nets["on"], 1, None, 0))[0] == "live title"
        assert (await client.call("NETWORK_GET_METADATA", nets["on"], 1, None, 1))[0] == "live title"
        assert (await client.call("NETWORK_GET_METADATA", nets["on"], 1, None, 2))[0] == "kept title"
        assert (await client.call("NETWORK_GET_METADATA", nets["off"], 0, None, 0))[0] == "words"
        await client.call("NETWORK_SET_METADATA", nets["on"], 2, "<a b='1'/>", "k", "http://x", 3)
        for flags in (1, 2):
            assert (await client.call("NETWORK_GET_METADATA", nets["on"], 2, "http://x", flags))[0] == '<a b="1"/>'
        with pytest.raises(OperationInvalid):
            await client.call("NETWORK_GET_METADATA", nets["off"], 0, None, 1)
        with pytest.raises(InvalidArgument):
            await client.call("NETWORK_GET_METADATA", nets["on"], 0, None, 3)


async def test_a_read_only_connection_looks_but_does_not_touch() -> None:
    async with running(FakeManager()) as daemon:
        client = await daemon.client()
        net = (await three(client))["on"]
        reader = await daemon.client(flags=1)
        assert (await reader.call("CONNECT_LIST_ALL_NETWORKS", 1, 0))[1] == 3
        await reader.call("NETWORK_GET_XML_DESC", net, 0)
        await reader.call("CONNECT_NETWORK_EVENT_REGISTER_ANY", 0, None)
        for name, *arguments in (
            ("NETWORK_DEFINE_XML", xml("x")),
            ("NETWORK_CREATE_XML", xml("x")),
            ("NETWORK_CREATE", net),
            ("NETWORK_DESTROY", net),
            ("NETWORK_UNDEFINE", net),
            ("NETWORK_SET_AUTOSTART", net, 1),
            ("NETWORK_UPDATE", net, 3, 4, -1, "<host/>", 0),
            ("NETWORK_SET_METADATA", net, 1, "t", None, None, 0),
        ):
            with pytest.raises(KvikError, match="read only"):
                await reader.call(name, *arguments)


async def test_events_reach_those_who_asked() -> None:
    async with running(FakeManager()) as daemon:
        client = await daemon.client()
        watcher = await daemon.client()
        (a,) = await client.call("NETWORK_DEFINE_XML", xml("a", 1))
        (every,) = await watcher.call("CONNECT_NETWORK_EVENT_REGISTER_ANY", 0, None)
        (of_a,) = await watcher.call("CONNECT_NETWORK_EVENT_REGISTER_ANY", 0, a)
        (words,) = await watcher.call("CONNECT_NETWORK_EVENT_REGISTER_ANY", 1, None)
        (b,) = await client.call("NETWORK_DEFINE_XML", xml("b", 2))
        await client.call("NETWORK_CREATE", a)
        await client.call("NETWORK_SET_METADATA", a, 2, "<x/>", "k", "http://x", 0)
        await client.call("NETWORK_SET_METADATA", a, 1, "title", None, "ignored", 0)
        await watcher.call("CONNECT_NETWORK_EVENT_DEREGISTER_ANY", of_a)
        await client.call("NETWORK_DESTROY", a)
        got = [tuple((await watcher.event()).decode()) for _ in range(6)]
        assert [(row[0], tuple(row[1]), *row[2:]) for row in got] == [
            (every, tuple(b), 0, 0),
            (every, tuple(a), 2, 0),
            (of_a, tuple(a), 2, 0),
            (words, tuple(a), 2, "http://x"),
            (words, tuple(a), 1, None),
            (every, tuple(a), 3, 0),
        ]
        assert watcher.events.empty()
        assert client.events.empty()


async def test_subscriptions_end_with_their_connection_and_are_bounded() -> None:
    async with running(FakeManager()) as daemon:
        client = await daemon.client()
        with pytest.raises(InvalidArgument):
            await client.call("CONNECT_NETWORK_EVENT_REGISTER_ANY", 7, None)
        with pytest.raises(InvalidArgument):
            await client.call("CONNECT_NETWORK_EVENT_DEREGISTER_ANY", 1)
        for _ in range(1024):
            (callback,) = await client.call("CONNECT_NETWORK_EVENT_REGISTER_ANY", 0, None)
        with pytest.raises(InvalidArgument, match="too many"):
            await client.call("CONNECT_NETWORK_EVENT_REGISTER_ANY", 0, None)
        other = await daemon.client()
        with pytest.raises(InvalidArgument):
            await other.call("CONNECT_NETWORK_EVENT_DEREGISTER_ANY", callback)
        assert daemon.server.network_events.count == 1024
        await client.close()
        await daemon.settled(connections=1)
        assert daemon.server.network_events.count == 0


PORT = "a1b1c1d1-a1b1-41d1-81f1-a1b1c1d1e1f1"
WITH_PORTGROUP = """<network>
  <name>a</name>
  <bridge name='virbr7'/>
  <portgroup name='slow'>
    <bandwidth><inbound average='10' peak='20'/><outbound average='5' burst='7'/></bandwidth>
  </portgroup>
</network>"""


async def test_ports_are_listed_and_told_and_not_made_by_hand() -> None:
    manager = FakeManager()
    async with running(manager) as daemon:
        client = await daemon.client()
        (net,) = await client.call("NETWORK_CREATE_XML", WITH_PORTGROUP)
        network, machine = manager.networks.all[0], manager.all[0]
        assert tuple(await client.call("NETWORK_LIST_ALL_PORTS", net, 1, 0)) == ([], 0)
        source = InterfaceSource(network="a", portgroup="slow", portid=PORT, bridge="virbr7")
        interface = Interface(type="network", source=source, mac=Mac(address="52:54:00:00:00:01"))
        network.ports[PORT] = machine.name
        machine.live = SimpleNamespace(devices=SimpleNamespace(interfaces=[interface]))
        port = (net, UUID(PORT).bytes)
        assert tuple(await client.call("NETWORK_LIST_ALL_PORTS", net, 1, 0)) == ([port], 1)
        assert tuple(await client.call("NETWORK_LIST_ALL_PORTS", net, 0, 0)) == ([], 1)
        assert tuple(await client.call("NETWORK_PORT_LOOKUP_BY_UUID", net, port[1])) == (port,)
        (text,) = await client.call("NETWORK_PORT_GET_XML_DESC", port, 0)
        expected = f"<uuid>{PORT}</uuid> <name>m0</name> <group>slow</group> <mac address='52:54:00:00:00:01'/>"
        for part in expected.replace("> <", ">|<").split("|"):
            assert part in text
        assert "<inbound average='10' peak='20'/>" in text
        assert "<plug type='network' bridge='virbr7'/>" in text
        assert tuple(await client.call("NETWORK_PORT_GET_PARAMETERS", port, 0, 0)) == ([], 4)
        rows, count = await client.call("NETWORK_PORT_GET_PARAMETERS", port, 16, 0)
        assert count == 0
        assert {row[0]: row[2] for row in rows} == {
            "inbound.average": 10,
            "inbound.peak": 20,
            "outbound.average": 5,
            "outbound.burst": 7,
        }
        for name, *arguments in (
            ("NETWORK_PORT_CREATE_XML", net, "<networkport/>", 0),
            ("NETWORK_PORT_DELETE", port, 0),
            ("NETWORK_PORT_SET_PARAMETERS", port, [], 0),
        ):
            with pytest.raises(OperationUnsupported, match="come and go with machines' interfaces"):
                await client.call(name, *arguments)
        network.ports[PORT] = "a machine that was just renamed"
        (text,) = await client.call("NETWORK_PORT_GET_XML_DESC", port, 0)
        assert "just renamed" in text
        del network.ports[PORT]
        for name, *arguments in (
            ("NETWORK_PORT_LOOKUP_BY_UUID", net, port[1]),
            ("NETWORK_PORT_GET_XML_DESC", port, 0),
            ("NETWORK_PORT_GET_PARAMETERS", port, 16, 0),
        ):
            with pytest.raises(NoNetworkPort):
                await client.call(name, *arguments)


@pytest.mark.parametrize(
    ("forward", "plug"),
    [
        ("<forward mode='bridge'/><bridge name='br0'/>", "<plug type='bridge' bridge='br0'/>"),
        ("<forward mode='vepa'><interface dev='eth0'/></forward>", "<plug type='direct' dev='eth0' mode='vepa'/>"),
    ],
)
async def test_a_port_says_what_its_other_end_is(forward: str, plug: str) -> None:
    manager = FakeManager()
    async with running(manager) as daemon:
        client = await daemon.client()
        extra = "<vlan><tag id='7'/></vlan><port isolated='yes'/>" if "br0" in forward else ""
        (net,) = await client.call("NETWORK_CREATE_XML", f"<network><name>a</name>{forward}{extra}</network>")
        direct = "eth0" in forward
        source = InterfaceSource(
            network="a", portid=PORT, dev="eth0" if direct else None, mode="vepa" if direct else None
        )
        manager.networks.all[0].ports[PORT] = manager.all[0].name
        interfaces = [Interface(type="user"), Interface(type="network", source=source)]
        manager.all[0].live = SimpleNamespace(devices=SimpleNamespace(interfaces=interfaces))
        (text,) = await client.call("NETWORK_PORT_GET_XML_DESC", (net, UUID(PORT).bytes), 0)
        assert plug in text
        assert ("<tag id='7'/>" in text and "<port isolated='yes'/>" in text) is bool(extra)
