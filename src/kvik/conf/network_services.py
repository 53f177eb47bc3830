"""Checks of what a network hands out: its own addresses, DHCP, DNS, routes and port forwards."""

from __future__ import annotations

import re
from collections.abc import Sequence

from kvik.conf.devices.interface import Route
from kvik.conf.network import Dhcp, DhcpHost, DhcpRange, Dns, DnsSrv, Lease, Network
from kvik.conf.network_addresses import (
    Address,
    Subnet,
    address,
    dns_name,
    ip_interface,
    is_edge,
    plain_text,
    route_destination,
    unicast_mac,
)
from kvik.conf.validate import absolute
from kvik.errors import ConfigError

LEASE_MIN, LEASE_MAX = 120, 0xFFFFFFFF  # seconds: dnsmasq's least, and what DHCP's 32 bits hold (RFC 2132)
DHCP6_PREFIX = 64  # dnsmasq refuses a shorter one
_DUID = re.compile(r"[0-9A-Fa-f]{1,2}(:[0-9A-Fa-f]{1,2}){2,129}")  # RFC 8415, 11.1: a type, then at most 128 bytes


def validate_ips(document: Network) -> list[Subnet]:
    """The subnets of the document's addresses, in order."""
    subnets: list[Subnet] = []
    served: set[int] = set()
    for index, ip in enumerate(document.ips, 1):
        path = f"/network/ip[{index}]"
        own = ip_interface(ip, path)
        for other in subnets:
            if other.version == own.version and other.overlaps(own.network):
                raise ConfigError(f"{own.network} overlaps {other} of this network", path=path)
        subnets.append(own.network)
        if ip.tftp is not None:
            absolute(ip.tftp.root, f"{path}/tftp/@root", "the TFTP root")
            if own.version == 6:
                raise ConfigError("TFTP is offered with IPv4 only", path=f"{path}/tftp")
        if ip.dhcp is not None:
            if own.version in served:
                raise ConfigError(f"DHCP for IPv{own.version} appears twice", path=f"{path}/dhcp")
            served.add(own.version)
            _dhcp(ip.dhcp, own.ip, own.network, f"{path}/dhcp")
    return subnets


def _dhcp(dhcp: Dhcp, own: Address, subnet: Subnet, path: str) -> None:
    if subnet.version == 6 and subnet.prefixlen < DHCP6_PREFIX:
        raise ConfigError(f"DHCP for IPv6 needs a prefix of {DHCP6_PREFIX} or more", path=path)
    ranges: list[tuple[int, int]] = []
    for index, item in enumerate(dhcp.ranges, 1):
        validate_range(item, subnet, ranges, f"{path}/range[{index}]")
    hosts: set[tuple[str, str]] = set()
    for index, host in enumerate(dhcp.hosts, 1):
        validate_host(host, own, subnet, hosts, f"{path}/host[{index}]")
    if dhcp.bootp is not None:
        if subnet.version == 6:
            raise ConfigError("BOOTP is part of IPv4", path=f"{path}/bootp")
        _field(dhcp.bootp.file, f"{path}/bootp/@file", "the boot file")
        if dhcp.bootp.server is not None and not _is_address(dhcp.bootp.server):
            dns_name(dhcp.bootp.server, f"{path}/bootp/@server", "server")


def _is_address(text: str) -> bool:
    try:
        address(text, "")
    except ConfigError:
        return False
    return True


def _field(text: str, path: str, what: str) -> None:
    """A field of a line that commas divide."""
    plain_text(text, path, what)
    if not text or any(character in ',"' for character in text):
        raise ConfigError(f"{what} {text!r} is empty, or holds a comma or a quote", path=path)


def validate_range(item: DhcpRange, subnet: Subnet, others: list[tuple[int, int]], path: str) -> None:
    """Adds the range to `others`, none of which it may touch."""
    family = f"ipv{subnet.version}"
    start = address(item.start, f"{path}/@start", "start", family)
    end = address(item.end, f"{path}/@end", "end", family)
    for value, name in ((start, "start"), (end, "end")):
        if value not in subnet:
            raise ConfigError(f"{value} is outside of {subnet}", path=f"{path}/@{name}")
        if is_edge(value, subnet):
            raise ConfigError(f"{value} is the network or broadcast address of {subnet}", path=f"{path}/@{name}")
    first, last = int(start), int(end)
    if last < first:
        raise ConfigError(f"the range ends ({end}) before it starts ({start})", path=f"{path}/@end")
    if any(first <= there[1] and there[0] <= last for there in others):
        raise ConfigError(f"{start} to {end} overlaps another range", path=path)
    others.append((first, last))
    _lease(item.lease, path)


def _lease(lease: Lease | None, path: str) -> None:
    if lease is not None and lease.expiry and not LEASE_MIN <= lease.seconds <= LEASE_MAX:
        raise ConfigError(
            f"a lease of {lease.seconds} seconds is not between {LEASE_MIN} and {LEASE_MAX}",
            path=f"{path}/lease/@expiry",
            remedy="0 is for ever",
        )


def validate_host(host: DhcpHost, own: Address, subnet: Subnet, others: set[tuple[str, str]], path: str) -> None:
    """Adds what identifies the host to `others`, with none of which it may share anything."""
    keys = []
    if host.mac is not None:
        if subnet.version == 6:
            raise ConfigError("DHCP of IPv6 knows its clients by id, not by MAC", path=f"{path}/@mac")
        keys.append(("MAC", unicast_mac(host.mac, f"{path}/@mac")))
    if host.id is not None:
        if subnet.version == 4 or not _DUID.fullmatch(host.id):
            raise ConfigError(f"{host.id!r} is no DHCP unique identifier of IPv6", path=f"{path}/@id")
        keys.append(("id", ":".join(part.zfill(2) for part in host.id.lower().split(":"))))
    if host.name is not None:
        keys.append(("name", dns_name(host.name, f"{path}/@name", "host name").lower()))
    if not keys:
        wanted = "mac or name" if subnet.version == 4 else "id or name"
        raise ConfigError(f"the host has no {wanted} by which to know it", path=path)
    if host.ip is None:
        raise ConfigError("the host's address is missing", path=f"{path}/@ip")
    value = address(host.ip, f"{path}/@ip", family=f"ipv{subnet.version}")
    if value not in subnet or is_edge(value, subnet):
        raise ConfigError(f"{value} is not the address of a host in {subnet}", path=f"{path}/@ip")
    if value == own:
        raise ConfigError(f"{value} is the network's own address", path=f"{path}/@ip")
    keys.append(("address", str(value)))
    for key in keys:
        if key in others:
            raise ConfigError(f"{key[0]} {key[1]} belongs to another host of this network", path=path)
    others.update(keys)
    _lease(host.lease, path)


def validate_dns(dns: Dns) -> None:
    path = "/network/dns"
    for index, forwarder in enumerate(dns.forwarders, 1):
        where = f"{path}/forwarder[{index}]"
        if forwarder.addr is None and forwarder.domain is None:
            raise ConfigError("a forwarder needs addr, domain or both", path=where)
        if forwarder.addr is not None:
            address(forwarder.addr, f"{where}/@addr")
        if forwarder.domain is not None:
            dns_name(forwarder.domain, f"{where}/@domain", "domain")
    names: set[str] = set()
    for index, txt in enumerate(dns.txts, 1):
        where = f"{path}/txt[{index}]"
        name = dns_name(txt.name, f"{where}/@name").lower()
        if name in names:
            raise ConfigError(f"TXT record {txt.name} appears twice", path=where)
        names.add(name)
        plain_text(txt.value, f"{where}/@value", "the text")
        if '"' in txt.value:
            raise ConfigError("the text holds a quote", path=f"{where}/@value")
    records: set[tuple[object, ...]] = set()
    for index, srv in enumerate(dns.srvs, 1):
        where = f"{path}/srv[{index}]"
        _srv(srv, where)
        record = (srv.service, srv.protocol, srv.domain, srv.target, srv.port)
        if record in records:
            raise ConfigError(f"SRV record {srv.service} appears twice", path=where)
        records.add(record)
    addresses: set[Address] = set()
    for index, host in enumerate(dns.hosts, 1):
        where = f"{path}/host[{index}]"
        if host.ip is None:
            raise ConfigError("the host's address is missing", path=f"{where}/@ip")
        value = address(host.ip, f"{where}/@ip")
        if value in addresses:
            raise ConfigError(f"{value} appears twice", path=where, remedy="give one <host> all its names")
        addresses.add(value)
        if not host.hostnames:
            raise ConfigError(f"{value} has no <hostname>", path=where)
        for number, name in enumerate(host.hostnames, 1):
            dns_name(name, f"{where}/hostname[{number}]", "host name")


def _srv(srv: DnsSrv, path: str) -> None:
    """RFC 2782."""
    dns_name(srv.service, f"{path}/@service", "service")
    if srv.protocol not in ("tcp", "udp"):
        raise ConfigError(f"protocol {srv.protocol!r} is neither tcp nor udp", path=f"{path}/@protocol")
    if srv.domain is not None:
        dns_name(srv.domain, f"{path}/@domain", "domain")
    if srv.target is not None and srv.target != ".":  # ".": there is no such service here
        dns_name(srv.target, f"{path}/@target", "target")
    for field in ("port", "priority", "weight"):
        value = getattr(srv, field)
        if value is None:
            continue
        if srv.target is None:
            raise ConfigError(f"{field} without a target", path=f"{path}/@{field}")
        if value > 65535 or (field == "port" and value == 0 and srv.target != "."):
            raise ConfigError(f"{field} {value} is out of range", path=f"{path}/@{field}")


def validate_routes(routes: Sequence[Route], subnets: Sequence[Subnet]) -> None:
    seen: set[Subnet] = set()
    for index, route in enumerate(routes, 1):
        path = f"/network/route[{index}]"
        destination = route_destination(route, path)
        if route.gateway is None:
            raise ConfigError("the route's gateway is missing", path=f"{path}/@gateway")
        gateway = address(route.gateway, f"{path}/@gateway", "gateway", f"ipv{destination.version}")
        if not any(gateway in subnet for subnet in subnets if subnet.version == gateway.version):
            raise ConfigError(f"gateway {gateway} is in no subnet of this network", path=f"{path}/@gateway")
        if destination in seen or destination in subnets:
            raise ConfigError(f"there is another way to {destination}", path=path)
        seen.add(destination)
        if route.metric is not None and not 1 <= route.metric <= 0xFFFFFFFF:
            raise ConfigError(f"metric {route.metric} is not between 1 and 2^32-1", path=f"{path}/@metric")


def validate_port_forwards(document: Network, subnets: Sequence[Subnet]) -> None:
    taken: list[tuple[str, Address | None, int, int]] = []
    for index, item in enumerate(document.forward.port_forwards if document.forward else [], 1):
        path = f"/network/forward/portForward[{index}]"
        if document.mode not in ("nat", "route"):
            raise ConfigError(f"ports are forwarded in modes nat and route, not {document.mode}", path=path)
        guest = address(item.guest, f"{path}/@guest", "guest")
        if not any(guest in subnet for subnet in subnets if subnet.version == guest.version):
            raise ConfigError(f"guest {guest} is in no subnet of this network", path=f"{path}/@guest")
        host = address(item.address, f"{path}/@address", family=f"ipv{guest.version}") if item.address else None
        last = item.start if item.end is None else item.end
        first_to = item.start if item.to is None else item.to
        if not (1 <= item.start <= last <= 65535 and first_to >= 1 and first_to + last - item.start <= 65535):
            raise ConfigError(f"{item.start} to {last}, handed to {first_to} on, are not ports in order", path=path)
        for proto, there, start, end in taken:
            same_address = there is None or host is None or there == host
            if proto == item.proto and same_address and start <= last and item.start <= end:
                raise ConfigError(f"{proto} port {max(start, item.start)} is forwarded already", path=path)
        taken.append((item.proto, host, item.start, last))
