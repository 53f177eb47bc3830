"""The filters that every host has, with the names and effects that libvirt's users know.

They lie in no file: a definition of the same name takes the place of one, and undefining it brings it back. Their
UUIDs are made from their names, so that they are the same on every host.
"""

from __future__ import annotations

from functools import cache
from uuid import UUID, uuid5

from kvik.conf.nwfilter import NetworkFilter, parse_filter

__all__ = ["builtin_filters"]

_NAMESPACE = UUID("9d1f6d2c-6f0b-5f0e-9c55-6b76696b0002")

# DHCP (RFC 2131, 4.1): a machine without an address asks everybody, the server answers from port 67 to port 68.
_DHCP = """
  <rule action='accept' direction='out' priority='100'>
    <ip srcipaddr='0.0.0.0' dstipaddr='255.255.255.255' protocol='udp' srcportstart='68' dstportstart='67'/>
  </rule>
  <rule action='accept' direction='in' priority='100'>
    <ip {server}protocol='udp' srcportstart='67' dstportstart='68'/>
  </rule>
"""
# DHCPv6 (RFC 8415, 7): from a link-local address to all relay agents and servers.
_DHCPV6 = """
  <rule action='accept' direction='out' priority='100'>
    <ipv6 srcipaddr='fe80::' srcipmask='10' dstipaddr='ff02::1:2' protocol='udp' srcportstart='546' dstportstart='547'/>
  </rule>
  <rule action='accept' direction='in' priority='100'>
    <ipv6 {server}protocol='udp' srcportstart='547' dstportstart='546'/>
  </rule>
"""
_SERVER = "srcipaddr='$DHCPSERVER' "
_ALLOW_BOTH = "<rule action='accept' direction='inout'/>"
_ALLOW_IN = "<rule action='accept' direction='in'/>"
_DROP_OUT = "<rule action='drop' direction='out' priority='1000'/>"
_ARP_BOTH = "<rule action='accept' direction='inout' priority='-500'><mac protocolid='arp'/></rule>"


def _references(*names: str) -> str:
    return "".join(f"<filterref filter='{name}'/>" for name in names)


# RARP request of one's own address: how QEMU tells switches where a machine is after a migration.
_ANNOUNCE = (
    "dstmacaddr='ff:ff:ff:ff:ff:ff' opcode='Request_Reverse' arpsrcmacaddr='$MAC' arpdstmacaddr='$MAC' "
    "arpsrcipaddr='0.0.0.0' arpdstipaddr='0.0.0.0'"
)

# name: (chain, priority or "" for the chain's own, inside)
_FILTERS = {
    "allow-arp": ("arp", "", _ALLOW_BOTH),
    "allow-dhcp": ("ipv4", "", _DHCP.format(server="")),
    "allow-dhcp-server": ("ipv4", "", _DHCP.format(server=_SERVER)),
    "allow-dhcpv6": ("ipv6", "", _DHCPV6.format(server="")),
    "allow-dhcpv6-server": ("ipv6", "", _DHCPV6.format(server=_SERVER)),
    "allow-incoming-ipv4": ("ipv4", "", _ALLOW_IN),
    "allow-incoming-ipv6": ("ipv6", "", _ALLOW_IN),
    "allow-ipv4": ("ipv4", "", _ALLOW_BOTH),
    "allow-ipv6": ("ipv6", "", _ALLOW_BOTH),
    # Only what the names in $ALLOW resolve to (network/egress.py); $GATEWAY, $GATEWAY6, $ALLOWED and $ALLOWED6 come by
    # themselves.
    "allow-names": (
        "root",
        "",
        _references("no-mac-spoofing")
        + "".join(
            f"<rule action='accept' direction='inout'><mac protocolid='{kind}'/></rule>"
            for kind in ("arp", "ipv4", "ipv6")
        )
        + _references("no-other-l2-traffic")
        + "".join(
            f"<rule action='accept' direction='out' priority='100'>"
            f"<udp dstipaddr='{to}' srcportstart='68' dstportstart='67'/></rule>"
            for to in ("255.255.255.255", "$GATEWAY")
        )
        + "<rule action='accept' direction='in' priority='100' statematch='false'>"
        "<udp srcipaddr='$GATEWAY' srcportstart='67' dstportstart='68'/></rule>"
        # DHCPv6 (RFC 8415, 7): asked of a group, answered from a link-local address, as routers' advertisements
        + "<rule action='accept' direction='out' priority='100'>"
        "<udp-ipv6 dstipaddr='ff02::1:2' srcportstart='546' dstportstart='547'/></rule>"
        "<rule action='accept' direction='in' priority='100' statematch='false'>"
        "<udp-ipv6 srcipaddr='fe80::' srcipmask='10' srcportstart='547' dstportstart='546'/></rule>"
        + "".join(
            "<rule action='accept' direction='out' priority='200'>"
            f"<{kind} dstipaddr='{gateway}' dstportstart='53'/></rule>"
            for kind, gateway in (
                ("udp", "$GATEWAY"), ("tcp", "$GATEWAY"), ("udp-ipv6", "$GATEWAY6"), ("tcp-ipv6", "$GATEWAY6"),
            )
        )
        # Neighbour and router discovery (RFC 4861): 133 to 136
        + "".join(
            f"<rule action='accept' direction='inout' priority='300'><icmpv6 type='{kind}'/></rule>"
            for kind in range(133, 137)
        )
        + "<rule action='accept' direction='out' priority='400'><all dstipaddr='$ALLOWED'/></rule>"
        + "<rule action='accept' direction='out' priority='400'><all-ipv6 dstipaddr='$ALLOWED6'/></rule>"
        + "<rule action='drop' direction='inout' priority='1000'><all/></rule>"
        + "<rule action='drop' direction='inout' priority='1000'><all-ipv6/></rule>",
    ),
    "clean-traffic": (
        "root",
        "",
        _references("no-mac-spoofing", "no-ip-spoofing")
        + "<rule action='accept' direction='out' priority='-650'><mac protocolid='ipv4'/></rule>"
        + _references("allow-incoming-ipv4", "no-arp-spoofing")
        + _ARP_BOTH
        + _references("no-other-l2-traffic", "qemu-announce-self"),
    ),
    "clean-traffic-gateway": (
        "root",
        "",
        _references("no-mac-spoofing", "no-ip-spoofing", "no-arp-spoofing")
        + _ARP_BOTH
        + "<rule action='accept' direction='in'><mac srcmacaddr='$GATEWAY_MAC'/></rule>"
        + "<rule action='accept' direction='out'><mac dstmacaddr='$GATEWAY_MAC'/></rule>"
        + _references("no-other-l2-traffic", "qemu-announce-self"),
    ),
    "no-arp-ip-spoofing": (
        "arp-ip",
        "-510",
        "<rule action='return' direction='out' priority='400'><arp arpsrcipaddr='$IP'/></rule>" + _DROP_OUT,
    ),
    "no-arp-mac-spoofing": (
        "arp-mac",
        "-520",
        "<rule action='return' direction='out' priority='350'><arp arpsrcmacaddr='$MAC'/></rule>" + _DROP_OUT,
    ),
    "no-arp-spoofing": ("root", "", _references("no-arp-mac-spoofing", "no-arp-ip-spoofing")),
    "no-ip-multicast": (
        "ipv4", "", "<rule action='drop' direction='out'><ip dstipaddr='224.0.0.0' dstipmask='4'/></rule>",
    ),
    "no-ip-spoofing": (
        "ipv4-ip",
        "-710",
        "<rule action='return' direction='out' priority='100'><ip srcipaddr='0.0.0.0' protocol='udp'/></rule>"
        "<rule action='return' direction='out'><ip srcipaddr='$IP'/></rule>" + _DROP_OUT,
    ),
    "no-ipv6-multicast": (
        "ipv6", "", "<rule action='drop' direction='out'><ipv6 dstipaddr='ff00::' dstipmask='8'/></rule>",
    ),
    "no-ipv6-spoofing": (
        "ipv6-ip",
        "-610",
        "<rule action='return' direction='out' priority='100'>"
        "<ipv6 srcipaddr='fe80::' srcipmask='10' protocol='udp'/></rule>"
        "<rule action='return' direction='out'><ipv6 srcipaddr='$IPV6'/></rule>" + _DROP_OUT,
    ),
    "no-mac-broadcast": (
        "ipv4", "", "<rule action='drop' direction='out'><mac dstmacaddr='ff:ff:ff:ff:ff:ff'/></rule>",
    ),
    "no-mac-spoofing": (
        "mac",
        "",
        "<rule action='return' direction='out'><mac srcmacaddr='$MAC'/></rule>"
        "<rule action='drop' direction='out'><mac/></rule>",
    ),
    "no-other-l2-traffic": ("root", "", "<rule action='drop' direction='inout' priority='1000'/>"),
    "no-other-rarp-traffic": ("rarp", "", "<rule action='drop' direction='inout' priority='1000'/>"),
    # Ethernet type 0x835: how old versions of QEMU announced themselves, by mistake.
    "qemu-announce-self": (
        "root",
        "",
        "<rule action='accept' direction='out'><mac protocolid='0x835'/></rule>"
        + _references("qemu-announce-self-rarp", "no-other-rarp-traffic"),
    ),
    "qemu-announce-self-rarp": (
        "rarp",
        "",
        f"<rule action='accept' direction='out'><rarp srcmacaddr='$MAC' {_ANNOUNCE}/></rule>"
        f"<rule action='accept' direction='in'><rarp {_ANNOUNCE}/></rule>",
    ),
}  # fmt: skip


@cache
def builtin_filters() -> dict[str, NetworkFilter]:
    """By name. Shared: nobody may change them."""
    found = {}
    for name, (chain, priority, inside) in _FILTERS.items():
        more = f" priority='{priority}'" if priority else ""
        uuid = uuid5(_NAMESPACE, name)
        found[name] = parse_filter(f"<filter name='{name}' chain='{chain}'{more}><uuid>{uuid}</uuid>{inside}</filter>")
    return found
