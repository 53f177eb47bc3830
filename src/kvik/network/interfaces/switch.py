"""One move of the host's address: from a physical interface to a bridge over it, or back. Blocking.

A `Switch` says what was before, whole, so that it can be undone by anybody who has it: from a file, by another process,
after a crash in the middle, more than once.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass

from kvik.errors import AlreadyExists, HostError, NotFound, OperationInvalid, ResourceBusy
from kvik.host.handover import PORT_GEN_MODE, Belongings, belongings, hand_over
from kvik.host.netlink import Netlink


@dataclass(slots=True)
class Switch:
    """`things` are the port's (to the bridge) or the bridge's (from it); `made`: the bridge did not exist before."""

    port: str
    bridge: str
    to_bridge: bool
    made: bool
    things: Belongings
    port_mode: int  # how the port makes its link-local address while it is no port

    @property
    def words(self) -> str:
        return (
            f"{self.port} into bridge {self.bridge}" if self.to_bridge else f"{self.port} out of bridge {self.bridge}"
        )


def plan_bridge(netlink: Netlink, port: str, bridge: str) -> Switch:
    """How `port` comes into `bridge` with all its addresses. Errors say what stands in the way."""
    things = belongings(netlink, port)
    link = netlink.link(port)
    if link.kind == "bridge" or port == "lo":
        raise OperationInvalid(f"{port} is {'a bridge' if link.kind else 'the loopback'} and cannot be put into one")
    if things.master:
        raise ResourceBusy(
            f"{port} is a part of {things.master} already",
            remedy=f"take it out first: kvik iface-unbridge {things.master}",
        )
    if link.mac in ("", "00:00:00:00:00:00"):
        raise OperationInvalid(f"{port} has no MAC address: it cannot be a port of a bridge")
    made = True
    try:
        there = netlink.link(bridge)
    except HostError as error:
        if error.errno != errno.ENODEV:
            raise
    else:
        made = False
        if there.kind != "bridge":
            raise AlreadyExists(f"{bridge} exists and is no bridge", remedy="choose another name")
    return Switch(port, bridge, True, made, things, things.gen_mode)


def plan_unbridge(netlink: Netlink, bridge: str) -> Switch:
    """How the one physical port of `bridge` gets its addresses back."""
    link = netlink.link(bridge)
    if link.kind != "bridge":
        raise OperationInvalid(f"{bridge} is no bridge")
    ports = [one for one in netlink.links() if one.master == link.index]
    machines = [one.name for one in ports if one.kind == "tun"]
    if machines:
        raise ResourceBusy(
            f"{bridge} has machines on it: {', '.join(machines[:8])}", remedy="stop them, or move their interfaces"
        )
    if len(ports) != 1:
        what = ", ".join(one.name for one in ports) or "none"
        raise OperationInvalid(
            f"{bridge} must have one port that its addresses go to; it has {what}",
            remedy="take the others out: kvik bridge delif" if ports else "delete it: kvik bridge del",
        )
    things = belongings(netlink, bridge)
    return Switch(ports[0].name, bridge, False, False, things, max(things.gen_mode, 0))


def apply(netlink: Netlink, switch: Switch) -> None:
    """Do it. `HostError`: the kernel's first refusal; `undo` puts back what was done."""
    if switch.to_bridge:
        index = _bridge(netlink, switch)
        netlink.set_link(index, up=True)
        netlink.set_link(netlink.link(switch.port).index, up=True)
        _hand(netlink, switch, into=True)
    else:
        netlink.set_link(netlink.link(switch.port).index, up=True)
        _hand(netlink, switch, into=False)
        netlink.set_link(netlink.link(switch.bridge).index, up=False)


def undo(netlink: Netlink, switch: Switch) -> None:
    """Put back what was, however much of it was done and however often this is called."""
    if not switch.to_bridge:
        netlink.set_link(netlink.link(switch.bridge).index, up=True)
        _hand(netlink, switch, into=True)
        return
    _hand(netlink, switch, into=False)
    if not switch.things.up:
        netlink.set_link(netlink.link(switch.port).index, up=False)
    if switch.made:
        remove_bridge(netlink, switch.bridge)


def remove_bridge(netlink: Netlink, name: str) -> None:
    """Delete a bridge if it is there."""
    try:
        link = netlink.link(name)
    except HostError as error:
        if error.errno == errno.ENODEV:
            return
        raise
    if link.kind == "bridge":
        netlink.delete_link(link.index)


def _bridge(netlink: Netlink, switch: Switch) -> int:
    """The bridge's index. One that we make gets the port's MAC for good: without that it would take the lowest of
    its ports', which changes as machines come and go, and what the LAN knows of this host would be wrong."""
    try:
        return netlink.link(switch.bridge).index
    except HostError as error:
        if error.errno != errno.ENODEV:
            raise
    if not switch.made:
        raise NotFound(f"bridge {switch.bridge} is gone")
    link = netlink.add_link(switch.bridge, "bridge")
    netlink.set_link(link.index, mac=switch.things.mac)
    return link.index


def _hand(netlink: Netlink, switch: Switch, *, into: bool) -> None:
    source, target = (switch.port, switch.bridge) if into else (switch.bridge, switch.port)
    hand_over(
        netlink,
        switch.things,
        source,
        target,
        port=switch.port,
        master=switch.bridge if into else "",
        gen_mode=PORT_GEN_MODE if into else switch.port_mode,
    )
