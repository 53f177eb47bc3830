"""Memory, memory-mapped I/O and ports at their edges, pages and exceptions, seen by a guest; like kvm-unit-tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from guests import needs_kvm
from remote import CS, FREE, Fault, RemoteGuest
from restored import either_way

from kvik.vmm.device import MmioDevice, PortDevice
from kvik.vmm.layout import BOOT_PAGE_TABLES, MIB, PLATFORM
from kvik.vmm.machine import Machine

pytestmark = [pytest.mark.functional, needs_kvm, either_way]

RAM = 4 * MIB
ALL = (1 << 64) - 1
UD, GP, PF, DE = 6, 13, 14, 0
PRESENT, WRITE, USER, LARGE, NO_EXECUTE = 1, 2, 4, 0x80, 1 << 63
ACCESSED, DIRTY = 0x20, 0x40
EFER, EFER_NXE = 0xC000_0080, 1 << 11
CR0_WP = 1 << 16
BASE, PORT = PLATFORM + 0x8000, 0x5F0


class Registers:
    """Remembers what is written, answers with what tells where it was read."""

    def reset(self) -> None:
        self.reads: list[tuple[int, int]] = []
        self.writes: list[tuple[int, int, int]] = []

    def read(self, offset: int, size: int) -> int:
        self.reads.append((offset, size))
        return int.from_bytes(bytes((offset + at) & 0xFF for at in range(size)), "little")

    def write(self, offset: int, size: int, value: int) -> None:
        self.writes.append((offset, size, value))


class Memory(Registers, MmioDevice):
    """Two pages and 24 bytes, so that its end is not the end of a page."""

    kind, base, size = "registers in memory", BASE, 0x2018


class Ports(Registers, PortDevice):
    kind, base, size = "registers behind ports", PORT, 7


class Stream(PortDevice):
    """One port: what is written comes out of it again, first in, first out."""

    kind, base, size = "stream", PORT + 8, 4

    def reset(self) -> None:
        self.values: list[int] = []

    def read(self, offset: int, size: int) -> int:
        return self.values.pop(0)

    def write(self, offset: int, size: int, value: int) -> None:
        self.values.append(value)

    def state(self) -> dict[str, Any]:
        return {"values": list(self.values)}

    def restore(self, state: dict[str, Any]) -> None:
        self.values = list(state["values"])


def with_registers(machine: Machine) -> None:
    for device in (Memory("memory"), Ports("ports"), Stream("stream")):
        machine.add(device)


@pytest.fixture
def guest() -> Iterator[RemoteGuest]:
    made = RemoteGuest(RAM, prepare=with_registers)
    made.moves()
    yield made
    made.close()


def registers(guest: RemoteGuest, name: str) -> Registers:
    found: Any = guest.machine.devices[name]
    return found


def here(offset: int, size: int) -> int:
    return int.from_bytes(bytes((offset + at) & 0xFF for at in range(size)), "little")


# RAM and where it ends ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_the_last_bytes_of_ram_and_the_first_behind_them(guest: RemoteGuest, size: int) -> None:
    value = 0x1122_3344_5566_7788 & (1 << 8 * size) - 1
    guest.write(RAM - size, value, size)
    guest.moves()
    assert guest.read(RAM - size, size) == value
    assert guest.machine.memory.read(RAM - size, size) == value.to_bytes(size, "little")
    assert guest.read(RAM, size) == (1 << 8 * size) - 1
    guest.write(RAM, 0, size)  # nobody is there
    assert guest.read(RAM, size) == (1 << 8 * size) - 1


def test_an_access_across_the_end_of_ram_is_half_ram(guest: RemoteGuest) -> None:
    guest.write(RAM - 4, 0x1122_3344_5566_7788, 8)
    assert guest.machine.memory.u32(RAM - 4) == 0x5566_7788
    assert guest.read(RAM - 4, 8) == 0xFFFF_FFFF_5566_7788
    guest.write(RAM - 1, 0xABCD, 2)
    assert guest.read(RAM - 1, 2) == 0xFFCD


@pytest.mark.parametrize("offset", [1, 4093, 4095, 8191])
def test_unaligned_and_page_crossing_accesses_to_ram(guest: RemoteGuest, offset: int) -> None:
    for size in (2, 4, 8):
        value = 0x8877_6655_4433_2211 & (1 << 8 * size) - 1
        guest.write(FREE + offset, value, size)
        assert guest.read(FREE + offset, size) == value
    assert guest.call("f00fc137 89f0 c3", FREE + offset, 2) == 0x4433_2211  # lock xadd %esi,(%rdi)
    assert guest.read(FREE + offset) == 0x4433_2213


def test_a_copy_from_registers_to_ram_and_across_the_end(guest: RemoteGuest) -> None:
    """rep movsb: each byte is an access of its own where there is no RAM."""
    guest.call("fc 4889d1 f3a4 c3", FREE, BASE, 32)  # mov %rdx,%rcx; rep movsb
    assert guest.machine.memory.read(FREE, 32) == bytes(range(32))
    guest.call("fc 4889d1 f3a4 c3", RAM - 8, FREE, 16)
    assert guest.machine.memory.read(RAM - 8, 8) == bytes(range(8))


# Memory-mapped I/O ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_an_access_arrives_whole_aligned_or_not(guest: RemoteGuest, size: int) -> None:
    memory = registers(guest, "memory")
    for offset in (0, 1, 8, 0x13):
        assert guest.read(BASE + offset, size) == here(offset, size)
        guest.write(BASE + offset, here(offset, size), size)
    expected = [(offset, size) for offset in (0, 1, 8, 0x13)]
    assert memory.reads == expected
    assert memory.writes == [(offset, size, here(offset, size)) for offset, size in expected]


def test_an_access_over_the_end_of_a_device_is_nobody_s(guest: RemoteGuest) -> None:
    memory, size = registers(guest, "memory"), Memory.size
    for offset, width in ((size - 4, 8), (size - 1, 2), (size - 3, 4), (size, 8)):
        assert guest.read(BASE + offset, width) == (1 << 8 * width) - 1
        guest.write(BASE + offset, 0, width)
    assert memory.reads == memory.writes == []
    assert guest.read(BASE + size - 8, 8) == here(size - 8, 8)


def test_an_access_across_two_pages_is_two(guest: RemoteGuest) -> None:
    assert guest.read(BASE + 0xFFC, 8) == here(0xFFC, 8)
    guest.write(BASE + 0xFFE, 0x4433_2211)
    memory = registers(guest, "memory")
    assert memory.reads == [(0xFFC, 4), (0x1000, 4)]
    assert memory.writes == [(0xFFE, 2, 0x2211), (0x1000, 2, 0x4433)]


def test_sixteen_bytes_at_once_are_two_accesses(guest: RemoteGuest) -> None:
    guest.call("0f20e0 480d00060000 0f22e0 c3")  # mov %cr4,%rax; or $0x600,%rax; mov %rax,%cr4: OSFXSR, OSXMMEXCPT
    guest.call("0f1007 0f1106 c3", BASE + 16, FREE)  # movups (%rdi),%xmm0; movups %xmm0,(%rsi)
    assert guest.machine.memory.read(FREE, 16) == bytes(range(16, 32))
    assert registers(guest, "memory").reads == [(16, 8), (24, 8)]


def test_read_modify_write_is_a_read_and_a_write(guest: RemoteGuest) -> None:
    guest.call("ff07 c3", BASE + 4)  # incl (%rdi)
    memory = registers(guest, "memory")
    assert memory.reads == [(4, 4)] and memory.writes == [(4, 4, here(4, 4) + 1)]


# Ports ----------------------------------------------------------------------------------------------------------------


def test_ports_of_every_size_and_at_the_end_of_a_device(guest: RemoteGuest) -> None:
    ports = registers(guest, "ports")
    for size in (1, 2, 4):
        assert guest.inp(PORT + 1, size) == here(1, size)
        guest.outp(PORT + 2, 0x1122_3344, size)
    assert ports.reads == [(1, 1), (1, 2), (1, 4)]
    assert ports.writes == [(2, size, 0x1122_3344 & (1 << 8 * size) - 1) for size in (1, 2, 4)]
    for offset, size in ((6, 2), (4, 4), (7, 1)):
        assert guest.inp(PORT + offset, size) == (1 << 8 * size) - 1
        guest.outp(PORT + offset, 0, size)
    assert len(ports.reads) == len(ports.writes) == 3


@pytest.mark.parametrize(("size", "code"), [(1, ("6e", "6c")), (2, ("66f36f", "66f36d")), (4, ("6f", "6d"))])
def test_strings_go_through_a_port_in_order_across_pages(guest: RemoteGuest, size: int, code: tuple[str, str]) -> None:
    """More of them than KVM takes at once."""
    count, source, target = 3000 // size, FREE + 0x1800 - 3, FREE + 0x4000 - 5
    data = bytes(at * 7 & 0xFF for at in range(count * size))
    guest.machine.memory.write(source, data)
    out, into = (one if one.startswith("66") else "f3" + one for one in code)
    # xchg %rcx,%rdx; cld; rep outs; mov %rsi,%rax
    assert guest.call(f"4887ca fc {out} 4889f0 c3", 0, source, count, PORT + 8) == source + len(data)
    guest.moves()
    assert guest.call(f"4887ca fc {into} 4889f8 c3", target, 0, count, PORT + 8) == target + len(data)
    assert guest.machine.memory.read(target, len(data)) == data


# Code -----------------------------------------------------------------------------------------------------------------


def test_code_that_changes_itself_and_code_that_is_changed(guest: RemoteGuest) -> None:
    assert guest.call("c60501000000 22 b011 c3") & 0xFF == 0x22  # movb $0x22,1(%rip); mov $0x11,%al
    for value in (1, 2):
        guest.machine.memory.write(FREE, b"\xb8" + value.to_bytes(4, "little") + b"\xc3")  # by the host
        assert guest.call("ffd7 c3", FREE) == value
        guest.write(FREE + 1, value + 2)  # by the guest
        assert guest.call("ffd7 c3", FREE) == value + 2
        guest.moves()
        assert guest.call("ffd7 c3", FREE) == value + 2


# Pages ----------------------------------------------------------------------------------------------------------------

TABLES, FRAME = FREE + 0x1_0000, FREE + 0x2_0000
VIRTUAL = 1 << 39  # the second entry of the PML4


class Pages:
    """Tables of the test's own, below the second entry of the guest's PML4: VIRTUAL on."""

    def __init__(self, guest: RemoteGuest) -> None:
        self.guest = guest
        self.put(BOOT_PAGE_TABLES + 8, TABLES | PRESENT | WRITE | USER)
        self.put(TABLES, TABLES + 0x1000 | PRESENT | WRITE | USER)
        self.put(TABLES + 0x1000, TABLES + 0x2000 | PRESENT | WRITE | USER)
        for number in range(4):
            self.put(TABLES + 0x2000 + 8 * number, FRAME + 0x1000 * number | PRESENT | WRITE)
        guest.call("0f20d8 0f22d8 c3")  # mov %cr3,%rax; mov %rax,%cr3

    def put(self, place: int, value: int) -> None:
        self.guest.write(place, value, 8)

    def page(self, number: int, value: int) -> None:
        self.put(TABLES + 0x2000 + 8 * number, value)
        self.guest.call("0f013f c3", VIRTUAL + 0x1000 * number)  # invlpg (%rdi)

    def fault(self, what: Callable[[], object]) -> int:
        with pytest.raises(Fault) as caught:
            what()
        assert caught.value.vector == PF
        return caught.value.code


def test_small_pages_are_translated_marked_and_translated_anew(guest: RemoteGuest) -> None:
    pages = Pages(guest)
    entries = TABLES + 0x2000
    for number in range(4):
        guest.machine.memory.put_u64(FRAME + 0x1000 * number, number + 10)
    assert guest.read(VIRTUAL + 0x1000, 8) == 11
    assert guest.read(entries + 8, 8) & (ACCESSED | DIRTY) == ACCESSED
    guest.write(VIRTUAL + 0x1000, 99, 8)
    assert guest.read(entries + 8, 8) & (ACCESSED | DIRTY) == ACCESSED | DIRTY
    guest.moves()
    pages.page(1, FRAME + 0x3000 | PRESENT | WRITE)
    assert guest.read(VIRTUAL + 0x1000, 8) == 13
    pages.page(0, FRAME + 0x2000 | PRESENT | WRITE)
    guest.write(VIRTUAL + 0xFFC, 0x1122_3344_5566_7788, 8)  # into two frames that are not neighbours
    assert guest.machine.memory.u32(FRAME + 0x2FFC) == 0x5566_7788
    assert guest.machine.memory.u32(FRAME + 0x3000) == 0x1122_3344


@pytest.mark.parametrize("large", [1 << 21, 1 << 30])
def test_large_pages(guest: RemoteGuest, large: int) -> None:
    # push %rbx; mov %edi,%eax; cpuid; mov %edx,%eax; pop %rbx: PDPE1GB
    if large == 1 << 30 and not guest.call("53 89f8 0fa2 89d0 5b c3", 0x8000_0001) >> 26 & 1:
        pytest.skip("this host's KVM has no 1 GiB pages for its guests")
    pages = Pages(guest)
    pages.put(TABLES + (0x1000 if large == 1 << 21 else 0) + 8, PRESENT | WRITE | LARGE)  # physical 0
    guest.write(FREE, 0x5A5A_5A5A)
    assert guest.read(VIRTUAL + large + FREE) == 0x5A5A_5A5A
    guest.moves()
    guest.write(VIRTUAL + large + FREE, 0xA5A5_A5A5)
    assert guest.read(FREE) == 0xA5A5_A5A5


def test_page_faults_say_why(guest: RemoteGuest) -> None:
    pages = Pages(guest)
    guest.wrmsr(EFER, guest.rdmsr(EFER) | EFER_NXE)
    guest.call("0f20c0 480d00000100 0f22c0 c3")  # CR0.WP: the kernel honours read-only pages too
    pages.page(0, 0)
    pages.page(1, FRAME | PRESENT)
    pages.page(2, FRAME | PRESENT | WRITE | NO_EXECUTE)
    pages.page(3, FRAME | PRESENT | 1 << 51)
    guest.moves()
    assert pages.fault(lambda: guest.read(VIRTUAL)) == 0
    assert pages.fault(lambda: guest.write(VIRTUAL, 1)) == 2
    assert pages.fault(lambda: guest.write(VIRTUAL + 0x1000, 1)) == 3
    assert guest.read(VIRTUAL + 0x1000, 1) >= 0
    assert pages.fault(lambda: guest.call("ffd7 c3", VIRTUAL + 0x2000)) == 0x11
    assert pages.fault(lambda: guest.read(VIRTUAL + 0x3000)) == 9  # a reserved bit
    with pytest.raises(Fault) as caught:
        guest.read(VIRTUAL - 4 + 0x1000, 8)
    assert caught.value.cr2 == VIRTUAL + 0xFFC


# Exceptions -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "argument", "vector", "error"),
    [
        ("8b07 c3", 1 << 47, GP, 0),  # mov (%rdi),%eax: not canonical
        ("0f32 c3", 0, GP, 0),  # rdmsr of none
        ("0f22df c3", ALL, GP, 0),  # mov %rdi,%cr3: reserved bits
        ("8edf c3", 0x1238, GP, 0x1238),  # mov %edi,%ds: beyond the table
        ("0f0b", 0, UD, 0),  # ud2
        ("31d2 f7f7 c3", 0, DE, 0),  # div %edi
    ],
    ids=["non-canonical", "rdmsr", "cr3", "selector", "ud2", "division"],
)
def test_exceptions_have_their_vector_and_error_code(
    guest: RemoteGuest, code: str, argument: int, vector: int, error: int
) -> None:
    guest.moves()
    with pytest.raises(Fault) as caught:
        guest.call(code, argument, rcx=0x1234_5678)
    assert (caught.value.vector, caught.value.code) == (vector, error)
    assert guest.call("8cc8 c3") & 0xFFFF == CS  # and it goes on


@pytest.mark.true_kvm
def test_a_software_interrupt_is_no_exception(guest: RemoteGuest) -> None:
    guest.call("cd80 c3")
    guest.interrupted(0x80)
