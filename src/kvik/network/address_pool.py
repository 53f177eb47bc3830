"""Whether a network has an IPv4 address left to lend. What is asked is the document and the leases there are: a DHCP
server that has none left does not answer, and a guest cannot tell that from a cable that leads nowhere."""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Address

from kvik.conf.network import Network
from kvik.conf.network_addresses import ip_interface
from kvik.network.dnsmasq import LeaseEntry

__all__ = ["exhausted", "free_addresses"]


def free_addresses(document: Network, leases: Iterable[LeaseEntry]) -> tuple[int, int] | None:
    """How many addresses of its ranges are free for a card that nothing is reserved for, and how many those ranges
    have; None for a network that has no range of IPv4."""
    served = [ip for ip in document.ips if ip.address and ip.dhcp and ip_interface(ip).version == 4]
    ranges = [
        (int(IPv4Address(item.start)), int(IPv4Address(item.end)))
        for ip in served
        if ip.dhcp is not None
        for item in ip.dhcp.ranges
    ]
    if not ranges:
        return None
    used = {int(IPv4Address(lease.address)) for lease in leases if lease.version == 4}
    for ip in served:
        used.add(int(ip_interface(ip).ip))
        used |= {int(IPv4Address(host.ip)) for host in (ip.dhcp.hosts if ip.dhcp else ()) if host.ip}
    size = sum(last - first + 1 for first, last in ranges)
    return size - sum(any(first <= address <= last for first, last in ranges) for address in used), size


def exhausted(document: Network, leases: Iterable[LeaseEntry]) -> str:
    """What is to be said and done when no address is left, or ""."""
    found = free_addresses(document, leases)
    if found is None or found[0] > 0:
        return ""
    return (
        f"all {found[1]} addresses that it has for machines are lent or reserved: the next machine gets none. See who "
        f"has them: kvik net-dhcp-leases {document.name}; widen its <range> (kvik net-edit, or kvik net-update "
        f"{document.name} add ip-dhcp-range ... --live --config), or give leases a shorter <lease>"
    )
