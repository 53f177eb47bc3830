"""Which IPv4 subnets this host has in use, and one that it has not."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from ipaddress import IPv4Network

from kvik.conf.network import Network
from kvik.conf.network_addresses import Subnet, ip_interface
from kvik.errors import OperationFailed, ResourceBusy
from kvik.host.netlink import Link, Netlink
from kvik.host.route import routes

__all__ = ["free_subnet", "refuse_taken", "taken_subnets"]

# 192.168.122.0/24 is what every guide says; after it its neighbours, which few home routers use, then 10.x.
CANDIDATES = [f"192.168.{number}.0/24" for number in (*range(122, 255), *range(100, 122))] + [
    f"10.{number}.0.0/24" for number in range(100, 255)
]


def _describe(link: Link) -> str:
    return f"{link.name} ({link.alias})" if link.alias.isprintable() and link.alias else link.name


def taken_subnets(netlink: Netlink, besides: int = 0) -> dict[Subnet, str]:
    """Subnets that an interface has an address in or a route leads to -> a few words on who has it. Default routes,
    and routes to one address, take nothing that a network could want; nor does what goes by the link `besides`."""
    names = {link.index: _describe(link) for link in netlink.links()}
    taken: dict[Subnet, str] = {}
    for route in routes(netlink):
        if (
            not route.default
            and (not besides or route.index != besides)
            and route.network.prefixlen < route.network.max_prefixlen
            and not _is_shared(route.network)
        ):
            way = f" by {names[route.index]}" if route.index in names else ""
            taken[route.network] = f"the route to {route.network}{way}"
    for address in netlink.addresses():
        network = address.interface.network
        if not _is_shared(network) and (not besides or address.index != besides):
            taken[network] = f"the address {address.interface} of {names.get(address.index, 'an interface')}"
    return taken


def _is_shared(network: Subnet) -> bool:
    """Loopback, link-local and multicast: every interface has those."""
    return network.is_loopback or network.is_link_local or network.is_multicast


def free_subnet(taken: Iterable[Subnet], candidates: Iterable[str] = CANDIDATES) -> IPv4Network:
    """The first /24 that overlaps nothing in `taken`. OperationFailed if there is none."""
    busy = [subnet for subnet in taken if isinstance(subnet, IPv4Network)]
    for text in candidates:
        candidate = IPv4Network(text)
        if not any(candidate.overlaps(subnet) for subnet in busy):
            return candidate
    raise OperationFailed(
        "no private IPv4 subnet is free for a network: every one that was tried overlaps a route of this host",
        remedy="define the network with an <ip> of your choice",
    )


def refuse_taken(netlink: Netlink, document: Network, besides: int = 0) -> None:
    """ResourceBusy if a subnet of the network is in use on this host: its guests and somebody else's machines could
    not both be reached. `besides`: its own bridge, if that is there already."""
    taken = taken_subnets(netlink, besides)
    for ip in document.ips:
        if ip.address is None:
            continue
        own = ip_interface(ip).network
        for subnet, who in taken.items():
            if isinstance(subnet, ipaddress.IPv4Network) == (own.version == 4) and own.overlaps(subnet):
                raise ResourceBusy(
                    f"network {document.name!r} wants {own}, which {who} has already",
                    remedy=_suggestion(own, taken),
                )


def _suggestion(own: Subnet, taken: Iterable[Subnet]) -> str:
    if own.version == 4:
        try:
            return f"{free_subnet(taken)} is free: change the network's <ip> to it (kvik net-edit)"
        except OperationFailed:
            pass
    return "change the network's <ip> (kvik net-edit)"
