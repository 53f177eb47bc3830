"""The qcow2 header and its extensions: parsed with every bound checked, and written as qemu-img 7.2 writes them.

Reference: QEMU's docs/interop/qcow2.rst, "Header" to "Feature name table". Limits beyond the format's own (cluster of
2 MiB, L1 table of 32 MiB, refcount table of 8 MiB, 65536 snapshots) are QEMU's, and bound our memory.
"""

from __future__ import annotations

import os
import struct

from kvik.errors import ImageError

__all__ = [
    "AUTOCLEAR_BITMAPS",
    "AUTOCLEAR_RAW",
    "COMPRESSION",
    "CORRUPT",
    "DATA_FILE",
    "DIRTY",
    "EXTENDED_L2",
    "LAZY_REFCOUNTS",
    "MAGIC",
    "Header",
    "parse",
]

MAGIC = b"QFI\xfb"

# incompatible features
DIRTY, CORRUPT, DATA_FILE, COMPRESSION, EXTENDED_L2 = 1, 2, 4, 8, 16
# compatible and autoclear features
LAZY_REFCOUNTS = 1
AUTOCLEAR_BITMAPS, AUTOCLEAR_RAW = 1, 2

FEATURES = (
    (0, 0, "dirty bit"),
    (0, 1, "corrupt bit"),
    (0, 2, "external data file"),
    (0, 3, "compression type"),
    (0, 4, "extended L2 entries"),
    (1, 0, "lazy refcounts"),
    (2, 0, "bitmaps"),
    (2, 1, "raw external data"),
)
FEATURE_TABLE = b"".join(struct.pack(">BB46s", kind, bit, name.encode()) for kind, bit, name in FEATURES)

# extensions
END, BACKING_FORMAT, FEATURE_NAMES, BITMAPS = 0, 0xE2792ACA, 0x6803F857, 0x23852875
ENCRYPTION, DATA_FILE_NAME = 0x0537BE77, 0x44415441

MAX_L1 = 32 << 20
MAX_REFCOUNT_TABLE = 8 << 20
MAX_SNAPSHOTS = 65536
MAX_NAME = 1023
OFFSET_LIMIT = 1 << 56  # L1 and L2 entries have bits 9 to 55 of an offset

_V2 = struct.Struct(">4sIQIIQIIQQIIQ")
_V3 = struct.Struct(">QQQII")


class Header:
    """The fields by the specification's names; names of files decoded as the file system's."""

    __slots__ = (
        "autoclear",
        "backing_file",
        "backing_format",
        "bitmaps",
        "cluster_bits",
        "compatible",
        "compression",
        "crypt_method",
        "data_file",
        "encryption",
        "extra",
        "incompatible",
        "l1_offset",
        "l1_size",
        "nb_snapshots",
        "refcount_order",
        "refcount_table_clusters",
        "refcount_table_offset",
        "size",
        "snapshots_offset",
        "unknown",
        "version",
    )

    def __init__(self, version: int = 3, cluster_bits: int = 16, size: int = 0) -> None:
        self.version = version
        self.cluster_bits = cluster_bits
        self.size = size
        self.crypt_method = 0
        self.l1_size = 0
        self.l1_offset = 0
        self.refcount_table_offset = 0
        self.refcount_table_clusters = 0
        self.nb_snapshots = 0
        self.snapshots_offset = 0
        self.incompatible = 0
        self.compatible = 0
        self.autoclear = 0
        self.refcount_order = 4
        self.compression = 0  # 0: zlib, 1: zstd
        self.extra = b""  # fields behind compression_type: kept as they are
        self.backing_file: str | None = None
        self.backing_format: str | None = None
        self.data_file: str | None = None
        self.bitmaps: tuple[int, int, int] | None = None  # number, size and offset of the directory
        self.encryption: bytes | None = None
        self.unknown: list[tuple[int, bytes]] = []  # extensions that are not ours: kept in their order

    @property
    def cluster_size(self) -> int:
        return 1 << self.cluster_bits

    @property
    def extended_l2(self) -> bool:
        return bool(self.incompatible & EXTENDED_L2)

    @property
    def l2_bits(self) -> int:
        """log2 of the entries in one L2 table."""
        return self.cluster_bits - (4 if self.extended_l2 else 3)

    def l1_needed(self, size: int) -> int:
        """Entries that an L1 table for a disk of `size` bytes has."""
        shift = self.cluster_bits + self.l2_bits
        return (size + (1 << shift) - 1) >> shift

    def pack(self) -> bytes:
        """The first cluster's contents; `ImageError` if it does not fit."""
        out = self._extensions(names=True)
        name = os.fsencode(self.backing_file) if self.backing_file is not None else b""
        self._fields(out, len(out) if name else 0, len(name))
        out += name
        if len(out) > self.cluster_size or len(name) > MAX_NAME:
            raise ImageError(
                f"the header does not fit in its cluster of {self.cluster_size} bytes",
                remedy="use a shorter backing file name or a bigger cluster_size",
            )
        return bytes(out)

    def pack_compact(self, name_offset: int) -> bytes:
        """Without the features' names, and with the backing file's name elsewhere."""
        out = self._extensions(names=False)
        name = os.fsencode(self.backing_file) if self.backing_file is not None else b""
        self._fields(out, name_offset, len(name))
        return bytes(out)

    def _extensions(self, *, names: bool) -> bytearray:
        """Room for the fields of version 2, those of version 3, and the extensions."""
        out = bytearray(_V2.size if self.version == 2 else _V2.size + _V3.size + 8 + len(self.extra))
        if self.version > 2:
            length = len(out)
            _V3.pack_into(out, 72, self.incompatible, self.compatible, self.autoclear, self.refcount_order, length)
            out[104] = self.compression
            out[112:] = self.extra
        if self.backing_format:
            _extension(out, BACKING_FORMAT, self.backing_format.encode())
        if self.data_file is not None and self.incompatible & DATA_FILE:
            _extension(out, DATA_FILE_NAME, os.fsencode(self.data_file))
        if self.encryption is not None:
            _extension(out, ENCRYPTION, self.encryption)
        if names and self.version > 2 and self.cluster_size > 4096:  # smaller ones have no room to spare
            _extension(out, FEATURE_NAMES, FEATURE_TABLE)
        if self.bitmaps is not None:
            number, size, offset = self.bitmaps
            _extension(out, BITMAPS, struct.pack(">IIQQ", number, 0, size, offset))
        for kind, data in self.unknown:
            _extension(out, kind, data)
        _extension(out, END, b"")
        return out

    def _fields(self, out: bytearray, name_offset: int, name_size: int) -> None:
        _V2.pack_into(
            out,
            0,
            MAGIC,
            self.version,
            name_offset,
            name_size,
            self.cluster_bits,
            self.size,
            self.crypt_method,
            self.l1_size,
            self.l1_offset,
            self.refcount_table_offset,
            self.refcount_table_clusters,
            self.nb_snapshots,
            self.snapshots_offset,
        )


def _extension(out: bytearray, kind: int, data: bytes) -> None:
    out += struct.pack(">II", kind, len(data)) + data + bytes(-len(data) % 8)


def parse(fd: int, path: str) -> Header:
    """The header of an open file. Raises `ImageError` for whatever could not be used safely."""
    data = os.pread(fd, 4096, 0)
    if len(data) < _V2.size or data[:4] != MAGIC:
        raise ImageError("is not a qcow2 image", file=path, offset=0, remedy="state its true format")
    header = Header()
    (_, header.version, name_offset, name_size, header.cluster_bits, header.size, header.crypt_method) = (
        _V2.unpack_from(data)[:7]
    )
    (
        header.l1_size,
        header.l1_offset,
        header.refcount_table_offset,
        header.refcount_table_clusters,
        header.nb_snapshots,
        header.snapshots_offset,
    ) = _V2.unpack_from(data)[7:]

    def fault(what: str, offset: int, remedy: str = "") -> ImageError:
        return ImageError(what, file=path, offset=offset, remedy=remedy)

    if header.version not in (2, 3):
        raise fault(f"qcow2 version {header.version} is not supported", 4)
    if not 9 <= header.cluster_bits <= 21:
        raise fault(f"the cluster size is out of bounds (2 to the power of {header.cluster_bits})", 20)
    end = _V2.size
    if header.version == 3:
        if len(data) < _V2.size + _V3.size:
            raise fault("the header is cut off", len(data))
        (header.incompatible, header.compatible, header.autoclear, header.refcount_order, end) = _V3.unpack_from(
            data, 72
        )
        if end < 104 or end % 8 or end > header.cluster_size:
            raise fault(f"the header's length of {end} is out of bounds", 100)
    if len(data) < header.cluster_size:
        data += os.pread(fd, header.cluster_size - len(data), len(data))
    data = data[: header.cluster_size]
    if end > len(data):
        raise fault("the header is cut off", len(data))
    if end > 104:
        header.compression = data[104]
        header.extra = data[112:end]
    first = min(name_offset, len(data)) if name_offset else len(data)
    _parse_extensions(header, data, end, first, fault)
    _check_features(header, fault)
    _check_tables(header, os.fstat(fd).st_size or _device_size(fd), fault)
    if name_offset:
        if not 0 < name_size <= MAX_NAME or name_offset < end or name_offset + name_size > len(data):
            raise fault("the backing file's name is out of bounds", 8)
        name = data[name_offset : name_offset + name_size]
        if b"\0" in name:
            raise fault("the backing file's name has a zero byte", name_offset)
        header.backing_file = os.fsdecode(name)
    return header


def _device_size(fd: int) -> int:
    """A block device's; regular files are seldom empty."""
    return os.lseek(fd, 0, os.SEEK_END)


TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    Fault = Callable[..., ImageError]


def _parse_extensions(header: Header, data: bytes, position: int, end: int, fault: Fault) -> None:
    feature_names: dict[tuple[int, int], str] = {}
    seen: set[int] = set()
    while position + 8 <= end:
        kind, length = struct.unpack_from(">II", data, position)
        at, position = position, position + 8
        if kind == END:
            break
        if length > end - position:
            raise fault(f"the header extension {kind:#x} is longer than the space it is in", at)
        body = data[position : position + length]
        position += (length + 7) & ~7
        if kind in seen and kind in (BACKING_FORMAT, BITMAPS, ENCRYPTION, DATA_FILE_NAME):
            raise fault(f"the header extension {kind:#x} appears twice", at)
        seen.add(kind)
        if kind == BACKING_FORMAT:
            if length > 15:
                raise fault("the backing format's name is too long", at)
            header.backing_format = body.decode("ascii", "replace")
        elif kind == DATA_FILE_NAME:
            if length > MAX_NAME or b"\0" in body:
                raise fault("the data file's name is out of bounds", at)
            header.data_file = os.fsdecode(body)
        elif kind == FEATURE_NAMES:
            for number in range(length // 48):
                group, bit, name = struct.unpack_from(">BB46s", body, number * 48)
                feature_names[group, bit] = name.rstrip(b"\0").decode("ascii", "replace")
        elif kind == BITMAPS:
            if length != 24:
                raise fault("the bitmaps extension has the wrong length", at)
            number, reserved, size, offset = struct.unpack(">IIQQ", body)
            if (
                reserved
                or not 1 <= number <= 65535
                or size > 65535 * 2048
                or offset % header.cluster_size
                or offset >> 62
            ):
                raise fault("the bitmaps extension is out of bounds", at)
            header.bitmaps = number, size, offset
        elif kind == ENCRYPTION:
            if length != 16:
                raise fault("the encryption header's pointer has the wrong length", at)
            header.encryption = body
        else:
            header.unknown.append((kind, body))
    unknown = header.incompatible & ~(DIRTY | CORRUPT | DATA_FILE | COMPRESSION | EXTENDED_L2)
    if unknown:
        names = [feature_names.get((0, bit), f"bit {bit}") for bit in range(64) if unknown >> bit & 1]
        raise fault(
            f"uses features that are not supported: {', '.join(names)}", 72, "a newer version may be able to read it"
        )


def _check_features(header: Header, fault: Fault) -> None:
    if header.refcount_order > 6:
        raise fault("the refcounts are wider than 64 bits", 96)
    if bool(header.incompatible & COMPRESSION) != bool(header.compression):
        raise fault("the compression type and its feature bit contradict each other", 104)
    if header.compression > 1:
        raise fault(f"the compression type {header.compression} is unknown", 104)
    if header.extended_l2 and header.cluster_bits < 14:
        raise fault("extended L2 entries need clusters of 16 KiB at least", 20)
    if header.crypt_method > 2:
        raise fault(f"the encryption method {header.crypt_method} is unknown", 32)
    if header.incompatible & DATA_FILE:
        if header.nb_snapshots:
            raise fault("an image with an external data file cannot have snapshots", 60)
    else:
        header.autoclear &= ~AUTOCLEAR_RAW
    if header.bitmaps is None:
        header.autoclear &= ~AUTOCLEAR_BITMAPS


def _check_tables(header: Header, file_size: int, fault: Fault) -> None:
    mask = header.cluster_size - 1
    if header.l1_size * 8 > MAX_L1:
        raise fault("the L1 table is bigger than 32 MiB", 36)
    if header.size > 1 << 63 or header.l1_needed(header.size) > header.l1_size:
        raise fault(f"the L1 table is too small for a disk of {header.size} bytes", 36)
    if header.l1_size and (header.l1_offset & mask or not header.l1_offset):
        raise fault(f"the L1 table's offset {header.l1_offset:#x} is not that of a cluster", 40)
    if header.l1_offset + header.l1_size * 8 > file_size:
        raise fault("the L1 table is outside the file", 40)
    if not header.refcount_table_offset or header.refcount_table_offset & mask:
        raise fault(f"the refcount table's offset {header.refcount_table_offset:#x} is not that of a cluster", 48)
    if not 0 < header.refcount_table_clusters << header.cluster_bits <= MAX_REFCOUNT_TABLE:
        raise fault("the refcount table's size is out of bounds", 56)
    if header.refcount_table_offset > file_size:
        raise fault("the refcount table is outside the file", 48)
    if header.nb_snapshots > MAX_SNAPSHOTS:
        raise fault(f"{header.nb_snapshots} snapshots are more than an image can have", 60)
    if header.nb_snapshots and (header.snapshots_offset & mask or not 0 < header.snapshots_offset < file_size):
        raise fault(f"the snapshot table's offset {header.snapshots_offset:#x} is out of bounds", 64)
