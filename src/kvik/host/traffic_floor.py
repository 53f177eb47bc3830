"""Bandwidth of a network that is promised to machines: libvirt's <inbound floor=...>.

The network's bridge has HTB (`set_traffic(..., inbound=rate, floors=True)`), and below its class 1:1

    1:2          what is promised to nobody; everything falls into it that no filter sends elsewhere
    1:3 and up   one for each machine: at least its floor, and what is left up to the whole

A frame finds its machine's class by its target address. Numbers are the caller's (libvirt's `class_id`, in the status
document of the network), so they are known again after a restart.
"""

from __future__ import annotations

import errno
import socket
import struct
from contextlib import ExitStack

from kvik.errors import HostError
from kvik.host.netlink import CREATE, EXCL, Netlink
from kvik.host.netlink_attributes import attribute, parse_mac, u32_attribute
from kvik.host.traffic import (
    DELTCLASS,
    DELTFILTER,
    NEWTCLASS,
    NEWTFILTER,
    REST,
    ROOT_HANDLE,
    WHOLE,
    Rate,
    add_class,
    class_options,
)

_TC = struct.Struct("=BxxxiIII")  # tcmsg: family, index, handle, parent, info
_KIND, _OPTIONS = 1, 2
_U32_CLASSID, _U32_SEL = 1, 5
_TERMINAL = 1  # TC_U32_TERMINAL
FIRST, LAST = REST + 1, 0xFFFE


def add_floor(netlink: Netlink, bridge: int, number: int, mac: str, *, floor: int, whole: Rate) -> None:
    """Promise `floor` kilobytes a second of the network's `whole` to a machine; on an error nothing is promised."""
    most = max(whole.peak, whole.average)
    if not FIRST <= number <= LAST or not 0 < floor <= most:
        raise HostError(
            f"cannot promise {floor} kB/s as class {number}: it is 1 to {most} kB/s, {FIRST} to {LAST}",
            errno=errno.EINVAL,
        )
    target = parse_mac(mac)
    with ExitStack() as undo:
        add_class(netlink, bridge, WHOLE, number, Rate(floor, max(whole.peak, whole.average)))
        undo.callback(netlink.change, f"delete class {number}", DELTCLASS, 0, _class(bridge, number))
        # tc_u32_sel with two tc_u32_key; the target stands 14 bytes before the network header, words begin at 16
        keys = struct.pack(">II", 0xFFFF, int.from_bytes(target[:2], "big")) + struct.pack("=ii", -16, 0)
        keys += struct.pack(">II", 0xFFFFFFFF, int.from_bytes(target[2:], "big")) + struct.pack("=ii", -12, 0)
        selector = struct.pack("=BBBxHHhhI", _TERMINAL, 0, 2, 0, 0, 0, 0, 0) + keys
        options = u32_attribute(_U32_CLASSID, ROOT_HANDLE | number) + attribute(_U32_SEL, selector)
        request = _filter(bridge, number) + attribute(_OPTIONS, options)
        netlink.change(f"send {mac} to class {number} of interface {bridge}", NEWTFILTER, CREATE | EXCL, request)
        undo.pop_all()


def delete_floor(netlink: Netlink, bridge: int, number: int) -> None:
    """Take a promise back; no error if there is none."""
    for kind, request in ((DELTFILTER, _filter(bridge, number)), (DELTCLASS, _class(bridge, number))):
        try:
            netlink.change(f"delete class {number} of interface {bridge}", kind, 0, request)
        except HostError as error:
            if error.errno not in (errno.ENOENT, errno.EINVAL):
                raise


def set_rest(netlink: Netlink, bridge: int, average: int, *, whole: Rate) -> None:
    """What is promised to nobody, in kilobytes a second: the whole less all floors; at least 1."""
    options = class_options(Rate(max(average, 1), max(whole.peak, whole.average)))
    request = _TC.pack(0, bridge, ROOT_HANDLE | REST, ROOT_HANDLE | WHOLE, 0)
    request += attribute(_KIND, b"htb\0") + attribute(_OPTIONS, options)
    netlink.change(f"change class {REST} of interface {bridge}", NEWTCLASS, 0, request)


def _class(bridge: int, number: int) -> bytes:
    return _TC.pack(0, bridge, ROOT_HANDLE | number, 0, 0)


def _filter(bridge: int, number: int) -> bytes:
    """The filters of a priority, which is the class's number, so that each can be deleted by it."""
    info = number << 16 | socket.htons(3)  # ETH_P_ALL
    return _TC.pack(0, bridge, 0, ROOT_HANDLE, info) + attribute(_KIND, b"u32\0")
