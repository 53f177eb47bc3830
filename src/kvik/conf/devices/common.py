"""What devices have in common: alias, guest address, boot order, virtio options. libvirt's <address> has one name and
many shapes, chosen by its type."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from kvik.conf.codec import ON_OFF, YES_NO, Element, OnOff, Text, YesNo, escape, on_off, unsigned

AddressType = Literal[
    "pci", "drive", "virtio-serial", "ccid", "usb", "spapr-vio", "virtio-s390", "ccw", "virtio-mmio", "isa", "dimm",
    "unassigned", "mdev", "ipv4",
]  # fmt: skip


class Alias(Element):
    name: str = ""


class Zpci(Element):
    uid: str | None = None
    fid: str | None = None


class Address(Element):
    """Where a device sits. Which fields mean something depends on `type`:

    pci: domain, bus, slot, function, multifunction; drive: controller, bus, target, unit; virtio-serial: controller,
    bus, port; ccid: controller, slot; usb: bus, usb_port ("1" or "1.2"); isa: iobase, irq; dimm: slot, base;
    spapr-vio: reg; ccw: cssid, ssid, devno; mdev (a host address): uuid.
    """

    __xml_custom__ = True

    type: AddressType | None = None
    domain: int | None = None
    controller: int | None = None
    bus: int | None = None
    target: int | None = None
    unit: int | None = None
    device: int | None = None
    slot: int | None = None
    function: int | None = None
    multifunction: Annotated[bool | None, ON_OFF] = None
    port: int | None = None
    usb_port: str | None = None
    iobase: int | None = None
    irq: int | None = None
    base: int | None = None
    reg: int | None = None
    cssid: int | None = None
    ssid: int | None = None
    devno: int | None = None
    uuid: str | None = None
    zpci: Zpci | None = None

    @classmethod
    def parse_attributes(cls, items: list[tuple[str, str]]) -> tuple[dict[str, Any], list[tuple[str, str]]]:
        """(fields, attributes nobody knows); ValueError for a bad number."""
        given = dict(items)
        kind = given.pop("type", None)
        if kind is not None and kind not in ADDRESS_SHAPES:
            raise ValueError(f"address type {kind!r} is not one of {', '.join(ADDRESS_SHAPES)}")
        shape = ADDRESS_SHAPES[kind or _shape_of(given)]
        values: dict[str, Any] = {"type": kind} if kind else {}
        rest = []
        for name, raw in given.items():
            if name not in shape:
                rest.append((name, raw))
                continue
            field, digits = shape[name]
            try:
                values[field] = raw if digits == -1 else on_off(raw) if digits == -2 else unsigned(raw)
            except ValueError as error:
                raise ValueError(f"attribute {name!r}: {error}") from None
        return values, rest

    def format_attributes(self) -> str:
        if self.type == "pci" and None not in (slot := (self.domain, self.bus, self.slot, self.function)):
            text = " type='pci' domain='0x{:04x}' bus='0x{:02x}' slot='0x{:02x}' function='0x{:x}'".format(*slot)
            if self.multifunction is not None:
                text += f" multifunction='{'on' if self.multifunction else 'off'}'"
            return text
        text = f" type='{self.type}'" if self.type else ""
        for name, (field, digits) in ADDRESS_SHAPES[self.type or _shape_of(self)].items():
            value = getattr(self, field)
            if value is None:
                continue
            if digits > 0:
                value = f"0x{value:0{digits}x}"
            elif digits == -1:
                value = escape(value)
            elif digits == -2:
                value = "on" if value else "off"
            text += f" {name}='{value}'"
        return text

    @property
    def pci(self) -> tuple[int, int, int, int]:
        """(domain, bus, slot, function), what is missing being 0."""
        return self.domain or 0, self.bus or 0, self.slot or 0, self.function or 0

    @property
    def pci_text(self) -> str:
        domain, bus, slot, function = self.pci
        return f"{domain:04x}:{bus:02x}:{slot:02x}.{function:x}"


def pci_address(text: str) -> Address:
    """From "0000:01:10.0". ValueError if it is none."""
    domain, bus, rest = text.split(":")
    slot, function = rest.split(".")
    return Address(type="pci", domain=int(domain, 16), bus=int(bus, 16), slot=int(slot, 16), function=int(function, 16))


# type -> {XML name: (field, digits: 0 for decimal, -1 for text, -2 for on/off)}, in the order they are written
ADDRESS_SHAPES: dict[str, dict[str, tuple[str, int]]] = {
    "pci": {
        "domain": ("domain", 4), "bus": ("bus", 2), "slot": ("slot", 2), "function": ("function", 1),
        "multifunction": ("multifunction", -2),
    },
    "drive": {"controller": ("controller", 0), "bus": ("bus", 0), "target": ("target", 0), "unit": ("unit", 0)},
    "virtio-serial": {"controller": ("controller", 0), "bus": ("bus", 0), "port": ("port", 0)},
    "ccid": {"controller": ("controller", 0), "slot": ("slot", 0)},
    "usb": {"bus": ("bus", 0), "port": ("usb_port", -1), "device": ("device", 0)},
    "spapr-vio": {"reg": ("reg", 8)},
    "virtio-s390": {},
    "virtio-mmio": {},
    "ccw": {"cssid": ("cssid", 2), "ssid": ("ssid", 1), "devno": ("devno", 4)},
    "isa": {"iobase": ("iobase", 1), "irq": ("irq", 1)},
    "dimm": {"slot": ("slot", 0), "base": ("base", 1)},
    "unassigned": {},
    "mdev": {"uuid": ("uuid", -1)},
    "ipv4": {},
}  # fmt: skip


def _shape_of(given: dict[str, str] | Address) -> str:
    """The shape of an address that names no type: those of host devices, told apart by what they hold."""

    def has(name: str) -> bool:
        return name in given if isinstance(given, dict) else getattr(given, name) is not None

    if has("uuid"):
        return "mdev"
    if has("device"):
        return "usb"
    return "pci" if has("slot") or has("function") or has("domain") else "drive"


class Boot(Element):
    order: int
    loadparm: str | None = None


class Rom(Element):
    enabled: YesNo = None
    bar: OnOff = None
    file: str | None = None


class Acpi(Element):
    index: int | None = None


class Device(Element, kw_only=True):
    """Base of everything under <devices>."""

    __xml_last__ = ("boot", "alias", "master", "rom", "acpi", "address")

    alias: Alias | None = None
    acpi: Acpi | None = None
    address: Address | None = None


class BootableDevice(Device, kw_only=True):
    """What firmware can start from."""

    boot: Boot | None = None
    rom: Rom | None = None


class VirtioOptions(Element, kw_only=True):
    """Base of the <driver> of a virtio device."""

    iommu: OnOff = None
    ats: OnOff = None
    packed: OnOff = None
    page_per_vq: OnOff = None


class VirtioDriver(VirtioOptions):
    """A <driver> that has nothing but virtio options."""


class Enabled(Element):
    """`enabled='yes'`."""

    enabled: Annotated[bool | None, YES_NO] = None


class State(Element):
    """`state='on'`."""

    state: Annotated[bool | None, ON_OFF] = None


class Reconnect(Element):
    enabled: YesNo = None
    timeout: int | None = None


class DeviceSeclabel(Element):
    """How one file or socket is labelled, against the domain's own label."""

    __xml_strict__ = True

    model: str | None = None
    labelskip: YesNo = None
    relabel: YesNo = None
    label: Text = None
