"""/etc/network/interfaces and what it sources: interfaces(5), bridge-utils-interfaces(5).

A file is cut into stanzas, each with its lines as they are; only stanzas of the interface in question change. All
options of an interface go with its address to the bridge: name servers, routes and commands included.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

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
from kvik.network.interfaces.formats.tree import Changes, Command, Move, Tree, encode

NAME = "ifupdown"
MAIN = "/etc/network/interfaces"
PRIVATE = False
_KEYWORDS = re.compile(
    r"(iface|mapping|auto|allow-[\w-]+|no-auto-down|no-scripts|source|source-directory|template|rename)\b"
)
_SOURCED = re.compile(r"[\w-]+")  # names that source-directory takes
_DEPTH = 4


@dataclass(slots=True)
class Stanza:
    """`words`: those of its first line; none for what stands before the first stanza. `lines`: all of its text."""

    words: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)

    @property
    def options(self) -> list[tuple[str, str]]:
        found = []
        for line in _joined(self.lines)[1 if self.words else 0 :]:
            key, _, value = line.strip().partition(" ")
            if key and not key.startswith("#"):
                found.append((key.replace("_", "-"), value.strip()))
        return found

    def option(self, key: str) -> str | None:
        return next((value for name, value in self.options if name == key), None)


def _joined(lines: list[str]) -> list[str]:
    """Logical lines: a backslash at the end of one takes in the next. Comments do not go on."""
    out: list[str] = []
    for line in lines:
        if out and out[-1].endswith("\\") and not out[-1].lstrip().startswith("#"):
            out[-1] = out[-1][:-1] + " " + line.strip()
        else:
            out.append(line.expandtabs(1))
    return out


def parse(text: str) -> list[Stanza]:
    stanzas = [Stanza()]
    continued = False
    for line in text.splitlines():
        plain = line.strip()
        if not continued and _KEYWORDS.match(plain):
            stanzas.append(Stanza(plain.rstrip("\\").split(), []))
        stanzas[-1].lines.append(line)
        continued = line.endswith("\\") and not plain.startswith("#")
    return stanzas


def join(stanzas: list[Stanza]) -> bytes:
    return encode("".join(line + "\n" for stanza in stanzas for line in stanza.lines))


def _files(tree: Tree) -> dict[str, list[Stanza]]:
    """The main file and those that it sources, parsed."""
    found: dict[str, list[Stanza]] = {}

    def read(path: str, depth: int) -> None:
        text = tree.read(path)
        if path in found or text is None or depth > _DEPTH:
            return
        found[path] = parse(text)
        for stanza in found[path]:
            if stanza.words[:1] in (["source"], ["source-directory"]):
                for word in stanza.words[1:]:
                    target = word if word.startswith("/") else f"/etc/network/{word}"
                    if stanza.words[0] == "source-directory":
                        names = [one for one in tree.list(target, "*") if _SOURCED.fullmatch(one.rpartition("/")[2])]
                    else:
                        names = tree.list(*_split(target))
                    for name in names:
                        read(name, depth + 1)

    read(MAIN, 0)
    return found


def _split(path: str) -> tuple[str, str]:
    directory, _, pattern = path.rpartition("/")
    return directory, pattern


def _iface(stanza: Stanza, name: str) -> bool:
    return stanza.words[:2] == ["iface", name]


def names(tree: Tree) -> list[str]:
    """The interfaces that are defined, in order; without loopback."""
    found = [stanza.words[1] for file in _files(tree).values() for stanza in file
             if stanza.words[:1] == ["iface"] and len(stanza.words) > 3 and stanza.words[3] != "loopback"]  # fmt: skip
    return list(dict.fromkeys(found))


# To documents -----------------------------------------------------------------------------------------------------


def describe(tree: Tree, name: str) -> Interface | None:
    """The document of an interface that is defined here."""
    files = _files(tree)
    stanzas = [stanza for file in files.values() for stanza in file if _iface(stanza, name)]
    if not stanzas:
        return None
    every = [stanza.words for file in files.values() for stanza in file]
    auto = any(words[:1] == ["auto"] and name in words for words in every)
    hotplug = any(words[:1] == ["allow-hotplug"] and name in words for words in every)
    document = Interface(
        type="ethernet", name=name, start=InterfaceStart(mode="onboot" if auto else "hotplug" if hotplug else "none")
    )
    for stanza in stanzas:
        _describe(document, stanza)
    return document


def _describe(document: Interface, stanza: Stanza) -> None:
    family, method = ([*stanza.words, "", ""])[2:4]
    if mtu := stanza.option("mtu"):
        document.mtu = InterfaceMtu(size=int(mtu)) if mtu.isdecimal() else None
    if mac := stanza.option("hwaddress"):
        document.mac = InterfaceMac(address=mac.split()[-1])
    if ports := stanza.option("bridge-ports"):
        stp = stanza.option("bridge-stp")
        document.type = "bridge"
        document.bridge = BridgeInterface(
            stp=None if stp is None else stp in ("on", "yes"),
            delay=stanza.option("bridge-fd"),
            ports=[Interface(type="ethernet", name=port) for port in ports.split() if port not in ("none", "regex")],
        )
    if base := stanza.option("vlan-raw-device"):
        tag = re.search(r"(\d+)$", document.name)
        if tag:
            document.type = "vlan"
            document.vlan = VlanInterface(tag=int(tag[1]), base=Interface(type="ethernet", name=base))
    if family not in ("inet", "inet6") or method == "manual":
        return
    protocol = document.protocol("ipv4" if family == "inet" else "ipv6")
    if protocol is None:
        protocol = Protocol(family="ipv4" if family == "inet" else "ipv6")
        document.protocols.append(protocol)
    if method == "dhcp":
        protocol.dhcp = InterfaceDhcp()
    elif method == "auto":
        protocol.autoconf = Autoconf()
    for key, value in stanza.options:
        if key == "address" and value:
            protocol.ips.append(_ip(value, stanza.option("netmask")))
        elif key == "gateway" and value:
            protocol.routes.append(InterfaceGateway(gateway=value.split()[0]))


def _ip(value: str, netmask: str | None) -> InterfaceIp:
    text = value.split(maxsplit=1)[0]
    if "/" not in text and netmask:
        text = f"{text}/{netmask}"
    try:
        found = ipaddress.ip_interface(text)
    except ValueError:
        return InterfaceIp(address=text.partition("/")[0])
    return InterfaceIp(address=str(found.ip), prefix=found.network.prefixlen)


# From documents ---------------------------------------------------------------------------------------------------


def define(tree: Tree, document: Interface) -> Changes:
    """Replace what is said of the interface, or add it at the end of the main file."""
    lines = _stanza_lines(document)
    changes = undefine(tree, document.name)
    for port in document.bridge.ports if document.bridge else []:
        tree = Tree(tree.root, {**tree.staged, **changes})
        changes.update(undefine(tree, port.name))  # a port has no address of its own
        lines += [f"iface {port.name} inet manual"]
    tree = Tree(tree.root, {**tree.staged, **changes})
    text = tree.read(MAIN)
    if text is None:
        text = "source /etc/network/interfaces.d/*\n\nauto lo\niface lo inet loopback\n"
    if text and not text.endswith("\n"):
        text += "\n"
    return {**changes, MAIN: encode(text + "\n" + "".join(line + "\n" for line in lines))}


def _stanza_lines(document: Interface) -> list[str]:
    lines = []
    mode = document.start.mode if document.start else "none"
    if mode != "none":
        lines.append(f"{'auto' if mode == 'onboot' else 'allow-hotplug'} {document.name}")
    common = []
    if document.mtu:
        common.append(f"    mtu {document.mtu.size}")
    if document.mac and document.type == "ethernet":
        common.append(f"    hwaddress {document.mac.address}")
    if document.bridge:
        common += bridge_lines(document.bridge, document.mac.address if document.mac else "")
    if document.vlan:
        common.append(f"    vlan-raw-device {document.vlan.base.name}")
    if document.bond:
        raise ConfigUnsupported(
            "bonds are not written into /etc/network/interfaces",
            path="/interface/bond",
            remedy="write it by hand as interfaces(5) says; kvik can put it into a bridge then",
        )
    for protocol in document.protocols:
        family = "inet" if protocol.family == "ipv4" else "inet6"
        method = "dhcp" if protocol.dhcp else "auto" if protocol.autoconf else "static" if protocol.ips else "manual"
        if method in ("dhcp", "auto") and not protocol.ips:
            lines += [f"iface {document.name} {family} {method}", *common]
            common = []
            continue
        if not protocol.ips:
            lines += [f"iface {document.name} {family} manual", *common]
            common = []
        for number, ip in enumerate(protocol.ips):  # several stanzas of one interface add up
            lines += [f"iface {document.name} {family} static", *common, f"    address {ip.text}"]
            common = []
            if number == 0:
                lines += [f"    gateway {route.gateway}" for route in protocol.routes]
        if protocol.autoconf and protocol.ips:
            lines += [f"iface {document.name} {family} auto"]
    if common or not document.protocols:
        lines += [f"iface {document.name} inet manual", *common]
    return lines


def bridge_lines(bridge: BridgeInterface, mac: str) -> list[str]:
    lines = [f"    bridge_ports {' '.join(port.name for port in bridge.ports) or 'none'}"]
    lines.append(f"    bridge_stp {'on' if bridge.stp else 'off'}")
    lines.append(f"    bridge_fd {bridge.delay or '0'}")
    if mac:
        lines.append(f"    bridge_hw {mac}")
    return lines


def undefine(tree: Tree, name: str) -> Changes:
    """Take out all that is said of the interface."""
    changes: Changes = {}
    for path, stanzas in _files(tree).items():
        kept = [stanza for stanza in stanzas if not _iface(stanza, name)]
        touched = len(kept) != len(stanzas)
        touched |= _rename_auto(kept, name, None)
        if touched:
            changes[path] = join(_without_empty(kept))
    return changes


def _without_empty(stanzas: list[Stanza]) -> list[Stanza]:
    """Without `auto` lines that name nothing any more."""
    return [stanza for stanza in stanzas if not (_is_auto(stanza) and len(stanza.words) == 1)]


def _is_auto(stanza: Stanza) -> bool:
    return bool(stanza.words) and (stanza.words[0] == "auto" or stanza.words[0].startswith("allow-"))


def _rename_auto(stanzas: list[Stanza], name: str, new: str | None) -> bool:
    """`name` becomes `new` (None: goes) where interfaces are named that start by themselves."""
    touched = False
    for stanza in stanzas:
        if _is_auto(stanza) and name in stanza.words[1:]:
            words = [stanza.words[0]]
            for word in stanza.words[1:]:
                if word != name:
                    words.append(word)
                elif new is not None and new not in words:
                    words.append(new)
            stanza.words = words
            stanza.lines[0] = " ".join(words)
            touched = True
    return touched


# Bridges ----------------------------------------------------------------------------------------------------------


def bridge(tree: Tree, port: str, document: Interface) -> Changes:
    """What `port` has goes to the bridge of `document`, as it stands; the port is left without an address."""
    assert document.bridge is not None
    changes: Changes = {}
    first = True
    for path, stanzas in _files(tree).items():
        touched = False
        for stanza in stanzas:
            if not _iface(stanza, port):
                continue
            _rename(stanza, port, document.name)
            if first:
                mac = document.mac.address if document.mac else ""
                stanza.lines[1:1] = bridge_lines(document.bridge, mac)
                stanza.lines[0:0] = [f"iface {port} inet manual", ""]
                first = False
            touched = True
        for stanza in stanzas:
            if _is_auto(stanza) and port in stanza.words[1:] and stanza.words[0] != "auto":
                # A bridge is made, never plugged in: it must be brought up at boot.
                stanza.words[0] = "auto"
        touched |= _rename_auto(stanzas, port, document.name)
        if touched:
            changes[path] = join(_without_empty(stanzas))
    return changes if not first else define(tree, document)


def unbridge(tree: Tree, name: str, port: str) -> Changes:
    """The way back: what the bridge has goes to its port, and the bridge goes."""
    changes: Changes = {}
    for path, stanzas in _files(tree).items():
        kept = [stanza for stanza in stanzas if not _iface(stanza, port)]
        touched = len(kept) != len(stanzas)
        for stanza in kept:
            if _iface(stanza, name):
                _rename(stanza, name, port)
                stanza.lines = [line for line in stanza.lines if not re.match(r"\s*bridge[_-]", line)]
                touched = True
        touched |= _rename_auto(kept, name, port)
        if touched:
            changes[path] = join(_without_empty(kept))
    return changes


def tell(tree: Tree, moves: Sequence[Move]) -> list[Command]:
    """Nothing runs that would have to be told; a DHCP client goes on at the port until the next boot."""
    return []


def held(tree: Tree, name: str) -> tuple[Command, str] | None:
    return None


def _rename(stanza: Stanza, old: str, new: str) -> None:
    stanza.words[1] = new
    stanza.lines[0] = " ".join(stanza.words)
    # Commands that name the interface must name the one that has the address now.
    stanza.lines[1:] = [re.sub(rf"(\bdev\s+){re.escape(old)}\b", rf"\g<1>{new}", line) for line in stanza.lines[1:]]
