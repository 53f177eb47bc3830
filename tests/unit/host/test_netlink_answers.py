"""The kernel's answers, decoded: recorded ones (Linux 6.18, tests/data/netlink), and damaged ones."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvik.errors import HostError, MissingPackages
from kvik.host import bridge as bridge_module
from kvik.host import netlink as netlink_module
from kvik.host import nft_probe, nftables
from kvik.host.bridge import parse_bridge, parse_port
from kvik.host.bridge_vlan import PortVlan, parse_vlans
from kvik.host.neighbour import parse_fdb, parse_neighbour
from kvik.host.netlink import DUMP, Netlink, parse_address, parse_link
from kvik.host.netlink_attributes import attribute, iterate_attributes
from kvik.host.netlink_monitor import parse_changes
from kvik.host.route import parse_route
from kvik.host.traffic import parse_queue

DATA = Path(__file__).parents[2] / "data/netlink/answers.json"
ANSWERS = {name: [bytes.fromhex(each) for each in found] for name, found in json.loads(DATA.read_text()).items()}


def test_a_bridge() -> None:
    bridge = parse_bridge(ANSWERS["bridge"][0])
    assert bridge is not None
    assert (bridge.name, bridge.link.mac, bridge.link.kind) == ("virbr0", "52:54:00:00:00:01", "bridge")
    assert (bridge.stp, bridge.stp_by, bridge.priority) == (True, "kernel", 4096)
    assert (bridge.forward_delay, bridge.hello_time, bridge.max_age, bridge.ageing_time) == (2, 2, 20, 100.5)
    assert bridge.bridge_id == bridge.root_id == "1000.525400000001" and bridge.is_root
    assert parse_bridge(ANSWERS["link"][0]) is None


def test_a_link_and_its_port() -> None:
    link = parse_link(ANSWERS["link"][0])
    assert (link.name, link.kind, link.mac, link.master_kind) == ("vnet0", "veth", "fe:54:00:00:00:07", "bridge")
    assert link.up and link.carrier and link.mtu == 1500
    ports = [parse_port(answer, {link.index: link}) for answer in ANSWERS["ports"]]
    (port,) = [port for port in ports if port]
    assert (port.name, port.cost, port.priority, port.isolated, port.learning, port.flood) == (
        "vnet0", 7, 3, True, False, True,
    )  # fmt: skip
    assert port.designated_root == "1000.525400000001" and port.state == "listening"


def test_addresses() -> None:
    four, six = [parse_address(answer) for answer in ANSWERS["addresses"]][:2]
    assert four is not None and six is not None
    assert (str(four.interface), four.broadcast, four.label) == ("192.168.122.1/24", "192.168.122.255", "virbr0")
    assert four.permanent and four.valid is None and four.peer == ""
    assert (str(six.interface), six.valid, six.preferred, six.permanent) == ("2001:db8::1/64", 1000, 500, False)


def test_routes() -> None:
    found = [parse_route(answer) for answer in ANSWERS["routes4"] + ANSWERS["routes6"]]
    routes = {str(route.network): route for route in found if route and route.table == 254}
    route = routes["198.51.100.0/24"]
    assert (route.gateway, route.metric) == (ip_address("192.168.122.9"), 5)
    assert (route.source, route.protocol, route.kind) == (ip_address("192.168.122.1"), "static", "unicast")
    assert routes["::/0"].default and routes["::/0"].gateway == ip_address("2001:db8::9")
    assert routes["192.168.122.0/24"].protocol == "kernel"


def test_a_route_of_several_ways_and_one_by_a_gateway_of_the_other_family() -> None:
    def way(index: int, weight: int, gateway: bytes) -> bytes:
        return struct.pack("=HBBi", 8 + len(gateway), 0, weight - 1, index) + gateway

    head = struct.pack("=BBBBBBBBI", 2, 24, 0, 0, 254, 4, 0, 1, 0)
    via = attribute(18, struct.pack("=H", 10) + ip_address("fe80::1").packed)
    ways = way(3, 1, attribute(5, ip_address("192.0.2.1").packed)) + way(4, 10, via)
    route = parse_route(head + attribute(1, ip_address("198.51.100.0").packed) + attribute(9, ways))
    assert route is not None and route.network == ip_network("198.51.100.0/24") and route.index == 0
    assert [(each.index, each.weight, str(each.gateway)) for each in route.ways] == [
        (3, 1, "192.0.2.1"),
        (4, 10, "fe80::1"),
    ]


def test_who_is_where() -> None:
    entries = [entry for answer in ANSWERS["fdb"] if (entry := parse_fdb(answer))]
    assert {(entry.mac, entry.kind) for entry in entries} >= {
        ("52:54:00:00:00:07", "static"),
        ("fe:54:00:00:00:07", "local"),
    }
    assert len({entry.bridge for entry in entries}) == 1
    assert any(parse_fdb(answer) is None for answer in ANSWERS["fdb"])  # what a card listens to, without a bridge
    (neighbour,) = [parse_neighbour(answer) for answer in ANSWERS["neighbours"]]
    assert neighbour is not None and (neighbour.mac, neighbour.state) == ("52:54:00:00:00:09", "permanent")
    assert neighbour.address == ip_address("192.168.122.9") and neighbour.usable


def test_queues() -> None:
    queues = {queue.handle: queue for queue in map(parse_queue, ANSWERS["queues"]) if queue.kind == "htb"}
    assert (queues["1:1"].rate, queues["1:1"].ceiling, queues["1:1"].parent) == (1_000_000, 2_000_000, "root")


class Kernel:
    """Stands for the socket: takes a request, gives the datagrams that a test wants, with its sequence number."""

    def __init__(self, *turns: list[bytes]) -> None:
        self.turns, self.requests = list(turns), 0
        self.waiting: list[bytes] = []

    def send(self, data: bytes) -> None:
        self.requests += 1
        sequence = data[8:12]
        self.waiting += [part.replace(b"SEQ!", sequence) for part in self.turns.pop(0)]

    def recv(self, size: int) -> bytes:
        if not self.waiting:
            raise TimeoutError(110, "timed out")
        return self.waiting.pop(0)[:size]

    def close(self) -> None: ...


def message(kind: int, payload: bytes = b"", flags: int = 2, sequence: bytes = b"SEQ!", length: int = 0) -> bytes:
    return struct.pack("=IHH4sI", length or 16 + len(payload), kind, flags, sequence, 0) + payload


def ask(kernel: Kernel) -> list[bytes]:
    with Netlink() as netlink:
        netlink._socket.close()
        netlink._socket = kernel
        return netlink.request("ask", 18, DUMP, b"")


DONE = message(3, struct.pack("=i", 0))


def test_a_list_comes_in_parts_and_strangers_answers_are_skipped() -> None:
    old = message(16, b"old!", sequence=struct.pack("=I", 77))
    kernel = Kernel([message(16, b"one!") + old + message(16, b"two!"), message(16, b"tri!"), DONE])
    assert ask(kernel) == [b"one!", b"two!", b"tri!"]


def test_a_list_that_changed_while_it_was_read_is_read_again() -> None:
    torn, whole = [message(16, b"torn", flags=0x12), DONE], [message(16, b"good"), DONE]
    kernel = Kernel(torn, torn, whole)
    assert ask(kernel) == [b"good"] and kernel.requests == 3
    assert ask(Kernel(*[torn] * 5)) == [b"torn"]  # it changes all the time


def test_an_answer_that_is_cut_short_late_or_a_refusal_is_an_error() -> None:
    with pytest.raises(HostError, match="cannot ask: the kernel's answer is cut short"):
        ask(Kernel([message(16, b"one!", length=200)]))
    with pytest.raises(HostError, match="cut short"):
        ask(Kernel([message(2, b"")]))
    with pytest.raises(HostError, match="cannot ask: timed out"):
        ask(Kernel([message(16, b"one!")]))
    with pytest.raises(HostError, match="cannot ask: No such device"):
        ask(Kernel([message(2, struct.pack("=i", -19))]))
    with pytest.raises(HostError, match="cannot ask: No such device"):  # at the end of a dump
        ask(Kernel([message(16, b"one!"), message(3, struct.pack("=i", -19))]))


def test_a_list_is_bounded_and_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(netlink_module, "MAX_ANSWERS", 2)
    kernel = Kernel([message(16, b"one!") * 3, message(16, b"more"), DONE])
    with pytest.raises(HostError, match="more than 2 entries") as raised:
        ask(kernel)
    assert raised.value.errno == 7 and kernel.waiting == []


def vlans(*infos: tuple[int, int]) -> list[PortVlan]:
    spec = b"".join(attribute(2, struct.pack("=HH", *info)) for info in infos)
    return parse_vlans(struct.pack("=BxHiII", 7, 1, 5, 0, 0) + attribute(26, spec))


def test_vlans_of_a_bridge_and_its_port() -> None:
    """Recorded from Linux 6.1 (the lab's)."""
    assert [[str(vlan) for vlan in parse_vlans(answer)] for answer in ANSWERS["vlans"]] == [
        ["1 PVID untagged"],
        ["1 PVID untagged", "10-20", "100 untagged"],
    ]


def test_vlan_ranges() -> None:
    assert vlans((6, 1), (8, 10), (16, 20), (0, 30)) == [
        PortVlan(5, 1, 1, True, True),
        PortVlan(5, 10, 20, False, False),
        PortVlan(5, 30, 30, False, False),
    ]
    assert list(map(str, vlans((6, 1), (8, 10), (16, 20)))) == ["1 PVID untagged", "10-20"]
    assert vlans((16, 20)) == [PortVlan(5, 20, 20, False, False)]  # an end without a beginning
    assert vlans((8, 30), (16, 20)) == [PortVlan(5, 20, 20, False, False)]  # before its beginning
    assert vlans((8, 30)) == []


DECODERS: dict[str, Callable[[bytes], object]] = {
    "bridge": parse_bridge,
    "link": parse_link,
    "ports": lambda answer: (parse_port(answer, {}), parse_vlans(answer)),
    "addresses": parse_address,
    "routes4": parse_route,
    "routes6": parse_route,
    "fdb": parse_fdb,
    "neighbours": parse_neighbour,
    "queues": parse_queue,
    "vlans": parse_vlans,
}


@pytest.mark.parametrize("name", DECODERS)
def test_an_answer_cut_anywhere_is_refused_or_read_as_less(name: str) -> None:
    answer = ANSWERS[name][0]
    for length in range(len(answer)):
        try:
            DECODERS[name](answer[:length])
        except HostError as error:
            assert "cut short" in str(error) and length < 32


@given(st.sampled_from(sorted(DECODERS)), st.data())
def test_damaged_answers_raise_nothing_but_our_own_error(name: str, data: st.DataObject) -> None:
    answer = bytearray(data.draw(st.sampled_from(ANSWERS[name])))
    for place in data.draw(st.lists(st.integers(0, len(answer) - 1), max_size=8)):
        answer[place] = data.draw(st.integers(0, 255))
    try:
        DECODERS[name](bytes(answer))
    except HostError:
        pass


@given(st.binary(max_size=400))
def test_any_bytes_may_come_as_a_notice(data: bytes) -> None:
    parse_changes(data)
    for kind in (16, 17, 0xA00, 0xA02):
        parse_changes(struct.pack("=IHHII", 16 + len(data), kind, 0, 0, 0) + data)


@given(st.binary(max_size=200))
def test_attributes_never_reach_beyond_their_message(data: bytes) -> None:
    assert sum(4 + len(payload) for _, payload in iterate_attributes(data)) <= len(data)


def test_notices_are_told_apart() -> None:
    def notice(kind: int, answer: bytes) -> bytes:
        return struct.pack("=IHHII", 16 + len(answer), kind, 0, 0, 0) + answer + bytes(-len(answer) % 4)

    found = parse_changes(
        notice(16, ANSWERS["link"][0])
        + notice(17, ANSWERS["link"][0])
        + notice(21, ANSWERS["addresses"][0])
        + notice(0xA00, b"\1\0\0\0")
        + notice(0xA02, b"\1\0\0\0")
        + notice(17, b"")
        + notice(99, b"")
    )
    assert [(change.what, change.gone) for change in found] == [
        ("link", False), ("link", True), ("table", False), ("table", True)
    ]  # fmt: skip
    assert found[1].link is not None and found[1].link.name == "vnet0"


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"priority": -1}, "cannot set priority"),
        ({"priority": "high"}, "cannot set priority"),
        ({"ageing_time": 1e12}, "cannot set ageing_time"),
        ({"ageing_time": float("nan")}, "cannot set ageing_time"),
    ],
)
def test_a_setting_out_of_its_field_is_refused_by_name(settings: dict[str, object], words: str) -> None:
    with pytest.raises(HostError, match=words):
        bridge_module._encode(bridge_module._BRIDGE, settings, "bridge br0")


def test_words_of_nftables_become_an_error_with_its_number() -> None:
    command = {"add": {"chain": {"family": "ip", "table": "t", "name": "c"}}}
    for words, number in (
        ("internal:0:0-0: Error: Could not process rule: No such file or directory\n\n\n", 2),
        ("internal:0:0-0: Error: No such file or directory; did you mean table ‘kvik’ in family inet?", 2),
        ("internal:0:0-0: Error: Could not process rule: File exists", 17),
        ("netlink: Error: Operation not permitted (you must be root)", 0),
        ("", 0),
    ):
        error = nftables.refusal(command, words)
        assert error.errno == number and '"name": "c"' in str(error)
    long = nftables.refusal({"add": {"set": {"elem": ["192.0.2.1"] * 1000}}}, "Error: " + "x" * 5000)
    assert len(str(long)) < 1200


@pytest.mark.parametrize("output", [b"{", b"[]", b'{"a": 1}', b'{"nftables": 7}', b'{"nftables": [3]}', b"[" * 100_000])
def test_output_that_is_not_nftables_is_refused(output: bytes) -> None:
    with pytest.raises(HostError, match="not as libnftables-json"):
        nftables.parse_output(output)


def test_output_less_its_metainfo() -> None:
    assert nftables.parse_output(b'{"nftables": [{"metainfo": {}}, {"table": {"name": "t"}}]}') == [
        {"table": {"name": "t"}}
    ]
    assert nftables.parse_output(b" \n") == []


def test_a_probe_asks_once_where_all_is_there_and_remembers(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    lacking = {"masquerade"}

    def check(commands: list[dict[str, dict[str, dict[str, str]]]]) -> None:
        names = [each["add"]["chain"]["name"] for each in commands if "chain" in each["add"]]
        asked.append(names)
        if lacking & set(names):
            raise HostError('nftables refused {"add": {}}: No such file or directory', errno=2)

    monkeypatch.setattr(nft_probe, "_known", {})
    monkeypatch.setattr(nftables, "check", check)
    assert nft_probe.missing("ct", "limit") == {}
    assert nft_probe.missing("ct") == {}
    assert asked == [["ct", "limit"]]
    reasons = nft_probe.missing("ct", "masquerade", "log")
    assert list(reasons) == ["masquerade"]
    assert "CONFIG_NFT_MASQ" in reasons["masquerade"] and reasons["masquerade"].endswith("No such file or directory")
    assert asked[1:] == [["masquerade", "log"], ["masquerade"], ["log"]]


def test_a_probe_that_could_not_ask_says_so_and_remembers_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(commands: object) -> None:
        raise HostError("nftables refused {}: Operation not permitted", errno=1)

    monkeypatch.setattr(nft_probe, "_known", {})
    monkeypatch.setattr(nftables, "check", check)
    with pytest.raises(HostError, match="not permitted"):
        nft_probe.missing("ct")
    assert nft_probe._known == {}


def test_without_the_library_its_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nftables, "_LIBRARY", "libnftables-is-not-here.so.1")
    nftables._library.cache_clear()
    try:
        with pytest.raises(MissingPackages, match="libnftables1") as raised:
            nftables.run([{"list": {"tables": None}}])
        assert raised.value.packages == ("libnftables1",)
    finally:
        nftables._library.cache_clear()
