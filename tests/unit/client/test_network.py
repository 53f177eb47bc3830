"""Networks through the typed client, against a daemon that answers from a table."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from fake_daemon import UUID, FakeDaemon

from kvik.client import Network
from kvik.client.events import NetworkEvent
from kvik.errors import InvalidArgument, NoNetwork, NoSupport
from kvik.rpc import message as m
from kvik.rpc.program import kvik

Make = Callable[..., FakeDaemon]
NET = ("lan", UUID)
LOOKUP = {"NETWORK_LOOKUP_BY_NAME": (NET,)}


def asked(fake: FakeDaemon) -> list[tuple[str, tuple[object, ...]]]:
    """The calls, but for those that open and close the connection."""
    return [call for call in fake.calls if call[0] not in ("AUTH_LIST", "CONNECT_OPEN", "CONNECT_CLOSE")]


def test_a_key_is_a_uuid_or_a_name(daemon: Make) -> None:
    fake = daemon(NETWORK_LOOKUP_BY_UUID=NoNetwork("none"), **LOOKUP)
    with fake.connect() as connection:
        assert connection.network("lan").ref == NET
        assert connection.network(UUID.hex()).name == "lan"
        with pytest.raises(NoNetwork):
            connection.lookup_network_uuid("no uuid")
    assert [name for name, _ in fake.calls if name.startswith("NET")] == [
        "NETWORK_LOOKUP_BY_NAME",
        "NETWORK_LOOKUP_BY_UUID",
        "NETWORK_LOOKUP_BY_NAME",
    ]


def test_the_verbs_are_one_call_each(daemon: Make) -> None:
    fake = daemon(
        NETWORK_CREATE=(),
        NETWORK_DESTROY=(),
        NETWORK_UNDEFINE=(),
        NETWORK_SET_AUTOSTART=(),
        NETWORK_GET_XML_DESC=("<network/>",),
        NETWORK_GET_METADATA=("words",),
        NETWORK_SET_METADATA=(),
        NETWORK_DEFINE_XML_FLAGS=(NET,),
        NETWORK_CREATE_XML_FLAGS=(NET,),
        **LOOKUP,
    )
    with fake.connect() as connection:
        network = connection.network("lan")
        assert network == connection.define_network("<network/>", 1) == connection.create_network("<network/>")
        network.start()
        network.destroy()
        network.set_autostart(True)
        network.undefine()
        assert network.xml(1) == "<network/>"
        assert network.metadata(1) == "words"
        network.set_metadata(2, "<a/>", "k", "u", 3)
    assert asked(fake)[1:] == [
        ("NETWORK_DEFINE_XML_FLAGS", ("<network/>", 1)),
        ("NETWORK_CREATE_XML_FLAGS", ("<network/>", 0)),
        ("NETWORK_CREATE", (NET,)),
        ("NETWORK_DESTROY", (NET,)),
        ("NETWORK_SET_AUTOSTART", (NET, 1)),
        ("NETWORK_UNDEFINE", (NET,)),
        ("NETWORK_GET_XML_DESC", (NET, 1)),
        ("NETWORK_GET_METADATA", (NET, 1, None, 0)),
        ("NETWORK_SET_METADATA", (NET, 2, "<a/>", "k", "u", 3)),
    ]


def test_leases(daemon: Make) -> None:
    rows = [
        ("virbr0", 1700000000, 0, "52:54:00:00:00:01", None, "10.0.0.5", 24, "web", None),
        ("virbr0", 0, 1, None, "7", "fd00::5", 64, None, "00:01"),
        ("virbr0", 0, 9, None, None, "?", 0, None, None),
    ]
    fake = daemon(NETWORK_GET_DHCP_LEASES=(rows, 3), **LOOKUP)
    with fake.connect() as connection:
        leases = connection.network("lan").leases("52:54:00:00:00:01")
        assert [(lease.family, lease.address, lease.hostname, lease.iaid) for lease in leases] == [
            ("ipv4", "10.0.0.5", "web", None),
            ("ipv6", "fd00::5", None, "7"),
            ("9", "?", None, None),
        ]
    assert ("NETWORK_GET_DHCP_LEASES", (NET, "52:54:00:00:00:01", 1, 0)) in fake.calls


@pytest.mark.parametrize(("feature", "numbers"), [(1, (4, 5)), (0, (5, 4))])
def test_an_update_is_put_the_way_the_daemon_takes_it(daemon: Make, feature: int, numbers: tuple[int, int]) -> None:
    fake = daemon(CONNECT_SUPPORTS_FEATURE=(feature,), NETWORK_UPDATE=(), **LOOKUP)
    with fake.connect() as connection:
        network = connection.network("lan")
        network.update("add-first", "ip-dhcp-range", "<range/>", parent_index=1, flags=3)
        for command, section in (("frob", "ip"), ("add", "frob")):
            with pytest.raises(InvalidArgument, match="frob"):
                network.update(command, section, "<a/>")
    assert asked(fake)[-1] == ("NETWORK_UPDATE", (NET, *numbers, 1, "<range/>", 3))


def test_a_list_that_changes_while_it_is_asked_about_is_made_again(daemon: Make) -> None:
    gone = [NoNetwork("it went away")]

    def is_active(fake: FakeDaemon, call: m.Call) -> None:
        fake.send(m.reply_error(call, gone.pop()) if gone else m.reply(call, (1,)))

    fake = daemon(
        CONNECT_LIST_ALL_NETWORKS=([NET], 1),
        NETWORK_IS_ACTIVE=is_active,
        NETWORK_GET_AUTOSTART=(0,),
        NETWORK_IS_PERSISTENT=(1,),
    )
    with fake.connect() as connection:
        (row,) = connection.network_facts(2)
    assert (row.name, row.active, row.autostart, row.persistent) == ("lan", True, False, True)
    assert sum(name == "CONNECT_LIST_ALL_NETWORKS" for name, _ in fake.calls) == 2


def test_messages_are_of_our_own_daemon(daemon: Make) -> None:
    with daemon(NETWORK_MESSAGES=(["a"],), **LOOKUP).connect() as connection:
        assert connection.network("lan").messages() == ["a"]
    with daemon(NETWORK_MESSAGES=NoSupport("no such program"), **LOOKUP).connect() as connection:
        assert connection.network("lan").messages() == []
    assert kvik()["NETWORK_MESSAGES"].number == 50


def test_ports(daemon: Make) -> None:
    port = (NET, bytes(16))
    fake = daemon(
        NETWORK_LIST_ALL_PORTS=([port], 1),
        NETWORK_PORT_LOOKUP_BY_UUID=(port,),
        NETWORK_PORT_CREATE_XML=(port,),
        NETWORK_PORT_GET_XML_DESC=("<networkport/>",),
        NETWORK_PORT_DELETE=(),
        **LOOKUP,
    )
    with fake.connect() as connection:
        network = connection.network("lan")
        (found,) = network.ports()
        assert found.uuid == "00000000-0000-0000-0000-000000000000"
        assert network.port(bytes(16)).ref == network.create_port("<networkport/>").ref == port
        assert found.xml() == "<networkport/>"
        found.delete()
    assert asked(fake)[-1] == ("NETWORK_PORT_DELETE", (port, 0))


def test_events(daemon: Make) -> None:
    fake = daemon(CONNECT_NETWORK_EVENT_REGISTER_ANY=(5,), CONNECT_NETWORK_EVENT_DEREGISTER_ANY=(), **LOOKUP)
    with fake.connect() as connection:
        network = connection.network("lan")
        assert connection.register_network("metadata-change", network) == 5
        with pytest.raises(InvalidArgument):
            connection.register_network("frob")
        fake.event("NETWORK_EVENT_LIFECYCLE", 5, NET, 3, 0)
        fake.event("NETWORK_EVENT_CALLBACK_METADATA_CHANGE", 5, NET, 2, "u")
        first, second = connection.next_event(5), connection.next_event(5)
        connection.deregister_network(5)
    assert first == NetworkEvent("lifecycle", "lan", UUID, 5, {"event": 3, "detail": 0})
    assert str(first) == "Stopped"
    assert str(second) == "type=2 nsuri=u"
    assert asked(fake)[1] == ("CONNECT_NETWORK_EVENT_REGISTER_ANY", (1, NET))


def test_the_class_is_at_hand() -> None:
    import kvik.client

    assert kvik.client.Network is Network
