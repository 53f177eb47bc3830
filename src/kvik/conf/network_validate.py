"""Does a completed network document make sense in itself? Whether this host can do it (a subnet that is taken, an
interface that does not exist) is asked when the network starts. Every refusal is a ConfigError with the element's path.

What libvirt refuses is refused; beyond it: subnets, ranges and port forwards that overlap, and duplicates, which
libvirt finds only when dnsmasq or the kernel fails, or never.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Hashable, Iterable

from kvik.conf.devices.interface import Bandwidth, Port, VirtualPort, Vlan
from kvik.conf.machine import MachineDefaults
from kvik.conf.network import Forward, Network, complete_network, parse_network
from kvik.conf.network_addresses import address, dns_name, interface_name, plain_text, unicast_mac
from kvik.conf.network_services import validate_dns, validate_ips, validate_port_forwards, validate_routes
from kvik.conf.prepare import located
from kvik.conf.validate import validate_name
from kvik.errors import ConfigError

__all__ = [
    "load_network", "validate_bandwidth", "validate_network", "validate_portgroups", "validate_virtualport",
    "validate_vlan",
]  # fmt: skip

MTU_MIN, MTU_MAX, MTU_IPV6 = 68, 65535, 1280  # RFC 791, the kernel's ETH_MAX_MTU, RFC 8200
MAX_DELAY = 30  # seconds: BR_MAX_FORWARD_DELAY of net/bridge/br_private_stp.h
MAX_RATE = 0xFFFFFFFF  # KiB/s
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def load_network(
    xml: str | bytes, taken_bridges: Collection[str] = (), defaults: MachineDefaults | None = None
) -> Network:
    """Parse, complete, validate. Raises ConfigError with line, path and reason."""
    document = parse_network(xml)
    with located(xml):
        complete_network(document, taken_bridges, defaults)
        validate_network(document)
    return document


def validate_network(document: Network) -> None:
    """Raises ConfigError for the first thing that is wrong."""
    validate_name(document.name, "/network/name")
    if document.uuid is None or not _UUID.fullmatch(document.uuid):
        raise ConfigError(f"{document.uuid!r} is not a UUID", path="/network/uuid")
    if document.title is not None and "\n" in document.title:
        raise ConfigError("a title is one line", path="/network/title", remedy="use <description> for more")
    _mode(document)
    if document.forward is not None:
        _forward(document.forward, document)
    _bridge(document)
    if document.mac is not None:
        unicast_mac(document.mac.address, "/network/mac/@address")
    if document.domain is not None:
        dns_name(document.domain.name, "/network/domain/@name", "domain")
    subnets = validate_ips(document)
    if document.dns is not None:
        validate_dns(document.dns)
    validate_routes(document.routes, subnets)
    validate_port_forwards(document, subnets)
    validate_vlan(document.vlan, "/network/vlan")
    validate_virtualport(document.virtualport, document, "/network/virtualport")
    validate_bandwidth(document.bandwidth, "/network/bandwidth")
    validate_portgroups(document)
    for index, option in enumerate(document.dnsmasq_options.options if document.dnsmasq_options else [], 1):
        plain_text(option.value, f"/network/options/option[{index}]", "dnsmasq option", 1024)


def _mode(document: Network) -> None:
    """What does not go with the way the network reaches the outside."""
    mode = document.mode
    if document.owns_bridge:
        if mode in ("nat", "route") and not document.ips:
            raise ConfigError(
                f"forward mode {mode} needs an <ip>: there is nothing to route from",
                path="/network/forward",
                remedy="add <ip address=... prefix=...>, or leave <forward> out for an isolated network",
            )
        return
    for field, name in (("ips", "ip"), ("dns", "dns"), ("domain", "domain"), ("routes", "route"), ("mtu", "mtu")):
        if getattr(document, field):
            raise ConfigError(
                f"<{name}> is for networks whose bridge is their own; with forward mode {mode} it has no place",
                path=f"/network/{name}",
                remedy="use mode nat, route or open, or leave <forward> out",
            )
    if document.bandwidth is not None:
        raise ConfigError(
            f"a network with forward mode {mode} has no bandwidth of its own",
            path="/network/bandwidth",
            remedy="set it in a <portgroup>, or on interfaces",
        )
    if _isolated(document.port) and (document.is_macvtap or mode == "hostdev"):
        raise ConfigError(
            f"ports cannot be isolated in forward mode {mode}: there is no bridge of this host", path="/network/port"
        )


def _isolated(port: Port | None) -> bool:
    return port is not None and bool(port.isolated)


def _forward(forward: Forward, document: Network) -> None:
    path, mode = "/network/forward", document.mode
    names = [item.dev for item in forward.interfaces]
    for field, items in (("interface", forward.interfaces), ("pf", forward.pfs)):
        for index, item in enumerate(items, 1):
            interface_name(item.dev, f"{path}/{field}[{index}]/@dev")
    _unique(names, f"{path}/interface", "interface")
    if forward.dev is not None:
        interface_name(forward.dev, f"{path}/@dev")
        if names and forward.dev != names[0]:
            raise ConfigError(f"dev {forward.dev!r} is not the first interface, {names[0]!r}", path=f"{path}/@dev")
    if len(forward.pfs) > 1:
        raise ConfigError("one physical function is all that a network can have", path=f"{path}/pf[2]")
    kinds = [
        kind for kind, given in (("interface", names), ("address", forward.addresses), ("pf", forward.pfs)) if given
    ]
    if len(kinds) > 1:
        raise ConfigError(f"<{kinds[0]}> and <{kinds[1]}> cannot stand together", path=path)
    if document.owns_bridge:
        if forward.addresses or forward.pfs:
            raise ConfigError(f"forward mode {mode} takes no <{kinds[0]}>", path=path)
        if len(names) > 1:
            raise ConfigError(f"forward mode {mode} has one way out at most", path=f"{path}/interface[2]")
        if mode == "open" and names:
            raise ConfigError("mode open leaves forwarding to you, so it takes no dev", path=f"{path}/@dev")
    elif document.bridge_name is not None:
        if kinds:
            raise ConfigError("a bridge and devices to forward to cannot both be given", path=path)
    elif mode == "hostdev":
        if names or not kinds:
            raise ConfigError("mode hostdev needs a <pf> or PCI addresses", path=path)
    elif forward.addresses or not kinds:
        raise ConfigError(
            f"mode {mode} needs interfaces of the host",
            path=path,
            remedy="add <interface dev=.../>" + (", or <bridge name=.../>" if mode == "bridge" else ""),
        )
    if mode != "hostdev" and (forward.managed is not None or forward.driver is not None):
        raise ConfigError("managed and <driver> are for mode hostdev", path=path)
    functions = [(pci.domain, pci.bus, pci.slot, pci.function) for pci in forward.addresses]
    for index, (pci, function) in enumerate(zip(forward.addresses, functions, strict=True), 1):
        if pci.type != "pci" or None in function:
            raise ConfigError("a whole PCI address is needed", path=f"{path}/address[{index}]")
    _unique(functions, f"{path}/address", "PCI function")
    if forward.nat is not None:
        _nat(forward, mode)


def _nat(forward: Forward, mode: str | None) -> None:
    nat, path = forward.nat, "/network/forward/nat"
    if nat is None:
        return
    if mode != "nat":
        raise ConfigError(f"<nat> in forward mode {mode}", path=path)
    if nat.port is not None and not 1 <= nat.port.start <= nat.port.end <= 65535:
        raise ConfigError(f"{nat.port.start} to {nat.port.end} are not ports in order", path=f"{path}/port")
    if nat.address is not None:
        start = address(nat.address.start, f"{path}/address/@start")
        end = address(nat.address.end, f"{path}/address/@end", family=f"ipv{start.version}")
        if int(end) < int(start):
            raise ConfigError(f"{end} comes before {start}", path=f"{path}/address/@end")
        if start.version == 6 and not nat.ipv6:
            raise ConfigError("IPv6 is not translated", path=f"{path}/address", remedy="say <nat ipv6='yes'>")


def _bridge(document: Network) -> None:
    bridge, path = document.bridge, "/network/bridge"
    if bridge is not None:
        if bridge.name:
            interface_name(bridge.name, f"{path}/@name")
        elif document.owns_bridge:
            raise ConfigError("the bridge has no name", path=path)
        if bridge.zone is not None:
            plain_text(bridge.zone, f"{path}/@zone", "zone", 64)
        if (bridge.delay or 0) > MAX_DELAY:
            raise ConfigError(f"a bridge's delay is at most {MAX_DELAY} seconds", path=f"{path}/@delay")
        if not document.owns_bridge:
            if bridge.stp is not None or bridge.delay is not None:
                raise ConfigError("stp and delay are for bridges that the network makes", path=path)
            if document.mode != "bridge":
                raise ConfigError(f"forward mode {document.mode} has no bridge", path=path)
    if document.mtu is not None:
        least = MTU_IPV6 if any(ip.family == "ipv6" for ip in document.ips) else MTU_MIN
        if not least <= document.mtu.size <= MTU_MAX:
            raise ConfigError(
                f"an MTU of {document.mtu.size} is not between {least} and {MTU_MAX}"
                + (" (IPv6 needs 1280)" if least == MTU_IPV6 else ""),
                path="/network/mtu/@size",
            )


def validate_vlan(vlan: Vlan | None, path: str) -> None:
    if vlan is None:
        return
    if not vlan.tags:
        raise ConfigError("a <vlan> without a <tag>", path=path)
    for index, tag in enumerate(vlan.tags, 1):
        if not 1 <= tag.id <= 4094:  # IEEE 802.1Q reserves 0 and 4095
            raise ConfigError(f"VLAN {tag.id} is not between 1 and 4094", path=f"{path}/tag[{index}]/@id")
    _unique((tag.id for tag in vlan.tags), f"{path}/tag", "VLAN")
    if len(vlan.tags) > 1 and vlan.trunk is False:
        raise ConfigError("more than one VLAN is a trunk", path=path, remedy="say trunk='yes'")
    native = [tag.id for tag in vlan.tags if tag.native_mode is not None]
    if len(native) > 1:
        raise ConfigError(f"VLANs {native[0]} and {native[1]} cannot both be native", path=path)
    if native and vlan.trunk is False:
        raise ConfigError("a native VLAN is one of a trunk", path=path)


def validate_virtualport(port: VirtualPort | None, document: Network, path: str) -> None:
    if port is None or port.type in (None, "none"):
        return
    on_bridge = document.mode == "bridge" and document.bridge_name is not None
    fits = on_bridge if port.type in ("openvswitch", "midonet") else document.is_macvtap or document.mode == "hostdev"
    if not fits:
        needs = (
            "forward mode bridge with a <bridge>" if port.type in ("openvswitch", "midonet") else "macvtap or hostdev"
        )
        raise ConfigError(f"a virtualport of type {port.type} needs {needs}", path=path)


def validate_bandwidth(bandwidth: Bandwidth | None, path: str, *, floor: bool = False) -> None:
    """`floor`: a guaranteed rate may be asked for (by an interface on a network that has a rate to share)."""
    for name in ("inbound", "outbound"):
        rate = getattr(bandwidth, name, None)
        if rate is None:
            continue
        where = f"{path}/{name}"
        if rate.floor is not None and (name == "outbound" or not floor):
            raise ConfigError("floor is for the inbound rate of an interface on a network", path=f"{where}/@floor")
        if rate.average is None and rate.floor is None:
            raise ConfigError("the average rate is missing", path=f"{where}/@average")
        if rate.average is None and (rate.peak is not None or rate.burst is not None):
            raise ConfigError("peak and burst need an average", path=f"{where}/@average")
        for field in ("average", "peak", "floor", "burst"):
            value = getattr(rate, field)
            if value is not None and not 1 <= value <= MAX_RATE:
                raise ConfigError(f"{value} is not between 1 and {MAX_RATE} KiB", path=f"{where}/@{field}")


def validate_portgroups(document: Network) -> None:
    path = "/network/portgroup"
    for index, group in enumerate(document.portgroups, 1):
        where = f"{path}[{index}]"
        plain_text(group.name, f"{where}/@name", "the portgroup's name")
        if not group.name.strip():
            raise ConfigError("a portgroup needs a name", path=f"{where}/@name")
        validate_vlan(group.vlan, f"{where}/vlan")
        validate_virtualport(group.virtualport, document, f"{where}/virtualport")
        validate_bandwidth(group.bandwidth, f"{where}/bandwidth")
    _unique((group.name for group in document.portgroups), path, "portgroup")
    defaults = [group.name for group in document.portgroups if group.default]
    if len(defaults) > 1:
        raise ConfigError(f"portgroups {defaults[0]} and {defaults[1]} cannot both be the default", path=path)


def _unique(keys: Iterable[Hashable], path: str, what: str) -> None:
    seen: set[Hashable] = set()
    for index, key in enumerate(keys, 1):
        if key in seen:
            raise ConfigError(f"{what} {key} appears twice", path=f"{path}[{index}]")
        seen.add(key)
