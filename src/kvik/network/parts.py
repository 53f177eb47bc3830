"""What of the host a network stands on and did not make: a bridge, the cards beneath it, the way out. Somebody may
unplug it at any time; the network goes on without it, and says so."""

from __future__ import annotations

import errno

from kvik.conf.network import Network
from kvik.errors import HostError
from kvik.host.bridge import bridge_ports
from kvik.host.netlink import Netlink

__all__ = ["missing", "parts"]

_WIRES = (
    "",
    "bond",
    "team",
    "vlan",
    "vxlan",
)  # kinds of interface that lead out of the host; taps and veths come and go


def parts(netlink: Netlink, document: Network) -> dict[str, str]:
    """Names of interfaces -> what each is to the network, as it is now."""
    found: dict[str, str] = {}
    forward = document.forward
    for item in forward.interfaces if forward is not None else ():
        found[item.dev] = (
            "by which its machines reach the world" if document.owns_bridge else "on which its machines' cards stand"
        )
    if document.owns_bridge or not document.bridge_name:
        return found
    found[document.bridge_name] = "its bridge"
    try:
        bridge = netlink.link(document.bridge_name)
    except HostError as error:
        if error.errno != errno.ENODEV:
            raise
        return found
    for port in bridge_ports(netlink, bridge.index) if bridge.kind == "bridge" else ():
        if port.link.kind in _WIRES:
            found[port.link.name] = f"a port of its bridge {bridge.name}"
    return found


def missing(netlink: Netlink, known: dict[str, str]) -> list[str]:
    """Of `parts` from an earlier time those that are not there, in words."""
    there = {link.name for link in netlink.links()}
    return [f"interface {name}, {what}, is not there" for name, what in known.items() if name not in there]
