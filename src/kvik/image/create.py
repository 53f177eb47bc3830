"""New images: raw and qcow2, laid out as `qemu-img create` lays them out.

A new qcow2 image: header, refcount table, refcount block, L1 table; a cluster each at least, in this order.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress

from kvik.errors import ImageError, InvalidArgument
from kvik.image.base import write_fully
from kvik.image.qcow2.header import (
    AUTOCLEAR_RAW,
    COMPRESSION,
    DATA_FILE,
    EXTENDED_L2,
    LAZY_REFCOUNTS,
    MAX_L1,
    Header,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["OPTIONS", "CreateOptions", "create", "parse_options", "parse_size"]

PREALLOCATIONS = ("off", "metadata", "falloc", "full")
COMPATS = {"0.10": 2, "v2": 2, "1.1": 3, "v3": 3}


class CreateOptions:
    """Of a new image; names and defaults are qemu-img's."""

    __slots__ = (
        "backing_file",
        "backing_format",
        "cluster_size",
        "compat",
        "compression_type",
        "data_file",
        "data_file_raw",
        "extended_l2",
        "lazy_refcounts",
        "preallocation",
        "refcount_bits",
    )

    def __init__(self, **values: Any) -> None:
        self.cluster_size: int = 65536
        self.backing_file: str | None = None
        self.backing_format: str | None = None
        self.data_file: str | None = None
        self.data_file_raw = False
        self.preallocation = "off"
        self.lazy_refcounts = False
        self.refcount_bits = 16
        self.extended_l2 = False
        self.compression_type = "zlib"
        self.compat = "1.1"
        for name, value in values.items():
            if name not in self.__slots__:
                raise InvalidArgument(
                    f"unknown option '{name}' of an image", remedy=f"known: {', '.join(self.__slots__)}"
                )
            setattr(self, name, value)

    @property
    def version(self) -> int:
        return COMPATS[self.compat]

    def check(self) -> None:
        """Raises `InvalidArgument` for what cannot be, as QEMU does."""
        size = self.cluster_size
        if size & (size - 1) or not 512 <= size <= 2 << 20:
            raise InvalidArgument("the cluster size must be a power of two between 512 and 2048k")
        if self.compat not in COMPATS:
            raise InvalidArgument(f"unknown compat '{self.compat}'", remedy="0.10 (v2) or 1.1 (v3)")
        if self.preallocation not in PREALLOCATIONS:
            raise InvalidArgument(
                f"unknown preallocation '{self.preallocation}'", remedy=f"one of: {', '.join(PREALLOCATIONS)}"
            )
        bits = self.refcount_bits
        if bits & (bits - 1) or not 1 <= bits <= 64:
            raise InvalidArgument("the refcount width must be a power of two and may not exceed 64 bits")
        if self.compression_type not in ("zlib", "zstd"):
            raise InvalidArgument(f"unknown compression_type '{self.compression_type}'", remedy="zlib or zstd")
        if self.version < 3:
            for wrong, name in (
                (bits != 16, "other refcount widths than 16 bits"),
                (self.lazy_refcounts, "lazy_refcounts"),
                (self.data_file is not None, "an external data file"),
                (self.extended_l2, "extended_l2"),
                (self.compression_type != "zlib", "other compression types than zlib"),
            ):
                if wrong:
                    raise InvalidArgument(f"{name}: needs compatibility level 1.1 and above", remedy="use compat=1.1")
        if self.extended_l2 and size < 16384:
            raise InvalidArgument("extended L2 entries need clusters of 16 KiB at least")
        if self.preallocation != "off" and self.backing_file is not None and not self.extended_l2:
            raise InvalidArgument("a backing file and preallocation cannot be used together without extended_l2")
        if self.data_file_raw and self.backing_file is not None:
            raise InvalidArgument("a backing file and data_file_raw cannot be used together")
        if self.data_file_raw and self.data_file is None:
            raise InvalidArgument("data_file_raw needs a data_file")
        if self.backing_format is not None and self.backing_file is None:
            raise InvalidArgument("a backing format needs a backing file")


# name as qemu-img spells it: (attribute, type, help)
OPTIONS: dict[str, tuple[str, type, str]] = {
    "backing_file": ("backing_file", str, "File name of a base image"),
    "backing_fmt": ("backing_format", str, "Image format of the base image"),
    "cluster_size": ("cluster_size", int, "qcow2 cluster size"),
    "compat": ("compat", str, "Compatibility level (v2 [0.10] or v3 [1.1])"),
    "compression_type": ("compression_type", str, "Compression method used for image cluster compression"),
    "data_file": ("data_file", str, "File name of an external data file"),
    "data_file_raw": ("data_file_raw", bool, "The external data file must stay valid as a raw image"),
    "extended_l2": ("extended_l2", bool, "Extended L2 tables"),
    "lazy_refcounts": ("lazy_refcounts", bool, "Postpone refcount updates"),
    "preallocation": ("preallocation", str, "Preallocation mode (allowed values: off, metadata, falloc, full)"),
    "refcount_bits": ("refcount_bits", int, "Width of a reference count entry in bits"),
    "size": ("size", int, "Virtual disk size"),
}
RAW_OPTIONS = ("preallocation", "size")
SUFFIXES = {"b": 0, "k": 10, "m": 20, "g": 30, "t": 40, "p": 50, "e": 60}


def parse_size(text: str, what: str = "size") -> int:
    """`512`, `1.5G`, `64k`: bytes; suffixes are powers of 1024. Raises `InvalidArgument`."""
    digits, shift = text, 0
    if text and text[-1].lower() in SUFFIXES:
        digits, shift = text[:-1], SUFFIXES[text[-1].lower()]
    try:
        if digits.isascii() and digits.isdigit():
            value = int(digits) << shift
        else:
            from fractions import Fraction

            if not digits or not digits[0].isdigit() or not all(c.isdigit() or c == "." for c in digits):
                raise ValueError(digits)
            value = int(Fraction(digits) * (1 << shift))
        if value < 1 << 63:
            return value
    except (ValueError, ZeroDivisionError):
        pass
    raise InvalidArgument(
        f"'{text}' is no valid {what}", remedy="write a number with k, M, G, T, P or E, such as 10G; below 8 EiB"
    )


def parse_options(words: list[str], format: str) -> dict[str, Any]:
    """`-o` lists (`name=value,name=value`; a comma in a value is doubled) as keywords of `CreateOptions`, and
    `size`."""
    found: dict[str, Any] = {}
    for word in words:
        for setting in word.replace(",,", "\0").split(","):
            name, equals, text = setting.replace("\0", ",").partition("=")
            known = OPTIONS.get(name)
            if known is None or (format == "raw" and name not in RAW_OPTIONS):
                raise InvalidArgument(
                    f"format '{format}' has no option '{name}'",
                    remedy=f"'kvik img create -f {format} -o help' lists them",
                )
            attribute, kind, _ = known
            if kind is bool:
                if text not in ("on", "off", "true", "false", "yes", "no") and equals:
                    raise InvalidArgument(f"option '{name}' is on or off, not '{text}'")
                found[attribute] = text in ("on", "true", "yes") or not equals
            elif not equals:
                raise InvalidArgument(f"option '{name}' needs a value")
            else:
                found[attribute] = parse_size(text, name) if kind is int else text
    return found


def create(target: str | int, format: str, size: int, **options: Any) -> None:
    """A new image of `size` bytes at a path (an existing file is replaced) or in an open, writable descriptor, also
    that of a block device.

    `options` are those of `CreateOptions`. Nothing is opened: not the backing file, and not the data file, which the
    caller makes. Raises `InvalidArgument`, `OSError`.
    """
    chosen = CreateOptions(**options)
    if size < 0 or size > 1 << 62:
        raise InvalidArgument(f"a disk of {size} bytes cannot be")
    if format == "raw":
        _check_raw(options)
    elif format == "qcow2":
        chosen.check()
        new_header(size, chosen)  # raises where the disk is too big
    else:
        raise InvalidArgument(f"images of format '{format}' cannot be made", remedy="raw or qcow2")
    size = (size + 511) & -512
    fd = target if isinstance(target, int) else os.open(target, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        room = device_size(fd)
        if room is None:
            _empty(fd)
        if format == "raw":
            if room is None:
                _create_raw(fd, size, chosen.preallocation)
            elif room < size:
                raise InvalidArgument(f"the device has {room} bytes, fewer than the {size} of the image")
        else:
            _create_qcow2(fd, size, chosen, "" if isinstance(target, int) else target)
    finally:
        if not isinstance(target, int):
            os.close(fd)


def _empty(fd: int) -> None:
    status = os.fstat(fd)
    if not (status.st_size or status.st_blocks):
        return
    os.ftruncate(fd, 0)
    # ext4 writes a file that was cut to nothing to disk when it is closed next, and whoever closes it waits for all of
    # that (auto_da_alloc, Documentation/admin-guide/ext4.rst). Closed now, there is nothing to wait for.
    with suppress(OSError):
        os.close(os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_CLOEXEC))


def device_size(fd: int) -> int | None:
    """Bytes of a block device; None for a file."""
    if not stat.S_ISBLK(os.fstat(fd).st_mode):
        return None
    return os.lseek(fd, 0, os.SEEK_END)


def _check_raw(options: dict[str, Any]) -> None:
    for name in options:
        if name != "preallocation":
            raise InvalidArgument(f"format 'raw' has no option '{name}'")
    if options.get("preallocation", "off") not in ("off", "falloc", "full"):
        raise InvalidArgument(
            f"format 'raw' has no preallocation '{options['preallocation']}'", remedy="off, falloc, full"
        )


def _create_raw(fd: int, size: int, preallocation: str) -> None:
    os.ftruncate(fd, size)
    reserve(fd, 0, size, preallocation)


def reserve(fd: int, offset: int, length: int, preallocation: str) -> None:
    """Room for a range of a file, by fallocate(2) or (`full`) by writing zeros."""
    if length <= 0:
        return
    if preallocation == "falloc":
        os.posix_fallocate(fd, offset, length)
    elif preallocation == "full":
        blank = bytes(1 << 20)
        for at in range(offset, offset + length, len(blank)):
            write_fully(fd, memoryview(blank)[: min(len(blank), offset + length - at)], at)
        os.fdatasync(fd)


def new_header(size: int, options: CreateOptions) -> Header:
    """The header's fields by the options, without the tables' places."""
    header = Header(options.version, options.cluster_size.bit_length() - 1, size)
    header.refcount_order = options.refcount_bits.bit_length() - 1
    header.backing_file, header.backing_format = options.backing_file, options.backing_format
    if options.lazy_refcounts:
        header.compatible |= LAZY_REFCOUNTS
    if options.extended_l2:
        header.incompatible |= EXTENDED_L2
    if options.compression_type == "zstd":
        header.incompatible |= COMPRESSION
        header.compression = 1
    if options.data_file is not None:
        header.incompatible |= DATA_FILE
        header.data_file = options.data_file
        header.autoclear |= AUTOCLEAR_RAW if options.data_file_raw else 0
    header.l1_size = header.l1_needed(size)
    if header.l1_size * 8 > MAX_L1:
        raise ImageError(
            f"a disk of {size} bytes is too big for clusters of {options.cluster_size} bytes",
            remedy="use a bigger cluster_size",
        )
    return header


def _create_qcow2(fd: int, size: int, options: CreateOptions, path: str) -> None:
    header = new_header(size, options)
    cluster = header.cluster_size
    per_block = cluster * 8 >> header.refcount_order
    l1_clusters = (header.l1_size * 8 + cluster - 1) // cluster
    blocks = table = 1
    while True:
        used = 1 + table + blocks + l1_clusters
        needed = (used + per_block - 1) // per_block
        if needed <= blocks and blocks * 8 <= table * cluster:
            break
        blocks = max(blocks, needed)
        table = max(table, (blocks * 8 + cluster - 1) // cluster)
    header.refcount_table_offset = cluster
    header.refcount_table_clusters = table
    header.l1_offset = (1 + table + blocks) * cluster
    packed = header.pack()  # raises before anything is written where it does not fit
    entries = b"".join(((1 + table + i) * cluster).to_bytes(8, "big") for i in range(blocks))
    from kvik.image.qcow2.refcount import blank_block, pack_block

    for index in range(blocks):
        block = blank_block(per_block, header.refcount_order)
        for i in range(min(per_block, used - index * per_block)):
            block[i] = 1
        write_fully(fd, pack_block(block, header.refcount_order), (1 + table + index) * cluster)
    write_fully(fd, entries + bytes(table * cluster - len(entries)), cluster)
    if header.l1_size:
        write_fully(fd, bytes(header.l1_size * 8), header.l1_offset)
    elif device_size(fd) is None:
        os.ftruncate(fd, header.l1_offset)
    # The header makes it an image: what it leads to is on disk before.
    os.fdatasync(fd)
    write_fully(fd, packed + bytes(cluster - len(packed)), 0)
    # A data file that is to be a raw image of its own has its place for every cluster from the start.
    mode = "metadata" if options.data_file_raw and options.preallocation == "off" else options.preallocation
    if mode != "off":
        from kvik.image.qcow2.preallocate import preallocate

        preallocate(fd, path, mode)
