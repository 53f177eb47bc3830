"""The host's side of a machine's interfaces: a tap for each one on a bridge, open until the VMM has it.

The kernel removes a tap with its last descriptor: when the VMM ends, however it ends, nothing stays. What would stay
(a macvtap, a port's record in Open vSwitch's database) is taken away by `release_taps`, from the live document alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack

from kvik.conf.devices.interface import Bandwidth, Interface, InterfaceTarget, Vlan
from kvik.conf.devices.interface import Rate as GivenRate
from kvik.errors import ConfigUnsupported, KvikError
from kvik.host import openvswitch, sriov
from kvik.host.bridge import NO_VLAN_FILTERING, read_bridge, set_bridge, set_port
from kvik.host.bridge_vlan import add_vlan, delete_vlan
from kvik.host.edge_port import bring_up_at_once
from kvik.host.macvtap import create_macvtap, delete_macvtap
from kvik.host.neighbour import add_fdb
from kvik.host.netlink import Netlink
from kvik.host.tap import Tap, create_tap
from kvik.host.traffic import Rate, set_traffic, sweep_ifbs
from kvik.network.attachment import Attachment

__all__ = ["bring_up", "check_mtu", "join_bridge", "open_taps", "release_taps", "set_bandwidth"]

logger = logging.getLogger(__name__)

QUEUES_MAX = 256
_PATH = "/domain/devices/interface"


def open_taps(
    interfaces: Iterable[Interface],
    close: ExitStack,
    attachments: Mapping[str, Attachment],
    protect: Callable[[Interface], None] | None = None,
) -> dict[str, int]:
    """ "net:ALIAS:N" -> descriptor of queue N; `close` closes ours. Writes each tap's name into the live document.

    `attachments` are those of `resolve`, by alias; `protect` puts an interface whose tap is there, and still down,
    under its network filter. Raises `ConfigUnsupported`, `HostError`, `NoNetwork`, and as `protect` does; then `close`
    still takes back what was made. Blocks for about a millisecond each.
    """
    files: dict[str, int] = {}
    for interface in interfaces:
        alias = interface.alias.name if interface.alias else ""
        attachment = attachments.get(alias)
        if attachment is None or attachment.kind == "switch":
            continue
        _refuse_unkept_promises(interface, attachment, alias, filters=protect is not None)
        if attachment.kind == "hostdev":
            _take_function(interface, attachment)
            continue
        target = interface.target = interface.target or InterfaceTarget()
        with Netlink() as netlink:
            check_mtu(netlink, attachment, alias)
        tap = _make(interface, attachment, target.dev or "", alias)
        close.callback(tap.close)
        target.dev = tap.name  # whatever fails from here on, `release_taps` finds what was made
        with Netlink() as netlink:
            if attachment.kind == "bridge":
                join_bridge(netlink, tap.index, attachment, interface)
            elif attachment.kind == "openvswitch":
                _join_openvswitch(tap.name, attachment, interface)
                if attachment.mtu is not None:
                    netlink.set_link(tap.index, mtu=attachment.mtu)  # the switch gives a port that of its bridge
            if attachment.bandwidth is not None:
                set_bandwidth(netlink, tap.index, attachment.bandwidth, swapped=attachment.kind == "macvtap")
            if protect is not None and attachment.kind != "macvtap":
                protect(interface)
            bring_up(netlink, tap.index, attachment)
        files |= {f"net:{alias}:{number}": fd for number, fd in enumerate(tap.fds)}
    return files


def _take_function(interface: Interface, attachment: Attachment) -> None:
    """A PCI function for the guest alone: with its address, in its VLAN, and away from the host's driver."""
    sriov.check_assignable(attachment.device, managed=attachment.managed)
    tags = attachment.vlan.tags if attachment.vlan is not None else []
    if interface.mac is not None:
        with Netlink() as netlink:
            vlan = tags[0].id if tags else 0
            sriov.set_address(netlink, attachment.device, interface.mac.address, vlan=vlan)
    if attachment.managed:
        sriov.take(attachment.device)


def _make(interface: Interface, attachment: Attachment, name: str, alias: str) -> Tap:
    """The tap, down: nothing passes before its walls stand."""
    queues = _queues(interface, alias)
    if attachment.kind == "macvtap":
        if interface.mac is None:
            raise ConfigUnsupported(f"interface {alias} of type direct has no MAC address", path=f"{_PATH}/mac")
        return create_macvtap(
            attachment.device,
            attachment.mode or "vepa",
            name=name,
            mac=interface.mac.address,
            queues=queues,
            mtu=attachment.mtu,
            up=False,
        )
    return create_tap(
        name,
        bridge=attachment.device if attachment.kind == "bridge" else None,
        queues=queues,
        mac=_host_side(interface.mac.address) if interface.mac else None,
        mtu=attachment.mtu,
        up=False,
    )


def bring_up(netlink: Netlink, index: int, attachment: Attachment) -> None:
    """Set a machine's interface up, on a port that forwards as soon as its network wants. Raises `HostError`."""
    if attachment.kind == "bridge" and attachment.at_once:
        bring_up_at_once(netlink, index, attachment.device)
    else:
        netlink.set_link(index, up=True)


def release_taps(interfaces: Iterable[Interface]) -> None:
    """Take away what a machine that has ended left on the host; what is gone already does not matter. Never raises."""
    try:
        with Netlink() as netlink:
            for interface in interfaces:
                name = interface.target.dev if interface.target is not None else None
                try:
                    if name and on_openvswitch(interface):
                        openvswitch.delete_port(name)
                    elif interface.host_function and interface.managed:
                        sriov.give_back(interface.host_function)
                    elif name and interface.is_macvtap and interface.mac is not None:
                        delete_macvtap(netlink, name, interface.mac.address)
                except KvikError as error:
                    logger.warning("interface %s: %s", name, error)
            sweep_ifbs(netlink)  # the kernel removes a tap with its machine, but not the IFB of its bandwidth
    except KvikError as error:
        logger.warning("%s", error)


def set_bandwidth(netlink: Netlink, index: int, bandwidth: Bandwidth, *, swapped: bool = False) -> None:
    """Bound a tap's bandwidth. `swapped` for a macvtap: what the host receives on it, the machine does; of a tap it is
    what the machine sends."""
    inbound, outbound = _rate(bandwidth.inbound), _rate(bandwidth.outbound)
    if swapped:
        inbound, outbound = outbound, inbound
    set_traffic(netlink, index, inbound=inbound, outbound=outbound)


def _rate(given: GivenRate | None) -> Rate | None:
    if given is None or given.average is None:
        return None
    return Rate(given.average, given.peak or 0, given.burst or 0)


def _join_openvswitch(name: str, attachment: Attachment, interface: Interface) -> None:
    """https://docs.openvswitch.org/en/latest/howto/libvirt/"""
    port = attachment.virtualport
    parameters = port.parameters if port is not None else None
    ids = {"attached-mac": interface.mac.address if interface.mac else "", "iface-status": "active"}
    if parameters is not None and parameters.interfaceid:
        ids["iface-id"] = parameters.interfaceid
    if parameters is not None and parameters.profileid:
        ids["port-profile"] = parameters.profileid
    mode, tag, trunks = openvswitch_vlans(attachment.vlan)
    openvswitch.add_port(attachment.device, name, vlan_mode=mode, tag=tag, trunks=trunks, external_ids=ids)


def openvswitch_vlans(vlan: Vlan | None) -> tuple[openvswitch.VlanMode | None, int | None, list[int]]:
    """(mode, tag, trunks) of a port, as ovs-vswitchd.conf.db(5) describes them."""
    if vlan is None or not vlan.tags:
        return None, None, []
    if not vlan.trunk and len(vlan.tags) == 1 and vlan.tags[0].native_mode is None:
        return None, vlan.tags[0].id, []  # access, as a tag alone means
    native = next((tag for tag in vlan.tags if tag.native_mode is not None), None)
    trunks = [tag.id for tag in vlan.tags]
    if native is None:
        return "trunk", None, trunks
    return ("native-tagged" if native.native_mode == "tagged" else "native-untagged"), native.id, trunks


def join_bridge(netlink: Netlink, index: int, attachment: Attachment, interface: Interface) -> None:
    alias = _alias(interface)
    if attachment.isolated:
        set_port(netlink, index, isolated=True)
    if attachment.vlan is not None:
        _join_vlans(netlink, index, attachment, attachment.vlan, alias)
    if attachment.static_fdb and interface.mac is not None:
        set_port(netlink, index, learning=False, flood=False)
        add_fdb(netlink, index, interface.mac.address, replace=True)


def check_mtu(netlink: Netlink, attachment: Attachment, alias: str) -> None:
    """Before it is a port. ConfigUnsupported if frames of the machine would not fit onto the bridge."""
    if attachment.mtu is None or attachment.kind != "bridge":
        return
    bridge = netlink.link(attachment.device)
    if bridge.mtu < attachment.mtu:
        raise ConfigUnsupported(
            f"interface {alias} has an MTU of {attachment.mtu}, bridge {bridge.name} only {bridge.mtu}: "
            "longer frames would be lost",
            path="/domain/devices/interface/mtu/@size",
            remedy=f"give the interface at most {bridge.mtu}, or the bridge and all its ports more",
        )
    if bridge.mtu > attachment.mtu:
        logger.warning(
            "interface %s has an MTU of %d, bridge %s %d: longer frames of others to it are lost%s; "
            "give both the same (<mtu size='%d'/>)",
            alias, attachment.mtu, bridge.name, bridge.mtu,
            # br_mtu_auto_adjust() in net/bridge/br_if.c: until somebody sets it, a bridge has the least of its ports'
            "" if attachment.owns_bridge else ", and unless its MTU was set by hand the bridge comes down to that, too",
            bridge.mtu,
        )  # fmt: skip


def _join_vlans(netlink: Netlink, index: int, attachment: Attachment, vlan: Vlan, alias: str) -> None:
    """A port of those VLANs and no other; the bridge's own port stays in its default one."""
    bridge = read_bridge(netlink, attachment.device)
    if not bridge.vlan_filtering:
        if not attachment.owns_bridge:
            raise ConfigUnsupported(
                f"interface {alias} wants VLANs, and bridge {bridge.name} does not filter them",
                path="/domain/devices/interface/vlan",
                remedy=f"ip link set {bridge.name} type bridge vlan_filtering 1, unless {NO_VLAN_FILTERING}",
            )
        set_bridge(netlink, bridge.index, vlan_filtering=True)
    if bridge.vlan_default_pvid:
        delete_vlan(netlink, index, bridge.vlan_default_pvid)
    access = len(vlan.tags) == 1 and not vlan.trunk and vlan.tags[0].native_mode is None
    for tag in vlan.tags:
        native = access or tag.native_mode is not None
        add_vlan(netlink, index, tag.id, pvid=native, untagged=access or tag.native_mode == "untagged")


def on_openvswitch(interface: Interface) -> bool:
    """Whether the live document says so: its virtualport, completed from the network's when it was attached."""
    return interface.virtualport is not None and interface.virtualport.type == "openvswitch"


def _alias(interface: Interface) -> str:
    return interface.alias.name if interface.alias else "(without an alias)"


def _refuse_unkept_promises(interface: Interface, attachment: Attachment, alias: str, *, filters: bool) -> None:
    """What is not done here yet and would be missed: a wall, or a way out."""
    bandwidth, port = attachment.bandwidth, attachment.virtualport
    on_device = attachment.kind in ("macvtap", "hostdev")
    kept = {
        "filterref": interface.filterref if not filters or on_device else None,
        "vlan": attachment.vlan is not None and attachment.kind in ("none", "macvtap"),
        "vlan trunk='yes'": attachment.kind == "hostdev"
        and attachment.vlan is not None
        and len(attachment.vlan.tags) > 1,
        "bandwidth": attachment.kind == "hostdev" and bandwidth is not None,
        "virtualport": port is not None and port.type not in (None, "none", "openvswitch"),
        "inbound floor=": not attachment.floor
        and bandwidth is not None
        and bandwidth.inbound is not None
        and bandwidth.inbound.floor,
        "port isolated='yes'": attachment.isolated and attachment.kind != "bridge",
    }
    for name, value in kept.items():
        if value:
            raise ConfigUnsupported(
                f"interface {alias}: <{name}> is not supported "
                + ("on a device of the host: there is no bridge that could" if on_device else "here"),
                path=_PATH,
            )


def _queues(interface: Interface, alias: str) -> int:
    queues = (interface.driver.queues if interface.driver else None) or 1
    if queues > QUEUES_MAX:
        raise ConfigUnsupported(
            f"interface {alias} has {queues} queues; {QUEUES_MAX} are the most a tap can have",
            path="/domain/devices/interface/driver/@queues",
        )
    return queues


def _host_side(mac: str) -> str:
    """The guest's address with the highest first byte: a bridge takes the lowest of its ports' for its own."""
    return "fe" + mac[2:]
