"""The host's side of an interface while its machine runs: onto another bridge, with other walls, at another rate."""

from __future__ import annotations

import logging

from kvik.conf.devices.interface import Bandwidth, Interface
from kvik.errors import HostError, KvikError
from kvik.host.bridge import set_port
from kvik.host.netlink import Link, Netlink
from kvik.host.traffic import queues
from kvik.network.attachment import Attachment
from kvik.network.taps import bring_up, check_mtu, join_bridge, set_bandwidth

__all__ = ["change_tap", "put_back_tap", "reconnect_tap"]

logger = logging.getLogger(__name__)

BOUNDS = ("htb", "ingress")  # queueing disciplines of a bandwidth of ours


def reconnect_tap(interface: Interface, attachment: Attachment) -> None:
    """Put a running machine's tap on a bridge that was made anew. Raises `HostError`, `ConfigUnsupported`."""
    if attachment.kind != "bridge" or not _name(interface):
        return
    with Netlink() as netlink:
        tap = netlink.link(_name(interface))
        if tap.master != netlink.link(attachment.device).index:
            _move(netlink, tap, interface, attachment)


def put_back_tap(interface: Interface, attachment: Attachment) -> bool:
    """Make a running machine's tap what its live document says, wherever a daemon left it that was killed while it
    changed it. Whether it was elsewhere. Raises `HostError`, `ConfigUnsupported`."""
    if attachment.kind != "bridge" or not _name(interface):
        return False
    with Netlink() as netlink:
        tap = netlink.link(_name(interface))
        if tap.master != netlink.link(attachment.device).index or not tap.up:
            _change(netlink, tap, interface, None, attachment)
            return True
        set_port(netlink, tap.index, isolated=attachment.isolated)
        if attachment.bandwidth is not None or any(queue.kind in BOUNDS for queue in queues(netlink, tap.index)):
            set_bandwidth(netlink, tap.index, attachment.bandwidth or Bandwidth())
    return False


def change_tap(interface: Interface, before: Attachment | None, after: Attachment) -> None:
    """Make a running machine's tap what `after` says; on an error it is what it was, so far as `before` tells.

    Raises `HostError`, `ConfigUnsupported`. The caller has made sure that both are of one kind.
    """
    with Netlink() as netlink:
        tap = netlink.link(_name(interface))
        try:
            _change(netlink, tap, interface, before, after)
        except KvikError:
            if before is not None:
                try:
                    _change(netlink, tap, interface, after, before)
                except KvikError as error:
                    logger.warning("interface %s is not what it was: %s", tap.name, error)
            raise


def _change(netlink: Netlink, tap: Link, interface: Interface, before: Attachment | None, after: Attachment) -> None:
    if after.kind == "bridge":
        if before is None or _place(before) != _place(after):
            _move(netlink, tap, interface, after)
        elif before.isolated != after.isolated:
            set_port(netlink, tap.index, isolated=after.isolated)
    if before is None or before.bandwidth != after.bandwidth:
        bandwidth = after.bandwidth or Bandwidth()
        set_bandwidth(netlink, tap.index, bandwidth, swapped=after.kind == "macvtap")


def _place(attachment: Attachment) -> tuple[object, ...]:
    """What makes another port of it."""
    return attachment.device, attachment.vlan, attachment.static_fdb


def _move(netlink: Netlink, tap: Link, interface: Interface, attachment: Attachment) -> None:
    """A port is made anew, with nothing of what the one before had."""
    bridge = netlink.link(attachment.device)
    if bridge.kind != "bridge":
        raise HostError(f"cannot put {tap.name} on {bridge.name}: that is no bridge")
    check_mtu(netlink, attachment, tap.name)
    netlink.set_link(tap.index, up=False)  # nothing passes before its walls stand
    try:
        netlink.set_link(tap.index, master=0)
        if attachment.mtu is None and tap.mtu > bridge.mtu:
            logger.warning(
                "interface %s had an MTU of %d, bridge %s has only %d: the guest's longer frames are lost; "
                "give its card at most that in the guest",
                tap.name, tap.mtu, bridge.name, bridge.mtu,
            )  # fmt: skip
            netlink.set_link(tap.index, mtu=bridge.mtu)  # or the bridge, with all its ports, would come down to it
        netlink.set_link(tap.index, master=bridge.index)
        join_bridge(netlink, tap.index, attachment, interface)
    except KvikError:
        netlink.set_link(tap.index, master=0)  # without its walls it is on no bridge
        netlink.set_link(tap.index, up=True)
        raise
    bring_up(netlink, tap.index, attachment)


def _name(interface: Interface) -> str:
    return (interface.target.dev if interface.target is not None else None) or ""
