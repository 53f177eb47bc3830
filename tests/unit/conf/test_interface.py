"""The host's interfaces as documents: netcf's XML, read, checked, written."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lxml import etree

from kvik.conf.interface import check_interface_name, format_interface, parse_interface
from kvik.errors import ConfigError

SCHEMA = Path("/usr/share/libvirt/schemas/interface.rng")

ETHERNET = """\
<interface type='ethernet' name='eth0'>
  <start mode='onboot'/>
  <mac address='52:54:00:00:00:01'/>
  <mtu size='9000'/>
  <protocol family='ipv4'>
    <dhcp peerdns='no'/>
  </protocol>
  <protocol family='ipv6'>
    <autoconf/>
    <ip address='2001:db8::2' prefix='64'/>
    <route gateway='2001:db8::1'/>
  </protocol>
</interface>
"""
BRIDGE = """\
<interface type='bridge' name='br0'>
  <start mode='onboot'/>
  <mtu size='1500'/>
  <protocol family='ipv4'>
    <ip address='192.0.2.1' prefix='24'/>
    <route gateway='192.0.2.254'/>
  </protocol>
  <bridge stp='off' delay='0'>
    <interface type='ethernet' name='eth0'>
      <mac address='52:54:00:00:00:01'/>
    </interface>
    <interface type='ethernet' name='eth1'/>
  </bridge>
</interface>
"""
VLAN = """\
<interface type='vlan' name='eth0.42'>
  <start mode='onboot'/>
  <protocol family='ipv4'>
    <dhcp/>
  </protocol>
  <vlan tag='42'>
    <interface name='eth0'/>
  </vlan>
</interface>
"""
BOND = """\
<interface type='bond' name='bond0'>
  <start mode='none'/>
  <bond mode='active-backup'>
    <miimon freq='100' updelay='10' carrier='ioctl'/>
    <interface type='ethernet' name='eth0'/>
    <interface type='ethernet' name='eth1'/>
  </bond>
</interface>
"""
ARP_BOND = BOND.replace(
    "<miimon freq='100' updelay='10' carrier='ioctl'/>", "<arpmon interval='100' target='192.0.2.7' validate='active'/>"
)


@pytest.mark.parametrize("xml", [ETHERNET, BRIDGE, VLAN, BOND, ARP_BOND])
def test_a_document_comes_back_as_it_was(xml: str) -> None:
    assert format_interface(parse_interface(xml)) == xml


@pytest.mark.skipif(not SCHEMA.exists(), reason=f"libvirt's schema {SCHEMA} is not installed")
@pytest.mark.parametrize("xml", [ETHERNET, BRIDGE, VLAN, BOND, ARP_BOND])
def test_libvirts_own_schema_allows_it(xml: str) -> None:
    grammar = etree.RelaxNG(etree.parse(str(SCHEMA)))
    assert grammar.validate(etree.fromstring(xml)), [str(entry) for entry in grammar.error_log]


def test_what_is_unknown_is_kept() -> None:
    xml = ETHERNET.replace("  <mtu size='9000'/>\n", "  <mtu size='9000'/>\n").replace(
        "</interface>", "  <wake>lan</wake>\n</interface>"
    )
    assert "<wake>lan</wake>" in format_interface(parse_interface(xml))


@pytest.mark.parametrize(
    ("xml", "where", "words"),
    [
        (ETHERNET.replace(" type='ethernet'", ""), "/interface", "'type' is missing"),
        (ETHERNET.replace("eth0", "a-name-too-long-0"), "/interface/@name", "no name"),
        (ETHERNET.replace("eth0", "eth0&#10;auto x"), "/interface/@name", "no name"),
        (ETHERNET.replace("type='ethernet'", "type='bridge'"), "/interface", "<bridge> is missing"),
        (BRIDGE.replace("type='bridge'", "type='vlan'"), "/interface", "does not belong"),
        (ETHERNET.replace("52:54:00:00:00:01", "52:54"), "/interface/mac/@address", "MAC"),
        (ETHERNET.replace("9000", "9"), "/interface/mtu/@size", "MTU"),
        (BRIDGE.replace("192.0.2.1'", "192.0.2.300'"), "ip", "no address"),
        (BRIDGE.replace("prefix='24'", "prefix='64'"), "ip", "no address"),
        (BRIDGE.replace("192.0.2.1'", "2001:db8::1'"), "ip", "no ipv4 address"),
        (BRIDGE.replace("192.0.2.254", "gate"), "route/@gateway", "no address"),
        (ETHERNET.replace("<dhcp peerdns='no'/>", "<autoconf/>"), "ipv4", "IPv6"),
        (ETHERNET.replace("<dhcp peerdns='no'/>", "<dhcp/><ip address='192.0.2.1' prefix='24'/>"), "ipv4", "exclude"),
        (ETHERNET.replace("family='ipv6'", "family='ipv4'"), "protocol", "one <protocol>"),
        (BRIDGE.replace("eth1", "eth0"), "/interface/bridge/interface", "twice"),
        (BRIDGE.replace("eth1", "br0"), "/interface/bridge/interface", "twice"),
        (BRIDGE.replace("delay='0'", "delay='soon'"), "delay", "30 seconds"),
        (
            BRIDGE.replace("<mac address='52:54:00:00:00:01'/>", "<protocol family='ipv4'><dhcp/></protocol>"),
            "protocol",
            "no address of its own",
        ),
        (VLAN.replace("tag='42'", "tag='4095'"), "vlan/@tag", "4094"),
        (BOND.replace("<interface type='ethernet' name='eth0'/>", "<arpmon interval='1' target='a'/>"), "bond", "both"),
        (BOND.replace("<interface type='ethernet' name='eth0'/>", "").replace(
            "<interface type='ethernet' name='eth1'/>", ""), "bond", "one <interface>"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_with_its_place(xml: str, where: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_interface(xml)
    assert where in caught.value.path
    assert words in caught.value.message


def test_another_root_is_refused() -> None:
    with pytest.raises(ConfigError, match="not <interface>"):
        parse_interface("<domain/>")


@given(st.text(max_size=20))
def test_a_name_that_passes_can_stand_in_any_configuration_file(name: str) -> None:
    try:
        check_interface_name(name)
    except ConfigError:
        return
    assert len(name.encode()) <= 15
    assert not set(name) & set(" \t\r\n\"'#=:;[]{}/\\*?$`%")
