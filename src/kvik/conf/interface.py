"""<interface>: a network interface of the host, in netcf's XML as libvirt has it (its schema: interface.rng).

One Struct serves the four kinds (ethernet, bridge, vlan, bond); `validate_interface` refuses what a kind cannot have.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Annotated, Any, Literal

from kvik.conf.codec import Element, OnOff, YesNo
from kvik.conf.reader import read_xml
from kvik.conf.xmlformat import format_element
from kvik.conf.xmlparse import parse_element
from kvik.errors import ConfigError, ConfigUnsupported

Kind = Literal["ethernet", "bridge", "vlan", "bond"]
NAME_MAX = 15  # IFNAMSIZ less the terminating zero
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@-]{0,14}")
_MAC = re.compile(r"[0-9A-Fa-f]{2}(:[0-9A-Fa-f]{2}){5}")


class InterfaceStart(Element):
    mode: Literal["onboot", "none", "hotplug"]


class InterfaceMac(Element):
    address: str


class InterfaceMtu(Element):
    size: int


class InterfaceLink(Element):
    """Of a document that tells what is: `speed` in Mbit/s, `state` as the kernel's operstate."""

    speed: int | None = None
    state: str | None = None


class InterfaceDhcp(Element):
    peerdns: YesNo = None


class Autoconf(Element):
    """IPv6 addresses from router advertisements."""


class InterfaceIp(Element):
    address: str
    prefix: int | None = None

    @property
    def text(self) -> str:
        """Such as 192.0.2.1/24."""
        full = 128 if ":" in self.address else 32
        return f"{self.address}/{full if self.prefix is None else self.prefix}"


class InterfaceGateway(Element):
    gateway: str


class Protocol(Element):
    family: Literal["ipv4", "ipv6"]
    autoconf: Autoconf | None = None
    dhcp: InterfaceDhcp | None = None
    ips: Annotated[list[InterfaceIp], "ip"] = []
    routes: Annotated[list[InterfaceGateway], "route"] = []


class BridgeInterface(Element):
    """`delay` in seconds."""

    stp: OnOff = None
    delay: str | None = None
    ports: Annotated[list[Interface], "interface"] = []


class VlanInterface(Element):
    tag: int
    base: Annotated[Interface, "interface"]


class MiiMonitor(Element):
    """Milliseconds."""

    freq: int
    downdelay: int | None = None
    updelay: int | None = None
    carrier: Literal["ioctl", "netif"] | None = None


class ArpMonitor(Element):
    interval: int
    target: str
    validate: Literal["none", "active", "backup", "all"] | None = None


class BondInterface(Element):
    mode: (
        Literal["balance-rr", "active-backup", "balance-xor", "broadcast", "802.3ad", "balance-tlb", "balance-alb"]
        | None
    ) = None
    miimon: MiiMonitor | None = None
    arpmon: ArpMonitor | None = None
    ports: Annotated[list[Interface], "interface"] = []


class Interface(Element, kw_only=True):
    """`type` and `name`; the rest as its kind has it. As a part of another (`ports`, `base`) often only that."""

    type: Kind | None = None
    name: str
    start: InterfaceStart | None = None
    mac: InterfaceMac | None = None
    link: InterfaceLink | None = None
    mtu: InterfaceMtu | None = None
    protocols: Annotated[list[Protocol], "protocol"] = []
    bridge: BridgeInterface | None = None
    vlan: VlanInterface | None = None
    bond: BondInterface | None = None

    def protocol(self, family: str) -> Protocol | None:
        return next((protocol for protocol in self.protocols if protocol.family == family), None)


def parse_interface(xml: str | bytes) -> Interface:
    """Read and check a document. Raises ConfigError with line and path."""
    root = read_xml(xml, "interface document")
    if root.tag != "interface":
        line: Any = root.sourceline or 0  # Any: the stubs of lxml do not know that it is a number
        raise ConfigError(f"the root element is <{root.tag}>, not <interface>", line=line)
    interface = parse_element(root, Interface)
    bridge = interface.bridge
    if interface.type != "bridge" and bridge and all(port.name == interface.name for port in bridge.ports):
        interface.bridge = None  # virsh's iface-unbridge only renames the document after the port
    validate_interface(interface)
    return interface


def format_interface(interface: Interface) -> str:
    return format_element(interface, "interface")


def check_interface_name(name: str, path: str = "/interface/@name") -> None:
    """A name that kernel and configuration files take alike: nothing that could end a line or a quotation in one."""
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r} is no name for an interface",
            path=path,
            remedy=f"use at most {NAME_MAX} letters, digits and . _ - @",
        )


def validate_interface(interface: Interface) -> None:
    """What the declarations cannot say. Raises ConfigError with the path."""
    kind = interface.type
    if kind is None:
        raise ConfigError("attribute 'type' is missing", path="/interface")
    _validate(interface, "/interface")
    for name in ("bridge", "vlan", "bond"):
        if (getattr(interface, name) is not None) != (kind == name):
            missing = kind == name
            what = f"<{name}> is missing" if missing else f"<{name}> does not belong to type='{kind}'"
            raise ConfigError(what, path="/interface")
    parts: list[Interface] = []
    if interface.bridge is not None:
        parts = interface.bridge.ports
        _delay(interface.bridge)
    elif interface.bond is not None:
        parts = interface.bond.ports
        if interface.bond.miimon and interface.bond.arpmon:
            raise ConfigError("a bond is watched by <miimon> or by <arpmon>, not both", path="/interface/bond")
        if not parts:
            raise ConfigError("a bond has one <interface> at least", path="/interface/bond")
    elif interface.vlan is not None:
        parts = [interface.vlan.base]
        if not 1 <= interface.vlan.tag <= 4094:
            raise ConfigError(f"VLAN {interface.vlan.tag} is not between 1 and 4094", path="/interface/vlan/@tag")
    seen = {interface.name}
    for part in parts:
        _validate(part, f"/interface/{kind}/interface")
        if part.name in seen:
            raise ConfigError(f"{part.name} is named twice", path=f"/interface/{kind}/interface")
        seen.add(part.name)
        if part.protocols:
            # Its address would be unreachable: what comes in is the bridge's or bond's.
            raise ConfigError(
                f"{part.name} is a part of {interface.name} and can have no address of its own",
                path=f"/interface/{kind}/interface/protocol",
                remedy=f"give the address to {interface.name}",
            )
        if part.type in ("bridge",) or part.bridge or part.bond or part.vlan:
            raise ConfigUnsupported(
                f"{part.name}: only interfaces that have a definition of their own can be nested",
                path=f"/interface/{kind}/interface",
                remedy=f"define {part.name} first and name it here as type='ethernet'",
            )


def _validate(interface: Interface, path: str) -> None:
    check_interface_name(interface.name, f"{path}/@name")
    if interface.mac is not None and not _MAC.fullmatch(interface.mac.address):
        raise ConfigError(f"{interface.mac.address!r} is no MAC address", path=f"{path}/mac/@address")
    if interface.mtu is not None and not 68 <= interface.mtu.size <= 65535:
        raise ConfigError(f"an MTU of {interface.mtu.size} is not between 68 and 65535", path=f"{path}/mtu/@size")
    families = [protocol.family for protocol in interface.protocols]
    if len(set(families)) != len(families):
        raise ConfigError("there is one <protocol> a family", path=f"{path}/protocol")
    for protocol in interface.protocols:
        _protocol(protocol, f"{path}/protocol[@family='{protocol.family}']")


def _protocol(protocol: Protocol, path: str) -> None:
    version = 4 if protocol.family == "ipv4" else 6
    if version == 4 and protocol.autoconf is not None:
        raise ConfigError("<autoconf> is IPv6's", path=path)
    if version == 4 and protocol.dhcp is not None and protocol.ips:
        raise ConfigError("<dhcp> and <ip> exclude each other", path=path)
    for ip in protocol.ips:
        try:
            address = ipaddress.ip_interface(ip.text)
        except ValueError as error:
            raise ConfigError(f"{ip.text!r} is no address: {error}", path=f"{path}/ip") from error
        if address.version != version:
            raise ConfigError(f"{ip.text} is no {protocol.family} address", path=f"{path}/ip")
    for route in protocol.routes:
        try:
            gateway = ipaddress.ip_address(route.gateway)
        except ValueError as error:
            raise ConfigError(f"{route.gateway!r} is no address", path=f"{path}/route/@gateway") from error
        if gateway.version != version:
            raise ConfigError(f"{route.gateway} is no {protocol.family} address", path=f"{path}/route/@gateway")


def _delay(bridge: BridgeInterface) -> None:
    if bridge.delay is None:
        return
    try:
        good = 0 <= float(bridge.delay) <= 30
    except ValueError:
        good = False
    if not good:
        raise ConfigError(f"a delay of {bridge.delay!r} is not 0 to 30 seconds", path="/interface/bridge/@delay")
