"""What the verbs of networks print where a line of test_verbs is not enough."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from kvik.client.domain import InterfaceAddress
from kvik.client.events import NetworkEvent
from kvik.errors import InvalidArgument, KvikError


def test_leases_are_ordered_and_times_are_local(kvik: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC-3")
    time.tzset()
    try:
        assert kvik("net-dhcp-leases", "lan") == 0
    finally:
        monkeypatch.undo()
        time.tzset()
    assert kvik.out == (
        " Expiry Time           MAC address         Protocol   IP address    Hostname   Client ID or DUID\n"
        "--------------------------------------------------------------------------------------------------\n"
        " 1970-01-02 03:00:00   52:54:00:00:00:01   ipv4       10.0.0.5/24   web        -\n"
        " never                 52:54:00:00:00:09   ipv6       fd00::9/64    -          00:01\n"
        "\n"
    )


def test_what_is_known_of_a_lease_as_json(kvik: Any) -> None:
    assert kvik("--json", "net-dhcp-leases", "lan") == 0
    first, second = json.loads(kvik.out)
    assert first == {
        "interface": "virbr7", "expiry": 86400, "family": "ipv4", "mac": "52:54:00:00:00:01", "address": "10.0.0.5",
        "prefix": 24, "hostname": "web",
    }  # fmt: skip
    assert (second["iaid"], second["client_id"], second["expiry"]) == ("7", "00:01", 0)


def test_lists_as_json(kvik: Any) -> None:
    assert kvik("--json", "net-list", "--all", "--name") == 0
    assert [(row["name"], row["active"], row["autostart"]) for row in json.loads(kvik.out)] == [
        ("lab", False, False),
        ("lan", True, True),
    ]


def test_a_network_without_a_bridge_or_autostart(kvik: Any) -> None:
    kvik.connection.replies |= {"net_bridge_name": KvikError("none"), "net_autostart": KvikError("none")}
    assert kvik("net-info", "lan") == 0
    assert kvik.out.endswith("Autostart:      no autostart\n\n")


def test_a_name_that_is_not_known_gets_a_suggestion(kvik: Any) -> None:
    assert kvik("net-info", "lam") == 1
    assert kvik.err == "error: failed to get network 'lam'\nerror: no network 'lam'\nhint: did you mean 'lab'?\n"
    assert kvik("net-start", "something-else") == 1
    assert "'kvik net-list --all' shows every network" in kvik.err
    assert kvik("net-name", "lan") == 1
    assert "hint: net-name takes a UUID" in kvik.err
    assert kvik("net-uuid", "11111111-2222-3333-4444-555555555555") == 1  # by name only, as virsh does


def test_what_the_daemon_has_to_say_follows_define_start_and_leases(kvik: Any) -> None:
    kvik.connection.replies["net_messages"] = ["chain FORWARD of docker drops its packets"]
    assert kvik("net-start", "lab") == 0
    assert kvik.out == "Network lab started\n\n"
    assert kvik.err == "warning: chain FORWARD of docker drops its packets\n"
    assert kvik("net-dhcp-leases", "lan") == 0
    assert kvik.err == "warning: chain FORWARD of docker drops its packets\n"
    kvik.connection.replies["net_messages"] = KvikError("the daemon knows no such call")
    assert kvik("net-start", "lab") == 0
    assert not kvik.err


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["net-list", "--uuid", "--name"], "Only one argument from --table, --name and --uuid may be specified."),
        (["net-port-list", "lan", "--uuid", "--table"], "Only one argument"),
        (["net-update", "lan", "frob", "ip", "<a/>"], "unrecognized command name 'frob'"),
        (["net-update", "lan", "add", "frob", "<a/>"], "unrecognized section name 'frob'"),
        (["net-update", "lan", "add", "ip", "/nonexistent"], "Failed to open file '/nonexistent'"),
        (["net-update", "lan", "add", "ip", "<a/>", "--live", "--current"], "mutually exclusive"),
        (["net-event"], "either --list or --event <type> is required"),
        (["net-event", "--event", "frob"], "unknown event type frob"),
        (["net-event", "--event", "lifecycle", "--timeout", "0"], "invalid timeout '0'"),
        (["net-port-dumpxml", "lan", "x"], "failed to get network port 'x'"),
        (["net-metadata", "lan", "u", "--remove", "--edit"], "mutually exclusive"),
    ],
)
def test_mistakes_are_named(kvik: Any, words: list[str], error: str) -> None:
    assert kvik(*words) == 1
    assert error in kvik.err


def test_a_refusal_says_what_was_tried(kvik: Any) -> None:
    kvik.connection.replies["net_destroy"] = InvalidArgument("the reason")
    assert kvik("net-destroy", "lan") == 1
    assert kvik.err == "error: Failed to destroy network lan\nerror: the reason\n"


def test_events_are_told_as_they_come(kvik: Any) -> None:
    uuid = bytes(16)
    events = [
        NetworkEvent("lifecycle", "lan", uuid, 1, {"event": 2, "detail": 0}),
        NetworkEvent("lifecycle", "lan", uuid, 1, {"event": 9, "detail": 0}),
        NetworkEvent("metadata-change", "lan", uuid, 1, {"type": 2, "nsuri": "http://x"}),
    ]
    queue = iter([*events, None])
    kvik.connection.replies["next_event"] = lambda timeout: next(queue)
    assert kvik("net-event", "--event", "lifecycle", "--loop", "--timeout", "5") == 0
    assert kvik.out.splitlines()[:3] == [
        "event 'lifecycle' for network lan: Started",
        "event 'lifecycle' for network lan: event 9",
        "event 'metadata-change' for network lan: type element, uri http://x",
    ]
    queue = iter([*events, None])
    assert kvik("--json", "net-event", "--event", "lifecycle", "--timestamp") == 0
    told = json.loads(kvik.out)
    assert (told["event"], told["network"], told["detail"]) == ("lifecycle", "lan", "Started")
    assert told["time"].endswith("+0000")


def told(connection: Any, **by_source: Any) -> None:
    """What each source says of a machine's addresses: a list, or the error it raises."""

    def interface_addresses(source: int = 0) -> Any:
        reply = by_source.get(["lease", "agent", "arp"][source], [])
        if isinstance(reply, Exception):
            raise reply
        return reply

    connection.replies["interface_addresses"] = interface_addresses


MAC = "52:54:00:aa:bb:cc"
LEASE = InterfaceAddress("vnet0", MAC, "ipv4", "10.0.0.5", 24)


def test_what_the_sources_know_is_put_together_and_who_knows_it_is_said(kvik: Any) -> None:
    told(
        kvik.connection,
        lease=[LEASE],
        agent=[
            InterfaceAddress("lo", "00:00:00:00:00:00", "ipv4", "127.0.0.1", 8),
            InterfaceAddress("eth1", "52:54:00:00:00:99", "ipv4", "10.9.9.9", 8),
            InterfaceAddress("eth0", MAC.upper(), "ipv4", "10.0.0.5", 24),
            InterfaceAddress("eth0", MAC, "ipv6", "fe80::1", 64),
        ],
        arp=[InterfaceAddress("vnet0", MAC, "ipv4", "10.0.0.5", 0)],
    )
    assert kvik("domifaddr", "tiny-1") == 0
    assert kvik.out == (
        " Name       MAC address          Protocol     Address        Source\n"
        "-------------------------------------------------------------------------------\n"
        " vnet0      52:54:00:aa:bb:cc    ipv4         10.0.0.5/24    lease, agent, arp\n"
        " eth0       52:54:00:aa:bb:cc    ipv6         fe80::1/64     agent\n"
        " eth1       52:54:00:00:00:99    ipv4         10.9.9.9/8     agent\n"
        "\n"
    )
    assert kvik("domifaddr", "tiny-1", "--source", "any") == 0
    assert kvik.out.splitlines()[2].endswith("10.0.0.5/24    lease, agent, arp")
    assert kvik("--json", "domifaddr", "tiny-1") == 0
    assert next((one["address"], one["sources"]) for one in json.loads(kvik.out)) == (
        "10.0.0.5",
        ["lease", "agent", "arp"],
    )


def test_addresses_by_lease_alone_look_as_virsh_shows_them(kvik: Any) -> None:
    told(kvik.connection, lease=[LEASE], agent=KvikError("no agent"))
    assert kvik("domifaddr", "tiny-1") == 0
    assert kvik.out.splitlines()[0].endswith("Protocol     Address")
    assert kvik.out.splitlines()[2] == " vnet0      52:54:00:aa:bb:cc    ipv4         10.0.0.5/24"


def test_the_address_that_one_would_type_comes_first(kvik: Any) -> None:
    addresses = [("ipv6", "fe80::1"), ("ipv6", "2001:db8::1"), ("ipv4", "10.0.0.5")]
    told(kvik.connection, agent=[InterfaceAddress("eth0", MAC, family, text, 64) for family, text in addresses])
    assert kvik("ip", "tiny-1") == 0
    assert kvik.out == "10.0.0.5\n"
    assert kvik("ip", "tiny-1", "--all") == 0
    assert kvik.out == "10.0.0.5\n2001:db8::1\nfe80::1\n"


def test_no_address_is_an_error_that_says_what_to_do(kvik: Any) -> None:
    told(kvik.connection, agent=KvikError("no agent in the guest"))
    assert kvik("ip", "tiny-1") == 1
    assert "no agent in the guest" in kvik.err
    told(kvik.connection)
    assert kvik("ip", "tiny-1") == 1
    assert "nobody knows one" in kvik.err
    assert "hint: wait until it has booted" in kvik.err
