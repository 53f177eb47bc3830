"""OVA: a tar archive with an OVF document and the disks that it names, which are read where they lie in the archive.

References: POSIX's ustar format (pax(1), "ustar Interchange Format") with GNU's sizes beyond 8 GiB; DMTF DSP0243 (OVF
1.1), sections 6 "OVF package" and 7 "OVF descriptor". Nothing is unpacked, and no name of the archive becomes a path:
names only tell members from each other. Links, directories and devices are refused, as are more members, longer names
and bigger documents than an appliance has.
"""

from __future__ import annotations

import os
import re

from kvik.errors import ImageError

__all__ = ["Member", "disks", "looks_like", "members"]

BLOCK = 512
MOST_MEMBERS = 64
LARGEST_OVF = 1 << 20
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9 ._+()@-]{0,99}", re.ASCII)


class Member:
    """A file of the archive: its data is at `offset` of it."""

    __slots__ = ("name", "offset", "size")

    def __init__(self, name: str, offset: int, size: int) -> None:
        self.name = name
        self.offset = offset
        self.size = size


def looks_like(head: bytes) -> bool:
    """Whether a file begins as an OVA does: a tar archive whose first member is the document."""
    return head[257:262] == b"ustar" and head[:100].split(b"\0", 1)[0].lower().endswith(b".ovf")


def members(fd: int, path: str) -> list[Member]:
    """The archive's files. Raises `ImageError` for whatever an OVA should not have."""
    end = os.fstat(fd).st_size
    found: list[Member] = []
    names: set[str] = set()
    at = 0
    while at + BLOCK <= end:
        header = os.pread(fd, BLOCK, at)
        if not header.strip(b"\0"):
            break  # the archive's end

        def fault(what: str, at: int = at) -> ImageError:
            return ImageError(what, file=path, offset=at, remedy="unpack it by hand if you trust it: tar -xf")

        if len(header) < BLOCK or header[257:262] != b"ustar" or _checksum(header) != _octal(header[148:156]):
            raise fault("is no archive that an OVA could be: a member's header is damaged")
        name = header[:100].split(b"\0", 1)[0].decode("ascii", "replace").removeprefix("./")
        size = _number(header[124:136])
        if header[156:157] not in (b"0", b"\0"):
            raise fault(f"a member of the archive is no plain file ({name!r}, type {header[156:157]!r})")
        if header[345:500].strip(b"\0") or not _NAME.fullmatch(name):
            raise fault(f"a member's name is not one that an OVA may have: {name!r}")
        if name in names:
            raise fault(f"two members are called {name!r}")
        if size is None or size > end - at - BLOCK:
            raise fault(f"the member {name!r} is longer than the archive")
        if len(found) >= MOST_MEMBERS:
            raise fault(f"the archive has more than {MOST_MEMBERS} members")
        names.add(name)
        found.append(Member(name, at + BLOCK, size))
        at += BLOCK + (size + BLOCK - 1) // BLOCK * BLOCK
    return found


def _checksum(header: bytes) -> int:
    """Of the header with its own checksum as blanks."""
    return sum(header[:148]) + 8 * 32 + sum(header[156:])


def _octal(field: bytes) -> int | None:
    text = field.strip(b"\0 ")
    return int(text, 8) if text and not text.strip(b"01234567") else None


def _number(field: bytes) -> int | None:
    """A size: octal, or (GNU) binary where the first bit is set."""
    if field[0] & 0x80:
        return int.from_bytes(field, "big") & ((1 << 95) - 1) if field[0] == 0x80 else None
    return _octal(field)


def disks(fd: int, path: str) -> list[Member]:
    """The disks that the archive's document names, in its order. Raises `ImageError`."""
    there = members(fd, path)
    documents = [one for one in there if one.name.lower().endswith(".ovf")]
    if len(documents) != 1 or documents[0].size > LARGEST_OVF:
        raise ImageError("has no OVF document, or several, or one of more than 1 MiB", file=path)
    document = documents[0]
    names = _disk_files(os.pread(fd, document.size, document.offset), path, document.offset)
    by_name = {one.name: one for one in there}
    missing = [name for name in names if name not in by_name]
    if missing:
        raise ImageError(f"its document names disks that are not in the archive: {', '.join(missing)[:200]}", file=path)
    return [by_name[name] for name in names]


def _disk_files(text: bytes, path: str, offset: int) -> list[str]:
    """The file names of the document's disks: each Disk refers to a File of its References."""
    from xml.parsers import expat

    files: dict[str, str] = {}
    wanted: list[str] = []

    def refuse(*_: object) -> None:
        raise ImageError("its OVF document declares entities", file=path, offset=offset)

    def start(tag: str, attributes: dict[str, str]) -> None:
        own = {name.rpartition(" ")[2]: value for name, value in attributes.items()}
        kind = tag.rpartition(" ")[2]
        if kind == "File":
            if own.get("compression", "identity") != "identity" or "chunkSize" in own:
                raise ImageError("has compressed or divided files, which is not supported", file=path, offset=offset)
            files[own.get("id", "")] = own.get("href", "")
        elif kind == "Disk" and "fileRef" in own:  # one without is empty
            wanted.append(own["fileRef"])

    parser = expat.ParserCreate(namespace_separator=" ")
    parser.StartElementHandler = start
    parser.StartDoctypeDeclHandler = parser.EntityDeclHandler = refuse
    try:
        parser.Parse(text, True)
    except expat.ExpatError as error:
        raise ImageError(f"its OVF document is damaged: {error}", file=path, offset=offset) from None
    return [files.get(name, name) for name in wanted]
