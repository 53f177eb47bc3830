"""Virtual functions of network cards (SR-IOV), and how one is taken from the host for a machine: by VFIO.

    for function in virtual_functions("enp1s0"): ...
    take("0000:01:10.0")        # from its driver to vfio-pci
    give_back("0000:01:10.0")   # and back to whichever driver the host has for it

Sources: Documentation/PCI/pci-iov-howto.rst, driver-api/vfio.rst, ABI/testing/sysfs-bus-pci.
"""

from __future__ import annotations

import errno
import re
import struct
from pathlib import Path
from typing import NamedTuple

from kvik.errors import HostError, OperationInvalid
from kvik.host.netlink import SETLINK, Netlink
from kvik.host.netlink_attributes import attribute, parse_mac

__all__ = ["VirtualFunction", "check_assignable", "give_back", "set_address", "take", "virtual_functions"]

SYSFS = Path("/sys")
VFIO = Path("/dev/vfio")
DRIVER = "vfio-pci"
_ADDRESS = re.compile(r"[0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")
_LINK = struct.Struct("=BxHiII")
_VFINFO_LIST, _VF_INFO, _VF_MAC, _VF_VLAN = 22, 1, 1, 2  # linux/if_link.h
_NESTED = 0x8000


class VirtualFunction(NamedTuple):
    number: int
    address: str  # like 0000:01:10.0
    interface: str  # its network interface; "" while another driver, or a machine, has it


def virtual_functions(physical: str, sysfs: Path = SYSFS) -> list[VirtualFunction]:
    """Of the interface of a physical function, in order. `OperationInvalid` if there is none."""
    device = sysfs / "class/net" / physical / "device"
    found = []
    for link in device.glob("virtfn*"):
        number, address = link.name.removeprefix("virtfn"), link.resolve().name
        if number.isdigit() and _ADDRESS.fullmatch(address):
            found.append(VirtualFunction(int(number), address, _interface(link)))
    if not found:
        remedy = f"echo 4 > /sys/class/net/{physical}/device/sriov_numvfs, if the card and its firmware can"
        if not device.exists():
            raise OperationInvalid(f"{physical} is no network interface of a PCI device of this host")
        raise OperationInvalid(f"{physical} has no virtual functions", remedy=remedy)
    return sorted(found)


def _interface(device: Path) -> str:
    return min((entry.name for entry in device.glob("net/*")), default="")


def check_assignable(address: str, sysfs: Path = SYSFS, vfio: Path = VFIO, *, managed: bool = True) -> None:
    """Whether a PCI device can be given to a machine; one that is not `managed` has to be with vfio-pci already.
    `OperationInvalid` says what is missing."""
    device = _device(address, sysfs)
    if not (device / "iommu_group").exists():
        raise OperationInvalid(
            f"PCI device {address} cannot be given to a machine: this host has no IOMMU at work",
            remedy="switch VT-d or AMD-Vi on in the firmware, and boot with intel_iommu=on or iommu=pt",
        )
    if not (vfio / "vfio").exists():
        raise OperationInvalid(
            f"PCI device {address} cannot be given to a machine: there is no {vfio / 'vfio'}",
            remedy="load the module: modprobe vfio-pci",
        )
    if not managed and (driver := _driver(device)) != DRIVER:
        raise OperationInvalid(
            f"PCI device {address} cannot be given to a machine: {driver or 'no driver'} has it, not {DRIVER}",
            remedy=f"say managed='yes', or bind it yourself: driverctl set-override {address} {DRIVER}",
        )


def take(address: str, sysfs: Path = SYSFS) -> None:
    """Bind a device to vfio-pci; nothing if it is already. On an error its own driver has it again."""
    device = _device(address, sysfs)
    if _driver(device) == DRIVER:
        return
    try:
        _write(device / "driver_override", DRIVER)
        if _driver(device):
            _write(device / "driver/unbind", address)
        _write(sysfs / "bus/pci/drivers_probe", address)
        if _driver(device) != DRIVER:
            raise HostError(f"{DRIVER} did not take PCI device {address}", remedy="load the module: modprobe vfio-pci")
    except HostError:
        give_back(address, sysfs)
        raise


def give_back(address: str, sysfs: Path = SYSFS) -> None:
    """Let the host's own driver have a device again that was taken; others, and what is gone, are left alone."""
    device = sysfs / "bus/pci/devices" / address
    if not _ADDRESS.fullmatch(address) or not device.exists():
        return
    if DRIVER not in (_driver(device), _override(device)):
        return
    _write(device / "driver_override", "\n")
    if _driver(device) == DRIVER:
        _write(device / "driver/unbind", address)
    if not _driver(device):
        _write(sysfs / "bus/pci/drivers_probe", address)


def set_address(netlink: Netlink, address: str, mac: str, *, vlan: int = 0, sysfs: Path = SYSFS) -> None:
    """Have a virtual function bear this MAC address, whoever drives it, in this VLAN (0: none); its physical function's
    driver sees to it. `HostError` if it refuses."""
    physical = _device(address, sysfs) / "physfn"
    name = _interface(physical)
    number = next((link.name for link in physical.glob("virtfn*") if link.resolve().name == address), "")
    if not name or not number:
        raise HostError(
            f"PCI device {address} is no virtual function of a network card",
            errno=errno.ENODEV,
            remedy="give a whole card by <hostdev>: as an interface it would not bear the machine's MAC address",
        )
    request = address_request(netlink.link(name).index, int(number.removeprefix("virtfn")), mac, vlan)
    netlink.change(f"set the address of virtual function {address} of {name}", SETLINK, 0, request)


def address_request(index: int, number: int, mac: str, vlan: int) -> bytes:
    # ifla_vf_mac: number, 32 bytes of address; ifla_vf_vlan: number, VLAN, priority
    function = attribute(_VF_MAC, struct.pack("=I32s", number, parse_mac(mac)))
    function += attribute(_VF_VLAN, struct.pack("=III", number, vlan, 0))
    return _LINK.pack(0, 0, index, 0, 0) + attribute(_VFINFO_LIST | _NESTED, attribute(_VF_INFO | _NESTED, function))


def _device(address: str, sysfs: Path) -> Path:
    device = sysfs / "bus/pci/devices" / address
    if not _ADDRESS.fullmatch(address) or not device.exists():
        raise OperationInvalid(f"this host has no PCI device {address}", remedy="'lspci -D' lists them")
    return device


def _driver(device: Path) -> str:
    link = device / "driver"
    return link.resolve().name if link.exists() else ""


def _override(device: Path) -> str:
    try:
        return (device / "driver_override").read_text("ascii").strip()
    except OSError:
        return ""


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, "ascii")
    except OSError as error:
        raise HostError(f"cannot write {text.strip()!r} to {path}: {error.strerror}", errno=error.errno or 0) from error
