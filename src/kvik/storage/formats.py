"""What a file or device in a pool holds, by its first bytes: for lists of volumes only.

A machine's disk never takes its format from here: a guest can write any header into a raw disk of its own. Only fixed
headers are read, and nothing that they point to is opened.
"""

from __future__ import annotations

import os

from kvik.named import NamedTuple

__all__ = ["Header", "read_header"]

# Magic numbers at their offsets, under libvirt's names of formats.
MAGIC = (
    (0, b"QFI\xfb", "qcow2"), (0, b"QED\0", "qed"), (0, b"KDMV", "vmdk"), (0, b"COWD", "vmdk"),
    (64, b"\x7f\x10\xda\xbe", "vdi"), (0, b"conectix", "vpc"), (0, b"OOOM", "cow"), (32769, b"CD001", "iso"),
)  # fmt: skip
LUKS = b"LUKS\xba\xbe"
HEAD = 4096
BACKING_MAX = 1023  # bytes of a name: QCOW2's own limit
ISO_AT, ISO_SIZE = 32769, 5


class Header(NamedTuple):
    """`capacity` in bytes as a guest would see it; `backing`: the name as the file has it, not looked for."""

    format: str
    capacity: int
    backing: str = ""
    encryption: str = ""


def read_header(fd: int, size: int) -> Header:
    """Of a file or device of `size` bytes. Short and damaged ones are raw. Raises OSError."""
    head = os.pread(fd, HEAD, 0)
    tail = os.pread(fd, ISO_SIZE, ISO_AT)
    kind = "raw"
    for offset, magic, name in MAGIC:
        data = tail if offset == ISO_AT else head[offset : offset + len(magic)]
        if data == magic:
            kind = name
            break
    if kind == "qcow2" and len(head) >= 72:
        return _qcow2(fd, head, size)
    return Header(kind, size, encryption="luks" if kind == "raw" and head.startswith(LUKS) else "")


def _qcow2(fd: int, head: bytes, size: int) -> Header:
    """QEMU's docs/interop/qcow2.txt, "Header"."""
    version = int.from_bytes(head[4:8])
    offset, length = int.from_bytes(head[8:16]), int.from_bytes(head[16:20])
    capacity = int.from_bytes(head[24:32])
    method = int.from_bytes(head[32:36])
    backing = ""
    if offset and 0 < length <= BACKING_MAX and offset + length <= size:
        backing = os.pread(fd, length, offset).decode(errors="replace")
    kind = "qcow" if version == 1 else "qcow2"
    return Header(kind, min(capacity, (1 << 63) - 1), backing, {1: "qcow", 2: "luks"}.get(method, ""))
