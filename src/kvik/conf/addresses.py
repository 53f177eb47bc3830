"""Addresses of devices that do not sit on PCI: drives on their controllers, ports of virtio-serial, ports of USB; and
the one entry for all of them.

As on PCI, what has an address keeps it. Without `grow` (a running machine), nothing is added that was not asked for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from kvik.conf.devices.common import Address, Device
from kvik.conf.devices.controller import Controller
from kvik.conf.devices.disk import Disk
from kvik.conf.devices.other import Hub
from kvik.conf.devices_xml import path_of
from kvik.conf.domain import Devices, Domain
from kvik.conf.machine import MMIO, family
from kvik.conf.pci import assign_pci, pci_devices
from kvik.errors import ConfigError

# bus of a disk -> prefix of its target names
TARGET_PREFIX = {
    "ide": "hd", "fdc": "fd", "scsi": "sd", "sata": "sd", "usb": "sd", "virtio": "vd", "xen": "xvd", "uml": "ubd",
    "sd": "sd", "nvme": "nvme",
}  # fmt: skip
_TARGET = re.compile(r"(?:xvd|ubd|[fhsv]d)([a-z]{1,3})")
_NVME_TARGET = re.compile(r"nvme([0-9]{1,3})n([1-9][0-9]{0,2})")
NVME_NAMESPACES = 256  # of a controller, in QEMU
NVME_SERIAL = 20  # characters: the NVM Express specification, Identify Controller, SN

USB_PORTS = {
    "qemu-xhci": 4, "nec-xhci": 4, "piix3-uhci": 2, "piix4-uhci": 2, "vt82c686b-uhci": 2, "ich9-uhci1": 2,
    "ich9-uhci2": 2, "ich9-uhci3": 2, "ehci": 6, "ich9-ehci1": 6, "pci-ohci": 3, "qusb1": 8, "qusb2": 8,
}  # fmt: skip
HUB_PORTS = 8
VIRTIO_SERIAL_PORTS = 31
_SCSI_UNITS = {"virtio-scsi": 7, "lsilogic": 7, "buslogic": 7}  # libvirt numbers disks by seven, whatever the bus holds


def target_index(name: str) -> int | None:
    """0 for vda, 26 for sdaa, 257 for nvme1n2; None for a name that is not of that form."""
    namespace = _NVME_TARGET.fullmatch(name)
    if namespace is not None:
        controller, number = int(namespace[1]), int(namespace[2]) - 1
        return controller * NVME_NAMESPACES + number if number < NVME_NAMESPACES else None
    match = _TARGET.fullmatch(name)
    if match is None:
        return None
    index = 0
    for letter in match[1]:
        index = index * 26 + ord(letter) - ord("a") + 1
    return index - 1


def target_name(bus: str, index: int) -> str:
    if bus == "nvme":
        return f"nvme{index // NVME_NAMESPACES}n{index % NVME_NAMESPACES + 1}"
    letters = ""
    index += 1
    while index:
        index, rest = divmod(index - 1, 26)
        letters = chr(ord("a") + rest) + letters
    return TARGET_PREFIX[bus] + letters


def drive_address(bus: str, index: int, controller_model: str | None = None) -> Address:
    """Where the disk with this number in its name sits on a bus of drives."""
    if bus == "ide":
        return Address(
            type="drive", controller=index // 4, bus=index // 2 % 2, target=0, unit=index % 2
        )  # two channels of two
    if bus == "fdc":
        return Address(type="drive", controller=index // 2, bus=0, target=0, unit=index % 2)
    if bus == "nvme":  # nvme1n2: namespace 2 of controller 1
        return Address(type="drive", controller=index // NVME_NAMESPACES, bus=0, target=0, unit=index % NVME_NAMESPACES)
    units = 6 if bus == "sata" else _SCSI_UNITS.get(controller_model or "", 7)
    return Address(type="drive", controller=index // units, bus=0, target=0, unit=index % units)


def _unplaced(device: Device) -> bool:
    return device.address is None or device.address.type is None


def _drive_key(disk: Disk) -> tuple[str, int, int, int, int]:
    address = disk.address or Address()
    return (
        disk.target.bus or "", address.controller or 0, address.bus or 0, address.target or 0, address.unit or 0
    )  # fmt: skip


def assign_drives(domain: Domain) -> None:
    """By the number in the target's name, as libvirt does; the next free one if that place is taken."""
    disks = [disk for disk in domain.devices.disks if disk.target.bus in ("ide", "sata", "scsi", "fdc", "nvme")]
    used = {_drive_key(disk) for disk in disks if not _unplaced(disk)}
    models = {item.index: item.model for item in domain.devices.controllers if item.type == "scsi"}
    for disk in disks:
        if not _unplaced(disk):
            continue
        bus = str(disk.target.bus)
        index = target_index(disk.target.dev or "")
        candidates = range(index or 0, 4096)
        for candidate in candidates:
            disk.address = drive_address(bus, candidate, models.get(0))
            if _drive_key(disk) not in used:
                break
        used.add(_drive_key(disk))


def _virtio_serial(devices: Devices) -> Iterator[tuple[Device, bool]]:
    """(device, whether port 0 suits it): port 0 is the kernel's hvc0, for consoles."""
    for console in devices.consoles:
        if console.target is not None and console.target.type == "virtio":
            yield console, True
    for channel in devices.channels:
        if channel.target is not None and channel.target.type == "virtio":
            yield channel, False


def assign_virtio_serial(domain: Domain, *, grow: bool) -> None:
    used = {
        (device.address.controller or 0, device.address.port or 0)
        for device, _ in _virtio_serial(domain.devices)
        if device.address is not None and device.address.type == "virtio-serial" and device.address.port is not None
    }
    for device, console in _virtio_serial(domain.devices):
        address = device.address
        # Port 0 of a channel means "any" in documents of old; of a console it is hvc0.
        if address is not None and address.type is not None and (address.port or (console and address.port == 0)):
            continue
        controllers = sorted(
            (item.index or 0, item.ports or VIRTIO_SERIAL_PORTS)
            for item in domain.devices.controllers
            if item.type == "virtio-serial"
        )
        free = (
            (index, port)
            for index, ports in controllers
            for port in range(0 if console and index == 0 else 1, ports)
            if (index, port) not in used and (address is None or address.controller in (None, index))
        )
        place = next(free, None)
        if place is None and grow:
            index = controllers[-1][0] + 1 if controllers else 0
            domain.devices.controllers.append(Controller(type="virtio-serial", index=index))
            place = (index, 0 if console and index == 0 else 1)
        if place is None:
            raise ConfigError(
                "no free virtio-serial port is left",
                path=path_of(domain.devices, device),
                remedy="add a virtio-serial controller while the machine is off",
            )
        used.add(place)
        device.address = Address(type="virtio-serial", controller=place[0], bus=0, port=place[1])


def usb_devices(devices: Devices) -> Iterator[Device]:
    """In the order in which ports are handed out."""
    yield from (item for item in devices.hostdevs if item.type == "usb")
    yield from (item for item in devices.disks if item.target.bus == "usb")
    yield from (item for item in devices.serials if item.target is not None and item.target.type == "usb-serial")
    yield from (item for item in devices.inputs if item.bus == "usb")
    yield from (item for item in devices.sounds if item.model == "usb")
    yield from (item for item in devices.interfaces if item.model is not None and item.model.type == "usb-net")
    yield from (item for item in devices.redirdevs if item.bus == "usb")
    yield from (item for item in devices.controllers if item.type == "ccid")


def _port_order(port: str) -> tuple[int, list[int]]:
    """The controller's own ports before those of hubs."""
    parts = [int(part) for part in port.split(".")]
    return len(parts), parts


class _UsbPorts:
    """Free ports by bus; a hub's ports are named after the port it sits on ("1.3")."""

    def __init__(self, devices: Devices) -> None:
        self.ports: dict[int, list[str]] = {}
        for item in devices.controllers:
            if item.type == "usb" and item.model != "none" and item.master is None:
                count = item.ports or USB_PORTS.get(item.model or "piix3-uhci", 2)
                self.ports.setdefault(item.index or 0, [str(port) for port in range(1, count + 1)])
        placed = [*devices.hubs, *usb_devices(devices)]
        for device in sorted(placed, key=lambda item: len((item.address and item.address.usb_port) or "")):
            if device.address is not None and device.address.type == "usb" and device.address.usb_port:
                self.take(device.address.bus or 0, device.address.usb_port)
                if isinstance(device, Hub):
                    self.add_hub(device.address.bus or 0, device.address.usb_port)

    def take(self, bus: int, port: str) -> None:
        if port in self.ports.get(bus, []):
            self.ports[bus].remove(port)

    def add_hub(self, bus: int, port: str) -> None:
        # In front: libvirt fills hubs before the last root ports.
        self.ports.setdefault(bus, [])[:0] = [f"{port}.{number}" for number in range(1, HUB_PORTS + 1)]

    def find(self, bus: int | None) -> tuple[int, str] | None:
        for index in sorted(self.ports):
            if bus in (None, index) and self.ports[index]:
                return index, min(self.ports[index], key=_port_order)
        return None


def assign_usb(domain: Domain, *, grow: bool) -> None:
    devices = domain.devices
    missing = [item for item in [*devices.hubs, *usb_devices(devices)] if _unported(item)]
    if not missing:
        return
    ports = _UsbPorts(devices)
    if not ports.ports:
        raise ConfigError(
            "a USB device needs a USB controller, and the document has none",
            path=path_of(devices, missing[0]),
            remedy="remove <controller type='usb' model='none'/>",
        )
    if grow:
        while sum(map(len, ports.ports.values())) < len(missing):
            place = ports.find(None)
            if place is None:
                raise ConfigError("no free USB port is left for another hub", path=path_of(devices, missing[-1]))
            hub = Hub(type="usb", address=Address(type="usb", bus=place[0], usb_port=place[1]))
            devices.hubs.append(hub)
            ports.take(*place)
            ports.add_hub(*place)
    for device in missing:
        place = ports.find(device.address.bus if device.address is not None else None)
        if place is None:
            raise ConfigError(
                "no free USB port is left",
                path=path_of(devices, device),
                remedy="add <hub type='usb'/> while the machine is off",
            )
        device.address = Address(type="usb", bus=place[0], usb_port=place[1])
        ports.take(*place)
        if isinstance(device, Hub):
            ports.add_hub(*place)


def _unported(device: Device) -> bool:
    return device.address is None or (device.address.type in (None, "usb") and not device.address.usb_port)


def assign_addresses(domain: Domain, *, grow: bool = True, spare_root_ports: int = 0) -> None:
    """Every device that needs an address has one afterwards. Raises ConfigError when there is no room."""
    assign_drives(domain)
    assign_virtio_serial(domain, grow=grow)
    assign_usb(domain, grow=grow)
    if family(domain) == MMIO:
        for device, _ in pci_devices(domain.devices):
            if _unplaced(device):
                device.address = Address(type="virtio-mmio")
    else:
        assign_pci(domain, grow=grow, spare_root_ports=spare_root_ports)
