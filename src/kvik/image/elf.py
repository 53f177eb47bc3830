"""What kvik needs of ELF files (System V ABI, x86-64 and i386 little-endian): notes, sections, needed libraries.

Every offset and length comes from the file and is checked against its size before use; a file that lies raises
`ImageError`, never anything else.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from kvik.errors import ImageError

__all__ = ["ElfFile", "Note", "Section"]

PT_DYNAMIC, PT_INTERP, PT_NOTE = 2, 3, 4
SHT_DYNAMIC, SHT_NOBITS = 6, 8
DT_NEEDED = 1
MAX_HEADERS = 4096  # far beyond any kernel, module or library


@dataclass(frozen=True, slots=True)
class Section:
    name: str
    type: int
    offset: int
    size: int
    link: int


@dataclass(frozen=True, slots=True)
class Note:
    name: bytes
    type: int
    descriptor: bytes


class ElfFile:
    """A parsed header over `data`; the tables are read on demand."""

    def __init__(self, data: bytes | memoryview) -> None:
        self._data = memoryview(data)
        ident = bytes(self._data[:16])
        if len(ident) < 16 or ident[:4] != b"\x7fELF":
            raise ImageError("not an ELF file")
        if ident[4] not in (1, 2) or ident[5] != 1:
            raise ImageError("not a little-endian ELF file of a known class")
        self.is_64bit = ident[4] == 2
        header = self._unpack("<HHIQQQIHHHHHH" if self.is_64bit else "<HHIIIIIHHHHHH", 16)
        self.type, self.machine, _, self.entry, self._phoff, self._shoff = header[:6]
        self._phentsize, self._phnum, self._shentsize, self._shnum, self._shstrndx = header[8:]
        if max(self._phnum, self._shnum) > MAX_HEADERS:
            raise ImageError(f"an ELF file with more than {MAX_HEADERS} headers is not read")

    def _unpack(self, layout: str, offset: int) -> tuple[int, ...]:
        try:
            return struct.unpack_from(layout, self._data, offset)
        except (struct.error, OverflowError):
            raise ImageError(f"ELF structure at offset {offset} lies outside the file") from None

    def _slice(self, offset: int, size: int) -> memoryview:
        if offset + size > len(self._data):
            raise ImageError(f"ELF contents at offset {offset} ({size} bytes) lie outside the file")
        return self._data[offset : offset + size]

    def segments(self) -> Iterator[tuple[int, int, int]]:
        """(type, file offset, file size) of each program header."""
        for index in range(self._phnum):
            at = self._phoff + index * self._phentsize
            if self.is_64bit:
                kind, _, offset, _, _, size = self._unpack("<IIQQQQ", at)
            else:
                kind, offset, _, _, size = self._unpack("<IIIII", at)
            yield kind, offset, size

    def interpreter(self) -> str:
        """The dynamic loader's path; empty for a static program or a library."""
        for kind, offset, size in self.segments():
            if kind == PT_INTERP:
                return bytes(self._slice(offset, min(size, 4096))).rstrip(b"\0").decode("utf-8", "replace")
        return ""

    def notes(self) -> Iterator[Note]:
        for kind, offset, size in self.segments():
            if kind == PT_NOTE:
                yield from _notes(bytes(self._slice(offset, size)))

    def sections(self) -> list[Section]:
        raw = []
        for index in range(self._shnum):
            at = self._shoff + index * self._shentsize
            if self.is_64bit:
                name, kind, _, _, offset, size, link = self._unpack("<IIQQQQI", at)
            else:
                name, kind, _, _, offset, size, link = self._unpack("<IIIIIII", at)
            raw.append((name, Section("", kind, offset, size, link)))
        if not raw or self._shstrndx >= len(raw):
            return []
        table = raw[self._shstrndx][1]
        names = bytes(self._slice(table.offset, table.size))
        return [Section(_string(names, name), s.type, s.offset, s.size, s.link) for name, s in raw]

    def section(self, name: str) -> bytes | None:
        """The contents of the first section of that name."""
        for section in self.sections():
            if section.name == name and section.type != SHT_NOBITS:
                return bytes(self._slice(section.offset, section.size))
        return None

    def needed(self) -> list[str]:
        """The libraries (`DT_NEEDED`) that the dynamic loader must find, in order."""
        sections = self.sections()
        for section in sections:
            if section.type != SHT_DYNAMIC or section.link >= len(sections):
                continue
            table = sections[section.link]
            names = bytes(self._slice(table.offset, table.size))
            entries = bytes(self._slice(section.offset, section.size - section.size % (16 if self.is_64bit else 8)))
            return [
                _string(names, value)
                for tag, value in struct.iter_unpack("<QQ" if self.is_64bit else "<II", entries)
                if tag == DT_NEEDED
            ]
        return []

    def modinfo(self) -> dict[str, list[str]]:
        """A kernel module's `.modinfo`: `key=value` strings, keys may repeat."""
        found: dict[str, list[str]] = {}
        for item in (self.section(".modinfo") or b"").split(b"\0"):
            key, separator, value = item.decode("utf-8", "replace").partition("=")
            if separator:
                found.setdefault(key, []).append(value)
        return found


def _string(table: bytes, offset: int) -> str:
    end = table.find(b"\0", offset)
    return table[offset : end if end >= 0 else len(table)].decode("utf-8", "replace")


def _notes(data: bytes) -> Iterator[Note]:
    at = 0
    while at + 12 <= len(data):
        name_size, size, kind = struct.unpack_from("<III", data, at)
        start = at + 12 + (name_size + 3 & ~3)
        if start + size > len(data):
            return  # a note cut short: what came before it still counts
        yield Note(data[at + 12 : at + 12 + name_size].rstrip(b"\0"), kind, data[start : start + size])
        at = start + (size + 3 & ~3)
