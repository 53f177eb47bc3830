"""The third pass over <devices>: sources that exist in form, names and addresses that nobody else has."""

from __future__ import annotations

import re
from collections.abc import Mapping

from kvik.conf.addresses import NVME_SERIAL, TARGET_PREFIX, target_index
from kvik.conf.devices.chardev import Chardev
from kvik.conf.devices.common import Address, Device
from kvik.conf.devices.controller import Controller
from kvik.conf.devices.disk import Disk
from kvik.conf.devices.hostdev import Smartcard
from kvik.conf.devices.interface import Interface
from kvik.conf.devices_xml import devices_of
from kvik.conf.domain import Domain
from kvik.conf.machine import is_x86
from kvik.conf.pci import BUSES
from kvik.errors import ConfigError

MAX_UNIX_PATH = 107
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")
_ALIAS = re.compile(r"[A-Za-z0-9_-]+(\.[0-9]+)?")
_INTERFACE_SOURCE = {"bridge": "bridge", "network": "network", "direct": "dev", "internal": "name", "vdpa": "dev"}
_DISK_SOURCE = {
    "file": "file",
    "block": "dev",
    "dir": "dir",
    "network": "protocol",
    "volume": "pool",
    "vhostuser": "path",
}
_SERIAL = re.compile(r"[A-Za-z0-9_. +-]{1,250}")  # QEMU cuts further, by bus; anything else could end an option
_WWN = re.compile(r"(0x)?[0-9a-fA-F]{16}")


# The one emulator without a path: the VMM that comes with whoever starts the machine.
OUR_EMULATOR = "kvik-vmm"


def validate_devices(domain: Domain) -> None:
    root = "/domain/devices/"
    devices = domain.devices
    if devices.emulator != OUR_EMULATOR:
        _absolute(devices.emulator, root + "emulator", "emulator")
    taken: dict[tuple[object, ...], str] = {}
    buses = {item.index: item.model for item in devices.controllers if item.type == "pci" and item.index is not None}

    def claim(key: tuple[object, ...], path: str, what: str) -> None:
        if key in taken:
            raise ConfigError(f"{what} is already that of {taken[key]}", path=path)
        taken[key] = path

    for short, device in devices_of(devices):
        path = root + short
        if isinstance(device, Device):
            if device.alias is not None and device.alias.name and not short.startswith("console"):
                if not _ALIAS.fullmatch(device.alias.name):
                    raise ConfigError(f"alias {device.alias.name!r} is not of letters, digits, - and _", path=path)
                claim(("alias", device.alias.name), path, f"alias {device.alias.name!r}")
            if device.address is not None:
                key = _address_key(device, device.address, path, buses, is_x86(domain))
                if key in taken:
                    claim(key, path, f"the address {device.address.format_attributes().strip()}")
                if key is not None:
                    taken[key] = path
        if isinstance(device, Disk):
            _disk(device, path)
            claim(("target", device.target.dev), path, f"target {device.target.dev!r}")
            source = device.source.location if device.source is not None else None
            if source is not None and not (device.readonly or device.shareable or device.device == "floppy"):
                claim(("source", source), path, f"{source!r}, writable,")
        elif isinstance(device, Interface):
            _interface(device, path)
            if device.mac is not None and device.mac.check is not False:
                claim(("mac", device.mac.address), path, f"MAC address {device.mac.address}")
        elif isinstance(device, Controller):
            if device.serial is not None and (
                not _SERIAL.fullmatch(device.serial) or len(device.serial) > NVME_SERIAL or device.type != "nvme"
            ):
                raise ConfigError(
                    f"serial {device.serial!r} is none of an NVMe controller: at most {NVME_SERIAL} letters and digits",
                    path=path + "/serial",
                )
            if device.master is None and not str(device.model).startswith("ich9-"):
                claim(("controller", device.type, device.index), path, f"index {device.index} of {device.type}")
        elif isinstance(device, Chardev):
            _chardev(device, path)
    for index, channel in enumerate(devices.channels, 1):
        if channel.target is not None and channel.target.name is not None:
            claim(("channel", channel.target.name), f"{root}channel[{index}]", f"channel {channel.target.name!r}")
    for index, filesystem in enumerate(devices.filesystems, 1):
        path = f"{root}filesystem[{index}]"
        if filesystem.target is None or not filesystem.target.dir:
            raise ConfigError("a filesystem needs a <target dir=...>", path=path)
        if filesystem.source is not None:
            _absolute(filesystem.source.dir, path + "/source/@dir", "directory")
        claim(("tag", filesystem.target.dir), path, f"tag {filesystem.target.dir!r}")
    _pci_tree(domain, root)
    _displays(domain, root)
    _others(domain, root)


def _pci_tree(domain: Domain, root: str) -> None:
    """Bridges hang on the root, whatever way: one that is behind itself hangs on nothing."""
    above = {
        item.index: item.address.bus or 0
        for item in domain.devices.controllers
        if item.type == "pci" and item.index and item.address is not None and item.address.type == "pci"
    }
    for index in above:
        seen: set[int] = set()
        bus: int = index
        while bus in above and bus not in seen:
            seen.add(bus)
            bus = above[bus]
        if bus in seen:
            raise ConfigError(f"PCI controller {bus} is behind itself", path=f"{root}controller")


def _absolute(value: str | None, path: str, what: str) -> None:
    if value is not None and (not value.startswith("/") or any(ord(letter) < 32 for letter in value)):
        raise ConfigError(f"{what} {value!r} is not an absolute path", path=path)


def _address_key(
    device: Device, address: Address, path: str, buses: Mapping[int, str | None], x86: bool
) -> tuple[object, ...] | None:
    """`buses`: the PCI controllers' models by index."""
    if address.type == "pci":
        domain_, bus, slot, function = address.pci
        if domain_ > 0xFFFF or bus > 0xFF or slot > 0x1F or function > 7:
            raise ConfigError(f"{address.pci_text} is not a PCI address", path=path + "/address")
        if buses:
            if bus not in buses:
                raise ConfigError(f"there is no PCI controller with index {bus}", path=path + "/address")
            model = buses[bus] or ""
            # pcie.0's slot 0 is the host bridge on x86; elsewhere firmware may put things there.
            first = 0 if model not in BUSES or not x86 else BUSES[model][1]
            last = BUSES[model][2] if model in BUSES else 31
            if not first <= slot <= last:
                raise ConfigError(f"slot {slot:#x} does not exist on a {model}", path=path + "/address")
        return ("pci", *address.pci)
    if address.type == "drive":
        bus_name = device.target.bus if isinstance(device, Disk) else "scsi"
        return ("drive", bus_name, address.controller or 0, address.bus or 0, address.target or 0, address.unit or 0)
    if address.type == "virtio-serial":
        return ("virtio-serial", address.controller or 0, address.port or 0) if address.port is not None else None
    if address.type == "usb" and address.usb_port:
        if not re.fullmatch(r"[1-9][0-9]*(\.[1-9][0-9]*){0,3}", address.usb_port):
            raise ConfigError(f"{address.usb_port!r} is not a USB port such as '1' or '1.2'", path=path + "/address")
        return ("usb", address.bus or 0, address.usb_port)
    if address.type == "dimm" and address.slot is not None:
        return ("dimm", address.slot)
    if address.type == "isa" and address.iobase is not None:
        return ("isa", address.iobase)
    return None


def _disk(disk: Disk, path: str) -> None:
    bus, name = disk.target.bus, disk.target.dev or ""
    if target_index(name) is None:
        raise ConfigError(f"{name!r} is not a target such as 'vda' or 'sdb'", path=path + "/target/@dev")
    if bus is not None and bus in TARGET_PREFIX and (bus == "nvme") != name.startswith("nvme"):
        raise ConfigError(f"{name!r} is not a target of bus {bus}", path=path + "/target/@dev")
    if (disk.device == "floppy") != (bus == "fdc"):
        raise ConfigError(f"a {disk.device} cannot be on bus {bus!r}", path=path + "/target/@bus")
    if disk.device == "cdrom" and bus == "virtio":
        raise ConfigError("a CD drive cannot be on bus 'virtio'", path=path + "/target/@bus", remedy="use sata or scsi")
    source = disk.source
    wanted = _DISK_SOURCE.get(disk.type)
    given = getattr(source, wanted) if source is not None and wanted is not None else None
    passed = source is not None and source.fdgroup is not None
    if wanted is not None and given is None and not passed and disk.device in ("disk", "lun"):
        raise ConfigError(f"a disk of type {disk.type} needs a <source {wanted}=...>", path=path)
    if source is not None:
        for field in ("file", "dev", "dir"):
            _absolute(getattr(source, field), f"{path}/source/@{field}", "source")
    if disk.driver is not None and disk.driver.type is not None and not re.fullmatch(r"[a-z0-9_-]+", disk.driver.type):
        raise ConfigError(f"{disk.driver.type!r} is no image format", path=path + "/driver/@type")
    if disk.serial is not None and not _SERIAL.fullmatch(disk.serial):
        raise ConfigError(f"serial {disk.serial!r} is not of letters, digits, space and _.+-", path=path + "/serial")
    if disk.wwn is not None and not _WWN.fullmatch(disk.wwn):
        raise ConfigError(f"{disk.wwn!r} is not a WWN of 16 hexadecimal digits", path=path + "/wwn")
    tune = disk.iotune
    if tune is not None:
        for unit in ("bytes_sec", "iops_sec", "bytes_sec_max", "iops_sec_max"):
            parts = [getattr(tune, f"{direction}_{unit}") for direction in ("read", "write")]
            if getattr(tune, f"total_{unit}") and any(parts):
                raise ConfigError(f"total_{unit} excludes read_ and write_{unit}", path=path + "/iotune")


def _interface(item: Interface, path: str) -> None:
    if item.mac is not None:
        if not _MAC.fullmatch(item.mac.address):
            raise ConfigError(f"{item.mac.address!r} is not a MAC address", path=path + "/mac/@address")
        if int(item.mac.address[:2], 16) & 1:
            raise ConfigError(f"{item.mac.address} is a multicast address", path=path + "/mac/@address")
    field = _INTERFACE_SOURCE.get(item.type)
    if field is not None and (item.source is None or not getattr(item.source, field)):
        raise ConfigError(f"an interface of type {item.type} needs a <source {field}=...>", path=path)
    names = [item.source.bridge, item.source.dev] if item.source is not None and item.type != "vdpa" else []
    names.append(item.target.dev if item.target is not None else None)
    for name in names:
        # The kernel's IFNAMSIZ, with the terminating zero.
        if name is not None and not re.fullmatch(r"[^\s/:]{1,15}", name):
            raise ConfigError(f"{name!r} is not an interface name of at most 15 bytes", path=path)
    if item.mtu is not None and not 68 <= item.mtu.size <= 65535:
        raise ConfigError(f"MTU {item.mtu.size} is not between 68 and 65535", path=path + "/mtu")
    for tag in item.vlan.tags if item.vlan is not None else []:
        if tag.id > 4095:
            raise ConfigError(f"VLAN {tag.id} is above 4095", path=path + "/vlan/tag")
    for forward in item.port_forwards:
        for ports in forward.ranges:
            if not 1 <= ports.start <= (ports.end or ports.start) <= 65535:
                raise ConfigError(f"ports {ports.start} to {ports.end} are no range", path=path + "/portForward")


def _chardev(item: Chardev, path: str) -> None:
    if isinstance(item, Smartcard) and item.mode != "passthrough":
        return
    source = item.source
    if item.type in ("file", "dev", "pipe"):
        if source is None or not source.path:
            raise ConfigError(f"a character device of type {item.type} needs a <source path=...>", path=path)
        _absolute(source.path, path + "/source/@path", "path")
    elif item.type == "unix" and source is not None and source.path is not None:
        _absolute(source.path, path + "/source/@path", "socket")
        if len(source.path.encode()) > MAX_UNIX_PATH:
            raise ConfigError(f"a socket's path has at most {MAX_UNIX_PATH} bytes", path=path + "/source/@path")
    elif item.type == "tcp" and (source is None or not source.service or not source.host):
        raise ConfigError("a character device of type tcp needs a host and a service", path=path + "/source")
    if item.log is not None:
        _absolute(item.log.file, path + "/log/@file", "log")


def _displays(domain: Domain, root: str) -> None:
    for index, graphics in enumerate(domain.devices.graphics, 1):
        path = f"{root}graphics[{index}]"
        for field in ("port", "tls_port", "websocket"):
            value = getattr(graphics, field)
            if value is not None and not -1 <= value <= 65535:
                raise ConfigError(f"{value} is not a port", path=path)
        if graphics.type == "vnc" and graphics.passwd is not None and len(graphics.passwd) > 8:
            raise ConfigError("a VNC password has at most 8 characters", path=path + "/@passwd")
        if (
            graphics.type == "vnc"
            and (graphics.port or 5900) not in range(5900, 65536)
            and graphics.port not in (-1, 0)
        ):
            raise ConfigError("VNC ports start at 5900", path=path + "/@port")
    primaries = [video for video in domain.devices.videos if video.model is not None and video.model.primary]
    if len(primaries) > 1:
        raise ConfigError("only one video device can be the primary one", path=root + "video")


def _others(domain: Domain, root: str) -> None:
    devices = domain.devices
    for index, hostdev in enumerate(devices.hostdevs, 1):
        path = f"{root}hostdev[{index}]"
        if hostdev.source is None:
            raise ConfigError("a host device needs a <source>", path=path)
        if hostdev.type in ("pci", "mdev") and hostdev.source.address is None:
            raise ConfigError(f"a {hostdev.type} host device needs a <source><address .../></source>", path=path)
        if hostdev.type == "pci" and hostdev.source.address is not None:
            for part, limit in (("domain", 0xFFFF), ("bus", 0xFF), ("slot", 0x1F), ("function", 7)):
                number = getattr(hostdev.source.address, part) or 0
                if not 0 <= number <= limit:
                    raise ConfigError(
                        f"{part} {number:#x} is more than {limit:#x}", path=f"{path}/source/address/@{part}"
                    )
        if hostdev.type == "usb" and hostdev.source.address is None and hostdev.source.vendor is None:
            raise ConfigError("a USB host device needs an address, or vendor and product", path=path)
    for index, rng in enumerate(devices.rngs, 1):
        if rng.backend is None:
            raise ConfigError("an rng needs a <backend>", path=f"{root}rng[{index}]")
        if rng.backend.model == "random":
            _absolute(rng.backend.value, f"{root}rng[{index}]/backend", "source")
    if devices.vsock is not None and devices.vsock.cid is not None:
        address = devices.vsock.cid.address
        if address is not None and not 3 <= address < 0xFFFFFFFF:
            raise ConfigError(f"guest CID {address} is not between 3 and 2^32-2", path=root + "vsock/cid")
    for index, memory in enumerate(devices.memorys, 1):
        if memory.target is None or not memory.target.size:
            raise ConfigError("a memory module needs a <target><size>", path=f"{root}memory[{index}]")
    for index, tpm in enumerate(devices.tpms, 1):
        if tpm.backend is None:
            raise ConfigError("a TPM needs a <backend>", path=f"{root}tpm[{index}]")
