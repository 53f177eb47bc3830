"""Backing chains, found by reading qcow2 headers from descriptors that are already open.

QEMU never follows an image's own reference (`backing: null` or a named node everywhere), so what a chain contains is
decided here: a backing file must state its format, because a guest could otherwise make its raw disk look like a
qcow2 that refers to any file of the host. And as anything is a raw disk, an image from elsewhere could name any file as
one: only what lies beside the image or in a storage pool is followed, unless the document names it. Reference: QEMU's
docs/interop/qcow2.txt.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from kvik.errors import ConfigUnsupported
from kvik.host.reach import about

__all__ = ["Backing", "check_meant", "check_qcow2", "qcow2_backing", "qcow2_size"]

_MAGIC = 0x514649FB
_FORMAT_EXTENSION = 0xE2792ACA
_EXTERNAL_DATA = 1 << 2
_HEADER = struct.Struct(">IIQI")
_SIZE = struct.Struct(">Q")
_MAX_HEADER = 65536
# Where no disk images are: programs, configuration, keys, the kernel's own files
_SYSTEM = ("bin", "boot", "dev", "etc", "lib", "lib32", "lib64", "proc", "run", "sbin", "sys", "usr")


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


def check_meant(found: Backing, image: str, bases: Collection[str], *, block: bool) -> None:
    """Whether what a header names is something for a guest to read, if it is raw: only what lies beside the image, or
    in one of `bases` (directories, devices and files that people told us of); and no device that the host uses.

    Raises `ConfigUnsupported`.
    """
    if found.format == "qcow2":
        return
    about(found.path)
    named = os.path.normpath(found.path)
    path = Path(os.path.realpath(found.path))
    directory = Path(named).parent if block else path.parent
    remedy = (
        "if a guest shall read it, name it in the document's <backingStore>, or let "
        f"{directory} be a storage pool (kvik pool-define-as)"
    )
    if block:
        try:
            os.close(os.open(path, os.O_RDONLY | os.O_EXCL | os.O_NONBLOCK | os.O_CLOEXEC))
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise ConfigUnsupported(
                    f"{image} sits on {path}, a device that the host uses", remedy=remedy
                ) from error
        if not any(Path(named).is_relative_to(base) for base in bases):  # links in /dev are the host's own
            raise ConfigUnsupported(f"{image} sits on {named}, a device of no storage pool", remedy=remedy)
        return
    if path.is_relative_to(Path(os.path.realpath(image)).parent) or any(_lies_in(path, named, base) for base in bases):
        return
    if path.parts[1] in _SYSTEM:
        raise ConfigUnsupported(f"{image} sits on {path}, a file of the host's own", remedy=remedy)
    raise ConfigUnsupported(f"{image} sits on {path}, which is in no storage pool and not beside it", remedy=remedy)


def _lies_in(path: Path, named: str, base: str) -> bool:
    """`path` is what `named` leads to. A base that it is not in by name is not looked at: it may not answer."""
    return path.is_relative_to(base) or (
        Path(named).is_relative_to(base) and path.is_relative_to(os.path.realpath(base))
    )


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
