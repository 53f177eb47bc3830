"""What UEFI firmware finds through ports 0xCF8 and 0xCFC, and where it may put BARs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from kvik.errors import AlreadyExists
from kvik.vmm.bus import Bus
from kvik.vmm.interrupts import Doorbells, Interrupts
from kvik.vmm.layout import ECAM, MIB, PM_PORT
from kvik.vmm.memory import GuestMemory
from kvik.vmm.pci.bus import PciBus
from kvik.vmm.pci.device import Bar, PciDevice


class Card(PciDevice):
    kind, vendor, device_id = "card", 0x1B36, 0x0011
    bars = (Bar(0, 4096), Bar(2, 1 << 20, "mem64"))

    def read_bar(self, bar: int, offset: int, size: int) -> int:
        return 0x5A


class Firmware:
    def __init__(self) -> None:
        self.calls: list[str] = []
        self.machine: Any = SimpleNamespace(
            memory=GuestMemory.allocate(16 * MIB, firmware=True),
            ports=Bus("port", 0x1_0000),
            mmio=Bus("memory", 1 << 52),
            interrupts=Interrupts(None),
            doorbells=Doorbells(None),
            hold_caller=lambda: self.calls.append("hold"),
            request_reset=self.calls.append,
        )
        self.bus = PciBus(firmware=True)
        self.bus.attach(self.machine)
        self.card = Card("card")
        self.bus.add(self.card)

    def read(self, slot: int, function: int, register: int, size: int = 4) -> int:
        self.machine.ports.write(0xCF8, 4, 1 << 31 | slot << 11 | function << 8 | register & ~3)
        return int(self.machine.ports.read(0xCFC + register % 4, size))

    def write(self, slot: int, register: int, value: int, size: int = 4) -> None:
        self.machine.ports.write(0xCF8, 4, 1 << 31 | slot << 11 | register & ~3)
        self.machine.ports.write(0xCFC + register % 4, size, value)


@pytest.fixture
def firmware() -> Firmware:
    return Firmware()


def test_the_platform_is_known_by_its_host_bridge(firmware: Firmware) -> None:
    assert firmware.read(0, 0, 0) == 0x1237_8086
    assert firmware.read(1, 0, 0) == 0x7000_8086 and firmware.read(1, 0, 0x0E, 1) & 0x80  # several functions
    assert firmware.read(1, 3, 0) == 0x7113_8086
    assert firmware.read(1, 3, 0x40) == PM_PORT | 1 and firmware.read(1, 3, 0x80, 1) & 1
    assert firmware.card.slot == 2  # the first that is free
    with pytest.raises(AlreadyExists):
        firmware.bus.add(Card("other"), slot=1)


def test_there_is_no_ecam(firmware: Firmware) -> None:
    assert firmware.machine.mmio.read(ECAM, 4) == 0xFFFFFFFF
    assert all(start != ECAM for start, _, _ in firmware.machine.mmio.ranges())


def test_bars_have_no_address_until_the_firmware_gives_them_one_in_its_windows(firmware: Firmware) -> None:
    assert firmware.read(2, 0, 0x10) == 0 and firmware.read(2, 0, 0x18) == 4
    _, high = firmware.machine.memory.layout.pci64
    firmware.write(2, 0x10, 0xFBFF_F000)
    firmware.write(2, 0x18, high - (1 << 20) & 0xFFFFFFFF)
    firmware.write(2, 0x1C, high - (1 << 20) >> 32)
    firmware.write(2, 0x04, 2, 2)
    assert firmware.machine.mmio.read(0xFBFF_F000, 4) == 0x5A
    assert firmware.machine.mmio.read(high - (1 << 20), 4) == 0x5A
    firmware.write(2, 0x10, 0xFC00_0000)  # behind the window
    assert firmware.machine.mmio.read(0xFC00_0000, 4) == 0xFFFFFFFF


def test_the_reset_control_register_resets_and_the_address_stays(firmware: Firmware) -> None:
    firmware.machine.ports.write(0xCF8, 4, 1 << 31)
    firmware.machine.ports.write(0xCF9, 1, 0x02)
    assert not firmware.calls
    firmware.machine.ports.write(0xCF9, 1, 0x06)
    assert firmware.calls == ["hold", "guest-reset"]
    assert firmware.machine.ports.read(0xCF8, 4) == 1 << 31


def test_interrupt_routes_can_be_written_and_where_the_pm_registers_are_cannot(firmware: Firmware) -> None:
    firmware.write(1, 0x60, 0x0B0B0A0A)
    assert firmware.read(1, 0, 0x60) == 0x0B0B0A0A
    firmware.machine.ports.write(0xCF8, 4, 1 << 31 | 1 << 11 | 3 << 8 | 0x40)
    firmware.machine.ports.write(0xCFC, 4, 0x601)
    assert firmware.read(1, 3, 0x40) == PM_PORT | 1
