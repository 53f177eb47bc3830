"""netplan: /etc/netplan/*.yaml (https://netplan.readthedocs.io/en/stable/netplan-yaml/).

Files are merged key by key, and lists add up: what a later file says cannot take an address away. So the file that
says it is written anew, with all else that it says; its comments stay in the original that is kept.
"""

from __future__ import annotations

import fnmatch
import ipaddress
from collections.abc import Iterator, Sequence
from types import ModuleType

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
from kvik.network.interfaces.formats import networkd, networkmanager
from kvik.network.interfaces.formats.tree import Changes, Command, Move, Tree, encode
from kvik.network.interfaces.formats.yaml import parse, plain, quote, truth, write

NAME = "netplan"
DIRECTORY = "/etc/netplan"
OWN = f"{DIRECTORY}/90-kvik.yaml"
_KINDS = {"ethernets": "ethernet", "bridges": "bridge", "vlans": "vlan", "bonds": "bond"}
# What belongs to the address and goes with it to a bridge; all else is the hardware's and stays.
_ADDRESS_KEYS = frozenset(
    {
        "accept-ra", "activation-mode", "addresses", "critical", "dhcp-identifier", "dhcp4", "dhcp4-overrides", "dhcp6",
        "dhcp6-overrides", "gateway4", "gateway6", "ignore-carrier", "ipv6-address-generation", "ipv6-address-token",
        "ipv6-mtu", "ipv6-privacy", "link-local", "nameservers", "optional-addresses", "ra-overrides", "routes",
        "routing-policy",
    }
)  # fmt: skip
_DEFAULT = ("default", "0.0.0.0/0", "::/0", "0/0")

Files = dict[str, dict[str, object]]


def _files(tree: Tree) -> Files:
    return {path: parse(tree.read(path) or "", path) for path in tree.list(DIRECTORY, "*.yaml")}


def _mapping(value: object) -> dict[str, object]:
    return value if isinstance(value, dict) else {}


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def _entries(files: Files) -> Iterator[tuple[str, str, str, dict[str, object]]]:
    """(path, kind, identifier, definition) of all that is defined, in the order of the files."""
    for path, content in files.items():
        network = _mapping(content.get("network"))
        for section, kind in _KINDS.items():
            for key, value in _mapping(network.get(section)).items():
                if isinstance(value, dict):
                    yield path, kind, key, value


def _identifier(files: Files, name: str) -> str | None:
    """What the files call the interface: its name, unless they pick it by what it has ("match")."""
    merged: dict[str, dict[str, object]] = {}
    for _, _, key, value in _entries(files):
        merged.setdefault(key, {}).update(value)
    for key, value in merged.items():
        match = _mapping(value.get("match"))
        pattern = plain(match.get("name"))
        if plain(value.get("set-name")) == name or (pattern and fnmatch.fnmatchcase(name, pattern)):
            return key
        if key == name and (not match or not plain(value.get("set-name"))):
            return key
    return None


def names(tree: Tree) -> list[str]:
    found = []
    for _, _, key, value in _entries(_files(tree)):
        match = _mapping(value.get("match"))
        name = plain(value.get("set-name")) or plain(match.get("name")) or key
        if not set(name) & set("*?[!"):
            found.append(name)
    return list(dict.fromkeys(found))


# To documents -----------------------------------------------------------------------------------------------------


def describe(tree: Tree, name: str) -> Interface | None:
    files = _files(tree)
    key = _identifier(files, name)
    if key is None:
        return None
    kind, merged = "ethernet", dict[str, object]()
    for _, entry_kind, entry, value in _entries(files):
        if entry == key:
            kind = entry_kind
            for option, item in value.items():
                old = merged.get(option)
                merged[option] = [*old, *item] if isinstance(old, list) and isinstance(item, list) else item
    mode = plain(merged.get("activation-mode"))
    document = Interface(type="ethernet", name=name, start=InterfaceStart(mode="none" if mode else "onboot"))
    if (mtu := plain(merged.get("mtu"))).isdecimal():
        document.mtu = InterfaceMtu(size=int(mtu))
    if ":" in (mac := plain(merged.get("macaddress"))):
        document.mac = InterfaceMac(address=mac)
    parts = [Interface(type="ethernet", name=plain(port)) for port in _list(merged.get("interfaces"))]
    parameters = _mapping(merged.get("parameters"))
    if kind == "bridge":
        stp = parameters.get("stp")
        document.type = "bridge"
        document.bridge = BridgeInterface(
            stp=True if stp is None else truth(stp), delay=plain(parameters.get("forward-delay")) or None, ports=parts
        )
    elif kind == "bond":
        document.type = "bond"
        document.bond = BondInterface(ports=parts)
    elif kind == "vlan" and plain(merged.get("id")).isdecimal():
        document.type = "vlan"
        base = Interface(type="ethernet", name=plain(merged.get("link")))
        document.vlan = VlanInterface(tag=int(plain(merged.get("id"))), base=base)
    document.protocols = _protocols(merged)
    return document


def _protocols(merged: dict[str, object]) -> list[Protocol]:
    v4, v6 = Protocol(family="ipv4"), Protocol(family="ipv6")
    if truth(merged.get("dhcp6")):
        v6.dhcp = InterfaceDhcp()
    if truth(merged.get("accept-ra")):
        v6.autoconf = Autoconf()
    for item in _list(merged.get("addresses")):
        text = next(iter(item), "") if isinstance(item, dict) else plain(item)
        try:
            ip = ipaddress.ip_interface(text)
        except ValueError:
            continue
        (v4 if ip.version == 4 else v6).ips.append(InterfaceIp(address=str(ip.ip), prefix=ip.network.prefixlen))
    if truth(merged.get("dhcp4")) and not v4.ips:
        v4.dhcp = InterfaceDhcp()
    gateways = [plain(merged.get("gateway4")), plain(merged.get("gateway6"))]
    for route in _list(merged.get("routes")):
        if plain(_mapping(route).get("to")) in _DEFAULT:
            gateways.append(plain(_mapping(route).get("via")))
    for gateway in gateways:
        if gateway:
            (v6 if ":" in gateway else v4).routes.append(InterfaceGateway(gateway=gateway))
    return [protocol for protocol in (v4, v6) if protocol.dhcp or protocol.autoconf or protocol.ips]


# From documents ---------------------------------------------------------------------------------------------------


def _write(files: Files, touched: set[str]) -> Changes:
    changes: Changes = {}
    for path in touched:
        content = files[path]
        network = _mapping(content.get("network"))
        for section in _KINDS:
            if section in network and not _mapping(network[section]):
                del network[section]
        changes[path] = encode(write(content)) if set(network) - {"version", "renderer"} else None
    return changes


def _own(files: Files) -> dict[str, object]:
    """The `network` mapping of our own file, made if it is not there."""
    content = files.setdefault(OWN, {})
    network = content.setdefault("network", {"version": "2"})
    if not isinstance(network, dict):
        raise ConfigUnsupported(f"{OWN}: 'network' is no mapping", remedy="remove that file")
    return network


def _put(files: Files, section: str, key: str, value: dict[str, object]) -> None:
    network = _own(files)
    there = network.setdefault(section, {})
    if isinstance(there, dict):
        there[key] = value
    else:
        network[section] = {key: value}


def _bridge_value(document: Interface, ports: list[str]) -> dict[str, object]:
    assert document.bridge is not None
    value: dict[str, object] = {"interfaces": [quote(port) for port in ports]}
    if document.mac:
        value["macaddress"] = quote(document.mac.address)
    delay = document.bridge.delay or "0"
    value["parameters"] = {"stp": "true" if document.bridge.stp else "false", "forward-delay": delay}
    return value


def define(tree: Tree, document: Interface) -> Changes:
    changes = undefine(tree, document.name)
    files = _files(Tree(tree.root, {**tree.staged, **changes}))
    touched = {OWN}
    for port in document.bridge.ports if document.bridge else []:
        touched |= _strip(files, port.name)
    value: dict[str, object] = {}
    section = "ethernets"
    if document.bridge:
        section = "bridges"
        value = _bridge_value(document, [_known(files, port.name) for port in document.bridge.ports])
    elif document.vlan:
        section = "vlans"
        value = {"id": str(document.vlan.tag), "link": quote(_known(files, document.vlan.base.name))}
    elif document.bond:
        section = "bonds"
        value = {"interfaces": [quote(_known(files, port.name)) for port in document.bond.ports]}
        if document.bond.mode:
            value["parameters"] = {"mode": quote(document.bond.mode)}
    if document.mtu:
        value["mtu"] = str(document.mtu.size)
    if document.mac and document.type == "ethernet":
        value["macaddress"] = quote(document.mac.address)
    v4, v6 = document.protocol("ipv4"), document.protocol("ipv6")
    value["dhcp4"] = "true" if v4 and v4.dhcp else "false"
    value["dhcp6"] = "true" if v6 and v6.dhcp else "false"
    value["accept-ra"] = "true" if v6 and (v6.autoconf or v6.dhcp) else "false"
    addresses: list[object] = [quote(ip.text) for protocol in document.protocols for ip in protocol.ips]
    if addresses:
        value["addresses"] = addresses
    routes: list[object] = [
        {"to": '"0.0.0.0/0"' if protocol.family == "ipv4" else '"::/0"', "via": quote(route.gateway)}
        for protocol in document.protocols
        for route in protocol.routes
    ]
    if routes:
        value["routes"] = routes
    if document.start and document.start.mode == "none":
        value["activation-mode"] = "manual"
    _put(files, section, document.name, value)
    return {**changes, **_write(files, touched)}


def _strip(files: Files, name: str) -> set[str]:
    """Take the addresses from an interface that becomes a port. The files that this touches."""
    key = _identifier(files, name)
    touched = set()
    for path, _, entry, value in _entries(files):
        if entry == key and set(value) & _ADDRESS_KEYS:
            for option in set(value) & _ADDRESS_KEYS:
                del value[option]
            value.update({"dhcp4": "false", "dhcp6": "false"})
            touched.add(path)
    return touched


def _known(files: Files, name: str) -> str:
    """The identifier that a part has; one that nobody knows is made, for netplan wants every name defined."""
    key = _identifier(files, name)
    if key is None:
        _put(files, "ethernets", name, {"dhcp4": "false", "dhcp6": "false"})
        return name
    return key


def undefine(tree: Tree, name: str) -> Changes:
    files = _files(tree)
    key = _identifier(files, name)
    touched: set[str] = set()
    for path, content in files.items():
        network = _mapping(content.get("network"))
        for section in _KINDS:
            if key is not None and _mapping(network.get(section)).pop(key, None) is not None:
                touched.add(path)
    return _write(files, touched)


# Bridges ----------------------------------------------------------------------------------------------------------


def bridge(tree: Tree, port: str, document: Interface) -> Changes:
    files = _files(tree)
    key = _identifier(files, port)
    if key is None:
        return define(tree, document)
    touched: set[str] = set()
    first = True
    for path, _, entry, value in list(_entries(files)):
        if entry != key:
            continue
        moved = {option: value.pop(option) for option in list(value) if option in _ADDRESS_KEYS}
        if first and "mtu" in value:
            moved["mtu"] = value["mtu"]
        if moved or first:
            network = _mapping(files[path].get("network"))
            bridges = network.setdefault("bridges", {})
            assert isinstance(bridges, dict)
            if first:  # what else the bridge says adds up with this
                moved = {**_bridge_value(document, [key]), **moved}
                value.update({"dhcp4": "false", "dhcp6": "false"})
            bridges[document.name] = moved
            touched.add(path)
        first = False
    return _write(files, touched)


def unbridge(tree: Tree, name: str, port: str) -> Changes:
    files = _files(tree)
    key = _identifier(files, port)
    touched: set[str] = set()
    moved: dict[str, object] = {}
    for path, kind, entry, value in list(_entries(files)):
        if kind == "bridge" and entry == name:
            for option, item in value.items():
                if option in _ADDRESS_KEYS:
                    old = moved.get(option)
                    moved[option] = [*old, *item] if isinstance(old, list) and isinstance(item, list) else item
            bridges = _mapping(files[path].get("network"))["bridges"]
            assert isinstance(bridges, dict)
            del bridges[name]
            touched.add(path)
    for path, _, entry, value in list(_entries(files)):
        if key is not None and entry == key:
            for option in ("dhcp4", "dhcp6"):
                value.pop(option, None)
            value.update(moved)
            moved = {}
            touched.add(path)
            if not value:
                value["dhcp4"] = "false"
    if moved:
        _put(files, "ethernets", port, moved)
        touched.add(OWN)
    return _write(files, touched)


def _renderer(tree: Tree) -> ModuleType:
    """Whose files netplan writes: networkd's unless the network says otherwise (per interface it is not looked at)."""
    said = [plain(_mapping(content.get("network")).get("renderer")) for content in _files(tree).values()]
    return networkmanager if "NetworkManager" in said else networkd


def tell(tree: Tree, moves: Sequence[Move]) -> list[Command]:
    if _renderer(tree) is networkmanager:
        return [("netplan", "generate"), *networkmanager.tell(tree, moves, "netplan-")]
    return [("netplan", "generate"), *networkd.tell(tree, moves)]


def held(tree: Tree, name: str) -> tuple[Command, str] | None:
    return networkmanager.held(tree, name, "netplan-") if _renderer(tree) is networkmanager else None
