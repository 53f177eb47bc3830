"""Attach, detach and change devices: in the definition, in the running machine, or in both.

A device comes as a lone element. It is put into a copy of the document, which is completed and checked as a whole;
what the copy gave it (address, alias) is what the VMM is told. Detaching is the guest's to grant: the answer is an
event, and the call returns after a few seconds whether it came or not, as libvirt's does.
"""

from __future__ import annotations

import asyncio
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

import msgspec

from kvik.conf.codec import Element
from kvik.conf.devices.chardev import Chardev
from kvik.conf.devices.common import Device
from kvik.conf.devices.disk import Disk
from kvik.conf.devices.hostdev import Hostdev
from kvik.conf.devices.interface import Interface
from kvik.conf.devices.memory import Memballoon, Memory
from kvik.conf.devices.other import Filesystem, Lease
from kvik.conf.devices_xml import (
    FIELDS,
    add_device,
    device_list,
    format_device,
    guest_devices,
    kind_of,
    parse_device,
    remove_device,
)
from kvik.conf.domain import Domain
from kvik.errors import (
    AlreadyExists,
    ConfigUnsupported,
    InvalidArgument,
    NoDevice,
    OperationFailed,
    OperationUnsupported,
    ResourceBusy,
)
from kvik.host.reach import reach
from kvik.hypervisor.driver import Feature
from kvik.hypervisor.layers import next_index
from kvik.manager import disks, filtering, interface_changes, lease_changes, ports, prepare, volume_disks
from kvik.manager.interfaces import open_interfaces, plugged
from kvik.manager.secrets import open_secrets
from kvik.manager.storage import check_idle

if TYPE_CHECKING:
    from kvik.manager.domain import DomainObject
    from kvik.manager.run import Run

LIVE, CONFIG, FORCE = 1, 2, 4
REMOVAL_WAIT = 5.0  # seconds; libvirt's own figure


# Finding --------------------------------------------------------------------------------------------------------


def find(document: Domain, kind: str, given: Element) -> Element:
    """The device of the document that `given` means: by alias, target, MAC or address, else by being the same."""
    if isinstance(given, Lease):
        return lease_changes.find_lease(document, given)
    candidates = device_list(document.devices, kind)
    found = [device for device in candidates if _means(given, device)]
    if len(found) == 1:
        return found[0]
    what = _describe(kind, given)
    if not found:
        raise NoDevice(f"machine {document.name!r} has no {what}")
    raise OperationFailed(f"machine {document.name!r} has {len(found)} devices like {what}", remedy="give the alias")


def _means(given: Any, device: Any) -> bool:
    if isinstance(given, Device) and given.alias and given.alias.name:
        return isinstance(device, Device) and device.alias is not None and device.alias.name == given.alias.name
    if isinstance(given, Disk):
        return isinstance(device, Disk) and given.target.dev == device.target.dev
    if isinstance(given, Interface) and isinstance(device, Interface):
        if given.mac is not None:
            same = device.mac is not None and given.mac.address.lower() == device.mac.address.lower()
            return same and (given.address is None or _same_address(given, device))
        return given.address is not None and _same_address(given, device)
    if isinstance(given, Hostdev) and isinstance(device, Hostdev):
        return given.mode == device.mode and given.type == device.type and given.source == device.source
    if isinstance(given, Device) and isinstance(device, Device) and given.address is not None:
        return _same_address(given, device)
    if isinstance(given, Chardev) and isinstance(device, Chardev):
        return _same_line(given, device)
    if isinstance(given, Filesystem) and isinstance(device, Filesystem) and given.target and device.target:
        return given.target.dir == device.target.dir  # the guest knows it by that alone
    if isinstance(given, Memballoon) and isinstance(device, Memballoon):
        return True  # there is one at most
    if isinstance(given, Memory) and isinstance(device, Memory) and given.target and device.target:
        one, other = given.target, device.target
        return (given.model, one.size, one.block, one.node) == (device.model, other.size, other.block, other.node)
    return _bare(given) == _bare(device)


def _same_line(given: Any, device: Any) -> bool:
    """By what the guest sees; the host's side only as far as it is given: a path may have been chosen at the start."""
    if given.type != device.type or (given.source and given.source.path and given.source != device.source):
        return False
    if given.target is None or device.target is None:
        return given.target is None
    names = [name for name in given.target.__struct_fields__ if name != "state"]
    return all(getattr(given.target, name) in (None, getattr(device.target, name, None)) for name in names)


def _same_address(one: Device, other: Device) -> bool:
    if one.address is None or other.address is None or one.address.type != other.address.type:
        return False
    if one.address.type == "pci":
        return one.address.pci == other.address.pci
    return one.address == other.address


def _bare(device: Element) -> str:
    """The device's text without what the manager added."""
    _, copy = parse_device(format_device(device, secure=True))
    if isinstance(copy, Device):
        copy.alias = None
        copy.address = None
    return format_device(copy, secure=True, inactive=True)


def _describe(kind: str, given: Any) -> str:
    if isinstance(given, Device) and given.alias and given.alias.name:
        return f"{kind} with alias {given.alias.name!r}"
    if isinstance(given, Disk):
        return f"disk {given.target.dev!r}"
    if isinstance(given, Interface) and given.mac:
        return f"interface with MAC {given.mac.address}"
    return f"such {kind}"


def by_alias(document: Domain, alias: str) -> Device:
    for _, device in guest_devices(document.devices):
        if device.alias and device.alias.name == alias:
            return device
    raise NoDevice(f"machine {document.name!r} has no device with alias {alias!r}")


def _check_new(document: Domain, kind: str, given: Any) -> None:
    if isinstance(given, Disk) and any(given.target.dev == disk.target.dev for disk in document.devices.disks):
        raise AlreadyExists(f"machine {document.name!r} already has a disk {given.target.dev!r}")
    if isinstance(given, Interface) and given.mac:
        for other in document.devices.interfaces:
            if other.mac and other.mac.address.lower() == given.mac.address.lower():
                raise AlreadyExists(f"machine {document.name!r} already has an interface with MAC {given.mac.address}")


# Attaching ------------------------------------------------------------------------------------------------------


async def attach(domain: DomainObject, xml: str, flags: int) -> None:
    impact = domain.impact(flags)
    kind, given = parse_device(xml)
    if impact & LIVE:
        _check_hotplug(domain)
    if not impact & CONFIG:
        await _attach_live(domain, kind, given)
        return
    async with domain.manager.editing(domain) as document:
        _check_new(document, kind, given)
        add_device(document.devices, given)
        prepare.fill(document)
        if impact & LIVE:
            # The same MAC and address in both, where the definition had to choose them.
            _, same = parse_device(format_device(given, secure=True, inactive=True))
            await _attach_live(domain, kind, same)


def _check_hotplug(domain: DomainObject) -> None:
    domain.require_machine()
    if Feature.DEVICE_HOTPLUG not in domain.driver.features():
        raise OperationUnsupported(f"the VMM of machine {domain.name!r} takes no devices while it runs")


async def _attach_live(domain: DomainObject, kind: str, given: Element) -> None:
    machine = domain.require_machine()
    run = domain.run
    assert run is not None
    if isinstance(given, Lease):
        await lease_changes.attach(domain, given)
        return
    if run.arriving is not None:
        await settle(domain)
    if isinstance(given, Disk):
        volume_disks.resolve_disk(domain.manager, given)
    _check_new(run.live, kind, given)
    trial = run.live.copy()
    add_device(trial.devices, given)
    prepare.fill_live(trial)
    await domain.manager.driver_of(trial).validate(trial)
    known = {device.alias.name for _, device in guest_devices(run.live.devices) if device.alias}
    fresh = [device for _, device in guest_devices(trial.devices) if device.alias and device.alias.name not in known]
    use = None
    if isinstance(given, Disk):
        await reach(disks.check_disk, given, domain.name)
        use = await reach(disks.use_of, given)
        check_idle(domain.manager, [], [given])
        if use is not None:
            disks.check_unused([use], domain.manager.disk_uses(domain))
            check_idle(domain.manager, [use])
            run.uses.append(use)  # before the VMM opens it: nobody else gets it meanwhile
    try:
        # What the device needs (a controller that was not there) goes first.
        for device in sorted(fresh, key=lambda item: item is given):
            if device is not given and kind_of(device) == "controller" and getattr(device, "type", "") == "pci":
                raise ConfigUnsupported(
                    f"machine {domain.name!r} has no free PCI slot for another {kind}",
                    remedy="add PCI root ports to the definition and start the machine again",
                )
            attachments = {}
            if isinstance(device, Interface) and Feature.TAPS in domain.driver.features():
                attachments = ports.join(domain, [device])
            if isinstance(device, Disk) and device.source is not None:
                device.source.index = next_index(run.live.devices.disks)
            run.arriving = device
            await domain.save_status()  # the next daemon must know what to look for, should this one be killed
            with ExitStack() as taps:
                files: dict[str, int] = {}
                if isinstance(device, Interface):
                    files = await open_interfaces(domain, run.directory, [device], taps, attachments)
                if isinstance(device, Disk):
                    files = open_secrets(domain.manager.secrets, [device], taps)
                await machine.attach_device(device, files)
                if isinstance(device, Interface):
                    await plugged(domain, run.directory, device)
            _arrived(domain, run, device)
            run.arriving = None
    except BaseException:
        if isinstance(given, Interface):
            domain.manager.spawn(filtering.release(domain, [given]))
        # `arriving` stays: what could not be undone, for the monitor was lost, is cleared before the next attach.
        if use is not None:
            run.uses.remove(use)
        if isinstance(given, Interface):
            await asyncio.shield(ports.release(domain.manager, domain, [given]))
        raise
    finally:
        domain.live_changed()
        # If this fails, the status on disk still names the device, and the next daemon finds it.
        await domain.save_quietly()


def _arrived(domain: DomainObject, run: Run, device: Any) -> None:
    if domain.run is run:
        add_device(run.live.devices, device)
        domain.live_changed()
        if device.alias:
            domain.emit("device-added", dev_alias=device.alias.name)


async def settle(domain: DomainObject) -> None:
    """After the daemon was away: bring the live document and the VMM's devices together.

    A device that was being attached when the last daemon was killed is taken up if the VMM has it; otherwise what was
    prepared for it is removed, so that it can be attached again. A disk or interface that the guest let go meanwhile
    leaves the document.
    """
    machine, run = domain.require_machine(), domain.run
    assert run is not None
    plugged = await machine.devices()
    if plugged is None:
        run.arriving = None
        return
    device = run.arriving
    if device is not None:
        if device.alias and device.alias.name in plugged:
            _arrived(domain, run, device)
            if isinstance(device, Disk) and (use := await reach(disks.use_of, device)):
                run.uses.append(use)
        else:
            await machine.clear_remains(device)
        run.arriving = None
    for item in (*run.live.devices.disks, *run.live.devices.interfaces):
        bus = item.target.bus if isinstance(item, Disk) else "pci"
        if (
            bus in ("virtio", "scsi", "usb", "pci")
            and item.alias
            and item.alias.name
            and item.alias.name not in plugged
        ):
            await machine.clear_remains(item)
            removed(domain, run, item.alias.name)
    await domain.save_quietly()


# Detaching ------------------------------------------------------------------------------------------------------


async def detach(domain: DomainObject, xml: str, flags: int) -> None:
    kind, given = parse_device(xml)
    await _detach(domain, flags, kind, given)


async def detach_alias(domain: DomainObject, alias: str, flags: int) -> None:
    if not alias:
        raise InvalidArgument("an alias is needed")
    document = domain.document(flags)
    device = by_alias(document, alias)
    await _detach(domain, flags, kind_of(device), device)


async def _detach(domain: DomainObject, flags: int, kind: str, given: Element) -> None:
    impact = domain.impact(flags)
    if impact & LIVE:
        _check_hotplug(domain)
    if not impact & CONFIG:
        await _detach_live(domain, kind, given)
        return
    async with domain.manager.editing(domain) as document:
        try:
            remove_device(document.devices, find(document, kind, _as_defined(domain, kind, given)))
        except NoDevice:
            if not impact & LIVE or not _has_live_alias(given):
                raise  # by its alias it may be a device that only the running machine has
        if impact & LIVE:
            await _detach_live(domain, kind, given)


def _has_live_alias(given: Any) -> bool:
    return isinstance(given, Device) and given.alias is not None and not given.alias.name.startswith("ua-")


def _as_defined(domain: DomainObject, kind: str, given: Element) -> Element:
    """Live aliases are not kept in definitions: what has one is looked for by what else is known of it."""
    if not _has_live_alias(given):
        return given
    known = given
    if domain.run is not None:
        with suppress(NoDevice):
            known = find(domain.run.live, kind, given)
    twin = msgspec.structs.replace(known)
    assert isinstance(twin, Device)
    twin.alias = None
    return twin


async def _detach_live(domain: DomainObject, kind: str, given: Element) -> None:
    machine = domain.require_machine()
    run = domain.run
    assert run is not None
    if isinstance(given, Lease):
        await lease_changes.detach(domain, given)
        return
    device = find(run.live, kind, given)
    if not isinstance(device, Device) or device.alias is None:
        raise ConfigUnsupported(f"a {kind} cannot be detached from a running machine")
    if isinstance(device, Disk) and device.target.dev in run.block_jobs:
        raise ResourceBusy(
            f"disk '{device.target.dev}' has an active block job",
            remedy=f"end it first: kvik blockjob {domain.name} {device.target.dev} --abort",
        )
    alias = device.alias.name
    waiting = run.removals.get(alias)
    if waiting is None:
        waiting = run.removals[alias] = asyncio.get_running_loop().create_future()
    try:
        await machine.detach_device(device)
        done, _ = await asyncio.wait({waiting}, timeout=REMOVAL_WAIT)
        if done and not waiting.result():
            raise OperationFailed(f"the guest of machine {domain.name!r} refused to let go of {alias}")
    finally:
        run.removals.pop(alias, None)


def removed(domain: DomainObject, run: Run, alias: str) -> None:
    """The VMM says that a device is gone, asked or not."""
    for _, device in list(guest_devices(run.live.devices)):
        if device.alias and device.alias.name == alias:
            remove_device(run.live.devices, device)
            if isinstance(device, Interface):
                domain.spawn(ports.release(domain.manager, domain, [device]))
            if isinstance(device, Disk):
                images = {use.path for use in disks.uses_of(device)}
                run.uses = [other for other in run.uses if other.path not in images]
            if isinstance(device, Interface):
                domain.spawn(filtering.release(domain, [device]))
            break
    domain.live_changed()
    waiting = run.removals.get(alias)
    if waiting and not waiting.done():
        waiting.set_result(True)
    domain.emit("device-removed", dev_alias=alias)
    domain.spawn(domain.save_quietly())


# Changing -------------------------------------------------------------------------------------------------------


async def update(domain: DomainObject, xml: str, flags: int) -> None:
    impact = domain.impact(flags)
    kind, given = parse_device(xml)
    if not impact & CONFIG:
        await _update_live(domain, kind, given)
        return
    async with domain.manager.editing(domain) as document:
        _, new = parse_device(format_device(given, secure=True))
        old = find(document, kind, _as_defined(domain, kind, new))
        if isinstance(new, Device) and _has_live_alias(new):
            new.alias = None
        interface_changes.as_defined(old, new)
        _replace(document, kind, old, new)
        prepare.fill(document)
        if impact & LIVE:
            await _update_live(domain, kind, given)


async def _update_live(domain: DomainObject, kind: str, given: Element) -> None:
    machine = domain.require_machine()
    run = domain.run
    assert run is not None
    old = find(run.live, kind, given)
    if isinstance(given, Disk) and isinstance(old, Disk):
        volume_disks.resolve_disk(domain.manager, given)
        await reach(disks.check_disk, given, domain.name)
        use = await reach(disks.use_of, given)
        check_idle(domain.manager, [], [given])
        if use is not None:
            disks.check_unused([use], domain.manager.disk_uses(domain))
            check_idle(domain.manager, [use])
    if isinstance(given, Device) and isinstance(old, Device):
        given.alias = old.alias
        given.address = given.address or old.address
    async with interface_changes.changed(domain, old, given), filtering.changed(domain, old, given):
        await machine.update_device(old, given)
    if domain.run is run:
        _replace(run.live, kind, old, given)
        await disks.renew_uses(run)
        domain.live_changed()
        await domain.save_status()


def _replace(document: Domain, kind: str, old: Element, new: Element) -> None:
    if isinstance(new, Device) and isinstance(old, Device):
        new.address = new.address or old.address
        new.alias = new.alias or old.alias
    field, many = FIELDS[kind]
    if many:
        items = getattr(document.devices, field)
        items[items.index(old)] = new
    else:
        setattr(document.devices, field, new)
