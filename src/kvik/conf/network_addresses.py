"""The addresses and names that network documents hold, as text to values: each function raises ConfigError with the
path it was given, and takes nothing that a command line, a configuration file of dnsmasq or the kernel reads otherwise.
"""

from __future__ import annotations

import ipaddress
import re
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network

from kvik.conf.devices.interface import Route
from kvik.conf.network import NetworkIp, normal_mac
from kvik.errors import ConfigError

__all__ = [
    "address", "dns_name", "interface_name", "ip_interface", "plain_text", "route_destination", "unicast_mac",
]  # fmt: skip

Address = IPv4Address | IPv6Address
Subnet = IPv4Network | IPv6Network
IFNAMSIZ = 16  # with the NUL at the end: linux/if.h
_LABEL = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")


def interface_name(name: str, path: str) -> str:
    """A name that the kernel gives an interface (dev_valid_name in net/core/dev.c) and that no tool takes for an
    option or a pattern."""
    if not 0 < len(name.encode()) < IFNAMSIZ:
        raise ConfigError(f"{name!r} is no name of an interface: that has 1 to {IFNAMSIZ - 1} bytes", path=path)
    if (
        name in (".", "..")
        or name.startswith("-")
        or not re.fullmatch(r"[!-~]+", name)
        or re.search(r"[/:%*'\"]", name)
    ):
        raise ConfigError(
            f"{name!r} is no name of an interface", path=path, remedy="use letters, digits, '-', '_' and '.'"
        )
    return name


def address(text: str, path: str, what: str = "address", family: str | None = None) -> Address:
    """An address of one host, of `family` ipv4 or ipv6 if that is given."""
    try:
        value = ipaddress.ip_address(text)
    except ValueError:
        raise ConfigError(f"{what} {text!r} is neither an IPv4 nor an IPv6 address", path=path) from None
    if isinstance(value, IPv6Address) and (value.scope_id is not None or value.ipv4_mapped is not None):
        raise ConfigError(f"{what} {text!r} must stand without a zone, and not map an IPv4 address", path=path)
    if family is not None and value.version != int(family[-1]):
        raise ConfigError(f"{what} {text} is not of family {family}", path=path)
    return value


def _prefix(value: Address, netmask: str | None, prefix: int | None, natural: int, path: str) -> int:
    """The prefix length said by one of the two; `natural` if neither."""
    if netmask is not None and prefix is not None:
        raise ConfigError("netmask and prefix say the same thing", path=path, remedy="give one of them")
    if netmask is not None:
        mask = int(address(netmask, f"{path}/@netmask", "netmask", "ipv4"))
        if value.version == 6:
            raise ConfigError("IPv6 has no netmask", path=f"{path}/@netmask", remedy="give the prefix")
        ones = mask.bit_count()
        if mask != (0xFFFFFFFF << (32 - ones)) & 0xFFFFFFFF:
            raise ConfigError(f"netmask {netmask} is not ones followed by zeros", path=f"{path}/@netmask")
        prefix = ones
    if prefix is None:
        return natural
    if prefix > value.max_prefixlen:
        raise ConfigError(
            f"prefix {prefix} is longer than an IPv{value.version} address ({value.max_prefixlen} bits)",
            path=f"{path}/@prefix",
        )
    return prefix


def _natural(value: Address) -> int:
    """The prefix of an address that has none written: its class for IPv4, 64 for IPv6; as in libvirt."""
    if value.version == 6:
        return 64
    first = int(value) >> 24
    return 8 if first < 128 else 16 if first < 192 else 24


def ip_interface(ip: NetworkIp, path: str = "/network/ip") -> IPv4Interface | IPv6Interface:
    """The host's address with its subnet. Raises ConfigError for one that no host can have there."""
    if ip.address is None:
        raise ConfigError("the network's own address is missing", path=f"{path}/@address")
    where = f"{path}/@address"
    value = address(ip.address, where, family=ip.family or ("ipv4" if ":" not in ip.address else None))
    if value.version == 6 and ip.family != "ipv6":
        raise ConfigError(f"{value} is an IPv6 address", path=where, remedy="say family='ipv6'")
    made = ipaddress.ip_interface(f"{value}/{_prefix(value, ip.netmask, ip.prefix, _natural(value), path)}")
    kept_apart = value.is_multicast or value.is_unspecified or value.is_loopback or int(value) == 0xFFFFFFFF
    if kept_apart or (value.version == 4 and made.network.prefixlen == 0):
        raise ConfigError(f"{made} cannot be the address of a network's gateway", path=where)
    if is_edge(value, made.network):
        raise ConfigError(
            f"{value} is the network or broadcast address of {made.network}, not one of a host in it",
            path=where,
            remedy=f"such as {made.network.network_address + 1}",
        )
    return made


def is_edge(value: Address, subnet: Subnet) -> bool:
    """Whether no host can have it: IPv4's network and broadcast address, IPv6's subnet-router anycast address."""
    if subnet.num_addresses <= 2:  # RFC 3021 and 6164: both ends of a point-to-point link
        return False
    return value == subnet.network_address or (value.version == 4 and value == subnet.broadcast_address)


def route_destination(route: Route, path: str) -> Subnet:
    """Where a static route leads."""
    if route.address is None:
        raise ConfigError("where the route leads is missing", path=f"{path}/@address")
    value = address(
        route.address, f"{path}/@address", family=route.family or ("ipv4" if ":" not in route.address else None)
    )
    if value.version == 6 and route.family != "ipv6":
        raise ConfigError(f"{value} is an IPv6 address", path=f"{path}/@address", remedy="say family='ipv6'")
    prefix = _prefix(value, route.netmask, route.prefix, 0 if int(value) == 0 else _natural(value), path)
    made = ipaddress.ip_network(f"{value}/{prefix}", strict=False)
    if made.network_address != value:
        raise ConfigError(
            f"{value} with prefix {prefix} is an address in a network, not a network",
            path=f"{path}/@address",
            remedy=f"the network is {made.network_address}",
        )
    return made


def unicast_mac(text: str, path: str) -> str:
    """A MAC address one card can have, as `normal_mac` writes it."""
    try:
        mac = normal_mac(text)
    except ValueError as error:
        raise ConfigError(str(error), path=path) from None
    if int(mac[:2], 16) & 1 or mac == "00:00:00:00:00:00":
        raise ConfigError(f"{text} is not the address of one card (multicast, or all zeros)", path=path)
    return mac


def dns_name(text: str, path: str, what: str = "name") -> str:
    """A name of DNS (RFC 1035, with the underscore that RFC 2782 adds); a dot may end it."""
    labels = text.removesuffix(".").split(".")
    if len(text) > 254 or not all(_LABEL.fullmatch(label) for label in labels):
        raise ConfigError(
            f"{what} {text!r} is no DNS name", path=path, remedy="use letters, digits and '-', with '.' between labels"
        )
    return text


def plain_text(text: str, path: str, what: str, limit: int = 255) -> str:
    """Text that becomes part of a line: no control character, no more than `limit` bytes."""
    if len(text.encode()) > limit:
        raise ConfigError(f"{what} has more than {limit} bytes", path=path)
    if any(ord(character) < 32 or 127 <= ord(character) < 160 or character in "\u2028\u2029" for character in text):
        raise ConfigError(f"{what} {text!r} holds a control character", path=path)
    return text
