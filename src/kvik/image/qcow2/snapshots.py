"""Internal snapshots: the snapshot table, read with every bound checked, and written.

Reference: QEMU's docs/interop/qcow2.rst, "Snapshots".
"""

from __future__ import annotations

import os
import struct

from kvik.errors import ImageError, NoSnapshot
from kvik.image.qcow2.header import MAX_L1, Header

__all__ = ["Snapshot", "find", "find_by_name", "pack_snapshots", "read_snapshots", "table_size"]

_ENTRY = struct.Struct(">QIHHIIQII")  # 40 bytes
MAX_EXTRA = 1024
MAX_TABLE = 16 << 20  # QEMU's limit is 64 MiB; memory is bounded harder here
NO_ICOUNT = (1 << 64) - 1


class Snapshot:
    """One snapshot. Times in seconds and nanoseconds, sizes in bytes; `disk_size` None: version 2 did not say."""

    __slots__ = (
        "date_nsec",
        "date_sec",
        "disk_size",
        "extra",
        "icount",
        "id",
        "l1_offset",
        "l1_size",
        "name",
        "room",
        "vm_clock_nsec",
        "vm_state_size",
    )

    def __init__(
        self,
        id: str,
        name: str,
        *,
        l1_offset: int = 0,
        l1_size: int = 0,
        date_sec: int = 0,
        date_nsec: int = 0,
        vm_clock_nsec: int = 0,
        vm_state_size: int = 0,
        disk_size: int | None = None,
        icount: int | None = None,
        extra: bytes = b"",
    ) -> None:
        self.id = id
        self.name = name
        self.l1_offset = l1_offset
        self.l1_size = l1_size
        self.date_sec = date_sec
        self.date_nsec = date_nsec
        self.vm_clock_nsec = vm_clock_nsec
        self.vm_state_size = vm_state_size
        self.disk_size = disk_size
        self.icount = icount
        self.extra = extra  # what follows the fields that are known here
        self.room = 0  # bytes of its entry in the file

    def pack(self) -> bytes:
        extra = b""
        if self.disk_size is not None:
            extra = struct.pack(">QQ", self.vm_state_size, self.disk_size)
            if self.icount is not None or self.extra:
                extra += struct.pack(">Q", NO_ICOUNT if self.icount is None else self.icount) + self.extra
        elif self.vm_state_size >= 1 << 32:
            extra = struct.pack(">Q", self.vm_state_size)
        name, identity = os.fsencode(self.name), os.fsencode(self.id)
        data = _ENTRY.pack(
            self.l1_offset,
            self.l1_size,
            len(identity),
            len(name),
            self.date_sec,
            self.date_nsec,
            self.vm_clock_nsec,
            self.vm_state_size if self.vm_state_size < 1 << 32 else 0,
            len(extra),
        )
        data += extra + identity + name
        return data + bytes(-len(data) % 8)


def pack_snapshots(snapshots: list[Snapshot]) -> bytes:
    return b"".join(snapshot.pack() for snapshot in snapshots)


def read_snapshots(fd: int, path: str, header: Header) -> list[Snapshot]:
    """The whole table. Raises `ImageError` for entries that are cut off or out of bounds."""
    start = header.snapshots_offset
    data = os.pread(fd, min(MAX_TABLE, header.nb_snapshots * (40 + 2 * 65536)), start)
    at = 0
    found: list[Snapshot] = []

    def fault(what: str) -> ImageError:
        return ImageError(what, file=path, offset=start + at)

    for number in range(header.nb_snapshots):
        if at + _ENTRY.size > len(data):
            raise fault(f"entry {number} of the snapshot table is cut off")
        offset, l1_size, id_size, name_size, sec, nsec, clock, state_size, extra_size = _ENTRY.unpack_from(data, at)
        if extra_size > MAX_EXTRA:
            raise fault(f"entry {number} of the snapshot table has {extra_size} bytes of extra data")
        begin = at + _ENTRY.size
        end = begin + extra_size + id_size + name_size
        if end > len(data):
            raise fault(f"entry {number} of the snapshot table is cut off")
        if l1_size * 8 > MAX_L1 or offset & (header.cluster_size - 1):
            raise fault(f"the L1 table of entry {number} of the snapshot table is out of bounds")
        extra = data[begin : begin + extra_size]
        disk_size = icount = None
        if extra_size >= 8:
            (state_size,) = struct.unpack_from(">Q", extra)
        if extra_size >= 16:
            (disk_size,) = struct.unpack_from(">Q", extra, 8)
            if disk_size > 1 << 63 or header.l1_needed(disk_size) > l1_size:
                raise fault(f"the L1 table of entry {number} of the snapshot table is too small for its disk")
        if extra_size >= 24:
            (icount,) = struct.unpack_from(">Q", extra, 16)
        found.append(
            Snapshot(
                os.fsdecode(data[begin + extra_size : begin + extra_size + id_size]),
                os.fsdecode(data[begin + extra_size + id_size : end]),
                l1_offset=offset,
                l1_size=l1_size,
                date_sec=sec,
                date_nsec=nsec,
                vm_clock_nsec=clock,
                vm_state_size=state_size,
                disk_size=disk_size,
                icount=None if icount == NO_ICOUNT else icount,
                extra=extra[24:],
            )
        )
        found[-1].room = ((end + 7) & ~7) - at
        at += found[-1].room
    return found


def table_size(snapshots: list[Snapshot]) -> int:
    """Bytes of the table in the file."""
    return sum(snapshot.room for snapshot in snapshots)


def find_by_name(snapshots: list[Snapshot], key: str, path: str) -> Snapshot:
    """By name, else by id: as `qemu-img snapshot -d` looks, which knows names alone."""
    for snapshot in snapshots:
        if snapshot.name == key:
            return snapshot
    return find(snapshots, key, path)


def find(snapshots: list[Snapshot], key: str, path: str) -> Snapshot:
    """By id, else by name, as qemu-img looks; `NoSnapshot` if neither."""
    for snapshot in snapshots:
        if snapshot.id == key:
            return snapshot
    for snapshot in snapshots:
        if snapshot.name == key:
            return snapshot
    known = ", ".join(snapshot.name for snapshot in snapshots[:10]) or "none"
    raise NoSnapshot(f"{path} has no snapshot '{key}'", remedy=f"it has: {known}")
