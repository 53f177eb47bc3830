"""Changes of one part of a network document, as `virNetworkUpdate` and `virsh net-update` define them.

https://libvirt.org/html/libvirt-libvirt-network.html#virNetworkUpdate
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from kvik.conf.codec import Element
from kvik.conf.enums import NetworkUpdateCommand as Command
from kvik.conf.enums import NetworkUpdateSection as Section
from kvik.conf.network import (
    Dhcp,
    DhcpHost,
    DhcpRange,
    Dns,
    DnsHost,
    DnsSrv,
    DnsTxt,
    Forward,
    ForwardInterface,
    Network,
    NetworkIp,
    PortGroup,
    normal_mac,
)
from kvik.conf.network_validate import validate_network
from kvik.conf.reader import read_xml
from kvik.conf.xmlparse import parse_element
from kvik.errors import ConfigError, OperationInvalid, OperationUnsupported

__all__ = ["update_network"]

E = TypeVar("E", bound=Element)


def update_network(document: Network, command: int, section: int, parent_index: int, xml: str) -> None:
    """Apply one change in place; when it is refused, nothing has changed.

    `parent_index` chooses among several <ip> for DHCP; -1: the one with DHCP, IPv4 first. Raises OperationInvalid (no
    such entry, or one that exists already), OperationUnsupported (a section or command that cannot be), ConfigError.
    """
    part = _PARTS.get(section)
    if part is None:
        names = {number: name for name, number in vars(Section).items() if isinstance(number, int)}
        what = names.get(section, str(section)).lower().replace("_", "-")
        raise OperationUnsupported(
            f"section {what} of network {document.name} cannot be updated",
            remedy="define the network anew (net-edit); it takes effect when it is started the next time",
        )
    if command not in (Command.MODIFY, Command.DELETE, Command.ADD_LAST, Command.ADD_FIRST):
        raise OperationUnsupported(f"there is no network update command {command}")
    if command == Command.MODIFY and not part.modifiable:
        raise OperationUnsupported(f"entries of {part.what} can be added and deleted, not modified")
    item = _parse(xml, part, document.name)
    changed = document.copy()
    _apply(part, part.items(changed, parent_index), item, command, document.name)
    if changed.forward is not None and section == Section.FORWARD_INTERFACE:
        changed.forward.dev = changed.forward.interfaces[0].dev if changed.forward.interfaces else None
    validate_network(changed)
    for field in document.__struct_fields__:
        setattr(document, field, getattr(changed, field))


@dataclass(frozen=True, slots=True)
class _Part:
    """One section: where its entries are and which of them are meant."""

    what: str
    tag: str
    model: type[Element]
    items: Callable[[Network, int], list[Any]]
    clashes: Callable[[Any, Any], bool]  # (there, new): both cannot be
    fits: Callable[[Any, Any], bool]  # (there, asked for): this one is to be deleted
    modifiable: bool = False
    in_use: Callable[[Any], int] = lambda item: 0


def _parse(xml: str, part: _Part, name: str) -> Element:
    root = read_xml(xml, "network update")
    if root.tag != part.tag:
        raise ConfigError(f"<{part.tag}> is what updates {part.what} of network {name}, not <{root.tag}>")
    if part.model is DhcpRange and root.get("start") and not root.get("end"):
        root.set("end", root.get("start") or "")
    return parse_element(root, part.model)


def _apply(part: _Part, items: list[Any], item: Any, command: int, name: str) -> None:
    if command in (Command.ADD_FIRST, Command.ADD_LAST):
        if any(part.clashes(there, item) for there in items):
            raise OperationInvalid(f"network {name} has {part.what} that share something with the new one")
        items.insert(0 if command == Command.ADD_FIRST else len(items), item)
        return
    wanted = part.clashes if command == Command.MODIFY else part.fits
    found = [index for index, there in enumerate(items) if wanted(there, item)]
    if not found:
        raise OperationInvalid(f"network {name} has no such entry among its {part.what}")
    if len(found) > 1:
        raise OperationInvalid(
            f"{len(found)} entries among the {part.what} of network {name} are like that",
            remedy="say more of the one that is meant",
        )
    if command == Command.MODIFY:
        items[found[0]] = item
        return
    users = part.in_use(items[found[0]])
    if users:
        raise OperationInvalid(f"{users} interfaces use that entry of {part.what} of network {name}")
    del items[found[0]]


# Where the entries are; missing parents are made (and vanish with the copy if nothing comes of it).


def _dhcp(document: Network, parent_index: int) -> Dhcp:
    if not document.ips:
        raise OperationInvalid(f"network {document.name} has no <ip>, so no DHCP")
    if parent_index >= len(document.ips):
        raise OperationInvalid(f"network {document.name} has no <ip> number {parent_index}, counted from 0")
    ip = document.ips[parent_index] if parent_index >= 0 else min(document.ips, key=_preference)
    ip.dhcp = ip.dhcp or Dhcp(ranges=[], hosts=[])
    return ip.dhcp


def _preference(ip: NetworkIp) -> tuple[bool, bool]:
    return ip.family == "ipv6", ip.dhcp is None


def _dns(document: Network) -> Dns:
    if document.dns is not None and document.dns.enable is False:
        raise OperationInvalid(f"DNS is switched off in network {document.name}")
    document.dns = document.dns or Dns(forwarders=[], txts=[], srvs=[], hosts=[])
    return document.dns


def _interfaces(document: Network, _: int) -> list[ForwardInterface]:
    document.forward = document.forward or Forward(mode="nat", interfaces=[])
    return document.forward.interfaces


# What is the same.


def _mac(text: str | None) -> str | None:
    try:
        return normal_mac(text) if text is not None else None
    except ValueError:
        return text  # validation refuses it with its path


def _same(one: str | None, other: str | None) -> bool:
    return one is not None and one == other


def _host_clashes(there: DhcpHost, new: DhcpHost) -> bool:
    return (
        _same(_mac(there.mac), _mac(new.mac))
        or _same(there.id, new.id)
        or _same(there.name, new.name)
        or _same(there.ip, new.ip)
    )


def _host_fits(there: DhcpHost, asked: DhcpHost) -> bool:
    """Every attribute that is given is that of the entry."""
    pairs = [(_mac(there.mac), _mac(asked.mac))]
    pairs += [(getattr(there, name), getattr(asked, name)) for name in ("id", "name", "ip")]
    given = [(one, other) for one, other in pairs if other is not None]
    return bool(given) and all(one == other for one, other in given)


def _range_same(there: DhcpRange, new: DhcpRange) -> bool:
    return (there.start, there.end) == (new.start, new.end)


def _dns_host_clashes(there: DnsHost, new: DnsHost) -> bool:
    return there.ip == new.ip


def _dns_host_fits(there: DnsHost, asked: DnsHost) -> bool:
    return there.ip == asked.ip or bool(set(there.hostnames) & set(asked.hostnames))


_SRV = ("service", "protocol", "domain", "target", "port", "priority", "weight")


def _srv_same(there: DnsSrv, new: DnsSrv) -> bool:
    return all(getattr(there, name) == getattr(new, name) for name in _SRV[:4])


def _srv_fits(there: DnsSrv, asked: DnsSrv) -> bool:
    return all(getattr(asked, name) in (None, getattr(there, name)) for name in _SRV)


def _same_name(there: PortGroup | DnsTxt, new: PortGroup | DnsTxt) -> bool:
    return there.name == new.name


def _same_dev(there: ForwardInterface, new: ForwardInterface) -> bool:
    return there.dev == new.dev


_PARTS: dict[int, _Part] = {
    Section.IP_DHCP_HOST: _Part(
        "static DHCP hosts", "host", DhcpHost, lambda net, at: _dhcp(net, at).hosts, _host_clashes, _host_fits, True
    ),
    Section.IP_DHCP_RANGE: _Part(
        "DHCP ranges", "range", DhcpRange, lambda net, at: _dhcp(net, at).ranges, _range_same, _range_same
    ),
    Section.FORWARD_INTERFACE: _Part(
        "interfaces to forward to", "interface", ForwardInterface, _interfaces, _same_dev, _same_dev,
        in_use=lambda item: item.connections or 0,
    ),
    Section.PORTGROUP: _Part(
        "portgroups", "portgroup", PortGroup, lambda net, at: net.portgroups, _same_name, _same_name, True
    ),
    Section.DNS_HOST: _Part(
        "DNS hosts", "host", DnsHost, lambda net, at: _dns(net).hosts, _dns_host_clashes, _dns_host_fits
    ),
    Section.DNS_TXT: _Part("TXT records", "txt", DnsTxt, lambda net, at: _dns(net).txts, _same_name, _same_name),
    Section.DNS_SRV: _Part("SRV records", "srv", DnsSrv, lambda net, at: _dns(net).srvs, _srv_same, _srv_fits),
}  # fmt: skip
