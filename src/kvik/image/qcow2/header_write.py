"""The header changed in a file, so that power lost meanwhile leaves the old one or the new one.

What a disk writes as a whole is a sector. Most changes (places of tables, sizes, flags) are within the first one. Where
an extension or the backing file's name changes, the new name is written first, to a place that is not in use; then the
first sector, which leads to it, with all extensions that matter. The table of features' names, which only makes errors
readable, does not fit there and is left out from then on. Reference: QEMU's docs/interop/qcow2.rst, "Header".
"""

from __future__ import annotations

import os
from collections.abc import Callable

from kvik.image.base import write_fully
from kvik.image.qcow2.header import Header

__all__ = ["write_header"]

SECTOR = 512


def write_header(fd: int, header: Header, barrier: Callable[[], None]) -> None:
    """Into the file's first cluster; on disk after the next flush."""
    packed = header.pack()
    packed += bytes(max(-len(packed) % SECTOR, min(4096, header.cluster_size) - len(packed)))
    present = os.pread(fd, header.cluster_size, 0)
    changed = [at for at in range(0, len(packed), SECTOR) if packed[at : at + SECTOR] != present[at : at + SECTOR]]
    if not changed:
        return
    if len(changed) == 1:
        write_fully(fd, packed[changed[0] : changed[0] + SECTOR], changed[0])
        return
    if not _write_compact(fd, header, present, barrier):
        write_fully(fd, packed, 0)


def _write_compact(fd: int, header: Header, present: bytes, barrier: Callable[[], None]) -> bool:
    """With one write of the first sector, where that has room for what matters."""
    name = os.fsencode(header.backing_file) if header.backing_file is not None else b""
    at, length = int.from_bytes(present[8:16], "big"), int.from_bytes(present[16:20], "big")
    old_end = at + length if at else SECTOR
    first = header.pack_compact(0)
    if len(first) > SECTOR:
        return False
    place = at
    if not name:
        place = 0
    elif not at or present[at : at + length] != name or at < len(first):
        place = (max(old_end, _extensions_end(present), SECTOR) + 7) & -8
        if place + len(name) > header.cluster_size:
            place = SECTOR  # in front of the old one
            if place + len(name) > at or place < _extensions_end(present):
                return False
        write_fully(fd, name, place)
        barrier()
    first = header.pack_compact(place)
    if at and at < SECTOR and place == at:  # the name stays where it is, behind the extensions
        first += present[len(first) : SECTOR]
    write_fully(fd, first + bytes(SECTOR - len(first)), 0)
    return True


def _extensions_end(present: bytes) -> int:
    """Where the extensions that are in the file end."""
    at = 72 if int.from_bytes(present[4:8], "big") == 2 else int.from_bytes(present[100:104], "big")
    while at + 8 <= len(present):
        kind, length = int.from_bytes(present[at : at + 4], "big"), int.from_bytes(present[at + 4 : at + 8], "big")
        at += 8 + ((length + 7) & ~7)
        if kind == 0:
            break
    return at
