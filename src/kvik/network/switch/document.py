"""From a network's document to what its switch is told: a pure function.

A session's network is a switch without privileges, so all of the host's own network is out of reach: bridges, routes,
interfaces. What the document asks for and cannot be is refused, with what to do instead. Its <bridge> means nothing
here and is left out, so that documents made for other daemons can be used.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from kvik.conf.network import Lease, Network, NetworkIp, normal_mac
from kvik.conf.network_addresses import ip_interface
from kvik.errors import ConfigUnsupported
from kvik.network.switch.settings import FOR_EVER, from_json

__all__ = ["switch_settings"]

_SYSTEM = "leave it out, or define the network with the system's daemon (root)"


class _Unkept(NamedTuple):
    """Something that was said and cannot be done: the element, and what to do."""

    element: str
    said: object
    remedy: str = _SYSTEM


def switch_settings(document: Network) -> dict[str, Any]:
    """The settings of `settings.from_json`, for a complete and valid document. Raises `ConfigUnsupported`."""
    _refuse_unkept_promises(document)
    ip = document.ips[0] if document.ips else None
    out = document.mode is not None and ip is not None
    settings: dict[str, Any] = {
        "name": document.name,
        "mac": document.mac.address if document.mac is not None else "",
        "router": out,
        "forward_dns": out,
        "mtu": document.mtu.size if document.mtu is not None else 0,
        "isolated": bool(document.port and document.port.isolated),  # the daemon's to say, port by port
    }
    if document.domain is not None:
        settings |= {"domain": document.domain.name, "local_only": document.domain.local_only is True}
    if document.dns is not None:
        settings["dns"] = document.dns.enable is not False
        settings["forward_plain"] = document.dns.forward_plain_names is True
        settings["names"] = _names(document)
    if ip is not None:
        settings |= _addresses(ip)
    from_json(settings)  # a switch that would refuse this is never started
    return settings


def _names(document: Network) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for host in document.dns.hosts if document.dns is not None else ():
        for name in host.hostnames:
            names.setdefault(name.lower(), []).append(host.ip or "")
    return names


def _addresses(ip: NetworkIp) -> dict[str, Any]:
    own = ip_interface(ip)
    made: dict[str, Any] = {"ip": str(own.ip), "prefix": own.network.prefixlen}
    if ip.dhcp is not None:
        made["ranges"] = [[item.start, item.end, _seconds(item.lease)] for item in ip.dhcp.ranges]
        made["hosts"] = {
            normal_mac(host.mac or ""): {"ip": host.ip, "name": host.name or "", "lease": _seconds(host.lease)}
            for host in ip.dhcp.hosts
        }
    return made


def _seconds(lease: Lease | None) -> int:
    """0: as the network's other leases."""
    return 0 if lease is None else lease.seconds or FOR_EVER


def _refuse_unkept_promises(document: Network) -> None:
    forward, dns = document.forward, document.dns
    if not document.owns_bridge or document.mode == "route":
        raise ConfigUnsupported(
            f"network {document.name!r}: forward mode {document.mode} takes privileges: it changes the host's network",
            path="/network/forward/@mode",
            remedy="use <forward mode='nat'/> (out by the user's own sockets) or none; or the system's daemon (root)",
        )
    nat = forward.nat if forward is not None else None
    unkept = [
        _Unkept("forward/@dev", forward.interfaces if forward is not None else None),
        _Unkept("forward/nat/address", nat.address if nat is not None else None),
        _Unkept("forward/nat/port", nat.port if nat is not None else None),
        _Unkept("forward/nat/@ipv6", nat.ipv6 if nat is not None else None, "leave it out: the way out is IPv4"),
        _Unkept(
            "forward/portForward",
            forward.port_forwards if forward is not None else None,
            "put <portForward> into the machine's <interface>",
        ),
        _Unkept("bridge/@zone", document.bridge.zone if document.bridge is not None else None),
        _Unkept("domain/@register", document.domain.register if document.domain is not None else None),
        _Unkept("vlan", document.vlan),
        _Unkept("virtualport", document.virtualport),
        _Unkept("bandwidth", document.bandwidth),
        _Unkept("portgroup", document.portgroups),
        _Unkept("route", document.routes),
        _Unkept("dnsmasq:options", document.dnsmasq_options.options if document.dnsmasq_options is not None else None),
    ]
    if dns is not None:
        unkept += [
            _Unkept("dns/forwarder", dns.forwarders, "leave it out: the host's own resolvers are asked"),
            _Unkept("dns/txt", dns.txts),
            _Unkept("dns/srv", dns.srvs),
            _Unkept("dns/host with an IPv6 address", [host for host in dns.hosts if ":" in (host.ip or "")]),
        ]
    unkept += [
        _Unkept("a second ip", document.ips[1:], "give the network one IPv4 <ip>"),
        _Unkept("ip family='ipv6'", [ip for ip in document.ips if ":" in (ip.address or "")], "give it an IPv4 <ip>"),
    ]
    for ip in document.ips[:1]:
        unkept.append(_Unkept("ip/tftp", ip.tftp))
        if ip.dhcp is not None:
            unkept.append(_Unkept("ip/dhcp/bootp", ip.dhcp.bootp))
            nameless = [host for host in ip.dhcp.hosts if host.mac is None]
            unkept.append(_Unkept("ip/dhcp/host without mac", nameless, "say mac='...', which the document shows"))
    for element, said, remedy in unkept:
        if said:
            raise ConfigUnsupported(
                f"network {document.name!r}: <{element}> is not supported on a session's network",
                path="/network",
                remedy=remedy,
            )
