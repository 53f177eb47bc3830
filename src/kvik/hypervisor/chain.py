"""Backing chains, found by reading qcow2 headers from descriptors that are already open.

QEMU never follows an image's own reference (`backing: null` or a named node everywhere), so what a chain contains is
decided here: a backing file must state its format, because a guest could otherwise make its raw disk look like a
qcow2 that refers to any file of the host. Reference: QEMU's docs/interop/qcow2.txt.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path

from kvik.errors import ConfigUnsupported

__all__ = ["Backing", "check_qcow2", "qcow2_backing", "qcow2_size"]

_MAGIC = 0x514649FB
_FORMAT_EXTENSION = 0xE2792ACA
_EXTERNAL_DATA = 1 << 2
_HEADER = struct.Struct(">IIQI")
_SIZE = struct.Struct(">Q")
_MAX_HEADER = 65536


@dataclass(frozen=True, slots=True)
class Backing:
    path: str
    format: str


def check_qcow2(fd: int, image: str) -> None:
    """Raises `ConfigUnsupported` for what is no qcow2 image, or names another file that its data is in."""
    _header(fd, image)


def qcow2_size(fd: int, image: str) -> int:
    """Bytes of the disk in it. Raises `ConfigUnsupported` for what is no qcow2 image."""
    data, *_ = _header(fd, image)
    return int(_SIZE.unpack_from(data, 24)[0])


def _header(fd: int, image: str) -> tuple[bytes, int, int, int]:
    """The first bytes; where the extensions begin; where the backing file's name is, and how long."""
    data = os.pread(fd, _MAX_HEADER, 0)
    if len(data) < 72:
        raise ConfigUnsupported(f"{image} is not a qcow2 image", remedy="state its true format in <driver type=...>")
    magic, version, offset, length = _HEADER.unpack_from(data)
    if magic != _MAGIC or version not in (2, 3):
        raise ConfigUnsupported(f"{image} is not a qcow2 image", remedy="state its true format in <driver type=...>")
    position = 72
    if version == 3:
        if len(data) < 104:
            raise ConfigUnsupported(f"{image} is a damaged qcow2 image: its header is cut off")
        (features,) = struct.unpack_from(">Q", data, 72)
        (position,) = struct.unpack_from(">I", data, 100)
        if features & _EXTERNAL_DATA:
            raise ConfigUnsupported(f"{image} keeps its data in another file, which is not supported")
    return data, position, offset, length


def qcow2_backing(fd: int, image: str) -> Backing | None:
    """What a qcow2 image sits on; None if it stands alone. Raises `ConfigUnsupported` for one that is not safe."""
    data, position, offset, length = _header(fd, image)
    if offset == 0:
        return None
    if not 0 < length <= 1023 or offset + length > len(data):
        raise ConfigUnsupported(f"{image} is a damaged qcow2 image: its backing file name is out of bounds")
    name = os.fsdecode(data[offset : offset + length])
    found = _extension(data, position, offset)
    if found is None:
        raise ConfigUnsupported(
            f"{image} does not say which format its backing file {name} has",
            remedy=f"say it: qemu-img rebase -u -b {name} -F FORMAT {image}",
        )
    if (
        name.startswith("json:")
        or "://" in name
        or (":" in name.split("/", maxsplit=1)[0] and not name.startswith("."))
    ):
        raise ConfigUnsupported(
            f"{image} sits on {name}, which is no plain file", remedy="describe the chain in <backingStore>"
        )
    return Backing(str(Path(image).parent / name), found)


def _extension(data: bytes, position: int, end: int) -> str | None:
    """The backing format's name among the header extensions."""
    while position + 8 <= min(end, len(data)):
        kind, length = struct.unpack_from(">II", data, position)
        position += 8
        if kind == 0 or position + length > len(data):
            return None
        if kind == _FORMAT_EXTENSION:
            return data[position : position + length].decode("ascii", "replace")
        position += (length + 7) & ~7
    return None
