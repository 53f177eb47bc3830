"""Guest memory: layout, bounds, files mapped into it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvik.errors import InvalidArgument
from kvik.vmm.faults import GuestFault
from kvik.vmm.layout import GIB, MIB, PAGE, PCI64_SIZE, RAM_HIGH, RAM_LOW_END, Layout
from kvik.vmm.memory import GuestMemory, HostMemory, Region


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    memory = GuestMemory.allocate(4 * MIB)
    yield memory
    memory.close()


@pytest.mark.parametrize("size", [PAGE, 128 * MIB, 3 * GIB, 3 * GIB + PAGE, 256 * GIB, 4096 * GIB])
def test_ram_lies_below_3_gib_and_from_4_gib(size: int) -> None:
    layout = Layout(size, hotplug=5 * GIB)
    assert sum(length for _, length in layout.ram) == size
    assert all(start in (0, RAM_HIGH) and (start or length <= RAM_LOW_END) for start, length in layout.ram)
    assert layout.hotplug[0] >= max(start + length for start, length in layout.ram)
    assert layout.hotplug[1] - layout.hotplug[0] == 5 * GIB
    assert layout.pci64[0] >= layout.hotplug[1] and layout.pci64[0] % PCI64_SIZE == 0


@pytest.mark.parametrize("size", [0, -PAGE, 1, PAGE + 1, 1 << 60])
def test_an_impossible_size_is_refused(size: int) -> None:
    with pytest.raises(InvalidArgument, match="cannot have"):
        Layout(size)


def test_256_gib_cost_nothing_until_they_are_touched() -> None:
    memory = GuestMemory.allocate(256 * GIB)
    try:
        address = RAM_HIGH + 200 * GIB
        memory.put_u64(address, 0x1122334455667788)
        assert memory.u64(address) == 0x1122334455667788
        assert memory.regions[0].address % (2 * MIB) == 0
    finally:
        memory.close()


@pytest.mark.parametrize(
    ("address", "size"),
    [(4 * MIB, 1), (4 * MIB - 1, 2), (-1, 1), (-8, 16), (1 << 63, 8), ((1 << 64) - 4, 8), (0, 4 * MIB + 1)],
)
def test_what_is_not_all_ram_is_a_fault(memory: GuestMemory, address: int, size: int) -> None:
    with pytest.raises(GuestFault, match="not all RAM"):
        memory.view(address, size)
    with pytest.raises(GuestFault):
        memory.write(address, bytes(size))


def test_a_view_does_not_reach_over_the_end_of_a_region() -> None:
    memory = GuestMemory(Layout(8 * PAGE))
    for start in (0, 4 * PAGE):
        address, fd = HostMemory().allocate(4 * PAGE)
        memory.add(Region(start, 4 * PAGE, address, fd=fd))
    with pytest.raises(GuestFault):
        memory.view(4 * PAGE - 8, 16)
    with pytest.raises(InvalidArgument, match="overlaps"):
        memory.add(Region(7 * PAGE, PAGE, memory.regions[0].address))
    memory.close()


def test_what_the_vmm_writes_is_logged(memory: GuestMemory) -> None:
    seen: list[tuple[int, int]] = []
    memory.dirty_log = lambda address, size: seen.append((address, size))
    memory.write(100, b"abc")
    memory.put_u32(0x2000, 7)
    memory.touched(0x3000, 10)
    memory.touched(0x3000, 0)
    assert seen == [(100, 3), (0x2000, 4), (0x3000, 10)]


@pytest.mark.parametrize("shared", [False, True])
def test_a_file_is_mapped_or_read(tmp_path: Path, shared: bool) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 40)  # two pages and a half
    fd = os.open(path, os.O_RDONLY)
    memory = GuestMemory.allocate(4 * MIB, HostMemory(shared=shared))
    try:
        memory.map_file(MIB, fd, 0, 10240)
        memory.map_file(2 * MIB + 1, fd, 3, 100)  # neither is aligned
        assert memory.read(MIB, 10240) == path.read_bytes()
        assert memory.read(2 * MIB + 1, 100) == path.read_bytes()[3:103]
        memory.write(MIB, b"guest")
        assert path.read_bytes()[:5] == bytes(range(5))  # copy on write
    finally:
        os.close(fd)
        memory.close()


@pytest.mark.parametrize("shared", [False, True])
def test_discarded_pages_read_as_zeroes(shared: bool) -> None:
    memory = GuestMemory.allocate(4 * MIB, HostMemory(shared=shared))
    try:
        memory.write(MIB, b"x" * PAGE)
        memory.discard(MIB, PAGE)
        assert memory.read(MIB, PAGE) == bytes(PAGE)
    finally:
        memory.close()


def test_a_shared_memory_is_another_process_s_too() -> None:
    memory = GuestMemory.allocate(4 * MIB, HostMemory(shared=True))
    try:
        memory.write(12345, b"hello")
        assert os.pread(memory.regions[0].fd, 5, 12345) == b"hello"
    finally:
        memory.close()


def test_huge_pages_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="no multiple"):
        HostMemory(hugepages=2 * MIB).allocate(3 * MIB)
