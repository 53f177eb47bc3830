"""What every device family's module builds with: parts, descriptors, guest addresses, safe formatting.

A device is described once, as QAPI objects (`Parts`); the same parts become `-device {json}` at start and
`device_add` at hot-plug. JSON cannot be broken out of by any value; the few options QEMU only takes as key=value
lists go through `keyval`, where a comma is doubled.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from kvik.conf.devices.common import Address, BootableDevice, Device, VirtioOptions
from kvik.conf.domain import Domain
from kvik.errors import ConfigUnsupported
from kvik.hypervisor.names import alias_of
from kvik.hypervisor.qemu.capabilities import QemuCapabilities

__all__ = [
    "Chardev",
    "Context",
    "Files",
    "Parts",
    "json_text",
    "keyval",
    "node_name",
    "on_off",
    "virtio_options",
]

Props = dict[str, Any]


def json_text(value: Mapping[str, Any]) -> str:
    """Compact JSON, without the members that are None."""
    return msgspec.json.encode({key: item for key, item in value.items() if item is not None}).decode()


def keyval(first: str, options: Mapping[str, Any]) -> str:
    """`first,key=value,...` with commas in values doubled (QemuOpts); None is left out, booleans are on/off.

    A list repeats its key. Raises `ConfigUnsupported` for a NUL, which no argument can hold.
    """
    parts = [escape(first)] if first else []
    for key, value in options.items():
        for item in value if isinstance(value, list) else [value]:
            if item is not None:
                parts.append(f"{key}={escape(on_off(item) if isinstance(item, bool) else str(item))}")
    return ",".join(parts)


def escape(text: str) -> str:
    if "\0" in text:
        raise ConfigUnsupported("a value contains a NUL character, which no command line can hold")
    return text.replace(",", ",,")


def on_off(value: bool) -> str:
    return "on" if value else "off"


def node_name(alias: str, layer: int, kind: str) -> str:
    """A block node's name: at most 31 bytes (QEMU's limit), the same for the same alias for ever.

    `layer` is a `Layer.key`; `kind` is "format", "storage", or "cor" for what copies on read above them.
    """
    base = alias if len(alias) <= 14 else "d" + hashlib.sha1(alias.encode()).hexdigest()[:13]
    return f"{base}-{layer}-{kind}"


@dataclass(slots=True)
class Chardev:
    """A character device's host side: `backend` and `data` as in QAPI's ChardevBackend, `options` as in -chardev."""

    id: str
    backend: str
    options: Props = field(default_factory=dict)  # -chardev's own flat spelling
    data: Props = field(default_factory=dict)  # chardev-add's

    def argument(self) -> str:
        return keyval(self.backend, {"id": self.id, **self.options})


@dataclass(slots=True)
class Parts:
    """What one device consists of, in the order in which QEMU has to learn it. `arguments` exist at start only."""

    objects: list[Props] = field(default_factory=list)
    chardevs: list[Chardev] = field(default_factory=list)
    blockdevs: list[Props] = field(default_factory=list)
    netdevs: list[Props] = field(default_factory=list)
    arguments: list[str] = field(default_factory=list)
    devices: list[Props] = field(default_factory=list)


class Files:
    """Descriptors QEMU is given, by name, in place of paths it would have to open itself.

    At start `fds` are numbers in QEMU; a file goes in by an fdset of the same number. At hot-plug the monitor
    decides: `paths` holds what `add-fd` answered, and a bare descriptor is called by the name `getfd` gave it.
    `by_io_uring`: the images that QEMU reads and writes so unless the document says how.
    """

    def __init__(
        self,
        fds: Mapping[str, int] | None = None,
        paths: Mapping[str, str] | None = None,
        by_io_uring: Collection[str] = (),
    ) -> None:
        self.fds = dict(fds or {})
        self.paths = dict(paths or {})
        self.by_io_uring = by_io_uring
        self.hotplug = paths is not None
        self.sets: dict[str, int] = {}  # names used as files, in order

    def path(self, name: str, fallback: str) -> str:
        """The file's name in QEMU: an fdset if it is passed open, else its own path."""
        if name in self.paths:
            return self.paths[name]
        if name in self.fds and not self.hotplug:
            self.sets[name] = self.fds[name]
            return f"/dev/fdset/{self.fds[name]}"
        return fallback

    def host_io(self, name: str) -> str | None:
        """QEMU's `aio` of an image; None: QEMU's default."""
        return "io_uring" if name in self.by_io_uring else None

    def own_path(self, name: str) -> str:
        """A name that QEMU opens by itself, past its fdsets, as it does with a secret's file."""
        if name in self.paths:
            return self.paths[name]
        return f"/proc/self/fd/{self.fds[name]}" if name in self.fds else name

    def fd(self, name: str) -> str | None:
        """What QEMU calls a descriptor that it uses as such (a tap, a socket); None if it is not passed."""
        if name not in self.fds:
            return None
        # QEMU splits lists of descriptor names at colons.
        return name.replace(":", "-") if self.hotplug else str(self.fds[name])

    def numbered(self, prefix: str) -> list[str]:
        """Descriptors `prefix:0`, `prefix:1`, ... as `fd` gives them."""
        found: list[str] = []
        while (value := self.fd(f"{prefix}:{len(found)}")) is not None:
            found.append(value)
        return found


# controller type -> the bus name of index 0 when the machine type itself provides that controller
_BUILT_IN = {"ide": "ide", "sata": "ide", "fdc": "fdc"}


@dataclass(slots=True)
class Context:
    domain: Domain
    capabilities: QemuCapabilities
    files: Files
    machine: str  # versioned machine type
    controllers: dict[tuple[str, int], str] = field(default_factory=dict)  # (type, index) -> alias
    boot_index: dict[str, int] = field(default_factory=dict)  # alias -> bootindex

    @property
    def is_q35(self) -> bool:
        return self.machine.startswith("pc-q35") or self.machine == "q35"

    @property
    def is_i440fx(self) -> bool:
        return self.machine.startswith("pc-i440fx") or self.machine == "pc"

    @property
    def is_microvm(self) -> bool:
        return self.machine == "microvm"

    def controller(self, kind: str, index: int) -> str:
        """The alias of a controller: the name its bus begins with."""
        if index == 0 and ((kind == "sata" and self.is_q35) or (kind == "ide" and self.is_i440fx) or kind == "fdc"):
            return _BUILT_IN[kind]
        alias = self.controllers.get((kind, index))
        if alias is None:
            raise ConfigUnsupported(f"there is no {kind} controller with index {index}", path="/domain/devices")
        return alias

    def pci_bus(self, index: int) -> str:
        if index == 0:
            return "pcie.0" if self.is_q35 else "pci.0"
        return self.controller("pci", index)

    def address(self, device: Device, *, virtio: str = "") -> Props:
        """`bus`, `addr` and the like for a device on PCI, USB, ISA or virtio-serial; {} where QEMU chooses."""
        address = device.address
        if address is None or address.type is None:
            return {}
        if address.type == "pci":
            return self.pci_address(address, device)
        if address.type == "usb":
            bus = f"{self.controller('usb', address.bus or 0)}.0"
            return {"bus": bus, "port": address.usb_port}
        if address.type == "virtio-serial":
            return {"bus": f"{self.controller('virtio-serial', address.controller or 0)}.0", "nr": address.port}
        if address.type == "ccid":
            return {"bus": f"{self.controller('ccid', address.controller or 0)}.0"}
        if address.type == "isa":
            return {"iobase": address.iobase, "irq": address.irq}
        return {}

    def pci_address(self, address: Address, device: Device | None = None) -> Props:
        _, bus, slot, function = address.pci
        props: Props = {
            "bus": self.pci_bus(bus),
            "multifunction": address.multifunction,
            "addr": f"0x{slot:x}.0x{function:x}" if function else f"0x{slot:x}",
        }
        if device is not None:
            if device.acpi is not None:
                props["acpi-index"] = device.acpi.index
            if isinstance(device, BootableDevice) and device.rom is not None:
                props["rombar"] = None if device.rom.bar is None else int(device.rom.bar)
                props["romfile"] = "" if device.rom.enabled is False else device.rom.file
        return props

    def virtio_name(self, kind: str, model: str | None = None) -> str:
        """The device of a virtio kind ("blk", "net", ...).

        On PCI also in a microvm, which has it for us: many kernels come without drivers for virtio over mmio.
        """
        suffix = ""
        if model and model.endswith("-non-transitional"):
            suffix = "-non-transitional"
        elif model and model.endswith("-transitional"):
            suffix = "-transitional"
        return f"virtio-{kind}-pci{suffix}"

    def boot(self, device: Device) -> int | None:
        return self.boot_index.get(alias_of(device)) if device.alias else None

    def require(self, driver: str) -> str:
        """`driver` if this QEMU has it. Raises `ConfigUnsupported`."""
        if self.capabilities.devices and not self.capabilities.has(driver):
            raise ConfigUnsupported(f"{self.capabilities.binary} has no device {driver}", path="/domain/devices")
        return driver


def virtio_options(driver: VirtioOptions | None) -> Props:
    if driver is None:
        return {}
    return {
        "iommu_platform": driver.iommu,
        "ats": driver.ats,
        "packed": driver.packed,
        "page-per-vq": driver.page_per_vq,
    }
