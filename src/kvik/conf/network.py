"""<network>, the document of one virtual network, and its two directions: `parse_network` and `format_network`.

Parsing checks form only; `complete_network` fills in what was left out and `network_validate` checks
sense; its `load_network` does all three. Field names and order are those of https://libvirt.org/formatnetwork.html

What libvirt has no element for is in a namespace of our own, which libvirt ignores:

    <forward mode='nat' xmlns:kvik='urn:kvik:1'>
      <kvik:portForward proto='tcp' start='8080' guest='192.168.122.10' to='80'/>
    </forward>
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Literal

from kvik.conf import tree
from kvik.conf.codec import CHILD, DNSMASQ_NS, KVIK_NS, LIVE, RAW, UUID, YES_NO, Element, OnOff, Text, YesNo
from kvik.conf.devices.common import Address
from kvik.conf.devices.interface import Bandwidth, Mtu, Port, Route, VirtualPort, Vlan
from kvik.conf.machine import MachineDefaults
from kvik.conf.postparse import new_mac, new_uuid
from kvik.conf.reader import read_xml
from kvik.conf.xmlformat import format_element
from kvik.conf.xmlparse import parse_element
from kvik.errors import ConfigError

__all__ = [
    "Network", "NetworkIp", "PortGroup", "complete_network", "format_network", "normal_mac", "parse_network",
]  # fmt: skip

ForwardMode = Literal["nat", "route", "open", "bridge", "private", "vepa", "passthrough", "hostdev"]
BRIDGED_BY_US: tuple[ForwardMode | None, ...] = (None, "nat", "route", "open")  # the bridge is the network's own
MACVTAP: tuple[ForwardMode, ...] = (
    "private",
    "vepa",
    "passthrough",
)  # and bridge, with interfaces in place of a bridge
MAX_BRIDGES = 4096  # names virbr0, virbr1, ... that are tried


class AddressRange(Element):
    start: str
    end: str


class NatPorts(Element):
    start: int
    end: int


class Nat(Element):
    """Source addresses and ports to masquerade with; none: the address of the way out, and ports 1024 to 65535."""

    ipv6: YesNo = None
    address: AddressRange | None = None
    port: NatPorts | None = None


class ForwardInterface(Element):
    dev: str
    connections: Annotated[int | None, LIVE] = None


class ForwardDriver(Element):
    name: Literal["kvm", "vfio"]


class NetworkPortForward(Element, kw_only=True):
    """Ports start to end (start alone if no end) of the host, handed to ports from `to` on of the `guest` address."""

    __xml_strict__ = True  # what narrows an opening must not be ignored

    proto: Literal["tcp", "udp"]
    address: str | None = None  # of the host; None: every one
    start: int
    end: int | None = None
    guest: str
    to: int | None = None


class Forward(Element):
    dev: str | None = None
    mode: ForwardMode | None = None
    managed: YesNo = None
    driver: ForwardDriver | None = None
    nat: Nat | None = None
    pfs: Annotated[list[ForwardInterface], "pf"] = []
    interfaces: Annotated[list[ForwardInterface], "interface"] = []
    addresses: Annotated[list[Address], "address"] = []
    port_forwards: Annotated[list[NetworkPortForward], f"{{{KVIK_NS}}}portForward"] = []


class NetworkBridge(Element):
    """`delay` in seconds; `mac_table_manager` libvirt: the FDB is filled by us, learning and flooding are off."""

    name: str | None = None
    zone: str | None = None
    stp: OnOff = None
    delay: int | None = None
    mac_table_manager: Annotated[Literal["kernel", "libvirt"] | None, "macTableManager"] = None


class NetworkMac(Element):
    address: str


class NetworkDomain(Element):
    name: str
    local_only: Annotated[bool | None, YES_NO, "localOnly"] = None
    register: YesNo = None


class DnsForwarder(Element):
    domain: str | None = None
    addr: str | None = None


class DnsTxt(Element):
    name: str
    value: str = ""


class DnsSrv(Element):
    service: str
    protocol: str
    domain: str | None = None
    target: str | None = None
    port: int | None = None
    priority: int | None = None
    weight: int | None = None


class DnsHost(Element):
    ip: str | None = None
    hostnames: Annotated[list[str], "hostname"] = []


class Dns(Element):
    enable: YesNo = None
    forward_plain_names: Annotated[bool | None, YES_NO, "forwardPlainNames"] = None
    forwarders: Annotated[list[DnsForwarder], "forwarder"] = []
    txts: Annotated[list[DnsTxt], "txt"] = []
    srvs: Annotated[list[DnsSrv], "srv"] = []
    hosts: Annotated[list[DnsHost], "host"] = []


class Lease(Element):
    """How long an address is lent; 0 is for ever, and minutes is the unit if none is said."""

    expiry: int
    unit: Literal["seconds", "minutes", "hours"] | None = None

    @property
    def seconds(self) -> int:
        """0 for ever."""
        return self.expiry * {"seconds": 1, "minutes": 60, "hours": 3600}[self.unit or "minutes"]


class DhcpRange(AddressRange):
    lease: Lease | None = None


class DhcpHost(Element):
    """One guest, known by its MAC, its DHCP unique identifier (`id`, IPv6) or its name."""

    id: str | None = None
    mac: str | None = None
    name: str | None = None
    ip: str | None = None
    lease: Lease | None = None


class Bootp(Element):
    file: str
    server: str | None = None


class Dhcp(Element):
    ranges: Annotated[list[DhcpRange], "range"] = []
    hosts: Annotated[list[DhcpHost], "host"] = []
    bootp: Bootp | None = None


class Tftp(Element):
    root: str


class NetworkIp(Element):
    """The host's own address on the network, and what is served there."""

    __xml_open__ = True

    family: Literal["ipv4", "ipv6"] | None = None
    address: str | None = None
    netmask: str | None = None
    prefix: int | None = None
    local_ptr: Annotated[bool | None, YES_NO, "localPtr"] = None
    tftp: Tftp | None = None
    dhcp: Dhcp | None = None


class PortGroup(Element):
    __xml_open__ = True

    name: str
    default: YesNo = None
    trust_guest_rx_filters: Annotated[bool | None, YES_NO, "trustGuestRxFilters"] = None
    vlan: Vlan | None = None
    virtualport: VirtualPort | None = None
    bandwidth: Bandwidth | None = None


class DnsmasqOption(Element):
    value: str


class DnsmasqOptions(Element):
    """Lines handed to dnsmasq as they are."""

    options: Annotated[list[DnsmasqOption], f"{{{DNSMASQ_NS}}}option"] = []


class Network(Element):
    """`connections` is None unless this is the document of an active network that interfaces are on."""

    connections: Annotated[int | None, LIVE] = None
    ipv6: YesNo = None
    trust_guest_rx_filters: Annotated[bool | None, YES_NO, "trustGuestRxFilters"] = None
    name: Annotated[str, CHILD] = ""
    uuid: Annotated[str | None, CHILD, UUID] = None
    title: Text = None
    description: Text = None
    metadata: Annotated[list[bytes], RAW] = []
    forward: Forward | None = None
    bridge: NetworkBridge | None = None
    mtu: Mtu | None = None
    mac: NetworkMac | None = None
    domain: NetworkDomain | None = None
    dns: Dns | None = None
    vlan: Vlan | None = None
    bandwidth: Bandwidth | None = None
    port: Port | None = None
    ips: Annotated[list[NetworkIp], "ip"] = []
    routes: Annotated[list[Route], "route"] = []
    virtualport: VirtualPort | None = None
    portgroups: Annotated[list[PortGroup], "portgroup"] = []
    dnsmasq_options: Annotated[DnsmasqOptions | None, f"{{{DNSMASQ_NS}}}options"] = None

    @property
    def mode(self) -> ForwardMode | None:
        """How the network reaches the outside; None: it does not."""
        return None if self.forward is None else self.forward.mode or "nat"

    @property
    def owns_bridge(self) -> bool:
        """Whether starting the network makes its bridge, and stopping it removes it."""
        return self.mode in BRIDGED_BY_US

    @property
    def bridge_name(self) -> str | None:
        return self.bridge.name if self.bridge is not None else None

    @property
    def is_macvtap(self) -> bool:
        """Interfaces sit on a physical interface by macvtap, with no bridge between."""
        return self.mode in MACVTAP or (self.mode == "bridge" and self.bridge_name is None)

    def portgroup(self, name: str | None) -> PortGroup | None:
        """The group of that name; the default one, if there is, for None. Raises ConfigError for an unknown name."""
        for group in self.portgroups:
            if group.name == name if name is not None else group.default:
                return group
        if name is None:
            return None
        known = ", ".join(group.name for group in self.portgroups) or "none"
        raise ConfigError(f"network {self.name} has no portgroup {name!r}", remedy=f"it has {known}")

    def warnings(self) -> list[str]:
        """One line for each thing that this document says and kvik does not understand."""
        return tree.warnings(self, "/network")

    def copy(self) -> Network:
        return tree.clone(self)


def parse_network(xml: str | bytes) -> Network:
    """The document as it stands, nothing filled in. Raises ConfigError with line, path and reason."""
    root = read_xml(xml, "network document")
    if root.tag != "network":
        raise ConfigError(f"a network document starts with <network>, not <{root.tag}>", path=f"/{root.tag}")
    return parse_element(root, Network)


def format_network(document: Network, *, connections: int | None = None, inactive: bool = False) -> str:
    """libvirt's XML. `connections` is how many interfaces are on it, for an active network (0 and None: not said);
    `inactive` leaves out what is true of an active one only."""
    if connections != document.connections:
        document = tree.clone(document)
        document.connections = connections or None
    return format_element(document, "network", inactive=inactive)


def normal_mac(text: str) -> str:
    """A MAC address as libvirt writes it: lower case, two digits each. ValueError if it is none."""
    parts = text.strip().lower().split(":")
    if len(parts) != 6 or not all(0 < len(part) <= 2 and set(part) <= set("0123456789abcdef") for part in parts):
        raise ValueError(f"{text!r} is not a MAC address, six pairs of hexadecimal digits with ':' between")
    return ":".join(part.zfill(2) for part in parts)


def complete_network(
    document: Network, taken_bridges: Collection[str] = (), defaults: MachineDefaults | None = None
) -> None:
    """Fill in what libvirt fills in, in place: UUID, forward mode, and for a bridge of the network's own its name
    (the first virbrN that is not in `taken_bridges`), STP on, no delay, and a MAC so that it never changes.

    Doing it twice changes nothing. Raises ConfigError when no bridge name is free.
    """
    defaults = defaults or MachineDefaults()
    if document.uuid is None:
        document.uuid = new_uuid(defaults)
    forward = document.forward
    if forward is not None:
        forward.mode = forward.mode or "nat"
        if forward.dev is not None and not forward.interfaces and not forward.pfs:
            forward.interfaces.append(ForwardInterface(dev=forward.dev))
        if forward.dev is None and forward.interfaces and not forward.pfs:
            forward.dev = forward.interfaces[0].dev
    if document.owns_bridge:
        bridge = document.bridge = document.bridge or NetworkBridge()
        if not bridge.name or "%d" in bridge.name:
            bridge.name = _free_bridge(bridge.name or "virbr%d", taken_bridges)
        bridge.stp = True if bridge.stp is None else bridge.stp
        bridge.delay = bridge.delay or 0
        if document.mac is None:
            document.mac = NetworkMac(address=new_mac(defaults))
    if document.mac is not None:
        try:
            document.mac.address = normal_mac(document.mac.address)
        except ValueError as error:
            raise ConfigError(str(error), path="/network/mac/@address") from None
    for ip in document.ips:
        for lease in (item.lease for item in _lent(ip) if item.lease is not None):
            if lease.expiry:
                lease.unit = lease.unit or "minutes"
            else:
                lease.unit = None


def _lent(ip: NetworkIp) -> list[DhcpRange | DhcpHost]:
    return [*ip.dhcp.ranges, *ip.dhcp.hosts] if ip.dhcp is not None else []


def _free_bridge(template: str, taken: Collection[str]) -> str:
    before, _, after = template.partition("%d")
    for number in range(MAX_BRIDGES):
        name = f"{before}{number}{after}"
        if name not in taken:
            return name
    raise ConfigError(
        f"no bridge name {template} is free of the {MAX_BRIDGES} that were tried",
        path="/network/bridge/@name",
        remedy="name one",
    )
