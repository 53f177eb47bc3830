"""Network documents that make no sense are refused with the path of what is wrong."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvik.conf.network_validate import load_network
from kvik.errors import ConfigError

IP = "<ip address='10.0.0.1' prefix='24'/>"
NAT = f"<forward mode='nat'/>{IP}"


def dhcp(inside: str, ip: str = "address='10.0.0.1' prefix='24'") -> str:
    return f"<ip {ip}><dhcp>{inside}</dhcp></ip>"


def span(start: str, end: str, inside: str = "") -> str:
    return f"<range start='{start}' end='{end}'>{inside}</range>"


SIX = "family='ipv6' address='2001:db8::1' prefix='64'"

REFUSED = {
    # addresses
    "no-cidr": ("<ip address='10.0.0.300' prefix='24'/>", "/network/ip[1]/@address", "neither an IPv4 nor"),
    "cidr-in-address": ("<ip address='10.0.0.1/24'/>", "/network/ip[1]/@address", "neither"),
    "short": ("<ip address='10.0.1' prefix='24'/>", "/network/ip[1]/@address", "neither"),
    "prefix-33": ("<ip address='10.0.0.1' prefix='33'/>", "/network/ip[1]/@prefix", "longer than an IPv4"),
    "prefix-129": ("<ip family='ipv6' address='fd00::1' prefix='129'/>", "/network/ip[1]/@prefix", "longer"),
    "prefix-0": ("<ip address='10.0.0.1' prefix='0'/>", "/network/ip[1]/@address", "gateway"),
    "prefix-minus": ("<ip address='10.0.0.1' prefix='-1'/>", "/network/ip/@prefix", "not an unsigned"),
    "holes": ("<ip address='10.0.0.1' netmask='255.0.255.0'/>", "/network/ip[1]/@netmask", "ones followed by zeros"),
    "both": ("<ip address='10.0.0.1' netmask='255.0.0.0' prefix='8'/>", "/network/ip[1]", "say the same"),
    "netmask-six": (
        "<ip family='ipv6' address='fd00::1' netmask='255.0.0.0'/>",
        "/network/ip[1]/@netmask",
        "no netmask",
    ),
    "family": ("<ip family='ipv4' address='fd00::1' prefix='64'/>", "/network/ip[1]/@address", "not of family ipv4"),
    "no-family": ("<ip address='fd00::1' prefix='64'/>", "/network/ip[1]/@address", "family='ipv6'"),
    "no-address": ("<ip prefix='24'/>", "/network/ip[1]/@address", "is missing"),
    "network-address": ("<ip address='10.0.0.0' prefix='24'/>", "/network/ip[1]/@address", "such as 10.0.0.1"),
    "broadcast": ("<ip address='10.0.0.255' prefix='24'/>", "/network/ip[1]/@address", "broadcast"),
    "multicast": ("<ip address='224.0.0.5' prefix='24'/>", "/network/ip[1]/@address", "gateway"),
    "loopback": ("<ip address='127.0.0.2' prefix='8'/>", "/network/ip[1]/@address", "gateway"),
    "any": ("<ip address='0.0.0.0' prefix='8'/>", "/network/ip[1]/@address", "gateway"),
    "zone": ("<ip family='ipv6' address='fe80::1%eth0' prefix='64'/>", "/network/ip[1]/@address", "zone"),
    "mapped": ("<ip family='ipv6' address='::ffff:10.0.0.1' prefix='96'/>", "/network/ip[1]/@address", "map"),
    "same-subnet": (IP + IP, "/network/ip[2]", "10.0.0.0/24 overlaps 10.0.0.0/24"),
    "wider-subnet": (IP + "<ip address='10.1.2.3' prefix='8'/>", "/network/ip[2]", "overlaps"),
    "six-overlap": (f"<ip {SIX}/><ip family='ipv6' address='2001:db8::5' prefix='120'/>", "/network/ip[2]", "overlaps"),
    # DHCP
    "range-outside": (dhcp(span("10.0.1.2", "10.0.1.9")), "/network/ip[1]/dhcp/range[1]/@start", "outside of"),
    "range-out-of-it": (dhcp(span("10.0.0.2", "10.0.1.9")), "/network/ip[1]/dhcp/range[1]/@end", "outside of"),
    "range-backwards": (dhcp(span("10.0.0.9", "10.0.0.2")), "/network/ip[1]/dhcp/range[1]/@end", "before it starts"),
    "range-broadcast": (dhcp(span("10.0.0.9", "10.0.0.255")), "/network/ip[1]/dhcp/range[1]/@end", "broadcast"),
    "range-other-family": (dhcp(span("fd00::2", "fd00::9")), "/network/ip[1]/dhcp/range[1]/@start", "family ipv4"),
    "range-bad": (dhcp(span("x", "10.0.0.9")), "/network/ip[1]/dhcp/range[1]/@start", "neither"),
    "ranges-overlap": (
        dhcp(span("10.0.0.2", "10.0.0.20") + span("10.0.0.20", "10.0.0.30")),
        "/network/ip[1]/dhcp/range[2]",
        "overlaps another",
    ),
    "lease-short": (
        dhcp(span("10.0.0.2", "10.0.0.9", "<lease expiry='119' unit='seconds'/>")),
        "/network/ip[1]/dhcp/range[1]/lease/@expiry",
        "119 seconds",
    ),
    "lease-long": (
        dhcp(span("10.0.0.2", "10.0.0.9", "<lease expiry='4294967296' unit='hours'/>")),
        "/network/ip[1]/dhcp/range[1]/lease/@expiry",
        "is not between",
    ),
    "two-dhcp": (
        dhcp(span("10.0.0.2", "10.0.0.9")) + dhcp(span("10.1.0.2", "10.1.0.9"), "address='10.1.0.1' prefix='24'"),
        "/network/ip[2]/dhcp",
        "appears twice",
    ),
    "short-prefix-six": (
        dhcp("", "family='ipv6' address='2001:db8::1' prefix='48'"),
        "/network/ip[1]/dhcp",
        "64 or more",
    ),
    "host-nobody": (dhcp("<host ip='10.0.0.2'/>"), "/network/ip[1]/dhcp/host[1]", "no mac or name"),
    "host-no-ip": (dhcp("<host name='a'/>"), "/network/ip[1]/dhcp/host[1]/@ip", "is missing"),
    "host-outside": (
        dhcp("<host name='a' ip='10.0.9.2'/>"),
        "/network/ip[1]/dhcp/host[1]/@ip",
        "not the address of a host",
    ),
    "host-is-gateway": (dhcp("<host name='a' ip='10.0.0.1'/>"), "/network/ip[1]/dhcp/host[1]/@ip", "own address"),
    "host-mac": (dhcp("<host mac='52:54' ip='10.0.0.2'/>"), "/network/ip[1]/dhcp/host[1]/@mac", "not a MAC"),
    "host-multicast": (
        dhcp("<host mac='01:00:5e:00:00:01' ip='10.0.0.2'/>"),
        "/network/ip[1]/dhcp/host[1]/@mac",
        "one card",
    ),
    "host-name": (dhcp("<host name='a,b' ip='10.0.0.2'/>"), "/network/ip[1]/dhcp/host[1]/@name", "no DNS name"),
    "host-id-four": (dhcp("<host id='0:1:2:3' ip='10.0.0.2'/>"), "/network/ip[1]/dhcp/host[1]/@id", "IPv6"),
    "host-mac-six": (
        dhcp("<host mac='52:54:00:00:00:01' ip='2001:db8::2'/>", SIX),
        "/network/ip[1]/dhcp/host[1]/@mac",
        "not by MAC",
    ),
    "host-id-bad": (dhcp("<host id='zz' ip='2001:db8::2'/>", SIX), "/network/ip[1]/dhcp/host[1]/@id", "no DHCP unique"),
    "host-same-ip": (
        dhcp("<host name='a' ip='10.0.0.2'/><host name='b' ip='10.0.0.2'/>"),
        "/network/ip[1]/dhcp/host[2]",
        "address 10.0.0.2 belongs to another",
    ),
    "host-same-name": (
        dhcp("<host name='a' ip='10.0.0.2'/><host name='A' ip='10.0.0.3'/>"),
        "/network/ip[1]/dhcp/host[2]",
        "name a belongs",
    ),
    "host-same-mac": (
        dhcp("<host mac='52:54:00:0:0:1' ip='10.0.0.2'/><host mac='52:54:00:00:00:01' ip='10.0.0.3'/>"),
        "/network/ip[1]/dhcp/host[2]",
        "MAC 52:54:00:00:00:01 belongs",
    ),
    "bootp-comma": (dhcp("<bootp file='a,b'/>"), "/network/ip[1]/dhcp/bootp/@file", "comma"),
    "bootp-line": (dhcp("<bootp file='a&#10;b'/>"), "/network/ip[1]/dhcp/bootp/@file", "control"),
    "bootp-server": (dhcp("<bootp file='a' server='b c'/>"), "/network/ip[1]/dhcp/bootp/@server", "no DNS name"),
    "bootp-six": (dhcp("<bootp file='a'/>", SIX), "/network/ip[1]/dhcp/bootp", "part of IPv4"),
    "tftp": ("<ip address='10.0.0.1' prefix='24'><tftp root='tftp'/></ip>", "/network/ip[1]/tftp/@root", "absolute"),
    "tftp-six": (f"<ip {SIX}><tftp root='/t'/></ip>", "/network/ip[1]/tftp", "IPv4 only"),
    # DNS
    "forwarder": ("<dns><forwarder/></dns>", "/network/dns/forwarder[1]", "needs addr"),
    "forwarder-addr": ("<dns><forwarder addr='8.8.8'/></dns>", "/network/dns/forwarder[1]/@addr", "neither"),
    "forwarder-domain": ("<dns><forwarder domain='a/b'/></dns>", "/network/dns/forwarder[1]/@domain", "DNS name"),
    "txt-twice": ("<dns><txt name='a' value='1'/><txt name='A' value='2'/></dns>", "/network/dns/txt[2]", "twice"),
    "txt-line": ("<dns><txt name='a' value='1&#10;dhcp-script=/x'/></dns>", "/network/dns/txt[1]/@value", "control"),
    "txt-quote": ("<dns><txt name='a' value='1&quot;'/></dns>", "/network/dns/txt[1]/@value", "quote"),
    "txt-long": (f"<dns><txt name='a' value='{'x' * 256}'/></dns>", "/network/dns/txt[1]/@value", "255 bytes"),
    "srv-protocol": ("<dns><srv service='a' protocol='icmp'/></dns>", "/network/dns/srv[1]/@protocol", "neither tcp"),
    "srv-port": (
        "<dns><srv service='a' protocol='tcp' port='1'/></dns>",
        "/network/dns/srv[1]/@port",
        "without a target",
    ),
    "srv-port-0": (
        "<dns><srv service='a' protocol='tcp' target='b' port='0'/></dns>",
        "/network/dns/srv[1]/@port",
        "range",
    ),
    "srv-weight": (
        "<dns><srv service='a' protocol='tcp' target='b' weight='65536'/></dns>",
        "/network/dns/srv[1]/@weight",
        "range",
    ),
    "srv-twice": ("<dns>" + 2 * "<srv service='a' protocol='tcp'/>" + "</dns>", "/network/dns/srv[2]", "twice"),
    "dns-host-no-name": ("<dns><host ip='10.0.0.2'/></dns>", "/network/dns/host[1]", "no <hostname>"),
    "dns-host-no-ip": ("<dns><host><hostname>a</hostname></host></dns>", "/network/dns/host[1]/@ip", "missing"),
    "dns-host-name": (
        "<dns><host ip='10.0.0.2'><hostname>a b</hostname></host></dns>",
        "/network/dns/host[1]/hostname[1]",
        "DNS name",
    ),
    "dns-host-twice": (
        "<dns>" + 2 * "<host ip='10.0.0.2'><hostname>a</hostname></host>" + "</dns>",
        "/network/dns/host[2]",
        "twice",
    ),
    "domain": ("<domain name='a..b'/>", "/network/domain/@name", "no DNS name"),
    "domain-option": ("<domain name='-a'/>", "/network/domain/@name", "no DNS name"),
    # routes
    "route-gateway": (
        IP + "<route address='10.9.0.0' prefix='16' gateway='10.2.0.1'/>",
        "/network/route[1]/@gateway",
        "in no subnet",
    ),
    "route-no-gateway": (IP + "<route address='10.9.0.0' prefix='16'/>", "/network/route[1]/@gateway", "missing"),
    "route-host-bits": (
        IP + "<route address='10.9.0.5' prefix='16' gateway='10.0.0.9'/>",
        "/network/route[1]/@address",
        "is 10.9.0.0",
    ),
    "route-own": (
        IP + "<route address='10.0.0.0' prefix='24' gateway='10.0.0.9'/>",
        "/network/route[1]",
        "another way",
    ),
    "route-twice": (
        IP + 2 * "<route address='10.9.0.0' prefix='16' gateway='10.0.0.9'/>",
        "/network/route[2]",
        "another way",
    ),
    "route-metric": (
        IP + "<route address='10.9.0.0' prefix='16' gateway='10.0.0.9' metric='0'/>",
        "/network/route[1]/@metric",
        "metric 0",
    ),
    # forward
    "nat-alone": ("<forward mode='nat'/>", "/network/forward", "needs an <ip>"),
    "nat-ports": (
        NAT.replace("/>", "><nat><port start='9' end='8'/></nat></forward>", 1),
        "/network/forward/nat/port",
        "in order",
    ),
    "nat-port-0": (
        NAT.replace("/>", "><nat><port start='0' end='8'/></nat></forward>", 1),
        "/network/forward/nat/port",
        "0 to 8",
    ),
    "nat-addresses": (
        NAT.replace("/>", "><nat><address start='1.2.3.4' end='1.2.3.3'/></nat></forward>", 1),
        "/network/forward/nat/address/@end",
        "comes before",
    ),
    "nat-address-six": (
        NAT.replace("/>", "><nat><address start='fd00::1' end='fd00::2'/></nat></forward>", 1),
        "/network/forward/nat/address",
        "IPv6 is not translated",
    ),
    "nat-in-route": (f"<forward mode='route'><nat/></forward>{IP}", "/network/forward/nat", "mode route"),
    "two-ways-out": (
        f"<forward mode='nat'><interface dev='a'/><interface dev='b'/></forward>{IP}",
        "/network/forward/interface[2]",
        "one way",
    ),
    "open-dev": (f"<forward mode='open' dev='a'/>{IP}", "/network/forward/@dev", "takes no dev"),
    "dev-is-another": (
        f"<forward dev='a'><interface dev='b'/></forward>{IP}",
        "/network/forward/@dev",
        "not the first",
    ),
    "dev-long": (f"<forward dev='a234567890123456'/>{IP}", "/network/forward/interface[1]/@dev", "15 bytes"),
    "dev-slash": (f"<forward dev='a/b'/>{IP}", "/network/forward/interface[1]/@dev", "no name of an interface"),
    "dev-option": (f"<forward dev='-a'/>{IP}", "/network/forward/interface[1]/@dev", "no name of an interface"),
    "macvtap-alone": ("<forward mode='vepa'/>", "/network/forward", "needs interfaces"),
    "macvtap-twice": (
        "<forward mode='vepa'><interface dev='a'/><interface dev='a'/></forward>",
        "/network/forward/interface[2]",
        "twice",
    ),
    "macvtap-bridge": ("<forward mode='vepa' dev='a'/><bridge name='br0'/>", "/network/forward", "both be given"),
    "bridge-alone": ("<forward mode='bridge'/>", "/network/forward", "or <bridge name"),
    "bridge-ip": (f"<forward mode='bridge'/><bridge name='br0'/>{IP}", "/network/ip", "no place"),
    "bridge-dns": ("<forward mode='bridge'/><bridge name='br0'/><dns/>", "/network/dns", "no place"),
    "bridge-mtu": ("<forward mode='bridge'/><bridge name='br0'/><mtu size='1500'/>", "/network/mtu", "no place"),
    "bridge-stp": (
        "<forward mode='bridge'/><bridge name='br0' stp='on'/>",
        "/network/bridge",
        "that the network makes",
    ),
    "bridge-rate": (
        "<forward mode='bridge'/><bridge name='br0'/><bandwidth><inbound average='1'/></bandwidth>",
        "/network/bandwidth",
        "portgroup",
    ),
    "bridge-both": ("<forward mode='bridge' dev='a'/><bridge name='br0'/>", "/network/forward", "both be given"),
    "hostdev-alone": ("<forward mode='hostdev'/>", "/network/forward", "needs a <pf>"),
    "hostdev-usb": (
        "<forward mode='hostdev'><address type='usb' bus='1' port='1'/></forward>",
        "/network/forward/address[1]",
        "PCI",
    ),
    "managed": (f"<forward mode='nat' managed='yes'/>{IP}", "/network/forward", "for mode hostdev"),
    "isolated-nowhere": ("<forward mode='vepa' dev='a'/><port isolated='yes'/>", "/network/port", "cannot be isolated"),
    # bridge, MTU, VLAN, virtualport, bandwidth, portgroups
    "bridge-name": ("<bridge name='a b'/>", "/network/bridge/@name", "no name of an interface"),
    "bridge-dots": ("<bridge name='..'/>", "/network/bridge/@name", "no name of an interface"),
    "bridge-long": ("<bridge name='a234567890123456'/>", "/network/bridge/@name", "15 bytes"),
    "delay": ("<bridge name='a' delay='31'/>", "/network/bridge/@delay", "30 seconds"),
    "mtu-small": ("<mtu size='67'/>", "/network/mtu/@size", "67 is not between 68"),
    "mtu-large": ("<mtu size='65536'/>", "/network/mtu/@size", "65535"),
    "mtu-six": (f"<mtu size='1279'/><ip {SIX}/>", "/network/mtu/@size", "IPv6 needs 1280"),
    "mac": ("<mac address='01:00:00:00:00:01'/>", "/network/mac/@address", "one card"),
    "mac-bad": ("<mac address='x'/>", "/network/mac/@address", "not a MAC"),
    "vlan-empty": ("<vlan/>", "/network/vlan", "without a <tag>"),
    "vlan-0": ("<vlan><tag id='0'/></vlan>", "/network/vlan/tag[1]/@id", "between 1 and 4094"),
    "vlan-4095": ("<vlan><tag id='4095'/></vlan>", "/network/vlan/tag[1]/@id", "between 1 and 4094"),
    "vlan-twice": ("<vlan><tag id='5'/><tag id='5'/></vlan>", "/network/vlan/tag[2]", "twice"),
    "vlan-no-trunk": ("<vlan trunk='no'><tag id='5'/><tag id='6'/></vlan>", "/network/vlan", "is a trunk"),
    "vlan-natives": (
        "<vlan trunk='yes'><tag id='5' nativeMode='tagged'/><tag id='6' nativeMode='untagged'/></vlan>",
        "/network/vlan",
        "native",
    ),
    "ovs-nowhere": ("<virtualport type='openvswitch'/>", "/network/virtualport", "needs forward mode bridge"),
    "qbg-nowhere": ("<virtualport type='802.1Qbg'/>", "/network/virtualport", "macvtap or hostdev"),
    "floor": ("<bandwidth><inbound floor='5'/></bandwidth>", "/network/bandwidth/inbound/@floor", "of an interface"),
    "no-average": ("<bandwidth><inbound peak='5'/></bandwidth>", "/network/bandwidth/inbound/@average", "missing"),
    "rate-0": ("<bandwidth><outbound average='0'/></bandwidth>", "/network/bandwidth/outbound/@average", "between 1"),
    "portgroup-twice": (2 * "<portgroup name='a'/>", "/network/portgroup[2]", "twice"),
    "portgroup-defaults": (
        "<portgroup name='a' default='yes'/><portgroup name='b' default='yes'/>",
        "/network/portgroup",
        "both be the default",
    ),
    "portgroup-vlan": (
        "<portgroup name='a'><vlan><tag id='9999'/></vlan></portgroup>",
        "/network/portgroup[1]/vlan/tag[1]/@id",
        "9999",
    ),
    # dnsmasq's own words
    "option-line": (
        "<d:options xmlns:d='http://libvirt.org/schemas/network/dnsmasq/1.0'><d:option value='a&#10;b'/></d:options>",
        "/network/options/option[1]",
        "control",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_makes_no_sense_is_refused_where_it_stands(case: str) -> None:
    inside, path, reason = REFUSED[case]
    with pytest.raises(ConfigError) as caught:
        load_network(f"<network>\n<name>n</name>\n{inside}\n</network>")
    assert caught.value.path == path
    assert reason in str(caught.value)
    assert caught.value.line in (3, 0) or path.startswith("/network/options")


def forwards(*items: str, inside: str = IP, mode: str = "nat") -> str:
    ports = "".join(f"<kvik:portForward {item}/>" for item in items)
    return f"<network><name>n</name><forward mode='{mode}' xmlns:kvik='urn:kvik:1'>{ports}</forward>{inside}</network>"


@pytest.mark.parametrize(
    ("items", "reason"),
    [
        (["proto='tcp' start='80' guest='10.0.9.2'"], "in no subnet"),
        (["proto='tcp' start='80' guest='x'"], "neither"),
        (["proto='icmp' start='80' guest='10.0.0.2'"], "not one of tcp, udp"),
        (["proto='tcp' start='0' guest='10.0.0.2'"], "not ports in order"),
        (["proto='tcp' start='90' end='80' guest='10.0.0.2'"], "not ports in order"),
        (["proto='tcp' start='1' end='10' guest='10.0.0.2' to='65530'"], "not ports in order"),
        (["proto='tcp' start='80' guest='10.0.0.2' address='fd00::1'"], "not of family ipv4"),
        (["proto='tcp' start='80' guest='10.0.0.2' only-from='10.0.0.9'"], "isolation"),
        (
            ["proto='tcp' start='80' end='90' guest='10.0.0.2'", "proto='tcp' start='85' guest='10.0.0.3'"],
            "tcp port 85",
        ),
        (
            ["proto='tcp' start='80' guest='10.0.0.2'", "proto='tcp' address='192.0.2.1' start='80' guest='10.0.0.3'"],
            "port 80 is forwarded already",
        ),
    ],
)
def test_a_port_forward_that_cannot_be_is_refused(items: list[str], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        load_network(forwards(*items))


def test_port_forwards_that_differ_in_protocol_or_address_stand_together() -> None:
    document = load_network(
        forwards(
            "proto='tcp' start='80' guest='10.0.0.2' address='192.0.2.1'",
            "proto='tcp' start='80' guest='10.0.0.2' address='192.0.2.2'",
            "proto='udp' start='80' guest='10.0.0.2'",
        )
    )
    assert document.forward is not None
    assert len(document.forward.port_forwards) == 3
    with pytest.raises(ConfigError, match="not open"):
        load_network(forwards("proto='tcp' start='80' guest='10.0.0.2'", mode="open"))


@pytest.mark.parametrize("name", ["", ".", "a/b", "-x", " a", "a\u2028b", "x" * 252])
def test_a_name_that_is_no_file_name_is_refused(name: str) -> None:
    with pytest.raises(ConfigError):
        load_network(f"<network><name>{name}</name></network>")


@given(st.binary(max_size=120))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_a_network_or_a_config_error(data: bytes) -> None:
    try:
        load_network(data)
    except ConfigError as error:
        assert error.message


WORDS = st.sampled_from(
    [
        "10.0.0.1",
        "10.0.0.0",
        "fd00::1",
        "24",
        "0",
        "4294967296",
        "nat",
        "yes",
        "x",
        "",
        "::",
        "0.0.0.0",
        "255.255.255.0",
    ]
)


@given(st.lists(WORDS, min_size=5, max_size=5), st.sampled_from(["ipv4", "ipv6"]))
@settings(max_examples=300, deadline=None)
def test_any_values_are_a_network_or_a_config_error(words: list[str], family: str) -> None:
    a, b, c, d, e = words
    try:
        load_network(
            f"<network><name>n</name><forward mode='nat'/><ip family='{family}' address='{a}' prefix='{b}'><dhcp>"
            f"<range start='{c}' end='{d}'/><host name='h' ip='{e}'/></dhcp></ip>"
            f"<route family='{family}' address='{c}' prefix='{b}' gateway='{d}'/></network>"
        )
    except ConfigError as error:
        assert error.message
