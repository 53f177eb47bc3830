"""systemd-networkd: systemd.network(5), systemd.netdev(5).

Of the files that match an interface only the first by name counts. So nothing that is there is edited: for what kvik
defines it writes files that come before all others, with all settings of the one that counted before, and to take
that back they are removed.
"""

from __future__ import annotations

import fnmatch
import ipaddress
from collections.abc import Sequence

from kvik.conf.interface import (
    Autoconf,
    BondInterface,
    BridgeInterface,
    Interface,
    InterfaceDhcp,
    InterfaceGateway,
    InterfaceIp,
    InterfaceMac,
    InterfaceMtu,
    InterfaceStart,
    Protocol,
    VlanInterface,
)
from kvik.errors import ConfigUnsupported
from kvik.network.interfaces.formats.ini import Section, find, format_sections, parse
from kvik.network.interfaces.formats.tree import Changes, Command, Move, Tree

NAME = "systemd-networkd"
OURS = "/etc/systemd/network"
DIRECTORIES = (OURS, "/run/systemd/network", "/usr/lib/systemd/network")
PREFIX = "00-kvik-"
_COMMENT = "Written by kvik. Remove it to have what was before: the files after it are as they were."
# Sections of a .network file that belong to the hardware or to its place in another, not to its addresses.
_LINK_ONLY = frozenset({"Match", "Link", "Bridge", "BridgeVLAN", "BridgeFDB", "CAN", "IPoIB"})


def _files(tree: Tree, suffix: str) -> list[tuple[str, list[Section]]]:
    """All files of a kind in the order that counts: by name, and of the same name the first directory's."""
    by_name: dict[str, str] = {}
    for directory in DIRECTORIES:
        for path in tree.list(directory, f"*{suffix}"):
            by_name.setdefault(path.rpartition("/")[2], path)
    return [(path, parse(tree.read(path) or "")) for _, path in sorted(by_name.items())]


def _matches(sections: list[Section], name: str) -> bool:
    """By name only, as far as it can be told here: a file that asks for more (a driver, a MAC) counts as matching if
    its names do; one without names matches what it asks for, which is not known, and so nothing."""
    match = find(sections, "Match")
    patterns = " ".join(match.all("Name")).split()
    if not patterns:
        return False
    negative = [pattern[1:] for pattern in patterns if pattern.startswith("!")]
    if negative:
        return not any(fnmatch.fnmatchcase(name, pattern) for pattern in negative)
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _network(tree: Tree, name: str) -> list[Section] | None:
    return next((sections for _, sections in _files(tree, ".network") if _matches(sections, name)), None)


def _netdev(tree: Tree, name: str) -> list[Section] | None:
    files = _files(tree, ".netdev")
    return next((sections for _, sections in files if find(sections, "NetDev").get("Name") == name), None)


def names(tree: Tree) -> list[str]:
    """Interfaces that files name; those that patterns mean are not known here."""
    found: list[str] = [name for _, file in _files(tree, ".netdev") if (name := find(file, "NetDev").get("Name"))]
    for _, sections in _files(tree, ".network"):
        words = " ".join(find(sections, "Match").all("Name")).split()
        found += [word for word in words if not set(word) & set("*?[!")]
    return [name for name in dict.fromkeys(found) if name != "lo"]


# To documents -----------------------------------------------------------------------------------------------------


def describe(tree: Tree, name: str) -> Interface | None:
    sections, device = _network(tree, name), _netdev(tree, name)
    if sections is None and device is None:
        return None
    document = Interface(type="ethernet", name=name, start=InterfaceStart(mode="onboot"))
    if device is not None:
        _describe_device(tree, document, device)
    for section in sections or []:
        if section.name == "Link":
            if (mtu := section.get("MTUBytes") or "").isdecimal():
                document.mtu = InterfaceMtu(size=int(mtu))
            if mac := section.get("MACAddress"):
                document.mac = InterfaceMac(address=mac)
    _describe_protocols(document, sections or [])
    return document


def _describe_device(tree: Tree, document: Interface, device: list[Section]) -> None:
    kind = find(device, "NetDev").get("Kind")
    if mac := find(device, "NetDev").get("MACAddress"):
        document.mac = InterfaceMac(address=mac)
    name = document.name
    ports = [
        word
        for _, sections in _files(tree, ".network")
        if find(sections, "Network").get("Bridge") == name or find(sections, "Network").get("Bond") == name
        for word in " ".join(find(sections, "Match").all("Name")).split()
    ]
    parts = [Interface(type="ethernet", name=port) for port in dict.fromkeys(ports)]
    if kind == "bridge":
        bridge = find(device, "Bridge")
        stp = bridge.get("STP")
        document.type = "bridge"
        document.bridge = BridgeInterface(
            stp=None if stp is None else _yes(stp), delay=bridge.get("ForwardDelaySec"), ports=parts
        )
    elif kind == "vlan":
        base = next(
            (
                word
                for _, sections in _files(tree, ".network")
                if name in find(sections, "Network").all("VLAN")
                for word in " ".join(find(sections, "Match").all("Name")).split()
            ),
            "",
        )
        tag = find(device, "VLAN").get("Id") or ""
        if base and tag.isdecimal():
            document.type = "vlan"
            document.vlan = VlanInterface(tag=int(tag), base=Interface(type="ethernet", name=base))
    elif kind == "bond":
        document.type = "bond"
        document.bond = BondInterface(ports=parts)


def _yes(text: str) -> bool:
    return text.lower() in ("1", "yes", "y", "true", "t", "on")


def _describe_protocols(document: Interface, sections: list[Section]) -> None:
    network = find(sections, "Network")
    v4, v6 = Protocol(family="ipv4"), Protocol(family="ipv6")
    dhcp = (network.get("DHCP") or "no").lower()
    if dhcp in ("ipv4", "v4", "both") or _yes(dhcp):
        v4.dhcp = InterfaceDhcp()
    if dhcp in ("ipv6", "v6", "both") or _yes(dhcp):
        v6.dhcp = InterfaceDhcp()
    if _yes(network.get("IPv6AcceptRA") or "no"):
        v6.autoconf = Autoconf()
    addresses = network.all("Address")
    gateways = network.all("Gateway")
    for section in sections:
        if section.name == "Address":
            addresses += section.all("Address")
        elif section.name == "Route" and section.get("Destination") in (None, "0.0.0.0/0", "::/0"):
            gateways += section.all("Gateway")
    for text in addresses:
        try:
            ip = ipaddress.ip_interface(text)
        except ValueError:
            continue
        protocol = v4 if ip.version == 4 else v6
        protocol.ips.append(InterfaceIp(address=str(ip.ip), prefix=ip.network.prefixlen))
    for text in gateways:
        try:
            gateway = ipaddress.ip_address(text)
        except ValueError:
            continue  # _dhcp4, _ipv6ra
        (v4 if gateway.version == 4 else v6).routes.append(InterfaceGateway(gateway=str(gateway)))
    for protocol in (v4, v6):
        if protocol.dhcp or protocol.autoconf or protocol.ips:
            if protocol.dhcp and protocol.ips and protocol.family == "ipv4":
                protocol.dhcp = None  # a document has one of them; the addresses are what can be said for sure
            document.protocols.append(protocol)


# From documents ---------------------------------------------------------------------------------------------------


def _path(name: str, suffix: str) -> str:
    return f"{OURS}/{PREFIX}{name}{suffix}"


def _write(sections: list[Section]) -> bytes:
    return format_sections(sections, _COMMENT)


def define(tree: Tree, document: Interface) -> Changes:
    name = document.name
    changes = undefine(tree, name)
    for part in document.bridge.ports if document.bridge else document.bond.ports if document.bond else []:
        changes[_path(part.name, ".network")] = _port_file(part.name, name, "Bridge" if document.bridge else "Bond")
    if document.vlan:
        raise ConfigUnsupported(
            "VLAN interfaces are not written for systemd-networkd",
            path="/interface/vlan",
            remedy="write a .netdev file and name it in the .network file of the interface below, systemd.netdev(5)",
        )
    if document.bridge or document.bond:
        changes[_path(name, ".netdev")] = _device_file(document)
    network = Section("Network")
    link = Section("Link")
    if document.mtu:
        link.items.append(("MTUBytes", str(document.mtu.size)))
    if document.mac and document.type == "ethernet":
        link.items.append(("MACAddress", document.mac.address))
    if document.start and document.start.mode == "none":
        link.items.append(("ActivationPolicy", "manual"))
    v4, v6 = document.protocol("ipv4"), document.protocol("ipv6")
    dhcp = {(False, False): "no", (True, False): "ipv4", (False, True): "ipv6", (True, True): "yes"}
    network.items.append(("DHCP", dhcp[bool(v4 and v4.dhcp), bool(v6 and v6.dhcp)]))
    network.items.append(("IPv6AcceptRA", "yes" if v6 and (v6.autoconf or v6.dhcp) else "no"))
    for protocol in document.protocols:
        network.items += [("Address", ip.text) for ip in protocol.ips]
        network.items += [("Gateway", route.gateway) for route in protocol.routes]
    sections = [Section("Match", [("Name", name)]), *([link] if link.items else []), network]
    changes[_path(name, ".network")] = _write(sections)
    return changes


def _port_file(port: str, master: str, what: str) -> bytes:
    network = Section("Network", [(what, master), ("LinkLocalAddressing", "no")])
    return _write([Section("Match", [("Name", port)]), network])


def _device_file(document: Interface) -> bytes:
    device = Section("NetDev", [("Name", document.name), ("Kind", str(document.type))])
    if document.mac:
        device.items.append(("MACAddress", document.mac.address))
    sections = [device]
    if document.bridge:
        stp = "yes" if document.bridge.stp else "no"
        sections.append(Section("Bridge", [("STP", stp), ("ForwardDelaySec", document.bridge.delay or "0")]))
    if document.bond:
        bond = Section("Bond", [("Mode", document.bond.mode or "balance-rr")])
        if document.bond.miimon:
            bond.items.append(("MIIMonitorSec", f"{document.bond.miimon.freq}ms"))
        sections.append(bond)
    return _write(sections)


def undefine(tree: Tree, name: str) -> Changes:
    """Our files of the interface go, and those of its ports that we wrote. Somebody else's are not ours to remove."""
    changes: Changes = {}
    for path, sections in _files(tree, ".network") + _files(tree, ".netdev"):
        if not path.startswith(f"{OURS}/{PREFIX}"):
            continue
        network = find(sections, "Network")
        own = find(sections, "Match").get("Name") == name or find(sections, "NetDev").get("Name") == name
        if own or name in (network.get("Bridge"), network.get("Bond")):
            changes[path] = None
    return changes


# Bridges ----------------------------------------------------------------------------------------------------------


def bridge(tree: Tree, port: str, document: Interface) -> Changes:
    before = _network(tree, port)
    if before is None:
        return define(tree, document)
    link = find(before, "Link")
    sections = [Section("Match", [("Name", document.name)])]
    if mtu := link.get("MTUBytes"):
        sections.append(Section("Link", [("MTUBytes", mtu)]))
    for section in before:
        if section.name == "Network":  # VLANs stay with the port: they are on the wire below the bridge
            section = section.without("Bridge", "Bond", "VLAN", "MACVLAN", "MACVTAP", "LLDP", "EmitLLDP")
        if section.name not in _LINK_ONLY:
            sections.append(section)
    below = Section("Match", [("Name", port)])
    network = Section("Network", [("Bridge", document.name), ("LinkLocalAddressing", "no")])
    network.items += [(key, value) for key, value in find(before, "Network").items if key in ("VLAN", "LLDP")]
    kept = [section for section in before if section.name == "Link"]
    return {
        _path(document.name, ".netdev"): _device_file(document),
        _path(document.name, ".network"): _write(sections),
        _path(port, ".network"): _write([below, *kept, network]),
    }


def unbridge(tree: Tree, name: str, port: str) -> Changes:
    """Our files go; what the bridge has is the port's where what counts then would not say the same."""
    now = _network(tree, name) or []
    changes = undefine(tree, name)
    after = Tree(tree.root, {**tree.staged, **changes})
    below = _network(after, port)
    wanted = [section for section in now if section.name not in ("Match", "Link")]
    if below is not None and [s for s in below if s.name not in _LINK_ONLY] == wanted:
        return changes
    links = [section for section in below or [] if section.name == "Link"]
    changes[_path(port, ".network")] = _write([Section("Match", [("Name", port)]), *links, *wanted])
    return changes


def tell(tree: Tree, moves: Sequence[Move]) -> list[Command]:
    """A port that left its bridge has failed meanwhile, by the file that still put it there: once more, with the file
    that counts now. What has failed would have its addresses until the lease of DHCP ends, and then none."""
    return [("networkctl", "reload"), *(("networkctl", "reconfigure", move.port) for move in moves if not move.into)]


def held(tree: Tree, name: str) -> tuple[Command, str] | None:
    return None
