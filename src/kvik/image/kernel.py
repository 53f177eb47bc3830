"""Kernel images: the bzImage header, its payload unpacked, and a cache of uncompressed kernels for PVH entry.

QEMU enters an ELF kernel that carries the PVH note directly in 32-bit mode (Xen's `XEN_ELFNOTE_PHYS32_ENTRY`,
include/xen/interface/elfnote.h), which skips the real-mode setup code and the kernel's own decompressor: under
software emulation that is a third of the boot time. The header is Documentation/arch/x86/boot.rst, "The
Real-Mode Kernel Header".
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kvik.errors import HostError, ImageError, NotFound, OperationUnsupported
from kvik.image import kernel_index
from kvik.image.compression import decompress, detect
from kvik.image.elf import ElfFile

__all__ = ["BzImage", "has_pvh_entry", "parse_bzimage", "uncompressed_kernel", "unpack_bzimage"]

SECTOR = 512
SETUP_SECTS, BOOT_FLAG, HEADER_MAGIC, VERSION = 0x1F1, 0x1FE, 0x202, 0x206
KERNEL_VERSION, LOADFLAGS, PAYLOAD_OFFSET, PAYLOAD_LENGTH = 0x20E, 0x211, 0x248, 0x24C
XEN_ELFNOTE_PHYS32_ENTRY = 18
EM_386, EM_X86_64 = 3, 62

MAX_FILE = 1 << 30  # a bzImage beyond this is no kernel
MAX_UNPACKED = 512 << 20  # distribution kernels unpack to 40 to 80 MiB
CACHED_KERNELS = 8
CACHED_INDEX = 64


@dataclass(frozen=True, slots=True)
class BzImage:
    """What the setup header says. Offsets and lengths are bytes from the start of the file, already checked."""

    protocol: int  # boot protocol, 0x020f is 2.15
    version: str  # the kernel's own version text, "" if none
    payload_offset: int
    payload_length: int


def parse_bzimage(data: bytes | memoryview) -> BzImage | None:
    """The header of a bzImage, or None when the file is none. Raises `ImageError` for one that is damaged."""
    if len(data) < 0x250 or data[HEADER_MAGIC : HEADER_MAGIC + 4] != b"HdrS":
        return None
    if struct.unpack_from("<H", data, BOOT_FLAG)[0] != 0xAA55:
        return None
    (protocol,) = struct.unpack_from("<H", data, VERSION)
    if protocol < 0x0208:
        raise OperationUnsupported(f"boot protocol {protocol >> 8}.{protocol & 255:02} has no payload offset")
    setup = ((data[SETUP_SECTS] or 4) + 1) * SECTOR
    offset, length = struct.unpack_from("<II", data, PAYLOAD_OFFSET)
    if length == 0 or setup + offset + length > len(data):
        raise ImageError(
            f"the kernel's payload ({length} bytes at {setup + offset}) lies outside the file of {len(data)} bytes"
        )
    return BzImage(protocol, _version_text(data, setup), setup + offset, length)


def _version_text(data: bytes | memoryview, setup: int) -> str:
    (pointer,) = struct.unpack_from("<H", data, KERNEL_VERSION)
    if pointer == 0 or pointer + 0x200 >= min(setup, len(data)):
        return ""
    text = bytes(data[pointer + 0x200 : pointer + 0x400]).split(b"\0")[0]
    return text.decode("ascii", "replace").partition(" ")[0]


def unpack_bzimage(data: bytes | memoryview, *, limit: int = MAX_UNPACKED) -> bytes:
    """The ELF kernel inside a bzImage."""
    header = parse_bzimage(data)
    if header is None:
        raise ImageError("not a bzImage")
    payload = memoryview(data)[header.payload_offset : header.payload_offset + header.payload_length]
    if bytes(payload[:4]) == b"\x7fELF":  # CONFIG_KERNEL_UNCOMPRESSED
        return bytes(payload)
    if not detect(payload):
        raise ImageError(f"the kernel's payload has an unknown compression ({bytes(payload[:6]).hex()})")
    # The build appends the unpacked size to every compressed payload (scripts/Makefile.lib, size_append).
    size = struct.unpack_from("<I", payload, len(payload) - 4)[0] if len(payload) >= 4 else None
    return decompress(payload, limit=limit, size=size)


def has_pvh_entry(kernel: bytes | memoryview) -> bool:
    """Whether this is an x86 ELF kernel with a PVH entry point, so that QEMU can boot it without its setup code."""
    elf = ElfFile(kernel)
    return elf.machine in (EM_386, EM_X86_64) and any(
        note.name == b"Xen" and note.type == XEN_ELFNOTE_PHYS32_ENTRY for note in elf.notes()
    )


def uncompressed_kernel(path: str | Path, cache_dir: str | Path) -> Path | None:
    """An uncompressed kernel with a PVH entry for the kernel at `path`; None when QEMU must boot `path` itself.

    None means: not a bzImage, no PVH note, or a compression that nothing here unpacks. A damaged bzImage raises
    `ImageError`. `cache_dir` (`Paths.cache / "kernels"`) holds at most a few kernels, named by the SHA-256 of the
    bzImage; an index by inode, size and times spares the hashing on later starts. Takes 0.2 s the first time, then
    well under a millisecond; safe to call from any thread and process at once.
    """
    path = Path(path)
    cache = Path(cache_dir)
    try:
        with path.open("rb") as stream:
            status = os.fstat(stream.fileno())
            identity = kernel_index.identity(stream.fileno())
            known = kernel_index.lookup(str(cache), identity, str(path))
            if known is not None:
                return Path(known) if known else None
            if not 0x250 <= status.st_size <= MAX_FILE:
                return None
            data = stream.read(MAX_FILE + 1)
        if data[:4] == b"\x7fELF":
            direct = has_pvh_entry(data)
            _write(cache / "index" / identity, b"self" if direct else b"none")
            return path if direct else None
        if parse_bzimage(data) is None:
            return None
        return _unpack_into(cache, identity, data)
    except FileNotFoundError as error:
        raise NotFound(f"the kernel {str(path)!r} does not exist") from error
    except OperationUnsupported:
        return None
    except OSError as error:
        raise HostError(
            f"the kernel {str(path)!r} cannot be prepared: {error.strerror or error}", errno=error.errno or 0
        ) from error


def _unpack_into(cache: Path, identity: str, data: bytes) -> Path | None:
    digest = hashlib.sha256(data).hexdigest()
    kernel = cache / f"{digest}.vmlinux"
    if not kernel.exists():
        unpacked = unpack_bzimage(data)
        if not has_pvh_entry(unpacked):
            _write(cache / "index" / identity, b"none")
            return None
        _write(kernel, unpacked)
    _write(cache / "index" / identity, digest.encode())
    _prune(cache, ".vmlinux", CACHED_KERNELS)
    _prune(cache / "index", "", CACHED_INDEX)
    return kernel


def _write(path: Path, data: bytes) -> None:
    """All of it or nothing, also after a power cut: a truncated kernel under the right name would be trusted."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".new-")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        Path(temporary).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(temporary).unlink()
        raise


def _prune(directory: Path, suffix: str, keep: int) -> None:
    def entries() -> Iterator[tuple[float, Path]]:
        for path in directory.iterdir():
            with contextlib.suppress(OSError):  # another process may prune too
                if path.is_file() and path.name.endswith(suffix) and not path.name.startswith("."):
                    yield path.stat().st_mtime, path

    for _, path in sorted(entries(), reverse=True)[keep:]:
        with contextlib.suppress(OSError):
            path.unlink()
