"""Interfaces up as their documents say, and down. Blocking. Addresses by DHCP are for the host's own tools."""

from __future__ import annotations

import errno

from kvik.conf.interface import Interface
from kvik.errors import HostError, OperationInvalid, OperationUnsupported
from kvik.host.bridge import create_bridge
from kvik.host.netlink import Link, Netlink
from kvik.host.route import add_route, routes


def _find(netlink: Netlink, name: str) -> Link | None:
    try:
        return netlink.link(name)
    except HostError as error:
        if error.errno == errno.ENODEV:
            return None
        raise


def bridge_of(netlink: Netlink, name: str) -> str:
    """The bridge that an interface is a port of; empty if it is of none."""
    link = _find(netlink, name)
    if link is None or not link.master:
        return ""
    master = netlink.link(link.master)
    return master.name if master.kind == "bridge" else ""


def start(netlink: Netlink, document: Interface) -> None:
    """Bring it up with its fixed addresses; made if it is virtual. What is there already stays."""
    dynamic = any(protocol.dhcp and not protocol.ips for protocol in document.protocols)
    link = _find(netlink, document.name)
    if dynamic and (link is None or not netlink.addresses(link.index)):
        raise OperationUnsupported(
            f"{document.name} gets its address by DHCP, which the host's own client does",
            remedy=f"start it with the host's tool: ifup {document.name}, networkctl up, or nmcli connection up",
        )
    if link is None:
        link = _make(netlink, document)
    if document.mtu is not None and link.mtu != document.mtu.size:
        netlink.set_link(link.index, mtu=document.mtu.size)
    netlink.set_link(link.index, up=True)
    have = {str(address.interface) for address in netlink.addresses(link.index)}
    gateways = {str(route.gateway) for route in routes(netlink) if route.default and route.index == link.index}
    for protocol in document.protocols:
        for ip in protocol.ips:
            if ip.text not in have:
                netlink.add_address(link.index, ip.text)
        for route in protocol.routes:
            if route.gateway in gateways:
                continue  # perhaps with a metric of its own
            network = "0.0.0.0/0" if protocol.family == "ipv4" else "::/0"
            try:
                add_route(netlink, network, gateway=route.gateway, index=link.index)
            except HostError as error:
                if error.errno != errno.EEXIST:
                    raise


def _make(netlink: Netlink, document: Interface) -> Link:
    mac = document.mac.address if document.mac else None
    if document.bridge is not None:
        delay = float(document.bridge.delay or 0)
        stp = bool(document.bridge.stp)
        made = create_bridge(netlink, document.name, mac=mac, forward_delay=max(delay, 2.0) if stp else delay, stp=stp)
        return made.link
    if document.vlan is not None:
        base = netlink.link(document.vlan.base.name)
        return netlink.add_vlan(document.name, base.index, document.vlan.tag)
    if document.bond is not None:
        raise OperationUnsupported("bonds are made by the host's own tools", remedy=f"ifup {document.name}")
    raise OperationInvalid(f"there is no interface {document.name}", remedy="is the hardware there, its driver loaded?")


def stop(netlink: Netlink, name: str) -> None:
    """Bring it down. One that is virtual stays: its ports and addresses are not this call's to lose."""
    netlink.set_link(netlink.link(name).index, up=False)
