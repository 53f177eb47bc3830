"""A disk that UEFI firmware boots: GPT, one EFI system partition, in it a unified kernel image (kernel, initrd and
command line in one program) where firmware looks without being told. Made without root, from Debian's packages."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import uuid
import zlib
from pathlib import Path

__all__ = ["CODE", "VARIABLES", "missing", "write_disk"]

CODE = Path("/usr/share/OVMF/OVMF_CODE_4M.fd")
VARIABLES = Path("/usr/share/OVMF/OVMF_VARS_4M.fd")
STUB = Path("/usr/lib/systemd/boot/efi/linuxx64.efi.stub")

SECTOR, FIRST, MIB = 512, 2048, 1 << 20
ENTRIES, ENTRY = 128, 128
ESP = uuid.UUID("c12a7328-f81f-11d2-ba4b-00a0c93ec93b")  # the type of an EFI system partition (UEFI 2.10, 5.3.3)


def missing() -> str:
    """What is not installed, and how to install it; empty if nothing is missing."""
    for package, there in (
        ("ovmf", CODE.exists() and VARIABLES.exists()),
        ("systemd-boot-efi", STUB.exists()),
        ("mtools", shutil.which("mcopy") is not None),
        ("binutils", shutil.which("objcopy") is not None),
    ):
        if not there:
            return f"needs {package} (apt install {package})"
    return ""


def write_disk(place: Path, kernel: Path, initrd: bytes, cmdline: str) -> Path:
    """`place`/disk.raw; other files are left beside it."""
    image = unified_kernel(place, kernel, initrd, cmdline)
    partition = place / "esp.fat"
    size = (image.stat().st_size + 16 * MIB + MIB - 1) // MIB * MIB
    with partition.open("wb") as file:
        file.truncate(size)
    environment = {**os.environ, "MTOOLS_SKIP_CHECK": "1"}
    for command in (
        ["mformat", "-i", str(partition), "-T", str(size // SECTOR), "-h", "64", "-s", "32", "-v", "ESP", "::"],
        ["mmd", "-i", str(partition), "::/EFI", "::/EFI/BOOT"],
        ["mcopy", "-i", str(partition), str(image), "::/EFI/BOOT/BOOTX64.EFI"],
    ):
        subprocess.run(command, check=True, env=environment, capture_output=True)
    disk = place / "disk.raw"
    with disk.open("wb") as file:
        file.truncate(2 * FIRST * SECTOR + size)
        write_gpt(file.fileno(), 2 * FIRST + size // SECTOR, FIRST, size // SECTOR)
        file.seek(FIRST * SECTOR)
        with partition.open("rb") as source:
            shutil.copyfileobj(source, file, MIB)
    partition.unlink()
    return disk


def unified_kernel(place: Path, kernel: Path, initrd: bytes, cmdline: str) -> Path:
    """systemd-stub(7) with sections for what it starts, one behind the other."""
    (place / "initrd").write_bytes(initrd)
    (place / "cmdline").write_text(cmdline)
    command, at = ["objcopy"], 0x100_0000
    for section, file in ((".cmdline", place / "cmdline"), (".initrd", place / "initrd"), (".linux", kernel)):
        command += ["--add-section", f"{section}={file}", "--change-section-vma", f"{section}={at:#x}"]
        at += (file.stat().st_size + 0xFFFFF) & ~0xFFFFF
    image = place / "linux.efi"
    subprocess.run([*command, str(STUB), str(image)], check=True, capture_output=True)
    return image


def write_gpt(fd: int, sectors: int, first: int, count: int) -> None:
    """A protective MBR and both copies of the table (UEFI 2.10, 5.2.3 and 5.3)."""
    last = sectors - 1
    mbr = bytearray(SECTOR)
    struct.pack_into("<B3sB3sII", mbr, 446, 0, b"\0\2\0", 0xEE, b"\xff\xff\xff", 1, last)
    mbr[510:] = b"\x55\xaa"
    os.pwrite(fd, mbr, 0)
    name = "EFI".encode("utf-16-le")
    entry = struct.pack("<16s16sQQQ72s", ESP.bytes_le, uuid.uuid4().bytes_le, first, first + count - 1, 0, name)
    table = entry.ljust(ENTRIES * ENTRY, b"\0")
    length = len(table) // SECTOR
    disk = uuid.uuid4().bytes_le
    for here, other, entries in ((1, last, 2), (last, 1, last - length)):
        fields = (here, other, length + 2, last - length - 1, disk, entries, ENTRIES, ENTRY, zlib.crc32(table))
        header = bytearray(struct.pack("<8sIIIIQQQQ16sQIII", b"EFI PART", 0x10000, 92, 0, 0, *fields))
        struct.pack_into("<I", header, 16, zlib.crc32(header))
        os.pwrite(fd, header.ljust(SECTOR, b"\0"), here * SECTOR)
        os.pwrite(fd, table, entries * SECTOR)
