"""The host's side of a machine's interfaces: a tap for each one on a bridge, open until the VMM has it.

The kernel removes a tap with its last descriptor: when the VMM ends, however it ends, nothing stays. What would stay
(a macvtap, a port's record in Open vSwitch's database) is taken away by `release_taps`, from the live document alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack

from kvik.conf.devices.interface import Interface, InterfaceTarget
from kvik.errors import ConfigUnsupported
from kvik.host.bridge import set_port
from kvik.host.netlink import Netlink
from kvik.host.tap import create_tap
from kvik.network.attachment import Attachment

__all__ = ["open_taps", "reconnect_tap"]

QUEUES_MAX = 256


def open_taps(
    interfaces: Iterable[Interface],
    close: ExitStack,
    attachments: Mapping[str, Attachment],
    protect: Callable[[Interface], None] | None = None,
) -> dict[str, int]:
    """ "net:ALIAS:N" -> descriptor of queue N; `close` closes ours. Writes each tap's name into the live document.

    `attachments` are those of `resolve_all`, by alias; `protect` puts an interface whose tap is there, and still down,
    under its network filter. Raises `ConfigUnsupported`, `HostError`, `NoNetwork`, and as `protect` does; then `close`
    still takes back what was made. Blocks for about a millisecond each.
    """
    files: dict[str, int] = {}
    for interface in interfaces:
        alias = interface.alias.name if interface.alias else ""
        attachment = attachments.get(alias)
        if attachment is None:
            continue
        _refuse_unkept_promises(interface, attachment, alias, filters=protect is not None)
        target = interface.target = interface.target or InterfaceTarget()
        tap = create_tap(
            target.dev or "",
            bridge=attachment.device if attachment.kind == "bridge" else None,
            queues=_queues(interface, alias),
            mac=_host_side(interface.mac.address) if interface.mac else None,
            mtu=attachment.mtu,
            up=False,  # nothing passes before its walls stand
        )
        close.callback(tap.close)
        with Netlink() as netlink:
            if attachment.kind == "bridge":
                _join_bridge(netlink, tap.index, attachment, alias)
            target.dev = tap.name
            if protect is not None:
                protect(interface)
            netlink.set_link(tap.index, up=True)
        files |= {f"net:{alias}:{number}": fd for number, fd in enumerate(tap.fds)}
    return files


def reconnect_tap(name: str, attachment: Attachment) -> None:
    """Put a running machine's tap on a bridge that was made anew. Raises `HostError`, `ConfigUnsupported`."""
    if attachment.kind != "bridge":
        return
    with Netlink() as netlink:
        tap, bridge = netlink.link(name), netlink.link(attachment.device)
        if tap.master == bridge.index:
            return
        netlink.set_link(tap.index, up=False)  # nothing passes before its walls stand
        netlink.set_link(tap.index, master=bridge.index)
        _join_bridge(netlink, tap.index, attachment, name)
        netlink.set_link(tap.index, up=True)


def _join_bridge(netlink: Netlink, index: int, attachment: Attachment, alias: str) -> None:
    if attachment.isolated:
        set_port(netlink, index, isolated=True)
    if attachment.mtu is not None and (bridge := netlink.link(attachment.device)).mtu < attachment.mtu:
        raise ConfigUnsupported(
            f"interface {alias} has an MTU of {attachment.mtu}, bridge {bridge.name} only {bridge.mtu}: "
            "longer frames would be lost",
            path="/domain/devices/interface/mtu/@size",
            remedy=f"give the interface at most {bridge.mtu}, or the bridge and all its ports more",
        )


def _refuse_unkept_promises(interface: Interface, attachment: Attachment, alias: str, *, filters: bool) -> None:
    """What is not done here yet and would be missed: a wall, or a way out."""
    if attachment.kind == "macvtap":
        raise ConfigUnsupported(
            f"interface {alias}: direct attachment (macvtap) is not supported yet",
            path="/domain/devices/interface/@type",
            remedy="use <interface type='user'>, or type='bridge' with a bridge of this host",
        )
    kept = {
        "filterref": interface.filterref if not filters else None,
        "vlan": attachment.vlan,
        "virtualport": attachment.virtualport,
        "bandwidth": attachment.bandwidth,
        "port isolated='yes'": attachment.isolated and attachment.kind != "bridge",
        "bridge macTableManager='libvirt'": attachment.static_fdb,
    }
    for name, value in kept.items():
        if value:
            raise ConfigUnsupported(
                f"interface {alias}: <{name}> is not supported yet", path="/domain/devices/interface"
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
