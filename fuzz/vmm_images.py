"""Hostile files that a machine starts from: ELF and bzImage kernels whose headers were turned about, and initrds.

    fuzz/run elf --operations 1000000 --seed 5

Whatever a file says, the answer is an entry into guest memory or a `KvikError` that says what is wrong with it; never
another exception, nor a write outside guest memory, nor an allocation that the file's numbers chose.
"""

from __future__ import annotations

import os
import random
import resource
import struct
from pathlib import Path

from kvik.errors import KvikError
from kvik.vmm import boot
from kvik.vmm.config import BootConfig
from kvik.vmm.memory import GuestMemory

TARGETS = ("elf", "bzimage", "initrd")
MEMORY = 32 << 20
NUMBERS = (0, 1, 2, 4, 16, 64, 0x1000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)


def elf_kernel() -> bytes:
    """A small, valid 64-bit ELF kernel with a PVH note."""
    note = struct.pack("<III4sI", 4, 4, 18, b"Xen\0", 0x1000000)
    header = b"\x7fELF\2\1\1" + bytes(9)
    header += struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, 0x1000000, 64, 0, 0, 64, 56, 2, 0, 0, 0)
    text, notes = 0x200, 0x180
    header += struct.pack("<IIQQQQQQ", 1, 5, text, 0x1000000, 0x1000000, 0x100, 0x2000, 0x1000)
    header += struct.pack("<IIQQQQQQ", 4, 4, notes, 0, 0, len(note), len(note), 4)
    return header.ljust(notes, b"\0") + note.ljust(text - notes, b"\0") + b"\xf4" * 0x100


def bzimage_kernel() -> bytes:
    """A small, valid bzImage with a 64-bit entry."""
    image = bytearray(0x400 + 0x1000)
    image[0x1F1] = 1
    image[0x1FE:0x200] = b"\x55\xaa"
    image[0x200:0x206] = b"\xeb\x66HdrS"
    struct.pack_into("<I", image, 0x1F4, 0x1000 // 16)
    struct.pack_into("<H", image, 0x206, 0x20F)
    struct.pack_into("<IB", image, 0x230, 0x200000, 1)
    struct.pack_into("<H", image, 0x236, 1)
    struct.pack_into("<I", image, 0x238, 2047)
    struct.pack_into("<I", image, 0x22C, 0x7FFFFFFF)
    struct.pack_into("<QI", image, 0x258, 0x1000000, 0x10000)
    return bytes(image)


def mutated(data: bytes, dice: random.Random, head: int) -> bytes:
    """Some numbers of the first `head` bytes changed, perhaps the end cut off."""
    out = bytearray(data)
    for _ in range(dice.randrange(1, 6)):
        size = dice.choice((1, 2, 4, 8))
        at = dice.randrange(0, head - size)
        value = dice.choice((*NUMBERS, dice.getrandbits(64), dice.getrandbits(16)))
        out[at : at + size] = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
    if dice.random() < 0.2:
        del out[dice.randrange(len(out)) :]
    return bytes(out)


def fuzz(name: str, operations: int, seed: int) -> int:
    """How many files were refused."""
    dice = random.Random(seed)
    kernels = {"elf": elf_kernel(), "bzimage": bzimage_kernel(), "initrd": elf_kernel()}
    base, head = kernels[name], {"elf": 0x200, "bzimage": 0x270, "initrd": 0x40}[name]
    kernel, initrd = os.memfd_create("kernel"), os.memfd_create("initrd")
    memory = GuestMemory.allocate(MEMORY)
    refused = 0
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
    resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20), hard))
    try:
        for number in range(operations):
            data = base if name == "initrd" else mutated(base, dice, head)
            os.ftruncate(kernel, 0)
            os.pwrite(kernel, data, 0)
            config = BootConfig(kernel_fd=kernel, protocol=dice.choice(("auto", "pvh", "bzimage")))
            if name == "initrd":
                config.protocol = "pvh"
                os.ftruncate(initrd, dice.choice((0, 1, 4095, 1 << 20, MEMORY, 1 << 40, dice.randrange(MEMORY))))
            if name == "initrd" or dice.random() < 0.3:
                config.initrd_fd = initrd
            config.cmdline = "x" * dice.choice((0, 100, 2047, 2048, 70000))
            try:
                boot.load_kernel(memory, config, fresh=number % 2 == 0)
            except KvikError as error:
                assert str(error)
                refused += 1
            if number % 256 == 0:
                memory.discard(0x100000, MEMORY - 0x100000)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        memory.close()
        os.close(kernel)
        os.close(initrd)
    return refused
