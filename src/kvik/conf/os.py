"""<os>, <sysinfo> and what boots: https://libvirt.org/formatdomain.html#operating-system-booting"""

from __future__ import annotations

from typing import Annotated, Literal

from kvik.conf.codec import SIGNED, VALUE, Element, Text, YesNo
from kvik.conf.devices.disk import DiskSource

BootDev = Literal["fd", "hd", "cdrom", "network"]


class OsType(Element):
    value: Annotated[Literal["hvm", "linux", "xen", "exe", "uml", "xenpvh"], VALUE] = "hvm"
    arch: str | None = None
    machine: str | None = None


class FirmwareFeature(Element):
    enabled: YesNo = None
    name: Literal["enrolled-keys", "secure-boot"] | None = None


class OsFirmware(Element):
    """Features that an automatically chosen firmware must or must not have."""

    features: Annotated[list[FirmwareFeature], "feature"] = []


class Loader(Element):
    """The firmware: `type` rom is BIOS (or UEFI without variables), pflash is UEFI."""

    readonly: YesNo = None
    type: Literal["rom", "pflash", "none"] | None = None
    secure: YesNo = None
    stateless: YesNo = None
    format: Literal["raw", "qcow2"] | None = None
    value: Annotated[str | None, VALUE] = None


class Nvram(Element):
    """Where UEFI keeps its variables, by path in `value` or by `source`; made from `template` when missing."""

    type: Literal["file", "block", "network", "volume"] | None = None
    template: str | None = None
    template_format: Annotated[Literal["raw", "qcow2"] | None, "templateFormat"] = None
    format: Literal["raw", "qcow2"] | None = None
    value: Annotated[str | None, VALUE] = None
    source: DiskSource | None = None


class OsBoot(Element):
    dev: BootDev


class BootMenu(Element):
    enable: YesNo = None
    timeout: int | None = None


class Smbios(Element):
    mode: Literal["emulate", "host", "sysinfo"]


class Bios(Element):
    """`reboot_timeout` in ms; -1 never reboots."""

    useserial: YesNo = None
    reboot_timeout: Annotated[int | None, "rebootTimeout", SIGNED] = None


class AcpiTable(Element):
    type: Literal["slic", "raw", "rawset", "msdm"] | None = None
    value: Annotated[str | None, VALUE] = None


class OsAcpi(Element):
    tables: Annotated[list[AcpiTable], "table"] = []


class Os(Element, kw_only=True):
    firmware: Literal["bios", "efi"] | None = None
    type: OsType
    firmware_features: Annotated[OsFirmware | None, "firmware"] = None
    loader: Loader | None = None
    nvram: Nvram | None = None
    kernel: Text = None
    initrd: Text = None
    cmdline: Text = None
    shim: Text = None
    dtb: Text = None
    acpi: OsAcpi | None = None
    boots: Annotated[list[OsBoot], "boot"] = []
    bootmenu: BootMenu | None = None
    bios: Bios | None = None
    smbios: Smbios | None = None


class SysinfoEntry(Element):
    name: str | None = None
    file: str | None = None
    value: Annotated[str | None, VALUE] = None


class SysinfoBlock(Element):
    entries: Annotated[list[SysinfoEntry], "entry"] = []


class Sysinfo(Element):
    """SMBIOS strings, or fw_cfg entries (`entries`, type fwcfg)."""

    type: Literal["smbios", "fwcfg"]
    bios: SysinfoBlock | None = None
    system: SysinfoBlock | None = None
    base_boards: Annotated[list[SysinfoBlock], "baseBoard"] = []
    chassis: SysinfoBlock | None = None
    oem_strings: Annotated[SysinfoBlock | None, "oemStrings"] = None
    entries: Annotated[list[SysinfoEntry], "entry"] = []


class GenId(Element):
    """VM generation ID: a UUID, or empty for one made up at start."""

    value: Annotated[str | None, VALUE] = None
