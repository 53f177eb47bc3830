"""<controller>: what other devices hang on. https://libvirt.org/formatdomain.html#controllers"""

from __future__ import annotations

from typing import Annotated, Literal

from kvik.conf.codec import CHILD, KIB, Element, Hex, OnOff, Text
from kvik.conf.devices.common import Device, VirtioOptions

PciModel = Literal[
    "pci-root", "pcie-root", "pci-bridge", "dmi-to-pci-bridge", "pcie-to-pci-bridge", "pcie-root-port",
    "pcie-switch-upstream-port", "pcie-switch-downstream-port", "pci-expander-bus", "pcie-expander-bus",
]  # fmt: skip
# Models of the other kinds: usb, scsi, ide, virtio-serial
OtherModel = Literal[
    "none", "default", "piix3-uhci", "piix4-uhci", "ehci", "ich9-ehci1", "ich9-uhci1", "ich9-uhci2", "ich9-uhci3",
    "vt82c686b-uhci", "pci-ohci", "nec-xhci", "qusb1", "qusb2", "qemu-xhci",
    "auto", "buslogic", "lsilogic", "lsisas1068", "vmpvscsi", "ibmvscsi", "virtio-scsi", "lsisas1078", "am53c974",
    "dc390", "piix3", "piix4", "ich6", "ich9",
    "virtio", "virtio-transitional", "virtio-non-transitional", "xenbus",
]  # fmt: skip


class ControllerModelName(Element):
    """The device that the VMM implements this controller with."""

    name: str


class ControllerTarget(Element):
    chassis_nr: Annotated[int | None, "chassisNr"] = None
    chassis: int | None = None
    port: Annotated[int | None, Hex(1)] = None
    bus_nr: Annotated[int | None, "busNr"] = None
    index: int | None = None
    hotplug: OnOff = None
    mem_reserve: Annotated[int | None, "memReserve"] = None
    node: Annotated[int | None, CHILD] = None


class ControllerDriver(VirtioOptions):
    queues: int | None = None
    cmd_per_lun: int | None = None
    max_sectors: int | None = None
    ioeventfd: OnOff = None
    iothread: int | None = None


class Master(Element):
    startport: int


class Controller(Device):
    """`pcihole64` in KiB; `serial` is an NVMe controller's."""

    type: Literal["ide", "fdc", "scsi", "sata", "virtio-serial", "ccid", "usb", "pci", "xenbus", "isa", "nvme"]
    index: int | None = None
    model: Annotated[str | None, "model"] = None
    ports: int | None = None
    vectors: int | None = None
    max_grant_frames: Annotated[int | None, "maxGrantFrames"] = None
    max_event_channels: Annotated[int | None, "maxEventChannels"] = None
    model_name: Annotated[ControllerModelName | None, "model"] = None
    target: ControllerTarget | None = None
    driver: ControllerDriver | None = None
    pcihole64: Annotated[int | None, CHILD, KIB] = None
    master: Master | None = None
    serial: Text = None
