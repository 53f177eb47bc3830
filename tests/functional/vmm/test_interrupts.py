"""Interrupts as the guest sees them: IOAPIC, INTx, MSI-X, local APIC, other processors, time. Like kvm-unit-tests.

Each test also moves the machine at its hardest instant (`guest.moves`): with an interrupt in service, pending or
masked, a timer running, a processor that waits for its start.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator

import pytest
from guests import needs_kvm
from remote import ALL, FREE, Fault, RemoteGuest
from restored import either_way

from kvik.vmm.layout import ECAM, IOAPIC, LAPIC, RAM_LOW_END, pci_gsi
from kvik.vmm.machine import Machine
from kvik.vmm.pci.config import BAR0, COMMAND, COMMAND_MEMORY, COMMAND_NO_INTX, STATUS, STATUS_INTERRUPT
from kvik.vmm.pci.device import Bar, PciDevice
from kvik.vmm.pci.msix import ENABLE, FUNCTION_MASK

pytestmark = [pytest.mark.functional, needs_kvm, either_way]

# Local APIC registers (Intel SDM 3A, table 11-1)
ID, TPR, EOI, SPURIOUS, ISR, IRR = 0x20, 0x80, 0xB0, 0xF0, 0x100, 0x200
ICR_LOW, ICR_HIGH, LVT_TIMER, INITIAL, CURRENT, DIVIDE = 0x300, 0x310, 0x320, 0x380, 0x390, 0x3E0
MASKED, PERIODIC, TSC_DEADLINE_MODE = 1 << 16, 1 << 17, 2 << 17
IA32_TSC, IA32_APIC_BASE, IA32_TSC_DEADLINE = 0x10, 0x1B, 0x6E0
NMI_MESSAGE = 0x400  # delivery mode 4
# IOAPIC redirection entry (82093AA, 3.2.4)
LEVEL, REMOTE_IRR = 1 << 15, 1 << 14
PIN, SLOT = 10, 3
CARD_PIN = pci_gsi(SLOT)
RDTSC = "0f31 48c1e220 4809d0 c3"  # rdtsc; shl $32,%rdx; or %rdx,%rax; ret


class Card(PciDevice):
    """A device that interrupts when the test says so, by its pin or by MSI-X; each byte of its BAR is its offset."""

    kind, vendor, device_id, class_code = "card", 0x1B36, 0x00CA, 0xFF0000
    bars = (Bar(0, 16),)
    msix_vectors = 2
    intx = True

    def read_bar(self, bar: int, offset: int, size: int) -> int:
        return int.from_bytes(bytes(range(offset, offset + size)), "little")


def with_card(machine: Machine) -> None:
    machine.add(Card("card"), slot=SLOT)


@pytest.fixture
def guest() -> Iterator[RemoteGuest]:
    made = RemoteGuest(prepare=with_card)
    yield made
    made.close()


def ioapic(guest: RemoteGuest, register: int, value: int | None = None) -> int:
    """Write or read one of its registers, which lie behind a window."""
    guest.write(IOAPIC, register)
    if value is None:
        return guest.read(IOAPIC + 0x10)
    guest.write(IOAPIC + 0x10, value)
    return value


def entry(guest: RemoteGuest, pin: int, value: int | None = None) -> int:
    """The low half of a pin's redirection entry."""
    return ioapic(guest, 0x10 + 2 * pin, value)


def card(guest: RemoteGuest) -> Card:
    found = guest.machine.devices["card"]
    assert isinstance(found, Card)
    return found


def configuration(offset: int) -> int:
    return ECAM + (SLOT << 15) + offset


# IOAPIC ---------------------------------------------------------------------------------------------------------------


@pytest.mark.true_kvm
def test_an_edge_that_comes_while_the_pin_is_masked_is_lost_and_a_level_is_not(guest: RemoteGuest) -> None:
    line = guest.machine.interrupts.line(PIN)
    entry(guest, PIN, MASKED | 0x50)
    line.pulse()
    entry(guest, PIN, 0x50)
    guest.quiet()
    entry(guest, CARD_PIN, MASKED | LEVEL | 0x51)
    card(guest).raise_intx()
    guest.quiet()
    guest.moves()
    guest.flags(0)
    entry(guest, CARD_PIN, LEVEL | 0x51)
    guest.interrupted(0x51)


@pytest.mark.true_kvm
def test_a_level_that_is_in_service_comes_again_after_its_end_while_it_is_up(guest: RemoteGuest) -> None:
    """Remote IRR is set from delivery to EOI, and with it nothing more is delivered."""
    guest.flags(0)
    entry(guest, CARD_PIN, LEVEL | 0x61)
    card(guest).raise_intx()
    guest.interrupted(0x61)
    assert entry(guest, CARD_PIN) == LEVEL | REMOTE_IRR | 0x61
    assert guest.read(LAPIC + ISR + 0x30) == 1 << 1
    guest.moves()
    assert entry(guest, CARD_PIN) == LEVEL | REMOTE_IRR | 0x61
    assert guest.read(LAPIC + ISR + 0x30) == 1 << 1
    guest.quiet()
    guest.write(LAPIC + EOI, 0)  # the device has not been served
    guest.interrupted(0x61)
    card(guest).lower_intx()
    guest.moves()
    guest.write(LAPIC + EOI, 0)
    guest.quiet()
    assert entry(guest, CARD_PIN) == LEVEL | 0x61
    card(guest).raise_intx()
    guest.interrupted(0x61)


def test_an_edge_does_not_come_again_and_leaves_no_remote_irr(guest: RemoteGuest) -> None:
    entry(guest, PIN, 0x50)
    line = guest.machine.interrupts.line(PIN)
    line.set(True)
    guest.interrupted(0x50)
    assert entry(guest, PIN) == 0x50
    guest.moves()
    guest.quiet()


def test_the_ioapic_says_what_it_is(guest: RemoteGuest) -> None:
    guest.moves()
    version = ioapic(guest, 1)
    assert version & 0xFF in (0x11, 0x20) and version >> 16 & 0xFF == 23  # the highest entry
    ioapic(guest, 0, 5 << 24)
    guest.moves()
    assert ioapic(guest, 0) >> 24 & 0xF == 5


# INTx -----------------------------------------------------------------------------------------------------------------


@pytest.mark.true_kvm
def test_intx_is_disabled_by_the_command_register_and_still_told_by_the_status(guest: RemoteGuest) -> None:
    entry(guest, CARD_PIN, LEVEL | 0x51)
    guest.flags(0)
    guest.write(configuration(COMMAND), COMMAND_NO_INTX, 2)
    card(guest).raise_intx()
    guest.quiet()
    assert guest.read(configuration(STATUS), 2) & STATUS_INTERRUPT
    guest.moves()
    guest.quiet()
    assert guest.read(configuration(STATUS), 2) & STATUS_INTERRUPT
    guest.write(configuration(COMMAND), 0, 2)
    guest.interrupted(0x51)
    card(guest).lower_intx()
    assert not guest.read(configuration(STATUS), 2) & STATUS_INTERRUPT


def test_a_bar_ends_where_it_ends_and_answers_where_it_is_put(guest: RemoteGuest) -> None:
    register, word = configuration(BAR0), 0x0706_0504
    place = guest.read(register) & ~0xF
    assert guest.read(place + 4) == 0xFFFF_FFFF  # not before it decodes
    guest.write(configuration(COMMAND), COMMAND_MEMORY, 2)
    assert guest.read(place + 8, 8) == 0x0F0E_0D0C_0B0A_0908
    assert guest.read(place + 12, 8) == ALL and guest.read(place + 16) == 0xFFFF_FFFF  # over its end, and behind it
    guest.write(register, 0xFFFF_FFFF)
    assert guest.read(register) == 0xFFFF_FFF0  # its size
    guest.write(register, place + 0x10_0000)
    guest.moves()
    assert guest.read(place + 4) == 0xFFFF_FFFF and guest.read(place + 0x10_0004) == word
    guest.write(register, RAM_LOW_END - 0x1000)  # over RAM that is not there: no window of the bridge leads there
    assert guest.read(RAM_LOW_END - 0x1000 + 4) == 0xFFFF_FFFF


# MSI-X ----------------------------------------------------------------------------------------------------------------


class MsixTable:
    """What the guest's driver does with the card's table."""

    def __init__(self, guest: RemoteGuest) -> None:
        self.guest = guest
        guest.write(configuration(COMMAND), COMMAND_MEMORY, 2)
        self.table = guest.read(configuration(BAR0 + 4 * 4)) & ~0xF
        self.pending_bits = self.table + 0x1000
        self.capability = configuration(guest.read(configuration(0x34), 1))
        assert guest.read(self.capability, 1) == 0x11

    def control(self, value: int) -> None:
        self.guest.write(self.capability + 2, value, 2)

    def set(self, number: int, vector: int, *, masked: bool = False) -> None:
        place = self.table + 16 * number
        self.guest.write(place + 12, 1)
        self.guest.write(place, LAPIC, 8)
        self.guest.write(place + 8, vector)
        self.guest.write(place + 12, int(masked))

    def mask(self, number: int, yes: bool) -> None:
        self.guest.write(self.table + 16 * number + 12, int(yes))

    def pending(self) -> int:
        return self.guest.read(self.pending_bits, 8)


def test_a_masked_message_is_pending_until_it_is_unmasked(guest: RemoteGuest) -> None:
    table = MsixTable(guest)
    table.set(0, 0x70)
    table.set(1, 0x71, masked=True)
    table.control(ENABLE)
    card(guest).msix.signal(0)
    guest.interrupted(0x70)
    card(guest).msix.signal(1)
    card(guest).msix.signal(1)
    guest.quiet()
    assert table.pending() == 1 << 1
    guest.moves()
    guest.quiet()
    assert table.pending() == 1 << 1
    table.mask(1, False)
    guest.interrupted(0x71)  # once
    assert table.pending() == 0


def test_the_whole_function_is_masked_and_a_message_is_rewritten_meanwhile(guest: RemoteGuest) -> None:
    table = MsixTable(guest)
    table.set(0, 0x70)
    table.set(1, 0x71)
    table.control(ENABLE | FUNCTION_MASK)
    for number in range(2):
        card(guest).msix.signal(number)
    assert table.pending() == 3
    guest.moves()
    table.set(1, 0x75)
    guest.quiet()
    guest.mask(True)
    table.control(ENABLE)
    guest.moves()  # both wait in the local APIC
    guest.mask(False)
    guest.interrupted(0x75, 0x70)  # the higher vector first
    assert table.pending() == 0


def test_another_process_s_descriptor_is_masked_and_pending_too(guest: RemoteGuest) -> None:
    """An irqfd: the kernel's vhost, or a device in a process of its own, writes to it."""
    table = MsixTable(guest)
    table.set(0, 0x70)
    table.control(ENABLE)
    descriptor = card(guest).msix.fd(0)
    os.eventfd_write(descriptor, 1)
    guest.interrupted(0x70)
    table.mask(0, True)
    os.eventfd_write(descriptor, 1)
    guest.quiet()
    assert table.pending() == 1
    guest.moves()
    assert table.pending() == 1
    table.mask(0, False)
    guest.interrupted(0x70)
    os.eventfd_write(card(guest).msix.fd(0), 1)
    guest.interrupted(0x70)


def test_the_table_takes_whole_aligned_words_only(guest: RemoteGuest) -> None:
    """PCI 3.0, 6.8.2: what else is written is undefined, here nothing. Reading is free, and so is no byte behind it."""
    table = MsixTable(guest)
    table.set(0, 0x70)
    table.set(1, 0x71)
    table.control(ENABLE)
    for offset, size in ((8, 1), (8, 2), (10, 4), (4, 8), (28, 8), (32, 4), (0xFF8, 8)):
        guest.write(table.table + offset, 0, size)
    assert guest.read(table.table + 8, 1) == 0x70 and guest.read(table.table + 8, 8) == 0x70
    guest.write(table.table + 0xFFC, ALL, 8)  # half in the table's page, half in the pending bits
    assert table.pending() == 0
    guest.moves()
    for number in range(2):
        card(guest).msix.signal(number)
        guest.interrupted(0x70 + number)


def test_nothing_comes_while_msix_is_off(guest: RemoteGuest) -> None:
    table = MsixTable(guest)
    table.set(0, 0x70)
    card(guest).msix.signal(0)
    guest.moves()
    table.control(ENABLE)
    guest.quiet()
    card(guest).msix.signal(0)
    guest.interrupted(0x70)


# The local APIC -------------------------------------------------------------------------------------------------------


def test_higher_vectors_come_first_and_the_task_priority_holds_the_lower_back(guest: RemoteGuest) -> None:
    guest.mask(True)
    guest.write(LAPIC + TPR, 0x80)
    for vector in (0x51, 0x85, 0xA1, 0xC1):
        guest.machine.interrupts.send(LAPIC, vector)
    guest.call("90c3")
    assert guest.read(LAPIC + IRR + 0x50) == 1 << 1 and guest.read(LAPIC + IRR + 0x60) == 1 << 1
    guest.moves()
    guest.mask(False)
    guest.interrupted(0xC1, 0xA1)
    assert guest.call("440f20c0 c3") == 8  # mov %cr8,%rax: the same register
    guest.moves()
    guest.quiet()
    guest.call("440f22c7 c3", 0)  # mov %rdi,%cr8
    guest.interrupted(0x85, 0x51)


@pytest.mark.true_kvm
def test_what_is_in_service_holds_its_class_back_until_its_end(guest: RemoteGuest) -> None:
    guest.flags(0)
    guest.machine.interrupts.send(LAPIC, 0x91)
    guest.interrupted(0x91)
    guest.machine.interrupts.send(LAPIC, 0x95)
    guest.quiet()
    guest.moves()
    guest.quiet()
    guest.machine.interrupts.send(LAPIC, 0xA2)
    guest.interrupted(0xA2)
    guest.write(LAPIC + EOI, 0)  # of 0xA2
    guest.quiet()
    guest.write(LAPIC + EOI, 0)  # of 0x91
    guest.interrupted(0x95)


def test_the_same_vector_twice_is_one_pending_interrupt(guest: RemoteGuest) -> None:
    guest.mask(True)
    for _ in range(3):
        guest.machine.interrupts.send(LAPIC, 0x66)
    guest.moves()
    guest.mask(False)
    guest.interrupted(0x66)


@pytest.mark.true_kvm
def test_a_processor_interrupts_itself_by_address_shorthand_and_x2apic(guest: RemoteGuest) -> None:
    guest.write(LAPIC + ICR_HIGH, 0)
    guest.write(LAPIC + ICR_LOW, 0x4042)
    guest.interrupted(0x42)
    guest.write(LAPIC + ICR_LOW, 1 << 18 | 0x4043)
    guest.interrupted(0x43)
    guest.wrmsr(IA32_APIC_BASE, guest.rdmsr(IA32_APIC_BASE) | 1 << 10)
    guest.flags(0)
    guest.moves()  # the registers' form depends on the mode
    assert guest.rdmsr(0x802) == 0 and guest.rdmsr(0x80F) == 0x1FF  # ID, spurious vector register
    guest.wrmsr(0x83F, 0x44)  # SELF IPI
    guest.interrupted(0x44)
    assert guest.rdmsr(0x812) == 1 << 4  # in service
    guest.moves()
    guest.wrmsr(0x80B, 0)
    assert guest.rdmsr(0x812) == 0
    with pytest.raises(Fault) as caught:
        guest.wrmsr(0x80B, 1)  # only 0 may be written to EOI (SDM 3A, 11.12.1.2)
    assert caught.value.vector == 13


def test_an_nmi_comes_whatever_the_flag_says(guest: RemoteGuest) -> None:
    guest.mask(True)
    guest.moves()
    guest.machine.interrupts.send(LAPIC, NMI_MESSAGE)
    guest.interrupted(2)
    guest.mask(False)
    guest.machine.interrupts.send(LAPIC, NMI_MESSAGE)
    guest.interrupted(2)


# Waiting --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["message", "line", "nmi"])
def test_a_processor_that_halts_is_woken(guest: RemoteGuest, by: str) -> None:
    entry(guest, PIN, 0x50)
    guest.halt()
    guest.moves()
    assert guest.halted()
    vector = {"message": 0x60, "line": 0x50, "nmi": 2}[by]
    if by == "line":
        guest.machine.interrupts.line(PIN).pulse()
    else:
        guest.machine.interrupts.send(LAPIC, 0x60 if by == "message" else NMI_MESSAGE)
    guest.end()
    assert guest.logged() == [vector]


# Time -----------------------------------------------------------------------------------------------------------------


def timer(guest: RemoteGuest, lvt: int, count: int) -> None:
    guest.write(LAPIC + DIVIDE, 0xB)  # by 1
    guest.write(LAPIC + LVT_TIMER, lvt)
    guest.write(LAPIC + INITIAL, count)


def test_the_timer_rings_once(guest: RemoteGuest) -> None:
    guest.mask(True)
    timer(guest, 0x40, 0xFFFF_FFFF)  # KVM counts nanoseconds: four seconds
    first = guest.read(LAPIC + CURRENT)
    guest.moves()
    assert guest.read(LAPIC + CURRENT) < first
    timer(guest, 0x40, 2_000_000)
    guest.moves()
    guest.until(lambda: guest.read(LAPIC + IRR + 0x20) == 1)
    guest.moves()
    guest.mask(False)
    guest.interrupted(0x40)
    assert guest.read(LAPIC + CURRENT) == 0
    guest.quiet()


def test_the_timer_rings_again_and_again_until_it_is_stopped(guest: RemoteGuest) -> None:
    timer(guest, PERIODIC | 0x40, 2_000_000)
    guest.until(lambda: len(guest.peek()) >= 3)
    guest.moves()
    seen = len(guest.peek())
    guest.until(lambda: len(guest.peek()) >= seen + 3)
    guest.write(LAPIC + INITIAL, 0)
    assert set(guest.logged()) == {0x40}
    guest.quiet()


def test_a_masked_timer_counts_and_does_not_ring(guest: RemoteGuest) -> None:
    timer(guest, MASKED | 0x40, 1_000_000)
    guest.moves()
    guest.until(lambda: guest.read(LAPIC + CURRENT) == 0)
    guest.quiet()


def test_a_deadline_of_the_tsc_rings_once_and_a_past_one_at_once(guest: RemoteGuest) -> None:
    guest.write(LAPIC + LVT_TIMER, TSC_DEADLINE_MODE | 0x41)
    guest.mask(True)
    deadline = guest.call(RDTSC) + 50_000_000
    guest.wrmsr(IA32_TSC_DEADLINE, deadline)
    guest.moves()
    guest.mask(False)
    guest.interrupted(0x41)
    assert guest.call(RDTSC) >= deadline
    assert guest.rdmsr(IA32_TSC_DEADLINE) == 0  # it was used up
    guest.moves()
    guest.quiet()
    guest.wrmsr(IA32_TSC_DEADLINE, 1)
    guest.interrupted(0x41)


def test_time_never_goes_back(guest: RemoteGuest) -> None:
    first = guest.call(RDTSC)
    second = guest.rdmsr(IA32_TSC)
    guest.moves()
    third = guest.call(RDTSC)
    with guest.machine.paused():  # a vCPU that runs answers no ioctl
        khz = guest.machine.vcpus[0].vcpu.tsc_khz()
    assert first < second < third < second + 60_000 * khz


@pytest.mark.true_kvm
def test_a_tsc_that_the_guest_set_stays_set(guest: RemoteGuest) -> None:
    far = guest.rdmsr(IA32_TSC) + (1 << 44)  # some hours
    guest.wrmsr(IA32_TSC, far)
    guest.moves()
    assert far <= guest.rdmsr(IA32_TSC) < far + (1 << 43)


CLOCK = 0x4B56_4D01  # MSR_KVM_SYSTEM_TIME_NEW (Documentation/virt/kvm/x86/msr.rst)


def kvmclock(guest: RemoteGuest) -> int:
    """Nanoseconds, as a guest computes them from the page that KVM fills."""
    for _ in range(100):
        data = guest.machine.memory.read(FREE, 32)
        tsc = guest.call(RDTSC)
        if data == guest.machine.memory.read(FREE, 32) and not data[0] & 1:
            break
    version, _, begun, nanoseconds, factor, shift, _ = struct.unpack("<IIQQIbB2x", data)
    assert version and factor
    delta = tsc - begun
    delta = delta << shift if shift >= 0 else delta >> -shift
    return nanoseconds + (delta * factor >> 32)


def test_kvm_s_clock_goes_on_where_it_stopped(guest: RemoteGuest) -> None:
    guest.wrmsr(CLOCK, FREE | 1)
    first = kvmclock(guest)
    second = kvmclock(guest)
    guest.moves()
    third = kvmclock(guest)
    assert first < second < third < second + 60 * 10**9
    assert guest.rdmsr(CLOCK) == FREE | 1


# Another processor ----------------------------------------------------------------------------------------------------

AP_PAGE, STARTED, HEARD = 4, 0x4F00, 0x4F04
INIT, STARTUP, NMI_TO = 0x4500, 0x4600 | AP_PAGE, 0x4400
# xor %ax,%ax; mov %ax,%ds; incl STARTED; mov $0x7000,%sp; sti; 1: hlt; jmp 1b
AP = bytes.fromhex("31c0 8ed8 66ff06004f bc0070 fb f4 ebfd")
AP_HANDLER = bytes.fromhex("66ff06044f cf")  # incl HEARD; iret


def test_another_processor_starts_when_told_and_is_interrupted_while_it_halts() -> None:
    """INIT, start-up, and an interrupt; it may move between any two of them."""
    guest = RemoteGuest(cpus=2)
    try:
        memory = guest.machine.memory
        memory.write(AP_PAGE << 12, AP)
        memory.write(0x4100, AP_HANDLER)
        memory.write(4 * 2, struct.pack("<HH", 0x4100, 0))

        def send(message: int) -> None:
            guest.write(LAPIC + ICR_HIGH, 1 << 24)
            guest.write(LAPIC + ICR_LOW, message)

        send(STARTUP)  # without INIT: nobody listens
        guest.quiet()
        assert memory.u32(STARTED) == 0
        send(INIT)
        guest.moves()
        assert guest.machine.memory.u32(STARTED) == 0
        send(STARTUP)
        guest.until(lambda: guest.machine.memory.u32(STARTED) == 1)
        guest.moves()
        send(NMI_TO)  # its APIC is still off by software, which an NMI passes
        guest.until(lambda: guest.machine.memory.u32(HEARD) == 1)
        guest.moves()
        send(STARTUP)  # it runs already: ignored
        guest.quiet()
        assert guest.machine.memory.u32(STARTED) == 1
        send(INIT)
        send(STARTUP)
        guest.until(lambda: guest.machine.memory.u32(STARTED) == 2)
    finally:
        guest.close()
