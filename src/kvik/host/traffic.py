"""Bandwidth of an interface, by the kernel's traffic control (tc(8), linux/pkt_sched.h, linux/pkt_cls.h).

Directions are the machine's: `inbound` is what its tap sends to it, `outbound` what it sends. As libvirt does it:

    inbound     HTB at the tap's root, one class of rate `average`, and of `peak` for `burst` KiB; SFQ within
    outbound    the tap's ingress, where what is above the rate is dropped (police)

A kernel without a policer (CONFIG_NET_ACT_POLICE) gets the outbound frames through an intermediate interface, an IFB
named "ifb-INDEX", that has the HTB: there they wait instead of being dropped.
"""

from __future__ import annotations

import errno
import socket
import struct
from contextlib import ExitStack
from dataclasses import dataclass

from kvik.errors import HostError
from kvik.host.netlink import CREATE, DUMP, EXCL, Netlink
from kvik.host.netlink_attributes import attribute, attributes, text, u32, u32_attribute, unpack_head

NEWQDISC, DELQDISC, GETQDISC, NEWTCLASS, DELTCLASS, GETTCLASS, NEWTFILTER, DELTFILTER = 36, 37, 38, 40, 41, 42, 44, 45
_TC = struct.Struct("=BxxxiIII")  # tcmsg: family, index, handle, parent, info
_ROOT, _INGRESS = 0xFFFFFFFF, 0xFFFFFFF1
_KIND, _OPTIONS, _STATS2 = 1, 2, 7
_HTB_PARMS, _HTB_INIT, _HTB_RATE64, _HTB_CEIL64 = 1, 2, 6, 7
_RATE = struct.Struct("=BBHhHI")  # tc_ratespec: cell log, link layer, overhead, cell align, mpu, bytes a second
ROOT_HANDLE = 1 << 16  # "1:"
WHOLE, REST = 1, 2  # classes 1:1, and of a network's bridge 1:2, as libvirt numbers them
_ETHERNET = 1  # TC_LINKLAYER_ETHERNET: the kernel computes, and asks for no table of times
_U32_CLASSID, _U32_SEL, _U32_ACT = 1, 5, 7
_ACT_KIND, _ACT_OPTIONS = 1, 2
_POLICE_TBF, _POLICE_RATE, _POLICE_RATE64 = 1, 2, 8
_MIRRED_PARMS, _EGRESS_REDIRECT = 2, 1
_SHOT, _STOLEN = 2, 4  # TC_ACT_*
_ETH_P_ALL = 3
_TICK_NS = 64  # PSCHED_SHIFT 6
_LARGEST_FRAME = 1 << 20  # a segmentation-offloaded one: 64 KiB, with BIG TCP 512 KiB
_MTU = 1514
MAX_RATE = 0xFFFFFFFF  # kilobytes a second that a document can ask for


@dataclass(frozen=True, slots=True)
class Rate:
    """libvirt's <inbound> or <outbound>: `average` and `peak` in kilobytes (1000 bytes) a second, `burst` in KiB."""

    average: int
    peak: int = 0  # 0: no more than the average
    burst: int = 0  # 0: what the rate brings in 4 ms, and a frame


@dataclass(frozen=True, slots=True)
class Queue:
    """A queueing discipline or a class of one, with its counters."""

    index: int
    kind: str  # "htb", "ingress", "sfq", ...
    handle: str  # like "1:" or "1:1"
    parent: str
    bytes: int
    packets: int
    dropped: int
    overlimits: int
    backlog: int  # bytes that wait
    rate: int = 0  # of an HTB class: bytes a second
    ceiling: int = 0


def set_traffic(
    netlink: Netlink,
    index: int,
    *,
    inbound: Rate | None = None,
    outbound: Rate | None = None,
    floors: bool = False,
) -> None:
    """Bound an interface's bandwidth anew; None is no bound. On an error it has none, in either direction.

    With `floors`, of a network's bridge, parts of `inbound` can be promised to machines (`traffic_floor.py`).
    """
    for rate in (inbound, outbound):
        if rate is not None and not (0 < rate.average <= MAX_RATE and 0 <= rate.peak <= MAX_RATE and rate.burst >= 0):
            raise HostError(f"cannot set bandwidth: {rate} is out of range (1 to {MAX_RATE} kB/s)", errno=errno.EINVAL)
    clear_traffic(netlink, index)
    with ExitStack() as undo:
        undo.callback(clear_traffic, netlink, index)
        if inbound is not None:
            _shape(netlink, index, inbound, default=REST if floors else WHOLE)
            if floors:
                add_class(netlink, index, WHOLE, REST, inbound)
        if outbound is not None:
            _limit_outbound(netlink, index, outbound)
        undo.pop_all()


def clear_traffic(netlink: Netlink, index: int) -> None:
    """Take every bound of `set_traffic` away; no error if there is none."""
    for parent, handle in ((_ROOT, ROOT_HANDLE), (_INGRESS, 0xFFFF0000)):
        try:
            netlink.change(
                f"clear the bandwidth of interface {index}", DELQDISC, 0, _TC.pack(0, index, handle, parent, 0)
            )
        except HostError as error:
            if error.errno not in (errno.ENOENT, errno.EINVAL):  # none, or the default one, which has no handle
                raise
    sweep_ifbs(netlink, index)


def sweep_ifbs(netlink: Netlink, index: int = 0) -> None:
    """Delete the IFB of an interface, and those whose interface is gone: a tap goes with its machine, an IFB stays."""
    ours = [link for link in netlink.links(kind="ifb") if link.name.startswith("ifb-")]
    alive = {link.index for link in netlink.links()} if ours else set()
    for link in ours:
        of = link.name.removeprefix("ifb-")
        if of.isdigit() and (int(of) == index or int(of) not in alive):
            netlink.delete_link(link.index)


def queues(netlink: Netlink, index: int) -> list[Queue]:
    """The disciplines and classes of an interface, with their counters."""
    request = _TC.pack(socket.AF_UNSPEC, index, 0, 0, 0)
    answers = netlink.request("list queueing disciplines", GETQDISC, DUMP, request)
    answers += netlink.request("list traffic classes", GETTCLASS, DUMP, request)
    return [queue for answer in answers if (queue := parse_queue(answer)).index == index]


# How each is built


def _shape(netlink: Netlink, index: int, rate: Rate, *, default: int = WHOLE) -> None:
    """HTB with the class 1:1; what no filter sends elsewhere falls into 1:DEFAULT."""
    init = attribute(_HTB_INIT, struct.pack("=IIIII", 3, 10, default, 0, 0))  # tc_htb_glob: version, r2q, default
    _add(netlink, NEWQDISC, index, _ROOT, ROOT_HANDLE, "htb", init)
    add_class(netlink, index, 0, WHOLE, rate, leaf=default == WHOLE)


def add_class(netlink: Netlink, index: int, parent: int, number: int, rate: Rate, *, leaf: bool = True) -> None:
    """Class 1:NUMBER of the HTB below 1:PARENT (0: its root)."""
    options = class_options(rate)
    _add(netlink, NEWTCLASS, index, ROOT_HANDLE | parent, ROOT_HANDLE | number, "htb", options)
    if leaf:
        try:  # fair between flows; without it first come, first served
            sfq = struct.pack("=IiIII", 0, 10, 0, 0, 0)  # tc_sfq_qopt: a new hash every ten seconds
            _add(netlink, NEWQDISC, index, ROOT_HANDLE | number, (number + 1) << 16, "sfq", sfq)
        except HostError as error:
            if error.errno != errno.ENOENT:
                raise


def class_options(rate: Rate) -> bytes:
    """What a class of HTB is told."""
    average, peak = rate.average * 1000, max(rate.peak, rate.average) * 1000
    burst = rate.burst * 1024 or average // 250 + _MTU
    parms = _ratespec(average) + _ratespec(peak)
    quantum = min(max(average // 10, _MTU), 200_000)  # bytes in turn, where classes share what is left
    parms += struct.pack("=IIIII", _ticks(burst, average), _ticks(max(_MTU, peak // 250), peak), quantum, 0, 0)
    options = attribute(_HTB_PARMS, parms)
    if average > 0xFFFFFFFF:
        options += attribute(_HTB_RATE64, struct.pack("=Q", average))
    if peak > 0xFFFFFFFF:
        options += attribute(_HTB_CEIL64, struct.pack("=Q", peak))
    return options


def _limit_outbound(netlink: Netlink, index: int, rate: Rate) -> None:
    _add(netlink, NEWQDISC, index, _INGRESS, 0xFFFF0000, "ingress", b"")
    try:
        _filter_all(netlink, index, _police(rate))
    except HostError as error:
        if error.errno != errno.ENOENT:  # "Failed to load TC action module"
            raise
        with ExitStack() as undo:
            ifb = netlink.add_link(f"ifb-{index}", "ifb", up=True)
            undo.callback(netlink.delete_link, ifb.index)
            _shape(netlink, ifb.index, rate)
            _filter_all(netlink, index, _redirect(ifb.index))
            undo.pop_all()


def _add(  # noqa: PLR0917  the columns of a tcmsg
    netlink: Netlink, kind: int, index: int, parent: int, handle: int, name: str, options: bytes
) -> None:
    request = _TC.pack(0, index, handle, parent, 0) + attribute(_KIND, name.encode() + b"\0")
    request += attribute(_OPTIONS, options) if options else b""
    netlink.change(f"bound the bandwidth of interface {index} ({name})", kind, CREATE | EXCL, request)


def _filter_all(netlink: Netlink, index: int, action: bytes) -> None:
    """Let every frame that comes in at the ingress take an action: u32 that matches anything."""
    # tc_u32_sel: terminal, one key; key: mask 0, value 0
    selector = struct.pack("=BBBxHHhhI", 1, 0, 1, 0, 0, 0, 0, 0) + struct.pack("=IIii", 0, 0, 0, 0)
    options = u32_attribute(_U32_CLASSID, 0xFFFF0001) + attribute(_U32_SEL, selector)
    options += attribute(_U32_ACT, attribute(1, action))
    info = 1 << 16 | socket.htons(_ETH_P_ALL)  # priority 1
    request = _TC.pack(0, index, 0, 0xFFFF0000, info) + attribute(_KIND, b"u32\0") + attribute(_OPTIONS, options)
    netlink.change(f"bound the outbound bandwidth of interface {index}", NEWTFILTER, CREATE | EXCL, request)


def _police(rate: Rate) -> bytes:
    """The action that drops what is above the average, but for bursts."""
    average = rate.average * 1000
    burst = rate.burst * 1024 or average // 250 + 65536  # below one offloaded frame nothing would ever pass
    cell = (_LARGEST_FRAME >> 8).bit_length() - 1
    # tc_police: index, action, limit, burst, mtu, rate, peak rate, references, bindings, capabilities
    parms = struct.pack("=IiIII", 0, _SHOT, 0, _ticks(burst, average), _LARGEST_FRAME)
    parms += _ratespec(average, cell) + _RATE.pack(0, 0, 0, 0, 0, 0) + struct.pack("=iiI", 0, 0, 0)
    # This one still wants the time that a frame of each size takes (qdisc_get_rtab).
    times = struct.pack("=256I", *(_ticks((each + 1) << cell, average) for each in range(256)))
    options = attribute(_POLICE_TBF, parms) + attribute(_POLICE_RATE, times)
    if average > 0xFFFFFFFF:
        options += attribute(_POLICE_RATE64, struct.pack("=Q", average))
    return attribute(_ACT_KIND, b"police\0") + attribute(_ACT_OPTIONS, options)


def _redirect(index: int) -> bytes:
    # tc_mirred: index, capabilities, action, references, bindings; what to do, with which interface
    parms = struct.pack("=IIiiiiI", 0, 0, _STOLEN, 0, 0, _EGRESS_REDIRECT, index)
    return attribute(_ACT_KIND, b"mirred\0") + attribute(_ACT_OPTIONS, attribute(_MIRRED_PARMS, parms))


def _ratespec(rate: int, cell: int = 0) -> bytes:
    return _RATE.pack(cell, _ETHERNET, 0, -1, 0, min(rate, 0xFFFFFFFF))


def _ticks(size: int, rate: int) -> int:
    """How long `size` bytes take, in the scheduler's unit."""
    return min(size * 1_000_000_000 // rate // _TICK_NS, 0xFFFFFFFF)


def _handle(number: int) -> str:
    if number in (_ROOT, _INGRESS, 0):
        return {_ROOT: "root", _INGRESS: "ingress", 0: ""}[number]
    return f"{number >> 16:x}:" + (f"{number & 0xFFFF:x}" if number & 0xFFFF else "")


def parse_queue(data: bytes) -> Queue:
    """Decode an RTM_NEWQDISC or RTM_NEWTCLASS."""
    _, index, handle, parent, _ = unpack_head(_TC, data)
    found = attributes(data, _TC.size)
    stats = attributes(found.get(_STATS2, b""))
    basic, queue = stats.get(1, b""), stats.get(3, b"")  # gnet_stats_basic, gnet_stats_queue
    bytes_, packets = struct.unpack_from("=QI", basic) if len(basic) >= 12 else (0, 0)
    _, backlog, dropped, _, overlimits = struct.unpack_from("=5I", queue) if len(queue) >= 20 else (0,) * 5
    packets = int.from_bytes(stats[8][:8], "little") if len(stats.get(8, b"")) >= 8 else packets  # TCA_STATS_PKT64
    kind = text(found.get(_KIND, b""))
    options = attributes(found.get(_OPTIONS, b"")) if kind == "htb" else {}
    parms = options.get(_HTB_PARMS, b"")
    rate, ceiling = (u32(parms[8:]), u32(parms[20:])) if len(parms) >= 24 else (0, 0)
    return Queue(
        index=index,
        kind=kind,
        handle=_handle(handle),
        parent=_handle(parent),
        bytes=bytes_,
        packets=packets,
        dropped=dropped,
        overlimits=overlimits,
        backlog=backlog,
        rate=int.from_bytes(options.get(_HTB_RATE64, b"")[:8], "little") or rate,
        ceiling=int.from_bytes(options.get(_HTB_CEIL64, b"")[:8], "little") or ceiling,
    )
