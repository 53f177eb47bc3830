"""Aliases: the name by which a device is known to the VMM and in events. They are given when a machine starts.

A user's own alias begins with `ua-` and survives; all others are made here, and again at the next start.
"""

from __future__ import annotations

from kvik.conf.addresses import target_index
from kvik.conf.devices.common import Address, Alias, Device
from kvik.conf.devices.controller import Controller
from kvik.conf.devices.disk import Disk
from kvik.conf.devices_xml import FIELDS, device_list
from kvik.conf.domain import Devices, Domain
from kvik.conf.machine import I440FX, Q35, family

USER_PREFIX = "ua-"
_PREFIX = {
    "interface": "net",
    "memory": "dimm",
    "redirdev": "redir",
    "filesystem": "fs",
    "sound": "sound",
    "vsock": "vsock",
}


def _stem(kind: str, device: Device) -> str:
    """The alias without number, or the whole alias of a device that numbers itself in another way."""
    if kind == "disk":
        return ""
    if kind == "memory":
        model = str(getattr(device, "model", "dimm"))
        return {"nvdimm": "nvdimm", "virtio-mem": "virtiomem", "virtio-pmem": "virtiopmem", "sgx-epc": "epc"}.get(
            model, "dimm"
        )
    return _PREFIX.get(kind, kind)


def disk_alias(bus: str, dev: str, place: tuple[int, int, int, int]) -> str:
    """`virtio-disk0`, `ide0-1-0`, `scsi0-0-0-1`: libvirt's names, which tools look for in events."""
    controller, bus_number, target, unit = place
    if bus == "scsi":
        return f"scsi{controller}-{bus_number}-{target}-{unit}"
    if bus in ("ide", "sata", "fdc", "nvme"):
        return f"{bus}{controller}-{bus_number}-{unit}"
    return f"{bus}-disk{target_index(dev) or 0}"


def controller_alias(domain: Domain, kind: str, index: int, model: str) -> str:
    if kind == "pci":
        if model in ("pci-root", "pcie-root") or index == 0:
            return "pcie.0" if model == "pcie-root" else "pci.0" if index == 0 else f"pci.{index}"
        return f"pci.{index}"
    if kind in ("ide", "sata", "usb") and index == 0:
        return (
            "ide" if kind in ("ide", "sata") and _integrated(domain, kind) else "usb" if kind == "usb" else f"{kind}0"
        )
    return f"{kind}{index}"


def _integrated(domain: Domain, kind: str) -> bool:
    return (kind, family(domain)) in (("ide", I440FX), ("sata", Q35))


def assign_aliases(domain: Domain) -> None:
    """Every device has one afterwards; the console that mirrors a serial line shares its name."""
    taken: set[str] = set()
    for kind in FIELDS:
        for item in device_list(domain.devices, kind):
            if isinstance(item, Device) and item.alias is not None and item.alias.name:
                taken.add(item.alias.name)
    for kind in FIELDS:
        for item in device_list(domain.devices, kind):
            if isinstance(item, Device):
                _assign(domain, kind, item, taken)


def _assign(domain: Domain, kind: str, device: Device, taken: set[str]) -> None:
    if device.alias is not None and device.alias.name:
        return
    name = _fixed_name(domain, kind, device)
    if not name or (name in taken and kind != "console"):
        stem = _stem(kind, device) or "disk"
        name = next(f"{stem}{number}" for number in range(len(taken) + 1) if f"{stem}{number}" not in taken)
    taken.add(name)
    device.alias = Alias(name=name)


def _fixed_name(domain: Domain, kind: str, device: Device) -> str:
    devices: Devices = domain.devices
    if isinstance(device, Disk):
        address = device.address or Address()
        place = (address.controller or 0, address.bus or 0, address.target or 0, address.unit or 0)
        return disk_alias(device.target.bus or "virtio", device.target.dev or "", place)
    if isinstance(device, Controller):
        return controller_alias(domain, device.type, device.index or 0, device.model or "")
    if kind == "console" and devices.consoles and device is devices.consoles[0] and devices.serials:
        target = devices.consoles[0].target
        serial = devices.serials[0].alias
        if (target is None or target.type == "serial") and serial is not None:
            return serial.name
    return ""
