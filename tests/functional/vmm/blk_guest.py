"""A guest of a few hundred bytes with a virtio-blk driver: 32-bit code, polling, one request at a time.

    code = wait_key() + disk.start() + disk.read(0) + say_memory(disk.data, 8) + disk.write(16, b"...") + IDLE

It finds the disk by its PCI slot and gives its BAR an address itself, so it drives one that was plugged in as well.
"""

from __future__ import annotations

import struct

from tiny_kernel import COM1

ECAM = 0xE000_0000  # `layout.ECAM`: PCI configuration space
WINDOW = 0xC800_0000  # where the guest puts BARs: in `layout.PCI32`, away from those of the start
COMMON, NOTIFY = 0x0000, 0x5000  # `virtio.transport`
LEAVING, EJECT = 0x614, 0x618  # `pci.hotplug`
T_IN, T_OUT, T_FLUSH = 0, 1, 4
NEXT, WRITE = 1, 2


def poke(address: int, value: int, size: int = 4) -> bytes:
    """mov{b,w,l} $value,address"""
    code = {1: b"\xc6\x05", 2: b"\x66\xc7\x05", 4: b"\xc7\x05"}[size]
    return code + struct.pack("<I", address) + value.to_bytes(size, "little")


def fill(address: int, data: bytes) -> bytes:
    return b"".join(
        poke(address + at, int.from_bytes(data[at : at + 4].ljust(4, b"\0"), "little")) for at in range(0, len(data), 4)
    )


def wait_word(address: int, value: int) -> bytes:
    """1: pause; cmpw $value,address; jne 1b"""
    return b"\xf3\x90\x66\x81\x3d" + struct.pack("<IH", address, value) + b"\x75\xf3"


def wait_key(counter: int = 0) -> bytes:
    """1: incl counter, if there is one; mov $COM1+5,%dx; in (%dx),%al; test $1,%al; jz 1b; mov $COM1,%dx; in (%dx),%al

    With a counter the guest writes to RAM all the time that it waits."""
    count = b"\xff\x05" + struct.pack("<I", counter) if counter else b""
    poll = count + b"\x66\xba" + struct.pack("<H", COM1 + 5) + b"\xec\xa8\x01\x74"
    return poll + bytes([256 - len(poll) - 1]) + b"\x66\xba" + struct.pack("<H", COM1) + b"\xec"


def say_memory(address: int, size: int) -> bytes:
    """mov $COM1,%dx; then for each byte mov address,%al; out %al,(%dx)"""
    start = b"\x66\xba" + struct.pack("<H", COM1)
    return start + b"".join(b"\xa0" + struct.pack("<I", address + at) + b"\xee" for at in range(size))


class BlkDriver:
    """Code that drives the disk in PCI slot `slot`; its rings lie at `memory`."""

    def __init__(self, slot: int, memory: int = 0x180_0000) -> None:
        self.slot = slot
        self.bar = WINDOW + slot * 0x1_0000
        memory += slot * 0x1_0000
        self.desc, self.avail, self.used = memory, memory + 0x1000, memory + 0x2000
        self.header, self.status, self.data = memory + 0x3000, memory + 0x3100, memory + 0x4000
        self.asked = 0

    def _config(self, register: int, value: int) -> bytes:
        return poke(ECAM + (self.slot << 15) + register, value)

    def start(self) -> bytes:
        """virtio 1.2, 3.1.1: acknowledge, driver, VERSION_1 and no other feature, one queue of eight."""
        common = self.bar + COMMON
        self.asked = 0
        code = self._config(0x10, self.bar) + self._config(0x14, 0) + self._config(0x04, 6)
        code += poke(self.avail, 0) + poke(self.used, 0)
        for status in (0, 1, 3):
            code += poke(common + 20, status, 1)
        code += poke(common + 8, 0) + poke(common + 12, 0) + poke(common + 8, 1) + poke(common + 12, 1)
        code += poke(common + 20, 11, 1) + poke(common + 22, 0, 2) + poke(common + 24, 8, 2)
        for offset, ring in ((32, self.desc), (40, self.avail), (48, self.used)):
            code += poke(common + offset, ring) + poke(common + offset + 4, 0)
        return code + poke(common + 28, 1, 2) + poke(common + 20, 15, 1)

    def _ask(self, kind: int, sector: int, size: int, data: int = 0) -> bytes:
        parts = [(self.header, 16, 0)]
        if size:
            parts.append((data or self.data, size, WRITE if kind == T_IN else 0))
        parts.append((self.status, 1, WRITE))
        code = fill(self.header, struct.pack("<IIQ", kind, 0, sector)) + poke(self.status, 0xEE, 1)
        for index, (address, length, flags) in enumerate(parts):
            more = (flags | NEXT, index + 1) if index + 1 < len(parts) else (flags, 0)
            code += fill(self.desc + 16 * index, struct.pack("<QIHH", address, length, *more))
        code += poke(self.avail + 4 + 2 * (self.asked % 8), 0, 2) + poke(self.avail + 2, self.asked + 1, 2)
        return code + poke(self.bar + NOTIFY, 0, 2)

    def _answered(self) -> bytes:
        self.asked += 1
        return wait_word(self.used + 2, self.asked)

    def read(self, sector: int, into: int = 0) -> bytes:
        """512 bytes to address `into`, or to `data`; whether it went well is in `status`."""
        return self._ask(T_IN, sector, 512, into) + self._answered()

    def write(self, sector: int, data: bytes) -> bytes:
        return fill(self.data, data.ljust(512, b"\0")) + self._ask(T_OUT, sector, 512) + self._answered()

    def flush(self) -> bytes:
        return self._ask(T_FLUSH, 0, 0) + self._answered()

    def ask_and_go_on(self, sector: int) -> bytes:
        """A read whose answer nobody waits for."""
        return self._ask(T_IN, sector, 512)

    def eject_when_asked(self) -> bytes:
        """1: mov $LEAVING,%dx; in (%dx),%eax; test $bit,%eax; jz 1b; mov $EJECT,%dx; mov $bit,%eax; out %eax,(%dx)"""
        bit = struct.pack("<I", 1 << self.slot)
        code = b"\x66\xba" + struct.pack("<H", LEAVING) + b"\xed\xa9" + bit + b"\x74\xf4"
        return code + b"\x66\xba" + struct.pack("<H", EJECT) + b"\xb8" + bit + b"\xef"
