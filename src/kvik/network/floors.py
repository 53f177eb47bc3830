"""Guaranteed rates of interfaces on a network: libvirt's <inbound floor=...>.

    promise(status, port, mac, 500)          # memory: is there as much left? which traffic class is it?
    with Netlink() as netlink:
        keep(netlink, bridge.index, status)  # the kernel's classes become what the status says

What is promised stands in the network's status, so a restarted daemon knows whose each class is.
https://libvirt.org/formatnetwork.html#quality-of-service
"""

from __future__ import annotations

from kvik.conf.network import Network
from kvik.conf.network_status import NetworkStatus, PortFloor
from kvik.errors import ConfigUnsupported, ResourceBusy
from kvik.host.netlink import Netlink
from kvik.host.traffic import Rate, queues
from kvik.host.traffic_floor import FIRST, add_floor, delete_floor, set_rest

__all__ = ["break_promise", "check_floor", "keep", "promise"]


def whole(document: Network) -> Rate | None:
    """What the network has to share: its own inbound rate."""
    inbound = document.bandwidth.inbound if document.bandwidth is not None else None
    if inbound is None or inbound.average is None:
        return None
    return Rate(inbound.average, inbound.peak or 0, inbound.burst or 0)


def check_floor(document: Network, floor: int, who: str) -> None:
    """Whether the network has anything to promise parts of. `ConfigUnsupported`."""
    if not document.owns_bridge or whole(document) is None:
        reason = "has no inbound bandwidth of its own to promise a part of"
        remedy = "give its document <bandwidth><inbound average=.../></bandwidth>"
        if not document.owns_bridge:
            reason, remedy = "has a bridge or device that is not its own", "leave floor out"
        raise ConfigUnsupported(
            f"{who} is promised {floor} kB/s (floor), but network {document.name!r} {reason}",
            path="/domain/devices/interface/bandwidth/inbound/@floor",
            remedy=remedy,
        )


def promise(status: NetworkStatus, port: str, mac: str, floor: int) -> bool:
    """Note a promise, in place of what this port had; a floor of 0 is none. False if that changes nothing.

    Raises `ResourceBusy` if it is more than what is left, or no class is left; then the old one stands.
    """
    before = next((each for each in status.port_floors if each.port == port), None)
    if (before.floor if before is not None else 0) == floor:
        return False
    total = sum(each.floor for each in status.port_floors if each is not before)
    rate = whole(status.document)
    limit = max(rate.peak, rate.average) if rate is not None else 0  # libvirt's measure
    if floor and total + floor > limit:
        raise ResourceBusy(
            f"network {status.document.name!r} cannot promise {floor} kB/s to {mac}: of its {limit} kB/s, {total} are "
            "promised already",
            remedy="ask for less, stop a machine that has a part, or give the network more inbound bandwidth",
        )
    break_promise(status, port)  # its class is free again: taking one cannot fail that could be taken before
    if floor:
        status.port_floors.append(PortFloor(port=port, mac=mac.lower(), number=status.take_class(), floor=floor))
        status.add_floor(floor)
    return True


def break_promise(status: NetworkStatus, port: str) -> bool:
    """Whether there was one."""
    for each in status.port_floors:
        if each.port == port:
            status.port_floors.remove(each)
            status.free_class(each.number)
            status.add_floor(-each.floor)
            return True
    return False


def keep(netlink: Netlink, bridge: int, status: NetworkStatus) -> None:
    """Have the kernel's classes as promised, whatever there is of them. Raises `HostError`."""
    rate = whole(status.document)
    if rate is None:
        return
    wanted = {each.number: each for each in status.port_floors}
    there = {}
    for queue in queues(netlink, bridge):
        major, _, minor = queue.handle.partition(":")
        if queue.kind == "htb" and major == "1" and minor and int(minor, 16) >= FIRST:
            there[int(minor, 16)] = queue.rate
    for number, bytes_ in there.items():
        if number not in wanted or wanted[number].floor * 1000 != bytes_:
            delete_floor(netlink, bridge, number)
    for number, each in wanted.items():
        if there.get(number) != each.floor * 1000:
            add_floor(netlink, bridge, number, each.mac, floor=each.floor, whole=rate)
    set_rest(netlink, bridge, rate.average - sum(each.floor for each in wanted.values()), whole=rate)
