"""A network's document becomes nftables commands: what passes, what is masqueraded, what is handed in."""

from __future__ import annotations

import json

import pytest

from kvik.conf.network_validate import load_network
from kvik.network import nat

MAC, UUID = "52:54:00:00:00:01", "6a1b9f0e-3c8d-4f5a-9b7e-0d2c4e6f8a10"
V4 = "<ip address='192.168.122.1' prefix='24'/>"
V6 = "<ip family='ipv6' address='fd00:1::1' prefix='64'/>"


def rules(inner: str, chain: str) -> list[str]:
    """The rules of one chain, in the words of nft(8) as far as these tests need them."""
    text = f"<network><name>n</name><uuid>{UUID}</uuid><mac address='{MAC}'/><bridge name='virbr0'/>{inner}</network>"
    found = [command["add"]["rule"] for command in nat.add(load_network(text)) if "rule" in command["add"]]
    return [" ".join(map(words, rule["expr"])) for rule in found if rule["chain"] == chain]


def words(expression: dict[str, object]) -> str:
    ((verb, body),) = expression.items()
    if verb != "match":
        return verb if body is None else f"{verb} {json.dumps(body)}"
    assert isinstance(body, dict)
    ((kind, left),) = body["left"].items()
    right = body["right"]
    if isinstance(right, dict) and "prefix" in right:
        right = f"{right['prefix']['addr']}/{right['prefix']['len']}"
    name = left.get("key") or left.get("field") or kind
    value = right if isinstance(right, str) else json.dumps(right)
    return f"{name}{body['op'] if body['op'] == '!=' else ''} {value}"


def test_nat_lets_out_what_is_its_own_and_in_what_answers() -> None:
    assert rules(f"<forward mode='nat'/>{V4}", "forward") == [
        "iifname virbr0 oifname virbr0 accept",
        'oifname virbr0 daddr 192.168.122.0/24 state ["established", "related"] accept',
        "iifname virbr0 saddr 192.168.122.0/24 accept",
        'iifname virbr0 reject {"type": "icmpx", "expr": "port-unreachable"}',
        'oifname virbr0 reject {"type": "icmpx", "expr": "port-unreachable"}',
    ]


def test_connections_leave_from_high_ports_and_what_is_for_the_segment_stays_as_it_is() -> None:
    assert rules(f"<forward mode='nat'/>{V4}", "masquerade") == [
        "saddr 192.168.122.0/24 daddr 224.0.0.0/24 return",
        "saddr 192.168.122.0/24 daddr 255.255.255.255 return",
        "saddr 192.168.122.0/24 daddr!= 192.168.122.0/24 l4proto "
        '{"set": ["tcp", "udp"]} masquerade {"port": {"range": [1024, 65535]}}',
        "saddr 192.168.122.0/24 daddr!= 192.168.122.0/24 masquerade",
    ]


def test_ipv6_is_routed_unless_nat_is_asked_for() -> None:
    routed = rules(f"<forward mode='nat'/>{V4}{V6}", "forward")
    assert "oifname virbr0 daddr fd00:1::/64 accept" in routed
    assert not any("fd00" in rule for rule in rules(f"<forward mode='nat'/>{V4}{V6}", "masquerade"))
    asked = f"<forward mode='nat'><nat ipv6='yes'/></forward>{V6}"
    assert 'oifname virbr0 daddr fd00:1::/64 state ["established", "related"] accept' in rules(asked, "forward")
    assert rules(asked, "masquerade")[-1] == "saddr fd00:1::/64 daddr!= fd00:1::/64 masquerade"


def test_addresses_and_ports_of_the_way_out_can_be_chosen() -> None:
    chosen = (
        "<forward mode='nat' dev='eth0'><nat><address start='203.0.113.5' end='203.0.113.9'/>"
        f"<port start='2000' end='2999'/></nat></forward>{V4}"
    )
    last = rules(chosen, "masquerade")[-2:]
    assert "oifname eth0" in last[0] and '"range": [2000, 2999]' in last[0]
    assert '{"addr": {"range": ["203.0.113.5", "203.0.113.9"]}, "family": "ip"}' in last[1]
    assert "iifname virbr0 oifname eth0 saddr 192.168.122.0/24 accept" in rules(chosen, "forward")


def test_a_route_is_open_both_ways_and_translates_nothing() -> None:
    assert "oifname virbr0 daddr 192.168.122.0/24 accept" in rules(f"<forward mode='route'/>{V4}", "forward")
    assert rules(f"<forward mode='route'/>{V4}", "masquerade") == []


def test_isolated_means_each_other_only() -> None:
    isolated = rules(V4, "forward")
    assert [rule.split()[-1] if "reject" not in rule else "reject" for rule in isolated] == [
        "accept", "reject", "reject",
    ]  # fmt: skip


def test_open_networks_and_borrowed_bridges_have_no_table() -> None:
    def needs(inner: str) -> bool:
        return nat.needs_table(load_network(f"<network><name>n</name>{inner}</network>"))

    assert needs(f"<bridge name='virbr0'/>{V4}") and needs(f"<forward mode='nat'/>{V4}")
    assert not needs(f"<forward mode='open'/><bridge name='virbr0'/>{V4}")
    assert not needs("<forward mode='bridge'/><bridge name='br0'/>")


@pytest.mark.parametrize(
    "attributes, translation",
    [
        ("start='80'", '{"addr": "192.168.122.9", "family": "ip", "port": 80}'),
        ("start='8080' to='80'", '{"addr": "192.168.122.9", "family": "ip", "port": 80}'),
        ("start='80' end='89'", '{"addr": "192.168.122.9", "family": "ip"}'),
        ("start='80' end='81' to='90'", '"data": {"set": [[80, 90], [81, 91]]}'),
    ],
)
def test_a_port_forward_opens_what_it_names(attributes: str, translation: str) -> None:
    inner = (
        "<forward mode='nat' xmlns:kvik='urn:kvik:1'>"
        f"<kvik:portForward proto='tcp' {attributes} guest='192.168.122.9'/></forward>{V4}"
    )
    for chain in ("incoming", "outgoing"):
        (rule,) = rules(inner, chain)
        assert "fib local" in rule and translation in rule
    opened = [rule for rule in rules(inner, "forward") if "status dnat" in rule]
    assert len(opened) == 1 and "daddr 192.168.122.9" in opened[0]


def test_to_replace_is_to_delete_and_add_in_one_transaction() -> None:
    document = load_network(f"<network><name>n</name><bridge name='virbr0'/>{V4}</network>")
    verbs = [next(iter(command)) for command in nat.install(document)]
    assert verbs[:3] == ["add", "delete", "add"]  # adding first: deleting cannot fail then
    assert nat.remove("virbr0") == nat.install(document)[:2]
