"""From a network's document to what its switch is told."""

from __future__ import annotations

import pytest

from kvik.conf.network import complete_network, parse_network
from kvik.conf.network_validate import validate_network
from kvik.errors import ConfigUnsupported
from kvik.network.switch.document import switch_settings
from kvik.network.switch.packets import ip_bytes, mac_bytes
from kvik.network.switch.settings import FOR_EVER, Settings, from_json

ALL_OF_IT = """<network>
  <name>lab</name>
  <forward mode='nat'/>
  <bridge name='virbr3' stp='on' delay='0'/>
  <mtu size='9000'/>
  <mac address='52:54:00:01:02:03'/>
  <domain name='Lab.example' localOnly='yes'/>
  <dns forwardPlainNames='yes'><host ip='10.1.0.5'><hostname>Printer</hostname><hostname>scan</hostname></host></dns>
  <port isolated='yes'/>
  <ip address='10.1.0.1' netmask='255.255.0.0'>
    <dhcp>
      <range start='10.1.0.10' end='10.1.0.20'><lease expiry='2' unit='minutes'/></range>
      <range start='10.1.1.10' end='10.1.1.20'/>
      <host mac='52:54:00:0A:0b:0c' name='web' ip='10.1.0.80'><lease expiry='0'/></host>
    </dhcp>
  </ip>
</network>"""


def settings(xml: str) -> dict[str, object]:
    document = parse_network(xml)
    complete_network(document)
    validate_network(document)
    return switch_settings(document)


def told(xml: str) -> Settings:
    return from_json(settings(xml))


def with_part(part: str, ip: str = "<ip address='10.1.0.1' prefix='24'/>") -> str:
    return f"<network><name>n</name>{part}{ip}</network>"


def test_all_that_a_switch_can_be_told() -> None:
    made = told(ALL_OF_IT)
    assert (made.name, made.ip, made.prefix) == ("lab", ip_bytes("10.1.0.1"), 16)
    assert (made.mac, made.mtu, made.domain) == (mac_bytes("52:54:00:01:02:03"), 9000, "lab.example")
    assert (made.router, made.dns, made.forward_dns, made.forward_plain, made.local_only) == (True,) * 5
    assert [(item.last - item.first, item.lease) for item in made.ranges] == [(10, 120), (10, 0)]
    (host,) = made.hosts.values()
    assert (host.ip, host.name, host.lease) == (ip_bytes("10.1.0.80"), "web", FOR_EVER)
    assert made.names == {"printer": (ip_bytes("10.1.0.5"),), "scan": (ip_bytes("10.1.0.5"),)}
    assert settings(ALL_OF_IT)["isolated"] is True


def test_an_isolated_network_has_no_way_out_and_asks_nobody_outside() -> None:
    made = told(with_part(""))
    assert not made.router
    assert not made.forward_dns
    assert made.dns
    assert not made.dhcp
    alone = told("<network><name>n</name></network>")
    assert (alone.ip, alone.router, alone.dhcp) == (b"", False, False)


@pytest.mark.parametrize("mode", ["nat", "open"])
def test_other_modes_lead_out_by_the_users_own_sockets(mode: str) -> None:
    assert told(with_part(f"<forward mode='{mode}'/>")).router


@pytest.mark.parametrize(
    ("part", "named", "remedy"),
    [
        ("<forward mode='route'/>", "forward mode route", "system's daemon"),
        ("<forward mode='bridge'/><bridge name='br0'/>", "forward mode bridge", "system's daemon"),
        ("<forward mode='private'><interface dev='eth0'/></forward>", "forward mode private", "nat"),
        ("<forward mode='nat' dev='eth0'/>", "forward/@dev", "system's daemon"),
        ("<forward mode='nat'><nat><port start='1024' end='2048'/></nat></forward>", "forward/nat/port", "system's"),
        ("<forward mode='nat'><nat ipv6='yes'/></forward>", "forward/nat/@ipv6", "leave it out"),
        ("<bandwidth><inbound average='1000'/></bandwidth>", "bandwidth", "system's daemon"),
        ("<portgroup name='a'/>", "portgroup", "system's daemon"),
        ("<dns><forwarder addr='192.0.2.1'/></dns>", "dns/forwarder", "resolvers"),
        ("<dns><txt name='a' value='b'/></dns>", "dns/txt", "system's daemon"),
        ("<dns><host ip='fd00::1'><hostname>a</hostname></host></dns>", "dns/host", "system's daemon"),
        ("<ip family='ipv6' address='fd00::1' prefix='64'/>", "a second ip", "one IPv4"),
        ("<route address='10.9.0.0' prefix='24' gateway='10.1.0.2'/>", "route", "system's daemon"),
    ],
)  # fmt: skip
def test_what_takes_privileges_is_refused_with_what_to_do(part: str, named: str, remedy: str) -> None:
    with pytest.raises(ConfigUnsupported, match=named) as caught:
        settings(with_part(part) if "bridge" not in part and "private" not in part else with_part(part, ""))
    assert remedy in caught.value.remedy


@pytest.mark.parametrize(
    ("inside", "named"),
    [("<tftp root='/srv'/>", "tftp"), ("<dhcp><bootp file='a'/></dhcp>", "bootp"),
     ("<dhcp><host name='web' ip='10.1.0.9'/></dhcp>", "without mac")],
)  # fmt: skip
def test_what_an_address_cannot_serve_is_refused(inside: str, named: str) -> None:
    with pytest.raises(ConfigUnsupported, match=named):
        settings(with_part("", f"<ip address='10.1.0.1' prefix='24'>{inside}</ip>"))


def test_ipv6_alone_is_refused() -> None:
    with pytest.raises(ConfigUnsupported, match="ipv6"):
        settings(with_part("", "<ip family='ipv6' address='fd00::1' prefix='64'/>"))
