"""Devices of the host given to the guest: <hostdev>, <redirdev>, <smartcard>.
https://libvirt.org/formatdomain.html#host-device-assignment"""

from __future__ import annotations

from typing import Annotated, Literal

from kvik.conf.codec import CHILD, YES_NO, Element, Hex, OnOff, Present, Text, YesNo
from kvik.conf.devices.chardev import Chardev
from kvik.conf.devices.common import Address, Boot, BootableDevice
from kvik.conf.devices.disk import Auth, Host, Initiator


class UsbId(Element):
    id: Annotated[int, Hex(4)]


class Adapter(Element):
    name: str


class HostdevSource(Element):
    """`address` (pci, usb, mdev, scsi unit); `vendor` and `product` (usb); `adapter` (scsi); `protocol`, `name`,
    `hosts` (iscsi, vhost-scsi with `wwpn`)."""

    startup_policy: Annotated[Literal["mandatory", "requisite", "optional"] | None, "startupPolicy"] = None
    guest_reset: Annotated[Literal["on", "off", "uninitialized"] | None, "guestReset"] = None
    protocol: Literal["adapter", "iscsi", "vhost"] | None = None
    name: str | None = None
    wwpn: str | None = None
    dev: str | None = None
    write_filtering: Annotated[bool | None, YES_NO, "writeFiltering"] = None
    adapter: Adapter | None = None
    vendor: UsbId | None = None
    product: UsbId | None = None
    hosts: Annotated[list[Host], "host"] = []
    auth: Auth | None = None
    initiator: Initiator | None = None
    block: Text = None
    char: Text = None
    address: Address | None = None


class HostdevDriver(Element):
    name: Literal["vfio", "kvm", "xen"] | None = None
    model: str | None = None


class Teaming(Element):
    type: Literal["persistent", "transient"]
    persistent: str | None = None


class Hostdev(BootableDevice, kw_only=True):
    mode: Literal["subsystem", "capabilities"] = "subsystem"
    type: Literal["usb", "pci", "scsi", "scsi_host", "mdev", "storage", "misc"]
    managed: YesNo = None
    sgio: Literal["filtered", "unfiltered"] | None = None
    rawio: YesNo = None
    model: str | None = None
    display: OnOff = None
    ramfb: OnOff = None
    driver: HostdevDriver | None = None
    source: HostdevSource | None = None
    teaming: Teaming | None = None
    readonly: Present = False
    shareable: Present = False


class Redirdev(Chardev):
    bus: Literal["usb"] | None = None
    boot: Boot | None = None


class RedirFilterRule(Element):
    __xml_strict__ = True

    class_: Annotated[str | None, "class"] = None
    vendor: str | None = None
    product: str | None = None
    version: str | None = None
    allow: YesNo = None


class RedirFilter(Element):
    """Which USB devices may be redirected."""

    __xml_strict__ = True

    rules: Annotated[list[RedirFilterRule], "usbdev"] = []


class Smartcard(Chardev, kw_only=True):
    type: Annotated[str | None, "type"] = None  # type: ignore[assignment]  # optional here: `mode` says enough
    mode: Literal["host", "host-certificates", "passthrough"]
    certificates: Annotated[list[str], CHILD, "certificate"] = []
    database: Text = None
