"""Network filters against real frames: what a hostile guest sends is dropped, what it may send passes."""

from __future__ import annotations

import time
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from functional.network.filtered_bridge import (
    ARP,
    BROADCAST,
    GUEST_IP,
    GUEST_MAC,
    IPV4,
    IPV6,
    OTHER_IP,
    OTHER_MAC,
    RARP,
    VLAN,
    arp,
    ethernet,
    filtered_bridge,
    ipv4,
    ipv6,
    tcp,
    udp,
)  # fmt: skip
from kvik.errors import ConfigError, ConfigUnsupported, NoFilter, NoFilterBinding
from netns import in_namespace

UDP, TCP, ICMP = 17, 6, 1
SYN, ACK = 0x02, 0x10
PING = ipv4(GUEST_IP, OTHER_IP, ICMP, b"\x08\0\0\0\0\0\0\0")


def from_guest(packet: bytes, kind: int = IPV4, to: str = OTHER_MAC) -> bytes:
    return ethernet(GUEST_MAC, to, kind, packet)


def to_guest(packet: bytes, kind: int = IPV4) -> bytes:
    return ethernet(OTHER_MAC, GUEST_MAC, kind, packet)


@in_namespace
def test_without_a_filter_everything_passes(tmp_path: Path) -> None:
    """Else the tests below would prove nothing."""
    with filtered_bridge(tmp_path) as wire:
        assert wire.sent(from_guest(PING))
        assert wire.sent(ethernet("52:54:00:00:00:66", OTHER_MAC, IPV4, PING))
        assert wire.sent(from_guest(ipv4("10.0.0.66", OTHER_IP, UDP, udp(1, 2))))
        assert wire.sent(arp("52:54:00:00:00:66", "10.0.0.66", OTHER_IP))
        assert wire.sent(from_guest(ipv6("fe80::1", "fe80::2", UDP, udp(1, 2)), IPV6))
        assert wire.sent(from_guest((5).to_bytes(2) + IPV4.to_bytes(2) + PING, VLAN))
        assert wire.received(to_guest(ipv4(OTHER_IP, GUEST_IP, UDP, udp(1, 2))))


@in_namespace
def test_clean_traffic_drops_what_is_spoofed_and_passes_what_is_right(tmp_path: Path) -> None:
    with filtered_bridge(tmp_path) as wire:
        wire.bind("clean-traffic", IP=GUEST_IP)
        assert wire.sent(from_guest(PING))
        assert wire.sent(arp(GUEST_MAC, GUEST_IP, OTHER_IP))
        assert wire.sent(arp(GUEST_MAC, GUEST_IP, OTHER_IP, opcode=2, target_mac=OTHER_MAC, to=OTHER_MAC))
        dhcp = ipv4("0.0.0.0", "255.255.255.255", UDP, udp(68, 67))
        assert wire.sent(from_guest(dhcp, to=BROADCAST))

        assert not wire.sent(ethernet("52:54:00:00:00:66", OTHER_MAC, IPV4, PING)), "another machine's MAC"
        assert not wire.sent(from_guest(ipv4("10.0.0.66", OTHER_IP, UDP, udp(1, 2)))), "another machine's IP"
        assert not wire.sent(arp("52:54:00:00:00:66", GUEST_IP, OTHER_IP)), "another MAC in both headers"
        assert not wire.sent(arp("52:54:00:00:00:66", GUEST_IP, OTHER_IP, ether=GUEST_MAC)), "another MAC inside ARP"
        assert not wire.sent(arp(GUEST_MAC, "10.0.0.66", OTHER_IP)), "another IP inside ARP"
        gratuitous = arp(GUEST_MAC, OTHER_IP, OTHER_IP, opcode=2, to=BROADCAST)
        assert not wire.sent(gratuitous), "taking another machine's address over"
        assert not wire.sent(from_guest(ipv6("fe80::1", "fe80::2", UDP, udp(1, 2)), IPV6)), "IPv6 is not allowed"
        tagged = from_guest((5).to_bytes(2) + IPV4.to_bytes(2) + ipv4("10.0.0.66", OTHER_IP, UDP, udp(1, 2)), VLAN)
        assert not wire.sent(tagged), "a spoofed address behind a VLAN tag"
        assert not wire.sent(from_guest(b"\0" * 46, 0x88CC)), "another protocol (LLDP)"

        assert wire.received(to_guest(ipv4(OTHER_IP, GUEST_IP, UDP, udp(1, 2))))
        assert wire.received(arp(OTHER_MAC, OTHER_IP, GUEST_IP))
        assert not wire.received(to_guest(ipv6("fe80::2", "fe80::1", UDP, udp(1, 2)), IPV6))


@in_namespace
def test_a_spoofed_source_never_reaches_the_bridges_own_table(tmp_path: Path) -> None:
    """Dropped after learning, a frame would still have moved the victim's address to the attacker's port."""
    with filtered_bridge(tmp_path) as wire:
        wire.bind("no-mac-spoofing")
        victim = "52:54:00:00:00:66"
        assert not wire.sent(ethernet(victim, OTHER_MAC, IPV4, PING))
        learned = Path("/sys/class/net/br0/brforward")
        if learned.exists():
            assert bytes.fromhex(victim.replace(":", "")) not in learned.read_bytes()
        # A frame to the victim is flooded, not sent to the guest alone: the other end of another port sees it.
        assert wire.sent(ethernet(GUEST_MAC, victim, IPV4, PING))


@in_namespace
def test_rarp_announces_the_machine_itself_and_nobody_else(tmp_path: Path) -> None:
    with filtered_bridge(tmp_path) as wire:
        wire.bind("clean-traffic", IP=GUEST_IP)
        own = arp(GUEST_MAC, "0.0.0.0", "0.0.0.0", opcode=3, target_mac=GUEST_MAC, kind=RARP)
        assert wire.sent(own)
        assert not wire.sent(arp(GUEST_MAC, "0.0.0.0", "0.0.0.0", opcode=3, target_mac=OTHER_MAC, kind=RARP))
        assert not wire.sent(arp(GUEST_MAC, "0.0.0.0", "0.0.0.0", opcode=4, target_mac=GUEST_MAC, kind=RARP))


@in_namespace
def test_several_addresses_are_all_allowed(tmp_path: Path) -> None:
    with filtered_bridge(tmp_path) as wire:
        wire.bind("clean-traffic", IP=["10.0.0.1", "10.0.0.7"])
        assert wire.sent(from_guest(ipv4("10.0.0.1", OTHER_IP, UDP, udp(1, 2))))
        assert wire.sent(from_guest(ipv4("10.0.0.7", OTHER_IP, UDP, udp(1, 2))))
        assert not wire.sent(from_guest(ipv4("10.0.0.8", OTHER_IP, UDP, udp(1, 2))))


@in_namespace
def test_the_first_address_a_machine_shows_becomes_its_own(tmp_path: Path) -> None:
    with filtered_bridge(tmp_path) as wire:
        wire.bind("clean-traffic")
        assert not wire.sent(ethernet("52:54:00:00:00:66", OTHER_MAC, IPV4, ipv4("10.0.0.66", OTHER_IP, UDP, b""))), (
            "nothing is learned from a spoofed frame"
        )
        assert wire.sent(arp(GUEST_MAC, "10.0.0.5", OTHER_IP))
        assert wire.sent(from_guest(ipv4("10.0.0.5", OTHER_IP, UDP, udp(1, 2))))
        assert not wire.sent(from_guest(ipv4("10.0.0.6", OTHER_IP, UDP, udp(1, 2))))
        assert not wire.sent(arp(GUEST_MAC, "10.0.0.6", OTHER_IP))
        # A filter that is changed does not forget; a machine that is started anew does.
        wire.filters.reapply()
        assert not wire.sent(arp(GUEST_MAC, "10.0.0.6", OTHER_IP))
        assert wire.sent(arp(GUEST_MAC, "10.0.0.5", OTHER_IP))
        wire.bind("clean-traffic")
        assert wire.sent(arp(GUEST_MAC, "10.0.0.6", OTHER_IP))


@in_namespace
def test_only_addresses_from_dhcp_are_allowed_if_asked_so_and_no_longer_than_the_lease(tmp_path: Path) -> None:
    with filtered_bridge(tmp_path) as wire:
        wire.bind("clean-traffic", CTRL_IP_LEARNING="dhcp")
        frame = from_guest(ipv4("10.0.0.5", OTHER_IP, UDP, udp(1, 2)))
        assert not wire.sent(frame)
        wire.filters.learned("tap0", "10.0.0.5", 3600)
        assert wire.sent(frame)
        wire.filters.learned("tap0", "10.0.0.5", 1)
        for _ in range(1000):
            if not wire.sent(frame):
                break
            time.sleep(0.02)
        else:
            pytest.fail("the lease of 1 s never ended")
        wire.filters.learned("tap0", "10.0.0.5", 3600)
        assert wire.sent(frame)


ONLY_SSH_IN_AND_DNS_OUT = """
<filter name='test-eth0'>
  <rule action='accept' direction='in'><tcp dstportstart='22'/></rule>
  <rule action='accept' direction='out'><udp dstportstart='53'/></rule>
  <rule action='drop' direction='inout' priority='900'><all/></rule>
</filter>
"""


@in_namespace
def test_answers_to_what_is_accepted_are_accepted_and_nothing_else_is(tmp_path: Path) -> None:
    with filtered_bridge(tmp_path) as wire:
        wire.filters.define(ONLY_SSH_IN_AND_DNS_OUT)
        wire.bind("test-eth0")
        answer = from_guest(ipv4(GUEST_IP, OTHER_IP, TCP, tcp(22, 4000, SYN | ACK)))
        assert not wire.sent(answer), "nobody asked"
        assert wire.received(to_guest(ipv4(OTHER_IP, GUEST_IP, TCP, tcp(4000, 22, SYN))))
        assert wire.sent(answer)
        assert not wire.sent(from_guest(ipv4(GUEST_IP, OTHER_IP, TCP, tcp(22, 4001, ACK)))), "another port"
        assert not wire.sent(from_guest(ipv4(GUEST_IP, "10.0.0.3", TCP, tcp(22, 4000, ACK)))), "another host"
        assert not wire.received(to_guest(ipv4(OTHER_IP, GUEST_IP, TCP, tcp(4000, 23, SYN))))

        reply = to_guest(ipv4(OTHER_IP, GUEST_IP, UDP, udp(53, 3000)))
        assert not wire.received(reply)
        assert wire.sent(from_guest(ipv4(GUEST_IP, OTHER_IP, UDP, udp(3000, 53))))
        assert wire.received(reply)
        assert not wire.sent(from_guest(ipv4(GUEST_IP, OTHER_IP, UDP, udp(3000, 54))))
        assert not wire.sent(from_guest(PING))
        assert wire.sent(arp(GUEST_MAC, GUEST_IP, OTHER_IP)), "rules about IP do not touch ARP"


@in_namespace
def test_what_layer_2_rules_accept_rules_about_ip_still_see(tmp_path: Path) -> None:
    with filtered_bridge(tmp_path) as wire:
        wire.filters.define(
            "<filter name='both'><filterref filter='clean-traffic'/>"
            "<rule action='drop' direction='out'><tcp dstportstart='25'/></rule></filter>"
        )
        wire.bind("both", IP=GUEST_IP)
        assert wire.sent(from_guest(ipv4(GUEST_IP, OTHER_IP, TCP, tcp(4000, 80, SYN))))
        assert not wire.sent(from_guest(ipv4(GUEST_IP, OTHER_IP, TCP, tcp(4000, 25, SYN))))


@in_namespace
def test_a_changed_filter_reaches_the_machines_that_run_at_once(tmp_path: Path) -> None:
    with filtered_bridge(tmp_path) as wire:
        rule = "<filter name='f'><rule action='drop' direction='out'><udp dstportstart='{}'/></rule></filter>"
        wire.filters.define(rule.format(7))
        wire.bind("f")
        seven, nine = (from_guest(ipv4(GUEST_IP, OTHER_IP, UDP, udp(5000, port))) for port in (7, 9))
        assert (wire.sent(seven), wire.sent(nine)) == (False, True)
        wire.filters.define(rule.format(9))
        assert (wire.sent(seven), wire.sent(nine)) == (True, False)
        # One that cannot be is refused whole: kernel, memory and disk stay with the last good one.
        with pytest.raises(ConfigError, match="needs the variable NOBODY"):
            wire.filters.define(rule.format("$NOBODY"))
        assert (wire.sent(seven), wire.sent(nine)) == (True, False)
        assert "dstportstart='9'" in (tmp_path / "etc/kvik/nwfilter/f.xml").read_text()


@in_namespace
def test_rules_are_gone_with_their_binding_and_those_of_others_stay(tmp_path: Path) -> None:
    from kvik.host import nftables

    with filtered_bridge(tmp_path) as wire:
        wire.bind("clean-traffic", IP=GUEST_IP)
        spoofed = from_guest(ipv4("10.0.0.66", OTHER_IP, UDP, udp(1, 2)))
        assert not wire.sent(spoofed)
        wire.filters.unbind("tap0")
        assert wire.sent(spoofed)
        listed = nftables.run([{"list": {"table": {"family": "bridge", "name": "kvik_filter"}}}])
        assert not [item for item in listed if any("tap0" in str(value) for value in item.values())]
        with pytest.raises(NoFilterBinding):
            wire.filters.unbind("tap0")


@in_namespace
def test_a_daemon_that_comes_back_finds_its_bindings_and_nothing_passes_meanwhile(tmp_path: Path) -> None:
    from kvik.network.filters.filters import Filters
    from kvik.paths import Paths

    with filtered_bridge(tmp_path) as wire:
        wire.bind("clean-traffic")
        assert wire.sent(arp(GUEST_MAC, "10.0.0.5", OTHER_IP))
        wire.filters = Filters(Paths.system(tmp_path))  # the first one was killed
        spoofed = from_guest(ipv4("10.0.0.66", OTHER_IP, UDP, udp(1, 2)))
        assert not wire.sent(spoofed)
        wire.filters.open()
        assert wire.filters.warnings == []
        assert [one.portdev for one in wire.filters.bindings()] == ["tap0"]
        assert not wire.sent(spoofed)
        assert wire.sent(arp(GUEST_MAC, "10.0.0.5", OTHER_IP)), "what was learned is known still"
        wire.filters.unbind("tap0")
        assert wire.sent(spoofed)


@in_namespace
def test_a_binding_whose_interface_is_gone_is_forgotten(tmp_path: Path) -> None:
    from kvik.host.netlink import Netlink
    from kvik.network.filters.filters import Filters
    from kvik.paths import Paths

    with filtered_bridge(tmp_path) as wire:
        wire.bind("clean-traffic", IP=GUEST_IP)
        with Netlink() as netlink:
            netlink.delete_link(netlink.link("tap0").index)
        again = Filters(Paths.system(tmp_path))
        again.open()
        assert list(again.bindings()) == [] and again.warnings == []
        assert not list((tmp_path / "run/kvik/nwfilter-binding").iterdir())


@in_namespace
def test_rules_that_somebody_flushed_come_back(tmp_path: Path) -> None:
    from kvik.host import nftables

    with filtered_bridge(tmp_path) as wire:
        wire.bind("clean-traffic")
        spoofed = from_guest(ipv4("10.0.0.66", OTHER_IP, UDP, udp(1, 2)))
        assert wire.sent(from_guest(PING))
        assert not wire.sent(spoofed)
        nftables.run([{"flush": {"ruleset": None}}])
        assert wire.sent(spoofed)
        assert wire.filters.repair()
        assert wire.sent(from_guest(PING))
        assert not wire.sent(spoofed)
        assert not wire.filters.repair(), "nothing is missing any more"


@in_namespace
def test_bpdus_of_a_machine_are_dropped_although_the_bridge_takes_them_itself(tmp_path: Path) -> None:
    """With STP on, they never come to prerouting: a guest could make itself the root of the tree."""
    from kvik.host.bridge import read_bridge, set_bridge
    from kvik.host.netlink import Netlink

    # IEEE 802.1D-2004, 9.3.1: configuration BPDU of a root with priority 0; LLC 42 42 03.
    bpdu = bytes.fromhex("42420300000000000000525400000001000000000000525400000001")
    bpdu += bytes.fromhex("80010000140002000f00")
    frame = ethernet(GUEST_MAC, "01:80:c2:00:00:00", len(bpdu), bpdu)

    def root() -> str:
        with Netlink() as netlink:
            return read_bridge(netlink, "br0").root_id

    with filtered_bridge(tmp_path) as wire:
        with Netlink() as netlink:
            set_bridge(netlink, wire.bridge, stp=True)
        own = root()
        wire.bind("clean-traffic", IP=GUEST_IP)
        wire.sent(frame)
        assert root() == own
        wire.filters.unbind("tap0")
        wire.sent(frame)
        assert root() == "0000.525400000001", "without the filter the guest is the root: the test proves something"


@in_namespace
def test_what_cannot_be_done_is_refused_with_its_reason_and_leaves_nothing(tmp_path: Path) -> None:
    with filtered_bridge(tmp_path) as wire:
        with pytest.raises(NoFilter, match="'missing'"):
            wire.bind("missing")
        with pytest.raises(ConfigError, match="needs the variable IP"):
            wire.bind("clean-traffic", CTRL_IP_LEARNING="none")
        with pytest.raises(ConfigError, match="variable IP for srcipaddr"):
            wire.bind("clean-traffic", IP="fe80::1")
        wire.filters.define(
            "<filter name='g'><rule action='drop' direction='in'><arp gratuitous='yes'/></rule></filter>"
        )
        with pytest.raises(ConfigUnsupported, match="cannot compare two addresses"):
            wire.bind("g")
        assert list(wire.filters.bindings()) == []
        assert not list((tmp_path / "run/kvik/nwfilter-binding").iterdir())
        assert wire.sent(from_guest(ipv4("10.0.0.66", OTHER_IP, UDP, udp(1, 2))))


def test_arp_is_what_the_tests_think() -> None:
    assert arp(GUEST_MAC, GUEST_IP, OTHER_IP)[12:14] == ARP.to_bytes(2)


def _example(protocol: str, attribute: str) -> str:
    if attribute.endswith(("macaddr", "macmask", "address", "address-mask")):
        return "52:54:00:12:34:56"
    if "ipmask" in attribute:
        return "24"
    if "ip" in attribute:
        return "2001:db8::7" if protocol.endswith("v6") else "10.1.2.3"
    words = {"protocol": "udp", "protocolid": "0x88cc", "encap-protocol": "arp", "opcode": "Reply", "flags": "SYN/ALL"}
    return "3" if protocol == "stp" and attribute == "flags" else words.get(attribute, "7")


@in_namespace
def test_this_kernel_takes_every_attribute_of_every_protocol(tmp_path: Path) -> None:
    """But for those whose refusal has a test of its own: compiled, in both directions, negated and not."""
    from kvik.conf.nwfilter_fields import PROTOCOLS

    refused = {"gratuitous", "ipset", "ipsetflags", "state", "connlimit-above"}
    with filtered_bridge(tmp_path) as wire:
        for protocol, attributes in PROTOCOLS.items():
            rules = ""
            for attribute in attributes:
                if attribute in refused:
                    continue
                before = attribute.removesuffix("mask") + "addr" if attribute.endswith("mask") else ""
                before = attribute.removesuffix("-mask") if attribute.endswith("-mask") else before
                before = attribute.removesuffix("end") + "start" if attribute.endswith("portend") else before
                before = attribute.removesuffix("-hi").removesuffix("end") if attribute[-3:] in ("-hi", "end") and (
                    not before
                ) else before  # fmt: skip
                values = {name: _example(protocol, name) for name in (before, attribute) if name}
                if "port" in attribute and protocol in ("ip", "ipv6"):
                    values["protocol"] = "tcp"
                text = "".join(f" {name}='{value}'" for name, value in values.items())
                for match in ("", " match='no'"):
                    rules += f"<rule action='accept' direction='inout'><{protocol}{match}{text}/></rule>"
                    rules += f"<rule action='return' direction='out'><{protocol}{match}{text}/></rule>"
            wire.filters.define(f"<filter name='all'>{rules}</filter>")
            wire.bind("all")


def dhcp_ack(address: str, seconds: int, *, mac: str = GUEST_MAC, kind: int = 5, server: str = OTHER_IP) -> bytes:
    """RFC 2131: what a server answers to a machine that has no address yet."""
    message = b"\x02\x01\x06\0" + b"\0" * 12 + IPv4Address(address).packed + b"\0" * 8
    message += bytes.fromhex(mac.replace(":", "")) + b"\0" * (236 - 34) + b"\x63\x82\x53\x63"
    message += bytes([53, 1, kind, 51, 4]) + seconds.to_bytes(4) + b"\xff"
    return ethernet(OTHER_MAC, BROADCAST, IPV4, ipv4(server, "255.255.255.255", UDP, udp(67, 68, message)))


@in_namespace
def test_the_address_that_a_dhcp_server_gives_is_read_from_its_answer(tmp_path: Path) -> None:
    def allowed(address: str) -> bool:
        return wire.sent(from_guest(ipv4(address, OTHER_IP, UDP, udp(1, 2))))

    def soon(address: str) -> bool:
        return any(allowed(address) or time.sleep(0.01) for _ in range(300))

    with filtered_bridge(tmp_path) as wire:
        wire.bind("clean-traffic", CTRL_IP_LEARNING="dhcp")
        assert wire.received(dhcp_ack("10.0.0.31", 3600, mac="52:54:00:00:00:99")), "another machine's"
        assert wire.received(dhcp_ack("10.0.0.32", 3600, kind=2)), "an offer"
        assert wire.received(dhcp_ack("127.0.0.1", 3600)), "nobody's address"
        assert wire.received(ethernet(OTHER_MAC, BROADCAST, IPV4, ipv4(OTHER_IP, "255.255.255.255", UDP, udp(67, 68))))
        assert wire.received(dhcp_ack("10.0.0.33", 3600))
        assert soon("10.0.0.33")
        assert not allowed("10.0.0.31") and not allowed("10.0.0.32")
        # The machine's own word is worth nothing, even if it could be sent.
        wire.filters.define("<filter name='open'><filterref filter='no-ip-spoofing'/></filter>")
        wire.bind("open", CTRL_IP_LEARNING="dhcp")
        own = ethernet(GUEST_MAC, BROADCAST, IPV4, ipv4("0.0.0.0", "255.255.255.255", UDP, udp(67, 68)))
        assert wire.sent(own)
        assert not allowed("10.0.0.33"), "a machine that starts anew has no lease"
        assert wire.received(dhcp_ack("10.0.0.34", 3600))
        assert soon("10.0.0.34")


@in_namespace
def test_only_the_dhcp_servers_that_are_trusted_are_heard(tmp_path: Path) -> None:
    with filtered_bridge(tmp_path) as wire:
        rule = "<filter name='only'><filterref filter='no-ip-spoofing'/>{}</filter>"
        deny = "<rule action='drop' direction='in' priority='-1'><ip match='no' srcipaddr='$DHCPSERVER'/></rule>"
        wire.filters.define(rule.format(deny))
        wire.bind("only", CTRL_IP_LEARNING="dhcp", DHCPSERVER=OTHER_IP)
        assert not wire.received(dhcp_ack("10.0.0.41", 3600, server="10.0.0.99"))
        assert wire.received(dhcp_ack("10.0.0.42", 3600))
        for _ in range(300):
            if wire.sent(from_guest(ipv4("10.0.0.42", OTHER_IP, UDP, udp(1, 2)))):
                break
            time.sleep(0.01)
        else:
            pytest.fail("the trusted server's answer was not heard")
        assert not wire.sent(from_guest(ipv4("10.0.0.41", OTHER_IP, UDP, udp(1, 2))))
