"""What a <disk> says and QEMU cannot do on its bus, for its device or with its image: refused by name, never dropped.

The words are of the element, the reason, and what to write instead. What the argv modules make is all that is left.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from kvik.conf.devices.disk import Disk, DiskSource
from kvik.conf.domain import Domain
from kvik.errors import ConfigUnsupported
from kvik.hypervisor.layers import layers
from kvik.hypervisor.overlay import check_transient

__all__ = ["check_disks", "refusals"]

_DISCARD_NO_UNREF = 8_001_000  # QEMU's versions
_SCSI_IDENTITY = frozenset({"scsi"})
_WWN = frozenset({"scsi", "ide", "sata"})
_GEOMETRY = frozenset({"scsi", "ide", "sata", "virtio"})
_POLICY = frozenset({"scsi", "ide", "sata", "virtio", "usb"})
_URLS = frozenset({"http", "https", "ftp", "ftps"})


# RFC 6265, section 4.1.1: a token (RFC 2616), and what is neither white nor a separator of cookies.
_COOKIE_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_COOKIE_VALUE = re.compile(r"[\x21\x23-\x2b\x2d-\x3a\x3c-\x5b\x5d-\x7e]*")


class Refusal(NamedTuple):
    path: str  # below the disk
    what: str  # follows "disk vda: "
    remedy: str


def check_disks(domain: Domain, version: int) -> None:
    """Raises `ConfigUnsupported` for the first. `version` is QEMU's."""
    for number, disk in enumerate(domain.devices.disks, 1):
        check_transient(disk)
        for found in refusals(disk, version):
            raise ConfigUnsupported(
                f"disk {disk.target.dev}: {found.what}",
                path=f"/domain/devices/disk[{number}]{found.path}",
                remedy=found.remedy,
            )


def refusals(disk: Disk, version: int) -> Iterator[Refusal]:
    yield from _device(disk)
    yield from _driver(disk, version)
    yield from _queues(disk)
    for layer in layers(disk):
        yield from _source(disk, layer.source, layer.type, layer.format)


def _device(disk: Disk) -> Iterator[Refusal]:
    bus = disk.target.bus or ""
    leave = "leave it out"

    def only(value: object, path: str, what: str, buses: frozenset[str]) -> Iterator[Refusal]:
        if value and bus not in buses:
            yield Refusal(path, f"{what} on bus {bus}", f"{leave}, or use bus {' or '.join(sorted(buses))}")

    yield from only(disk.wwn, "/wwn", "there is no WWN", _WWN)
    yield from only(disk.vendor, "/vendor", "there is no vendor", _SCSI_IDENTITY)
    yield from only(disk.product, "/product", "there is no product", _SCSI_IDENTITY)
    yield from only(disk.target.dpofua is not None, "/target/@dpofua", "dpofua is nothing", _SCSI_IDENTITY)
    yield from only(disk.target.rotation_rate, "/target/@rotation_rate", "there is no rotation rate", _WWN)
    yield from only(
        disk.target.removable is not None, "/target/@removable", "nothing is removable", frozenset({"usb", "scsi"})
    )
    yield from only(disk.geometry, "/geometry", "no geometry can be told", _GEOMETRY)
    yield from only(
        disk.geometry is not None and disk.geometry.trans,
        "/geometry/@trans", "there is no translation", frozenset({"ide", "sata"}),
    )  # fmt: skip
    if disk.model is not None and bus != "virtio":
        yield Refusal("/@model", f"model {disk.model} is of bus virtio, not of {bus}", leave)
    if disk.device == "floppy" and disk.serial:
        yield Refusal("/serial", "a floppy drive has no serial number", leave)
    if disk.device == "lun" and bus != "scsi":
        yield Refusal("/@device", f"a lun cannot be on bus {bus}", "use bus scsi with a virtio-scsi controller")
    if disk.device == "lun" and disk.type not in ("block", "network", "volume"):
        yield Refusal("/@type", "a lun is a SCSI device of the host or of an iSCSI target", "write type='block'")
    if disk.rawio and disk.device != "lun":
        yield Refusal("/@rawio", "rawio is for device='lun'", leave)
    if disk.sgio == "unfiltered":
        yield Refusal("/@sgio", "the kernel filters SG_IO commands of every disk since 5.14", "write sgio='filtered'")
    if disk.backend_domain is not None:
        yield Refusal("/backenddomain", "driver domains are Xen's", leave)
    if disk.target.bus in ("xen", "uml", "sd"):
        yield Refusal("/target/@bus", f"QEMU's machines have no bus {bus}", "use bus virtio, scsi, sata, nvme or usb")
    if disk.device == "cdrom" and bus in ("usb", "nvme"):
        yield Refusal("/@device", f"there is no CD-ROM drive on bus {bus}", "use bus sata or scsi")


def _driver(disk: Disk, version: int) -> Iterator[Refusal]:
    driver, bus = disk.driver, disk.target.bus or ""
    if driver is None:
        return
    leave = "leave it out"
    if driver.max_bootsize is not None:
        yield Refusal("/driver/@max_bootsize", "max_bootsize is Xen's", leave)
    if (driver.error_policy or driver.rerror_policy) and bus not in _POLICY:
        yield Refusal("/driver/@error_policy", f"a disk on bus {bus} hands errors on to the guest", leave)
    if driver.io == "native" and driver.cache not in ("none", "directsync"):
        yield Refusal(
            "/driver/@io", "native I/O needs either no disk cache or directsync cache mode", "write cache='none' too"
        )
    if driver.copy_on_read and (disk.readonly or disk.device == "cdrom"):
        yield Refusal("/driver/@copy_on_read", "copy_on_read is not compatible with a read-only disk", leave)
    qcow2 = driver.type == "qcow2"
    if driver.metadata_cache is not None and not qcow2:
        yield Refusal("/driver/metadata_cache", "only qcow2 images have a metadata cache", leave)
    if driver.discard_no_unref is not None and not qcow2:
        yield Refusal("/driver/@discard_no_unref", "discard_no_unref is for qcow2 images", leave)
    elif driver.discard_no_unref is not None and version < _DISCARD_NO_UNREF:
        yield Refusal("/driver/@discard_no_unref", "discard_no_unref needs QEMU 8.1", leave)
    if driver.detect_zeroes == "unmap" and driver.discard == "ignore":
        yield Refusal("/driver/@detect_zeroes", "detect_zeroes='unmap' needs discard='unmap'", "write 'on'")


def _queues(disk: Disk) -> Iterator[Refusal]:
    """What only a virtio disk has: of SCSI disks it is their controller's."""
    driver, bus = disk.driver, disk.target.bus or ""
    if driver is None or bus == "virtio":
        return
    remedy = "give it to the controller's <driver>" if bus == "scsi" else "use bus virtio"
    for field, words in (
        ("iothread", "an I/O thread"), ("iothreads", "I/O threads"), ("queues", "queues"), ("queue_size", "queue_size"),
        ("ioeventfd", "ioeventfd"), ("event_idx", "event_idx"), ("iommu", "iommu"), ("ats", "ats"),
        ("packed", "packed"), ("page_per_vq", "page_per_vq"),
    ):  # fmt: skip
        if getattr(driver, field) is not None:
            yield Refusal(f"/driver/@{field}", f"{words} cannot be given to a disk on bus {bus}", remedy)


def _source(disk: Disk, source: DiskSource, kind: str, format_: str) -> Iterator[Refusal]:
    protocol = source.protocol or ""
    leave = "leave it out"
    if source.slices is not None and source.slices.slices and (len(source.slices.slices) > 1 or format_ != "raw"):
        yield Refusal("/source/slices", f"one slice of a raw image can be used, not of {format_}", leave)
    if source.reservations is not None:
        yield Refusal("/source/reservations", "persistent reservations are not supported", leave)
    if kind == "nvme" and source.managed:
        yield Refusal(
            "/source/@managed", "kvik does not take the controller from its driver",
            "bind it to vfio-pci and write managed='no'",
        )  # fmt: skip
    if kind != "network":
        return
    if source.tls and protocol != "nbd":
        yield Refusal("/source/@tls", f"QEMU's {protocol} driver has no TLS of its own", "use tls='no'")
    if source.tls_hostname is not None and not source.tls:
        yield Refusal("/source/@tlsHostname", "a name for TLS needs tls='yes'", leave)
    cookies = source.cookies.cookies if source.cookies is not None else []
    if cookies and protocol not in ("http", "https"):
        yield Refusal("/source/cookies", f"{protocol} has no cookies", leave)
    if not all(_COOKIE_NAME.fullmatch(item.name) and _COOKIE_VALUE.fullmatch(item.value or "") for item in cookies):
        yield Refusal(
            "/source/cookies", "a cookie is of letters, digits and a few signs", "see RFC 6265, section 4.1.1"
        )
    reconnect = source.reconnect
    if reconnect is not None and protocol != "nbd":
        yield Refusal("/source/reconnect", f"QEMU's {protocol} driver has no delay to reconnect", leave)
    if source.known_hosts is not None or (source.identity is not None and (source.identity.keyfile)):
        yield Refusal(
            "/source/identity", "QEMU's ssh driver takes keys from an agent and hosts from ~/.ssh/known_hosts", leave
        )
    if source.identity is not None and protocol not in ("ssh", "nfs"):
        yield Refusal("/source/identity", f"{protocol} knows no <identity>", "use <auth>")
    for host in source.hosts:
        if host.transport == "rdma" or (host.transport == "unix" and protocol not in ("nbd", "gluster")):
            yield Refusal("/source/host/@transport", f"{protocol} over {host.transport} is not supported", "use tcp")
    writable = not (disk.readonly or disk.device == "cdrom")
    if protocol in _URLS and writable and source is disk.source:
        yield Refusal(
            "/readonly", f"{protocol} can only be read", "write <readonly/>, or name it below an image (<backingStore>)"
        )
    if source.query is not None and protocol not in _URLS:
        yield Refusal("/source/@query", f"{protocol} has no query", leave)
