"""What changes in an interface while its machine runs: bridge or network, walls, bandwidth; and `domiftune`.

The link is the VMM's to set and the filter `filtering.py`'s; all else that can change is the host's side of it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from kvik.conf.codec import Element
from kvik.conf.devices.interface import Bandwidth, Interface, Rate
from kvik.conf.domain import Domain
from kvik.conf.network_validate import validate_bandwidth
from kvik.conf.tree import clone
from kvik.errors import ConfigError, InvalidArgument, KvikError, OperationUnsupported
from kvik.hypervisor.changes import check_interface, complete_change
from kvik.hypervisor.driver import Feature
from kvik.manager import filtering, ports
from kvik.manager.interfaces import SHOWN, on_switch
from kvik.network.attachment import Attachment, macvtap_mode, resolve
from kvik.network.tap_changes import change_tap

if TYPE_CHECKING:
    from kvik.manager.domain import DomainObject

__all__ = ["as_defined", "changed", "parameters", "set_parameters"]

LIVE, CONFIG = 1, 2
NAMES = {"inbound": ("average", "peak", "burst", "floor"), "outbound": ("average", "peak", "burst")}


@asynccontextmanager
async def changed(domain: DomainObject, old: object, new: object) -> AsyncIterator[None]:
    """The host's side of a running interface becomes what `new` says; on an error in the block it is as before.

    Raises `OperationUnsupported` for what cannot change, and as `resolve` and `change_tap` do; then nothing has.
    """
    if not isinstance(old, Interface) or not isinstance(new, Interface):
        yield
        return
    as_defined(old, new)
    complete_change(old, new)
    check_interface(old, new)
    if Feature.TAPS not in domain.driver.features():
        yield
        return
    if on_switch(domain.manager, old) or on_switch(domain.manager, new):
        _check_same(old, new, ("source", "bandwidth", "port", "vlan"), "a session's network")
        yield
        return
    if old.host_function:
        _check_same(old, new, ("source", "bandwidth", "port", "vlan"), f"PCI device {old.host_function}")
        new.source = old.source
        yield
        return
    networks = domain.manager.networks
    before: Attachment | None
    after: Attachment | None
    if old.is_macvtap:
        _check_same_device(old, new)
        before, after = _on_device(domain, old), _on_device(domain, new)
    else:
        before, after = _before(domain, old), resolve(_with_its_ids(old, new), networks)
    if after is None:
        _check_same(old, new, ("source", "bandwidth", "port", "vlan"), "such an interface")
        yield
        return
    after = _check(old, before, after)
    joined = after.network and after.port_id != _port_id(old)
    ports.say(domain, new, after)
    if joined:
        networks.lookup_name(after.network).connect(after.port_id, domain.name)
    run = domain.manager.store.run
    try:
        await _promise(domain, new, after)
        await run(change_tap, new, before, after)
        moved = before is None or before.device != after.device
        try:
            if moved and old.filterref == new.filterref:  # else it gets a new filter, where it is now
                await filtering.follow(domain, new)
            yield
        except BaseException:
            if before is not None:
                await run(change_tap, old, after, before)
                if moved:
                    await filtering.follow(domain, old)
            raise
    except BaseException:
        if joined:
            networks.lookup_name(after.network).disconnect(after.port_id)
            await _keep_promises(domain, after)
        elif before is not None:
            await _promise(domain, old, before)
        raise
    if _port_id(old) and _port_id(old) != after.port_id:
        ports.leave(domain, [old])
        if before is not None:
            await _keep_promises(domain, before)


def as_defined(old: Element, new: Element) -> None:
    """Whoever took `new` from the document of a running machine (`interfaces.shown`) means the network it is on."""
    if not isinstance(old, Interface) or not isinstance(new, Interface) or old.type != "network":
        return
    one, other = old.source, new.source
    if new.type in SHOWN and one is not None and other is not None and other.network and one.network == other.network:
        new.type = "network"


async def _promise(domain: DomainObject, interface: Interface, attachment: Attachment) -> None:
    """The guaranteed rate on its network, or none; `ResourceBusy` if there is not as much left."""
    if attachment.network:
        network = domain.manager.networks.lookup_name(attachment.network)
        network.promise(attachment.port_id, ports.mac_of(interface), attachment.floor)
        await network.keep_promises()


async def _keep_promises(domain: DomainObject, attachment: Attachment) -> None:
    if attachment.network:
        await domain.manager.networks.lookup_name(attachment.network).keep_promises()


def _before(domain: DomainObject, old: Interface) -> Attachment | None:
    """None if it cannot be told any more: its network was stopped, say. Then everything is set anew."""
    try:
        found = resolve(clone(old), domain.manager.networks)
    except KvikError:
        return None
    bridge = old.source.bridge if old.source is not None else None
    if found is None or (bridge and bridge != found.device):
        return None  # its network has another bridge by now
    return replace(found, port_id=_port_id(old))


def _on_device(domain: DomainObject, interface: Interface) -> Attachment:
    """Of a macvtap: where it is, whatever a pool would give it now."""
    source, bandwidth = interface.source, interface.bandwidth
    network = (source.network if source is not None and interface.type == "network" else None) or ""
    if bandwidth is None and network and source is not None:
        group = domain.manager.networks.lookup_name(network).document.portgroup(source.portgroup)
        bandwidth = group.bandwidth if group is not None else None
    return Attachment(
        "macvtap",
        device=(source.dev if source is not None else None) or "",
        mode=macvtap_mode(source.mode if source is not None else None),
        network=network,
        port_id=_port_id(interface),
        virtualport=interface.virtualport,
        bandwidth=bandwidth,
    )


def _with_its_ids(old: Interface, new: Interface) -> Interface:
    """Whoever writes a document need not know by which id Open vSwitch knows the port."""
    one, other = old.source, new.source
    same = one is not None and other is not None and one.network == other.network and other.bridge in (None, one.bridge)
    mine, given = old.virtualport, new.virtualport
    if same and mine is not None and (given is None or (given.type == mine.type and given.parameters is None)):
        new.virtualport = clone(mine)
    return new


def _port_id(interface: Interface) -> str:
    return (interface.source.portid if interface.source is not None else None) or ""


def _check(old: Interface, before: Attachment | None, after: Attachment) -> Attachment:
    alias = old.alias.name if old.alias else ""
    if before is not None and before.kind != after.kind:
        raise OperationUnsupported(
            f"interface {alias} cannot go from a port of kind {before.kind} to one of kind {after.kind} while the "
            "machine runs",
            remedy="detach it and attach it anew",
        )
    if before is not None and after.kind == "openvswitch":
        for field in ("device", "vlan", "virtualport"):
            if getattr(before, field) != getattr(after, field):
                what = "bridge" if field == "device" else field
                raise OperationUnsupported(
                    f"the {what} of interface {alias} on Open vSwitch cannot change while the machine runs",
                    remedy="detach it and attach it anew, or set the port with ovs-vsctl",
                )
    same_network = old.type == "network" and old.source is not None and old.source.network == after.network
    return replace(after, port_id=_port_id(old)) if same_network and _port_id(old) else after


def _check_same(old: Interface, new: Interface, fields: tuple[str, ...], what: str) -> None:
    for field in fields:
        one, other = getattr(old, field), getattr(new, field)
        if field == "source" and one is not None and other is not None:
            one, other = (one.network, one.portgroup), (other.network, other.portgroup)
        if one != other:
            raise OperationUnsupported(
                f"the {field} of interface {old.alias.name if old.alias else ''} cannot change while the machine runs: "
                f"it is on {what}",
                remedy="detach it and attach it anew, or change the definition (--config)",
            )


def _check_same_device(old: Interface, new: Interface) -> None:
    """A macvtap stays where it was made; whoever writes the document need not know which of a pool it got."""
    one, other = old.source, new.source
    if one is None or other is None:
        return
    same = one.network == other.network and one.portgroup == other.portgroup
    same = same and other.dev in (None, one.dev) and other.mode in (None, one.mode)
    if not same or old.vlan != new.vlan or old.filterref != new.filterref:
        raise OperationUnsupported(
            f"interface {old.alias.name if old.alias else ''} stands on {one.dev}: only its link and its bandwidth can "
            "change while the machine runs",
            remedy="detach it and attach it anew, or change the definition (--config)",
        )
    new.source = old.source


# domiftune ------------------------------------------------------------------------------------------------------


def find(document: Domain, device: str) -> Interface:
    """By MAC address or the name of its host's side, as virsh does. `InvalidArgument` if there is none, or several."""
    found = [
        nic
        for nic in document.devices.interfaces
        if device
        and (
            (nic.mac is not None and nic.mac.address.lower() == device.lower())
            or (nic.target is not None and nic.target.dev == device)
        )
    ]
    if len(found) != 1:
        what = "is not a known interface" if not found else "means more than one interface"
        raise InvalidArgument(f"'{device}' {what}", remedy="'kvik domiflist' shows the interfaces")
    return found[0]


def parameters(document: Domain, device: str) -> list[tuple[str, int]]:
    """libvirt's virDomainGetInterfaceParameters: kilobytes a second, burst in KiB; 0 is no bound."""
    bandwidth = find(document, device).bandwidth or Bandwidth()
    return [
        (f"{direction}.{name}", getattr(getattr(bandwidth, direction), name, None) or 0)
        for direction, names in NAMES.items()
        for name in names
    ]


async def set_parameters(domain: DomainObject, device: str, values: Mapping[str, int], flags: int) -> None:
    """A direction of which anything is given becomes that and no more; an average of 0 ends its bound."""
    impact = domain.impact(flags)

    async def live() -> None:
        machine, run = domain.require_machine(), domain.run
        assert run is not None
        old = find(run.live, device)
        new = clone(old)
        new.bandwidth = _tuned(old.bandwidth, values)
        async with changed(domain, old, new):
            await machine.update_device(old, new)
        if domain.run is run:
            interfaces = run.live.devices.interfaces
            interfaces[interfaces.index(old)] = new
            domain.live_changed()
            await domain.save_status()

    if not impact & CONFIG:
        await live()
        return
    async with domain.manager.editing(domain) as document:
        # The definition has no name of the tap yet: what is meant by one is known by the running machine.
        mac = find(domain.live, device).mac if domain.live is not None and ":" not in device else None
        nic = find(document, mac.address if mac is not None else device)
        nic.bandwidth = _tuned(nic.bandwidth, values)
        if impact & LIVE:
            await live()


def _tuned(old: Bandwidth | None, values: Mapping[str, int]) -> Bandwidth | None:
    made = clone(old) if old is not None else Bandwidth()
    for direction, names in NAMES.items():
        given = {name: values[key] for name in names if (key := f"{direction}.{name}") in values}
        if not given:
            continue
        rate = Rate()
        for name, value in given.items():
            setattr(rate, name, value or None)
        setattr(made, direction, rate if rate.average or rate.floor else None)
        if not (rate.average or rate.floor) and any(given.values()):
            raise InvalidArgument(f"peak and burst of {direction} need an average")
    try:
        validate_bandwidth(made, "bandwidth", floor=True)
    except ConfigError as error:
        raise InvalidArgument(error.message) from error
    return made if made.inbound is not None or made.outbound is not None else None
