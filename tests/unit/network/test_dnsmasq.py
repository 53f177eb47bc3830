"""What dnsmasq is told, and what it tells: its configuration made, its leases read."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvik.conf.network import Network
from kvik.conf.network_validate import load_network
from kvik.errors import ConfigUnsupported
from kvik.network.dnsmasq import configuration, is_needed, parse_leases

HEAD = "<network xmlns:dnsmasq='http://libvirt.org/schemas/network/dnsmasq/1.0'><name>n</name><bridge name='virbr0'/>"


def network(inner: str) -> Network:
    return load_network(f"{HEAD}{inner}</network>")


def lines(inner: str) -> list[str]:
    text = configuration(network(inner), pid_file=Path("/run/n.pid"), lease_file=Path("/var/n.leases"), user="nobody")
    return text.splitlines()


IP = "<ip address='192.168.122.1' prefix='24'>{}</ip>"


def test_a_nat_network_is_told_its_bridge_range_and_leases() -> None:
    told = lines(
        "<forward mode='nat'/>" + IP.format("<dhcp><range start='192.168.122.2' end='192.168.122.254'/></dhcp>")
    )
    assert told[1:] == [
        "pid-file=/run/n.pid",
        "user=nobody",
        "strict-order",
        "interface=virbr0",
        "except-interface=lo",
        "bind-dynamic",
        "local-service",
        "domain-needed",
        "local=//",
        "dhcp-leasefile=/var/n.leases",
        "dhcp-no-override",
        "dhcp-authoritative",
        "no-ping",
        "dhcp-range=192.168.122.2,192.168.122.254,255.255.255.0",
        "dhcp-lease-max=253",
    ]


def test_an_isolated_network_offers_no_way_out_and_asks_nobody_outside() -> None:
    told = lines(
        IP.format(
            "<dhcp><range start='192.168.122.2' end='192.168.122.9'><lease expiry='2' unit='hours'/></range></dhcp>"
        )
    )
    assert "dhcp-option=option:router" in told and "no-resolv" in told
    assert "dhcp-range=192.168.122.2,192.168.122.9,255.255.255.0,7200" in told


def test_hosts_names_texts_and_services() -> None:
    told = lines(
        "<forward mode='nat'/><domain name='lan' localOnly='yes'/>"
        "<dns forwardPlainNames='no'><forwarder addr='203.0.113.53'/><forwarder domain='corp' addr='10.0.0.53'/>"
        "<txt name='t' value='a b'/><srv service='ldap' protocol='tcp' domain='lan' target='h.lan' port='389'/>"
        "<host ip='192.168.122.1'><hostname>gateway</hostname></host></dns>"
        + IP.format(
            "<dhcp><range start='192.168.122.2' end='192.168.122.9'/>"
            "<host mac='52:54:00:00:00:02' name='web' ip='192.168.122.80'><lease expiry='0'/></host></dhcp>"
        )
    )
    for line in (
        "domain=lan", "local=/lan/", "domain-needed", "local=//", "no-resolv", "server=203.0.113.53",
        "server=/corp/10.0.0.53", 'txt-record=t,"a b"', "srv-host=_ldap._tcp.lan,h.lan,389",
        "host-record=gateway,gateway.lan,192.168.122.1", "dhcp-host=52:54:00:00:00:02,192.168.122.80,web,infinite",
    ):  # fmt: skip
        assert line in told


def test_what_is_the_networks_own_is_asked_nowhere_else_unless_the_document_says_so() -> None:
    own = lines("<forward mode='nat'/><domain name='lan'/>" + IP.format(""))
    assert {"local=/lan/", "domain-needed", "local=//"} <= set(own)
    shared = lines(
        "<forward mode='nat'/><domain name='lan' localOnly='no'/><dns forwardPlainNames='yes'/>" + IP.format("")
    )
    assert not {"local=/lan/", "domain-needed", "local=//"} & set(shared)
    hosts = "<dns><host ip='192.168.122.9'><hostname>web.example</hostname><hostname>web</hostname></host></dns>"
    assert "local=/web.example/" in lines(hosts + IP.format("")), "isolated: there is nobody else to ask"
    assert "local=/web.example/" not in lines("<forward mode='nat'/>" + hosts + IP.format(""))


def test_ipv6_is_advertised_with_or_without_dhcp() -> None:
    v6 = "<ip family='ipv6' address='fd00:1::1' prefix='64'>{}</ip>"
    bare = lines("<forward mode='nat'/>" + v6.format(""))
    assert "enable-ra" in bare and "dhcp-range=fd00:1::,ra-names,64" in bare
    served = lines("<forward mode='nat'/>" + v6.format("<dhcp><range start='fd00:1::10' end='fd00:1::1f'/></dhcp>"))
    assert "dhcp-range=fd00:1::10,fd00:1::1f,64" in served and "dhcp-lease-max=16" in served


def test_network_boot() -> None:
    told = lines(
        IP.format(
            "<tftp root='/srv/tftp'/><dhcp><range start='192.168.122.2' end='192.168.122.9'/>"
            "<bootp file='pxelinux.0' server='192.168.122.5'/></dhcp>"
        )
    )
    assert {"enable-tftp", "tftp-root=/srv/tftp", "dhcp-boot=pxelinux.0,,192.168.122.5"} <= set(told)


def test_reverse_zones_are_kept_from_the_world() -> None:
    told = lines("<forward mode='nat'/><ip address='10.1.2.1' prefix='23' localPtr='yes'/>")
    assert "local=/2.1.10.in-addr.arpa/" in told and "local=/3.1.10.in-addr.arpa/" in told


def test_options_are_handed_through_unless_they_could_run_or_read_something() -> None:
    option = "<dnsmasq:options><dnsmasq:option value='{}'/></dnsmasq:options>"
    assert "cname=a,b" in lines(IP.format("") + option.format("cname=a,b"))
    for value in (
        "dhcp-script=/bin/sh",
        "conf-file=/etc/shadow",
        "user=root",
        "addn-hosts=/etc/shadow",
        "log-facility=/x",
    ):
        with pytest.raises(ConfigUnsupported, match="not handed through"):
            lines(IP.format("") + option.format(value))


def test_what_serves_nothing_needs_no_server() -> None:
    assert is_needed(network(IP.format("")))
    assert not is_needed(network(""))
    assert not is_needed(network("<dns enable='no'/>" + IP.format("")))


LEASES = """1700000000 52:54:00:00:00:02 192.168.122.80 web 01:52:54:00:00:00:02
0 52:54:00:00:00:03 192.168.122.81 * *
duid 00:01:00:01:2c:3b:4a:59:52:54:00:12:34:56
1700000001 1193046 fd00:1::10 six 00:01:00:01:2d:00:00:00:52:54:00:00:00:02
rubbish
x y z w v
"""


def test_leases_are_read_with_what_is_known_of_them() -> None:
    both = network(IP.format("") + "<ip family='ipv6' address='fd00:1::1' prefix='64'/>")
    first, second, third = parse_leases(LEASES, both)
    assert (first.address, first.prefix, first.mac, first.hostname) == (
        "192.168.122.80",
        24,
        "52:54:00:00:00:02",
        "web",
    )
    assert (first.expiry, first.client_id, first.interface) == (1700000000, "01:52:54:00:00:00:02", "virbr0")
    assert (second.expiry, second.hostname, second.client_id) == (0, "", "")
    assert (third.version, third.prefix, third.iaid, third.mac) == (6, 64, "1193046", "52:54:00:00:00:02")


@given(st.text())
def test_any_text_is_leases_or_none(text: str) -> None:
    for lease in parse_leases(text, network(IP.format(""))):
        assert lease.version in (4, 6)
