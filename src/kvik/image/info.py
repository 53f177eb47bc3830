"""What an image is, as `qemu-img info` tells it: gathered here, shown by the command line."""

from __future__ import annotations

import os

from kvik.image.base import Image
from kvik.image.qcow2.reader import Qcow2Reader

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from kvik.image.qcow2.bitmaps import Bitmap
    from kvik.image.qcow2.snapshots import Snapshot

__all__ = ["Info", "info", "size_text"]


class Info:
    """Facts about one image; sizes in bytes. What a format does not have is None or empty."""

    __slots__ = (
        "backing_file",
        "backing_format",
        "bitmaps",
        "cluster_size",
        "compat",
        "compression",
        "corrupt",
        "data_file",
        "data_file_raw",
        "dirty",
        "disk_size",
        "encrypted",
        "encryption",
        "extended_l2",
        "filename",
        "format",
        "lazy_refcounts",
        "luks",
        "refcount_bits",
        "snapshots",
        "virtual_size",
    )

    def __init__(self, filename: str, format: str, virtual_size: int, disk_size: int) -> None:
        self.filename = filename
        self.format = format
        self.virtual_size = virtual_size
        self.disk_size = disk_size
        self.cluster_size: int | None = None
        self.backing_file: str | None = None
        self.backing_format: str | None = None
        self.data_file: str | None = None
        self.data_file_raw = False
        self.compat: str | None = None
        self.compression: str | None = None
        self.lazy_refcounts = False
        self.refcount_bits: int | None = None
        self.extended_l2 = False
        self.corrupt = False
        self.dirty = False
        self.encrypted = False
        self.encryption: str | None = None
        self.luks: dict[str, Any] | None = None
        self.snapshots: list[Snapshot] = []
        self.bitmaps: list[Bitmap] = []

    def full_backing_file(self) -> str | None:
        """The backing file's name, as seen from where the image's own name is."""
        return None if self.backing_file is None else beside(self.filename, self.backing_file)

    def as_dict(self) -> dict[str, Any]:
        """As `qemu-img info --output=json` of QEMU 7.2, in its order."""
        out: dict[str, Any] = {}
        if self.snapshots:
            out["snapshots"] = [snapshot_dict(snapshot) for snapshot in self.snapshots]
        if self.backing_format is not None and self.backing_file is not None:
            out["backing-filename-format"] = self.backing_format
        out["virtual-size"] = self.virtual_size
        out["filename"] = self.filename
        if self.cluster_size is not None:
            out["cluster-size"] = self.cluster_size
        out["format"] = self.format
        out["actual-size"] = self.disk_size
        if self.compat is not None:
            out["format-specific"] = {"type": self.format, "data": self._specific()}
        elif self.luks is not None:
            out["format-specific"] = {"type": self.format, "data": self.luks}
        if self.encrypted:
            out["encrypted"] = True
        if self.backing_file is not None:
            out["full-backing-filename"] = self.full_backing_file()
            out["backing-filename"] = self.backing_file
        out["dirty-flag"] = self.dirty
        return out

    def _specific(self) -> dict[str, Any]:
        data: dict[str, Any] = {"compat": self.compat}
        if self.compression is not None:
            data["compression-type"] = self.compression
        if self.compat == "0.10":
            data["refcount-bits"] = self.refcount_bits
            if self.encryption is not None:
                data["encrypt"] = self._encrypt()
        else:
            data["lazy-refcounts"] = self.lazy_refcounts
            if self.bitmaps:
                data["bitmaps"] = [
                    {"flags": bitmap.flag_names(), "name": bitmap.name, "granularity": bitmap.granularity}
                    for bitmap in self.bitmaps
                ]
            data["refcount-bits"] = self.refcount_bits
            if self.data_file is not None:
                data["data-file"] = self.data_file
                data["data-file-raw"] = self.data_file_raw
            if self.encryption is not None:
                data["encrypt"] = self._encrypt()
            data["corrupt"] = self.corrupt
            data["extended-l2"] = self.extended_l2
        return data

    def _encrypt(self) -> dict[str, Any]:
        """As QEMU orders it: the format comes before the cipher's mode."""
        out: dict[str, Any] = {}
        for name, value in (self.luks or {}).items():
            if name == "cipher-mode":
                out["format"] = self.encryption
            out[name] = value
        return out or {"format": self.encryption}


def snapshot_dict(snapshot: Snapshot) -> dict[str, Any]:
    out: dict[str, Any] = {} if snapshot.icount is None else {"icount": snapshot.icount}
    return out | {
        "vm-clock-nsec": snapshot.vm_clock_nsec % 1_000_000_000,
        "name": snapshot.name,
        "date-sec": snapshot.date_sec,
        "date-nsec": snapshot.date_nsec,
        "vm-clock-sec": snapshot.vm_clock_nsec // 1_000_000_000,
        "id": snapshot.id,
        "vm-state-size": snapshot.vm_state_size,
    }


def beside(image: str, name: str) -> str:
    """`name` as an image refers to it: relative to the image's directory."""
    if name.startswith("/") or ":" in name.split("/", 1)[0]:
        return name
    directory = image.rpartition("/")[0]
    return f"{directory}/{name}" if directory else "/" + name if image.startswith("/") else name


def info(image: Image) -> Info:
    """Facts about an open image; nothing but headers and directories is read."""
    found = Info(image.path, image.format, image.size, os.fstat(image.fd).st_blocks * 512)
    if image.format == "luks":
        from kvik.image.luks import LuksImage

        assert isinstance(image, LuksImage)
        found.encrypted, found.luks = True, image.facts
    if not isinstance(image, Qcow2Reader):
        return found
    header = image.header
    found.cluster_size = header.cluster_size
    found.backing_file = header.backing_file
    found.backing_format = header.backing_format
    found.compat = "0.10" if header.version == 2 else "1.1"
    found.compression = ("zlib", "zstd")[header.compression]
    found.lazy_refcounts = bool(header.compatible & 1)
    found.refcount_bits = 1 << header.refcount_order
    found.extended_l2 = header.extended_l2
    found.dirty = image.dirty
    found.corrupt = image.corrupt
    found.encrypted = bool(header.crypt_method)
    found.encryption = (None, "aes", "luks")[header.crypt_method]
    if header.encryption is not None and header.crypt_method == 2:
        from kvik.image.luks import luks_facts

        at = int.from_bytes(header.encryption[:8], "big")
        found.luks = luks_facts(os.pread(image.fd, 4096, at) if at < 1 << 62 else b"", image.path, at)
    if image.has_data_file:
        found.data_file = header.data_file
        found.data_file_raw = bool(header.autoclear & 2)
    found.snapshots = image.snapshots
    found.bitmaps = image.bitmaps
    return found


def size_text(size: int) -> str:
    """`1.35 MiB`, as QEMU's size_to_str writes it: three digits, from 1000 of a unit on in the next."""
    from math import frexp

    exponent = max(0, frexp(size / (1000.0 / 1024.0))[1] - 1) // 10
    return f"{size / (1 << (exponent * 10)):.3g} {('', 'Ki', 'Mi', 'Gi', 'Ti', 'Pi', 'Ei')[exponent]}B"
