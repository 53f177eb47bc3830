"""The firmware's flash: Intel's command set, and the file behind it."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from kvik.errors import HostError, ImageError
from kvik.vmm.boot.source import Source
from kvik.vmm.devices.flash import Flash, Rom
from kvik.vmm.layout import FLASH, RAM_HIGH
from unit.vmm.devices.machine import FakeMachine

SIZE = 16384


class Guest:
    def __init__(self, path: Path, fd: int | None = None) -> None:
        self.machine = FakeMachine()
        self.machine.slots = None
        self.fd = os.open(path, os.O_RDWR) if fd is None else fd
        self.flash = Flash("nvram", Source("variables", self.fd), RAM_HIGH, self.fd)
        self.flash.attach(self.machine)
        self.base = RAM_HIGH - SIZE

    def write(self, offset: int, *values: int) -> None:
        for value in values:
            self.machine.mmio.write(self.base + offset, 1, value)

    def read(self, offset: int, size: int = 1) -> int:
        return self.machine.mmio.read(self.base + offset, size)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "vars").write_bytes(bytes(range(256)) * (SIZE // 256))
    return tmp_path / "vars"


def test_firmware_finds_that_it_is_flash(path: Path) -> None:
    """The dance of OvmfPkg's QemuFlashDetected: neither RAM, which keeps what is written, nor ROM."""
    guest = Guest(path)
    before = guest.read(1)
    guest.write(1, 0x50)
    assert guest.read(1) == before != 0x50
    guest.write(1, 0x70)
    assert guest.read(1) == 0
    guest.write(1, 0xFF)
    assert guest.read(1) == before


def test_a_program_and_an_erase_reach_the_file_at_once(path: Path) -> None:
    guest = Guest(path)
    guest.write(5, 0x10, 0xAB)
    guest.write(6, 0x40, 0xCD)
    assert guest.read(0) == 0x80  # ready, no error
    guest.write(6, 0xFF)
    assert guest.read(5, 2) == 0xCDAB and path.read_bytes()[4:8] == b"\x04\xab\xcd\x07"
    guest.write(4096 + 77, 0x20, 0xD0)
    guest.write(0, 0xFF)
    assert path.read_bytes()[4096:8192] == b"\xff" * 4096 and path.read_bytes()[8192] == 0
    assert guest.read(8191, 1) == 0xFF and guest.read(8192, 1) == 0


def test_an_erase_that_is_not_confirmed_erases_nothing(path: Path) -> None:
    guest = Guest(path)
    guest.write(0, 0x20, 0x00)
    assert guest.read(0) == 0xB0  # ready, both errors: a wrong sequence
    guest.write(0, 0x50, 0x70)
    assert guest.read(0) == 0
    assert path.read_bytes() == bytes(range(256)) * (SIZE // 256)


def test_a_file_that_cannot_be_written_is_a_failed_program_and_said(path: Path) -> None:
    guest = Guest(path, os.open(path, os.O_RDONLY))
    guest.write(0, 0x10, 0x55)
    assert guest.read(0) == 0x90 and "cannot be written" in guest.machine.log_lines[0]


def test_a_reset_reads_again_and_keeps_what_was_written(path: Path) -> None:
    guest = Guest(path)
    guest.write(0, 0x10, 0x55, 0x70)
    guest.flash.reset()
    assert guest.read(0) == 0x55


def test_a_restored_one_has_the_contents_and_its_file_too(path: Path, tmp_path: Path) -> None:
    guest = Guest(path)
    guest.write(0, 0x10, 0x99, 0x10)
    (tmp_path / "other").write_bytes(bytes(SIZE))
    other = Guest(tmp_path / "other")
    other.flash.restore(guest.flash.state())
    other.write(1, 0x42)  # it was about to program
    other.write(1, 0xFF)
    assert other.read(0, 2) == 0x4299 and (tmp_path / "other").read_bytes()[:2] == b"\x99\x42"
    for spoilt in ({"mode": "melted"}, {"contents": b"junk"}, {"contents": guest.flash.state()["contents"][:40]}):
        with pytest.raises(ValueError):
            other.flash.restore({**guest.flash.state(), **spoilt})


def test_a_random_guest_breaks_nothing(path: Path) -> None:
    guest, chance = Guest(path), random.Random(5)
    for _ in range(5000):
        size = chance.choice((1, 2, 4, 8))
        offset = chance.randrange(0, SIZE - size + 1)
        if chance.random() < 0.7:
            command = chance.choice((0x10, 0x20, 0x40, 0x50, 0x70, 0x90, 0xD0, 0xE8, 0xFF, chance.getrandbits(64)))
            guest.machine.mmio.write(guest.base + offset, size, command & (1 << 8 * size) - 1)
        else:
            assert 0 <= guest.read(offset, size) < 1 << 8 * size
    assert path.stat().st_size == SIZE and bytes(guest.flash.pages.view) == path.read_bytes()


def test_what_is_no_flash_image_is_refused(tmp_path: Path) -> None:
    for size, message in ((4097, "no flash image"), (RAM_HIGH - FLASH + 4096, "no flash image")):
        (tmp_path / "code").write_bytes(b"")
        os.truncate(tmp_path / "code", size)
        with Source("firmware", str(tmp_path / "code")) as source, pytest.raises(ImageError, match=message):
            Rom("firmware", source)
    os.truncate(tmp_path / "code", 8192)
    with Source("firmware", str(tmp_path / "code")) as source:
        with pytest.raises(ImageError, match="too large"):
            Rom("firmware", source, FLASH + 4096)
        machine = FakeMachine()
        machine.slots = None
        with pytest.raises(HostError, match="read-only memory"):
            Rom("firmware", source).attach(machine)
