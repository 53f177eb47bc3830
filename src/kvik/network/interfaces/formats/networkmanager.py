"""NetworkManager's keyfiles: nm-settings-keyfile(5), one profile a file.

A bridge over an interface is two profiles: the bridge's, with all address settings of the interface's, and one that
makes the interface its port. The interface's own profile stays as it was, but no longer starts by itself.
"""

from __future__ import annotations

import ipaddress
import uuid
from collections.abc import Sequence

from kvik.conf.interface import (
    Autoconf,
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

NAME = "NetworkManager"
DIRECTORY = "/etc/NetworkManager/system-connections"
SUFFIX = ".nmconnection"
_COMMENT = "Written by kvik."
_SPACE = uuid.UUID("5f0bb5ab-9d2c-5c5e-9b0e-6f1f4a3c9d10")  # of the profiles' UUIDs: the same name, the same UUID
_ADDRESS_SECTIONS = frozenset({"ipv4", "ipv6", "proxy", "hostname"})
_KINDS = {"802-3-ethernet": "ethernet", "ethernet": "ethernet", "bridge": "bridge", "vlan": "vlan", "bond": "bond"}
_RETIRED = "kvik.retired"  # in [user]: the bridge that a profile gave its settings to

Profiles = dict[str, list[Section]]


def _profiles(tree: Tree) -> Profiles:
    return {path: parse(tree.read(path) or "") for path in tree.list(DIRECTORY, f"*{SUFFIX}")}


def _interface(sections: list[Section]) -> str:
    return find(sections, "connection").get("interface-name") or ""


def _master(sections: list[Section]) -> str:
    connection = find(sections, "connection")
    return connection.get("controller") or connection.get("master") or ""


def _active(sections: list[Section]) -> bool:
    return find(sections, "connection").get("autoconnect", "true") not in ("false", "0", "no")


def _serves_any(sections: list[Section]) -> bool:
    connection, ethernet = find(sections, "connection"), find(sections, "ethernet")
    return (
        _KINDS.get(connection.get("type") or "") == "ethernet"
        and not _interface(sections)
        and not _master(sections)
        and not ethernet.get("mac-address")
        and _active(sections)
    )


def _find(tree: Tree, name: str) -> tuple[str, list[Section]] | None:
    """The profile that counts for an interface: one that starts by itself before one that does not, of several the
    one of highest priority, then the first by name."""
    found = [(path, sections) for path, sections in _profiles(tree).items() if _interface(sections) == name]
    if not found:  # a profile that names no interface serves any Ethernet card
        found = [(path, sections) for path, sections in _profiles(tree).items() if _serves_any(sections)]
        if not found or not name.startswith(("e", "lan")):
            return None

    def order(item: tuple[str, list[Section]]) -> tuple[bool, int, str]:
        priority = find(item[1], "connection").get("autoconnect-priority") or "0"
        return (not _active(item[1]), -int(priority) if priority.lstrip("-").isdecimal() else 0, item[0])

    return min(found, key=order)


def names(tree: Tree) -> list[str]:
    found = [_interface(sections) for sections in _profiles(tree).values()]
    return [name for name in dict.fromkeys(found) if name and name != "lo"]


# To documents -----------------------------------------------------------------------------------------------------


def describe(tree: Tree, name: str) -> Interface | None:
    found = _find(tree, name)
    if found is None:
        return None
    _, sections = found
    kind = _KINDS.get(find(sections, "connection").get("type") or "")
    document = Interface(type="ethernet", name=name)
    document.start = InterfaceStart(mode="onboot" if _active(sections) else "none")
    ethernet = find(sections, "ethernet")
    if (mtu := ethernet.get("mtu") or "").isdecimal() and mtu != "0":
        document.mtu = InterfaceMtu(size=int(mtu))
    if (mac := ethernet.get("cloned-mac-address") or find(sections, "bridge").get("mac-address")) and ":" in mac:
        document.mac = InterfaceMac(address=mac)
    if kind == "bridge":
        bridge = find(sections, "bridge")
        stp = bridge.get("stp", "true") in ("true", "1", "yes")  # NetworkManager's default is on
        keys = {name, find(sections, "connection").get("uuid")}
        ports = [_interface(other) for other in _profiles(tree).values() if _master(other) in keys]
        document.type = "bridge"
        document.bridge = BridgeInterface(
            stp=stp,
            delay=bridge.get("forward-delay"),
            ports=[Interface(type="ethernet", name=port) for port in ports if port],
        )
    elif kind == "vlan":
        vlan = find(sections, "vlan")
        base, tag = vlan.get("parent"), vlan.get("id") or ""
        if base and tag.isdecimal():
            document.type = "vlan"
            document.vlan = VlanInterface(tag=int(tag), base=Interface(type="ethernet", name=base))
    if not _master(sections):
        document.protocols = [
            protocol for family in ("ipv4", "ipv6") if (protocol := _protocol(find(sections, family), family))
        ]
    return document


def _protocol(section: Section, family: str) -> Protocol | None:
    method = section.get("method") or "disabled"
    if method in ("disabled", "ignore", "link-local", "shared"):
        return None
    protocol = Protocol(family="ipv4" if family == "ipv4" else "ipv6")
    if family == "ipv4" and method == "auto":
        protocol.dhcp = InterfaceDhcp()
    if family == "ipv6" and method == "auto":
        protocol.autoconf = Autoconf()
    if family == "ipv6" and method in ("auto", "dhcp"):
        protocol.dhcp = InterfaceDhcp()
    gateways = section.all("gateway")
    for key, value in section.items:
        # address1=192.0.2.1/24,192.0.2.254: the address, and perhaps the gateway
        if key.startswith("address") and key[7:].isdecimal():
            text, _, gateway = value.replace(";", ",").partition(",")
            try:
                ip = ipaddress.ip_interface(text.strip())
            except ValueError:
                continue
            protocol.ips.append(InterfaceIp(address=str(ip.ip), prefix=ip.network.prefixlen))
            if gateway.strip(" ,"):
                gateways.append(gateway.strip(" ,"))
    if protocol.ips and family == "ipv4":
        protocol.dhcp = None
    protocol.routes = [InterfaceGateway(gateway=gateway) for gateway in dict.fromkeys(gateways)]
    return protocol


# From documents ---------------------------------------------------------------------------------------------------


def _path(name: str) -> str:
    return f"{DIRECTORY}/kvik-{name}{SUFFIX}"


def _uuid(name: str) -> str:
    return str(uuid.uuid5(_SPACE, name))


def _connection(name: str, kind: str, *more: tuple[str, str]) -> Section:
    items = [("id", f"kvik-{name}"), ("uuid", _uuid(name)), ("type", kind), ("interface-name", name)]
    # Before what else there is for the interface.
    return Section("connection", [*items, ("autoconnect-priority", "100"), *more])


def _port_profile(port: str, master: str, ethernet: Section | None = None) -> bytes:
    # master and slave-type: the names that every version knows.
    connection = _connection(port, "ethernet", ("master", master), ("slave-type", "bridge"))
    return format_sections([connection, ethernet or Section("ethernet")], _COMMENT)


def _bridge_section(document: Interface) -> Section:
    assert document.bridge is not None
    delay = document.bridge.delay or "0"
    section = Section("bridge", [("stp", "true" if document.bridge.stp else "false")])
    # NetworkManager takes whole seconds; 2 is the least with STP.
    section.items.append(("forward-delay", str(max(round(float(delay)), 2 if document.bridge.stp else 0))))
    if document.mac:
        section.items.append(("mac-address", document.mac.address))
    return section


def define(tree: Tree, document: Interface) -> Changes:
    changes = undefine(tree, document.name)
    connection = _connection(document.name, str(document.type))
    if document.start and document.start.mode == "none":
        connection.items.append(("autoconnect", "false"))
    sections = [connection]
    ethernet = Section("ethernet")
    if document.mtu:
        ethernet.items.append(("mtu", str(document.mtu.size)))
    if document.mac and document.type == "ethernet":
        ethernet.items.append(("cloned-mac-address", document.mac.address))
    if ethernet.items or document.type == "ethernet":
        sections.append(ethernet)
    if document.bridge:
        sections.append(_bridge_section(document))
        for port in document.bridge.ports:
            changes.update(_retire(tree, port.name, document.name))
            changes[_path(port.name)] = _port_profile(port.name, document.name)
    if document.vlan:
        sections.append(Section("vlan", [("id", str(document.vlan.tag)), ("parent", document.vlan.base.name)]))
    if document.bond:
        raise ConfigUnsupported(
            "bonds are not written for NetworkManager",
            path="/interface/bond",
            remedy="make it with 'nmcli connection add type bond'; kvik can put it into a bridge then",
        )
    for family in ("ipv4", "ipv6"):
        sections.append(_ip_section(document.protocol(family), family))
    changes[_path(document.name)] = format_sections(sections, _COMMENT)
    return changes


def _ip_section(protocol: Protocol | None, family: str) -> Section:
    section = Section(family)
    if protocol is None:
        section.items.append(("method", "disabled"))
        return section
    automatic = protocol.dhcp is not None or protocol.autoconf is not None
    only_dhcp = family == "ipv6" and protocol.autoconf is None and protocol.dhcp is not None
    section.items.append(
        ("method", "dhcp" if only_dhcp else "auto" if automatic else "manual" if protocol.ips else "disabled")
    )
    section.items += [(f"address{number}", ip.text) for number, ip in enumerate(protocol.ips, 1)]
    section.items += [("gateway", route.gateway) for route in protocol.routes[:1]]
    if protocol.dhcp and protocol.dhcp.peerdns is False:
        section.items.append(("ignore-auto-dns", "true"))
    return section


def undefine(tree: Tree, name: str) -> Changes:
    """Profiles of the interface go, also somebody else's: that is what was asked for, and they are kept."""
    changes: Changes = {}
    for path, sections in _profiles(tree).items():
        if _interface(sections) == name or (_master(sections) == name and path == _path(_interface(sections))):
            changes[path] = None
    changes.update(_restore(tree, name))
    return changes


def _retire(tree: Tree, port: str, bridge: str) -> Changes:
    """The port's own profiles stay, but do not start by themselves."""
    changes: Changes = {}
    for path, sections in _profiles(tree).items():
        if _interface(sections) != port or path == _path(port) or not _active(sections):
            continue
        connection = find(sections, "connection")
        connection.items = [*connection.without("autoconnect").items, ("autoconnect", "false")]
        user = find(sections, "user")
        if user not in sections:
            sections.append(user)
        user.items.append((_RETIRED, bridge))
        changes[path] = format_sections(sections)
    return changes


def _restore(tree: Tree, bridge: str) -> Changes:
    changes: Changes = {}
    for path, sections in _profiles(tree).items():
        if find(sections, "user").get(_RETIRED) != bridge:
            continue
        connection = find(sections, "connection")
        connection.items = connection.without("autoconnect").items
        user = find(sections, "user")
        user.items = user.without(_RETIRED).items
        changes[path] = format_sections([one for one in sections if one is not user or user.items])
    return changes


# Bridges ----------------------------------------------------------------------------------------------------------


def bridge(tree: Tree, port: str, document: Interface) -> Changes:
    found = _find(tree, port)
    if found is None:
        return define(tree, document)
    _, before = found
    moved = [section for section in before if section.name in _ADDRESS_SECTIONS]
    connection = _connection(document.name, "bridge")
    connection.items += [(key, value) for key, value in find(before, "connection").items if key in ("zone", "metered")]
    ethernet = Section("ethernet", [item for item in find(before, "ethernet").items if item[0] == "mtu"])
    sections = [connection, *([ethernet] if ethernet.items else []), _bridge_section(document), *moved]
    return {
        **_retire(tree, port, document.name),
        _path(document.name): format_sections(sections, _COMMENT),
        _path(port): _port_profile(port, document.name, find(before, "ethernet")),
    }


def unbridge(tree: Tree, name: str, port: str) -> Changes:
    """The bridge's profiles go, and the port's own one is back with the settings that the bridge has by now."""
    found = _find(tree, name)
    moved = [section for section in found[1] if section.name in _ADDRESS_SECTIONS] if found else []
    changes = undefine(tree, name)
    changes[_path(port)] = None
    after = Tree(tree.root, {**tree.staged, **changes})
    below = _find(after, port)
    if below is None:
        connection = _connection(port, "ethernet")
        changes[_path(port)] = format_sections([connection, Section("ethernet"), *moved], _COMMENT)
        return changes
    path, sections = below
    if moved and [section for section in sections if section.name in _ADDRESS_SECTIONS] != moved:
        rest = [section for section in sections if section.name not in _ADDRESS_SECTIONS]
        changes[path] = format_sections([*rest, *moved])
    return changes


def tell(tree: Tree, moves: Sequence[Move], prefix: str = "kvik-") -> list[Command]:
    """New profiles count for what is active already only once they are brought up; until then the DHCP client is at
    the port, and the address of the bridge ends with its lease."""
    commands: list[Command] = [("nmcli", "connection", "reload")]
    for move in moves:
        if move.into:
            commands += (_nmcli("connection", "up", f"{prefix}{name}") for name in (move.bridge, move.port))
        else:
            commands.append(_nmcli("device", "connect", move.port))
    return commands


def _nmcli(*words: str) -> Command:
    return ("nmcli", "--wait", "15", *words)


def held(tree: Tree, name: str, prefix: str = "kvik-") -> tuple[Command, str] | None:
    return ("nmcli", "-g", "GENERAL.CONNECTION", "device", "show", name), f"{prefix}{name}"
