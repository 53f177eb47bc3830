"""MTUs that do not fit together: a switch drops a frame that is too long for its port, and tells nobody (IEEE 802.1Q,
6.7); a router may tell the sender by ICMP (RFC 1191), which many packet filters drop."""

from __future__ import annotations

from kvik.conf.network import Network
from kvik.host.bridge import bridge_ports
from kvik.host.netlink import Link, Netlink
from kvik.host.route import routes

__all__ = ["mismatches"]


def mismatches(netlink: Netlink, document: Network, bridge: Link) -> list[str]:
    """Where frames that fit onto the bridge get lost or stuck on their way, each with both figures and what to do."""
    if not document.owns_bridge:
        return [
            f"bridge {bridge.name} has an MTU of {bridge.mtu}, its port {port.link.name} only {port.link.mtu}: longer "
            f"frames are lost there; give both the same: ip link set {bridge.name} mtu {port.link.mtu}"
            for port in bridge_ports(netlink, bridge.index)
            if port.link.mtu < bridge.mtu
        ]
    return [
        f"its bridge {bridge.name} has an MTU of {bridge.mtu}, {link.name}, by which machines reach the world, only "
        f"{link.mtu}: connections may stall where ICMP is filtered; give it <mtu size='{link.mtu}'/> "
        f"(kvik net-edit {document.name})"
        for link in _ways_out(netlink, document)
        if link.mtu < bridge.mtu
    ]


def _ways_out(netlink: Netlink, document: Network) -> list[Link]:
    """The interfaces that the network's <forward> names; without, those of the host's default routes."""
    if document.forward is None:
        return []
    links = {link.index: link for link in netlink.links()}
    named = {item.dev for item in document.forward.interfaces}
    if named:
        return [link for link in links.values() if link.name in named]
    ways = {
        way for route in routes(netlink) if route.default for way in (route.index, *(hop.index for hop in route.ways))
    }
    return [link for index, link in links.items() if index in ways]
