"""A machine's port on a bridge with the kernel's spanning tree: one that forwards as soon as it is up.

RSTP has edge ports for end stations (IEEE 802.1D-2004, 17.13.1, AdminEdgePort); the kernel's STP has none. A port that
comes up is silent for two forwarding delays of at least 2 s each, while a machine asks for its address in vain, and its
state cannot be set (br_set_port_state: EBUSY). But a port that comes up while the protocol is off forwards at once, and
goes on when it is switched on again (net/bridge/br_stp.c, br_make_forwarding). BPDUs that come from there block it, as
on any port.

The other ports keep their states: to switch STP off changes none of them, and a loop through a guest stays cut.
"""

from __future__ import annotations

import threading

from kvik.host.bridge import read_bridge, set_bridge
from kvik.host.netlink import Netlink

__all__ = ["bring_up_at_once"]

_one_at_a_time = threading.Lock()  # or one would find STP off that another has switched off for its own port


def bring_up_at_once(netlink: Netlink, index: int, bridge: str) -> None:
    """Set a port of `bridge` up; it forwards when this returns, with STP or without. Raises `HostError`.

    STP is off meanwhile, for less than a millisecond: who is killed then leaves it off.
    """
    with _one_at_a_time:
        found = read_bridge(netlink, bridge)
        if found.stp_by != "kernel":  # off; or a daemon's, which knows edge ports itself
            netlink.set_link(index, up=True)
            return
        set_bridge(netlink, found.link.index, stp=False)
        try:
            netlink.set_link(index, up=True)
        finally:
            set_bridge(netlink, found.link.index, stp=True)
