"""Buses: who answers where."""

from __future__ import annotations

import pytest

from kvik.errors import InvalidArgument
from kvik.vmm.bus import Bus


class Recorder:
    def __init__(self) -> None:
        self.writes: list[tuple[int, int, int]] = []

    def read(self, offset: int, size: int) -> int:
        return 0xAABBCCDD_00112233 + offset

    def write(self, offset: int, size: int, value: int) -> None:
        self.writes.append((offset, size, value))


def test_the_device_sees_offsets_and_the_guest_only_what_it_asked_for() -> None:
    bus, device = Bus("memory", 1 << 52), Recorder()
    bus.attach(0x1000, 0x100, device)
    assert bus.read(0x1004, 4) == 0x00112237
    assert bus.read(0x10FF, 1) == 0x32
    bus.write(0x1080, 2, 7)
    assert device.writes == [(0x80, 2, 7)]


@pytest.mark.parametrize("address", [0, 0xFFF, 0x1100, 0x10FD])
def test_nobody_home_reads_ones_and_drops_writes(address: int) -> None:
    bus, device = Bus("memory", 1 << 52), Recorder()
    bus.attach(0x1000, 0x100, device)
    assert bus.read(address, 4) == 0xFFFFFFFF
    bus.write(address, 4, 1)
    assert device.writes == [] and bus.unclaimed == 2


@pytest.mark.parametrize(("start", "size"), [(0x1000, 1), (0xFFF, 2), (0x10FF, 8), (0, 0x2000), (0x1010, 4)])
def test_an_overlap_is_refused_and_named(start: int, size: int) -> None:
    bus = Bus("port", 0x10000)
    bus.attach(0x1000, 0x100, Recorder(), "first")
    with pytest.raises(InvalidArgument, match=r"second.*overlaps first at 0x1000"):
        bus.attach(start, size, Recorder(), "second")


@pytest.mark.parametrize(("start", "size"), [(0xFFFF, 2), (-1, 1), (0, 0), (0x10000, 1)])
def test_what_is_not_on_the_bus_is_refused(start: int, size: int) -> None:
    with pytest.raises(InvalidArgument, match="no part of the port bus"):
        Bus("port", 0x10000).attach(start, size, Recorder())


def test_a_detached_device_is_gone() -> None:
    bus = Bus("port", 0x10000)
    bus.attach(0x10, 1, Recorder(), "a")
    bus.attach(0x20, 1, Recorder(), "b")
    bus.detach(0x10)
    bus.detach(0x99)
    assert bus.ranges() == [(0x20, 1, "b")] and bus.read(0x10, 1) == 0xFF


def test_the_device_s_lock_is_held() -> None:
    class Locked(Recorder):
        def __init__(self) -> None:
            super().__init__()
            self.held = 0
            self.lock = self

        def __enter__(self) -> None:
            self.held += 1

        def __exit__(self, *exc: object) -> None:
            self.held -= 1

        def read(self, offset: int, size: int) -> int:
            return self.held

    bus, device = Bus("port", 0x10000), Locked()
    bus.attach(0, 4, device)
    assert bus.read(0, 1) == 1 and device.held == 0
