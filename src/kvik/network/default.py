"""The network `default`: NAT, on the first use of a daemon, on a subnet that nobody on this host has.

It is made once. Who undefines it does not want it, and does not get it again.
"""

from __future__ import annotations

import logging
from ipaddress import IPv4Network
from typing import TYPE_CHECKING

from kvik.errors import KvikError
from kvik.host import files
from kvik.host.netlink import Netlink
from kvik.network.subnet import CANDIDATES, free_subnet, taken_subnets

if TYPE_CHECKING:
    from kvik.network.network import NetworkObject
    from kvik.network.networks import Networks

__all__ = ["NAME", "default_document", "ensure_default"]

logger = logging.getLogger(__name__)

NAME = "default"
MARKER = "default-made"  # in <data>/network: it was offered once


def default_document(subnet: IPv4Network) -> str:
    """libvirt's own `default`, but without STP: with it the kernel keeps every new port silent for 4 s, and a guest's
    first DHCP requests are lost. Loops can arise only where a guest joins two of its interfaces."""
    hosts = subnet.num_addresses - 2
    return (
        f"<network><name>{NAME}</name><forward mode='nat'/><bridge stp='off' delay='0'/>"
        f"<ip address='{subnet[1]}' netmask='{subnet.netmask}'>"
        f"<dhcp><range start='{subnet[2]}' end='{subnet[hosts]}'/></dhcp></ip></network>"
    )


async def ensure_default(networks: Networks) -> NetworkObject | None:
    """Define `default`, have it start with the host and start it; None if it was made before or there is one.

    Says in the networks' warnings which subnet it took if that is not the usual one, and why it could not be started.
    """
    marker = networks.store.data / MARKER
    if await networks.run(files.try_read_file, marker, limit=64) is not None:
        return None
    if any(network.name == NAME for network in networks.list()):
        return None

    def choose() -> tuple[IPv4Network, str]:
        with Netlink() as netlink:
            taken = taken_subnets(netlink)
        subnet, usual = free_subnet(taken), IPv4Network(CANDIDATES[0])
        return subnet, next((who for other, who in taken.items() if other.version == 4 and other.overlaps(usual)), "")

    subnet, who = await networks.run(choose)
    network = await networks.define(default_document(subnet))
    if str(subnet) != CANDIDATES[0]:
        networks.warn(
            f"network {NAME!r} is on {subnet}, because {who or 'another network'} has {CANDIDATES[0]} already"
        )
    try:
        await network.set_autostart(True)
        if not networks.lacks(network.definition):
            await network.start()
    except KvikError as error:
        networks.warn(f"network {NAME!r} was defined but could not be started: {error}")
    # Last: a daemon that is killed before this finds the network defined, or makes it.
    await networks.run(files.atomic_write, marker, b"")
    return network
