"""<interface trustGuestRxFilters='yes'>: a macvtap lets in what its guest asks its card for, not one address alone.

The VMM says once that this has changed, and again only after it was asked what it is now (QEMU's qapi/net.json).
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from kvik.conf.devices.interface import Interface
from kvik.conf.network import normal_mac
from kvik.errors import KvikError
from kvik.host.macvtap import follow_guest
from kvik.host.netlink import Netlink

if TYPE_CHECKING:
    from kvik.manager.domain import DomainObject
    from kvik.manager.run import Run

__all__ = ["follow", "follow_all"]

logger = logging.getLogger(__name__)


async def follow_all(domain: DomainObject, run: Run) -> None:
    """After the daemon was away: what changed meanwhile was told to nobody."""
    for interface in run.live.devices.interfaces:
        if interface.alias is not None:
            await follow(domain, run, interface.alias.name)


async def follow(domain: DomainObject, run: Run, alias: str) -> None:
    """Never raises: what a guest asks for is its own loss."""
    found = [nic for nic in run.live.devices.interfaces if nic.alias is not None and nic.alias.name == alias]
    if not found or run.machine is None or not found[0].is_macvtap:
        return
    (interface,) = found
    try:
        if not _is_trusted(domain, interface):
            return
        told = await run.machine.monitor("query-rx-filter", {"name": alias})
        await domain.manager.store.run(_apply, interface, told)
    except KvikError as error:
        logger.warning("machine %s: what interface %s listens to: %s", domain.name, alias, error)


def _is_trusted(domain: DomainObject, interface: Interface) -> bool:
    """The interface's word goes before its portgroup's, and that before the network's."""
    words = [interface.trust_guest_rx_filters]
    if interface.type == "network" and interface.source is not None and interface.source.network:
        document = domain.manager.networks.lookup_name(interface.source.network).document
        group = document.portgroup(interface.source.portgroup)
        words += [group.trust_guest_rx_filters if group is not None else None, document.trust_guest_rx_filters]
    return next((word for word in words if word is not None), False)


def _apply(interface: Interface, told: object) -> None:
    """`told` is the VMM's word, and partly the guest's: only what has the form of an address becomes one."""
    name = interface.target.dev if interface.target is not None else None
    item = told[0] if isinstance(told, list) and told else None
    if not name or interface.mac is None or not isinstance(item, dict):
        return
    try:
        mac = normal_mac(str(item.get("main-mac")))
    except ValueError:
        return
    if int(mac[:2], 16) & 1 or mac == "00:00:00:00:00:00":  # the address of no card
        return
    with Netlink() as netlink:
        follow_guest(netlink, name, interface.mac.address, now=mac, multicast=item.get("multicast") != "none")
