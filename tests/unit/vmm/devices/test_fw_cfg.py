"""fw_cfg, as its specification (QEMU's docs/specs/fw_cfg.rst) has a firmware use it."""

from __future__ import annotations

import random
import struct

import pytest

from kvik.vmm.devices.fw_cfg import BEHIND, DIRECTORY, ERROR, READ, SELECT, SKIP, WRITE, FwCfg
from kvik.vmm.layout import FW_CFG_PORT, MIB
from kvik.vmm.memory import GuestMemory
from unit.vmm.devices.machine import FakeMachine

SELECTOR, DATA, DMA = FW_CFG_PORT, FW_CFG_PORT + 1, FW_CFG_PORT + 4
REQUEST, BUFFER = 0x1000, 0x2000
FILES = {"etc/e820": bytes(range(40)), "bootorder": b"/pci@i0cf8/scsi@2/disk@0,0\0"}


class Guest:
    """The driver's side."""

    def __init__(self) -> None:
        self.machine = FakeMachine()
        self.memory = self.machine.memory = GuestMemory.allocate(MIB)
        self.device = FwCfg()
        self.device.attach(self.machine)
        self.device.publish(FILES, {5: struct.pack("<H", 3)})

    def read(self, key: int, size: int) -> bytes:
        self.machine.ports.write(SELECTOR, 2, key)
        return bytes(self.machine.ports.read(DATA, 1) for _ in range(size))

    def request(self, control: int, length: int = 0, target: int = BUFFER, at: int = REQUEST) -> int:
        """What became of the control word."""
        there = at + 16 <= MIB
        if there:
            self.memory.write(at, struct.pack(">IIQ", control, length, target))
        self.machine.ports.write(DMA, 4, int.from_bytes(struct.pack(">I", at >> 32), "little"))
        self.machine.ports.write(DMA + 4, 4, int.from_bytes(struct.pack(">I", at & 0xFFFFFFFF), "little"))
        return int.from_bytes(self.memory.read(at, 4), "big") if there else 0

    def directory(self) -> dict[str, tuple[int, int]]:
        """Name -> (key, size)."""
        (count,) = struct.unpack(">I", self.read(DIRECTORY, 4))
        found = {}
        for _ in range(count):
            size, key, _, name = struct.unpack(">IHH56s", bytes(self.machine.ports.read(DATA, 1) for _ in range(64)))
            found[name.rstrip(b"\0").decode()] = key, size
        return found


@pytest.fixture
def guest() -> Guest:
    return Guest()


def test_it_is_recognized_and_says_that_it_has_dma(guest: Guest) -> None:
    assert guest.read(0, 4) == b"QEMU"
    assert guest.read(1, 4) == b"\x03\0\0\0"
    high, low = guest.machine.ports.read(DMA, 4), guest.machine.ports.read(DMA + 4, 4)
    assert high.to_bytes(4, "little") + low.to_bytes(4, "little") == b"QEMU CFG"


def test_files_are_found_by_the_directory_and_read_byte_by_byte(guest: Guest) -> None:
    found = guest.directory()
    assert set(found) == set(FILES)
    for name, (key, size) in found.items():
        assert key >= 0x20 and guest.read(key, size) == FILES[name]
        assert guest.read(key, size + 3)[size:] == bytes(3)  # zeroes behind the end
    assert guest.read(5, 2) == b"\x03\0"
    assert guest.read(0x1234, 4) == bytes(4)  # what is not there


def test_dma_selects_skips_and_reads(guest: Guest) -> None:
    key, size = guest.directory()["etc/e820"]
    assert guest.request(key << 16 | SELECT | READ, size) == 0
    assert guest.memory.read(BUFFER, size) == FILES["etc/e820"]
    assert guest.request(key << 16 | SELECT | SKIP, 10) == 0
    guest.memory.write(BUFFER, b"x" * 64)
    assert guest.request(READ, 34) == 0
    assert guest.memory.read(BUFFER, 35) == FILES["etc/e820"][10:] + bytes(4) + b"x"


def test_dma_that_may_not_be_is_an_error_and_changes_nothing(guest: Guest) -> None:
    key, _ = guest.directory()["etc/e820"]
    assert guest.request(key << 16 | SELECT | WRITE, 4) == ERROR
    assert guest.request(READ, 16, MIB - 8) == ERROR  # not all RAM
    assert guest.request(READ, 16, 1 << 63) == ERROR
    assert guest.request(READ, BEHIND + 41) == ERROR  # bounded
    guest.memory.write(MIB - 8, b"untaken!")
    assert guest.request(READ, 16, MIB - 8) == ERROR and guest.memory.read(MIB - 8, 8) == b"untaken!"
    assert guest.request(READ, 4) == 0 and guest.memory.read(BUFFER, 4) == FILES["etc/e820"][:4]
    for at in (MIB - 8, MIB, 1 << 63):  # a request that is not in RAM has no place for an answer
        guest.request(READ, 4, BUFFER, at)


def test_a_random_driver_breaks_nothing(guest: Guest) -> None:
    chance = random.Random(3)
    for _ in range(3000):
        if chance.random() < 0.3:
            control = chance.getrandbits(32) if chance.random() < 0.5 else chance.choice((READ, SKIP, 2 | SELECT))
            target = chance.choice((0, BUFFER, MIB - 1, MIB, chance.getrandbits(64)))
            guest.request(control, chance.choice((0, 1, 64, MIB, 0xFFFFFFFF)), target, chance.randrange(0, MIB - 16))
        elif chance.random() < 0.5:
            guest.machine.ports.write(
                FW_CFG_PORT + chance.randrange(12), chance.choice((1, 2, 4)), chance.getrandbits(32)
            )
        else:
            guest.machine.ports.read(FW_CFG_PORT + chance.randrange(12), chance.choice((1, 2, 4)))
    assert guest.read(0, 4) == b"QEMU"


def test_a_restored_one_goes_on_amid_a_file(guest: Guest) -> None:
    key, _ = guest.directory()["etc/e820"]
    guest.read(key, 7)
    other = Guest()
    other.device.restore(guest.device.state())
    assert other.machine.ports.read(DATA, 1) == 7


def test_names_and_numbers_are_bounded(guest: Guest) -> None:
    with pytest.raises(ValueError, match="longer"):
        guest.device.publish({"x" * 56: b""}, {})
    with pytest.raises(ValueError, match="at most"):
        guest.device.publish({str(number): b"" for number in range(65)}, {})
