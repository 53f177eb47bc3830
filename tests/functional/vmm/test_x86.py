"""The platform as the smallest guests see it, in 16-bit mode, each also after its state moved to another machine. More,
and in 64-bit mode, is in test_interrupts.py and test_memory_edges.py.

Interrupts by every way (IOAPIC edge and level, messages, the local APIC's timers, itself), what is not there, and the
edges of memory. The guests are a few instructions; `PROBE` is the port at which they report.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterator

import pytest
import restored
from guests import needs_kvm
from restored import either_way

from kvik.errors import HostError, InvalidArgument, OperationInvalid
from kvik.vmm.acpi.dsdt import CPU_EJECT
from kvik.vmm.build import add_vcpu
from kvik.vmm.config import MachineConfig, MemoryConfig
from kvik.vmm.cpu.hotplug import VcpuHotplug
from kvik.vmm.device import PortDevice
from kvik.vmm.devices.acpi_events import AcpiEvents, CpuHotplug
from kvik.vmm.layout import GIB, IOAPIC, LAPIC, MIB, PCI32, RAM_HIGH, RAM_LOW_END
from kvik.vmm.machine import Machine
from kvik.vmm.program import Program, bare_machine
from kvik.vmm.state.capture import apply, capture

pytestmark = [pytest.mark.functional, needs_kvm]

CODE, HANDLERS, PROBE = 0x1000, 0x3000, 0xF4
EDGE_PIN, LEVEL_PIN = 10, 11
READY, ONE_SHOT, DEADLINE, SELF, EDGE, LEVEL, MESSAGE = 0x01, 0x40, 0x41, 0x42, 0x50, 0x51, 0x52
ARM_ONE_SHOT, ARM_DEADLINE, SEND_SELF = 1, 2, 3  # what the guest does when it wakes and reads so from PROBE + 1

# In real mode, whose interrupts any KVM can emulate; ds lies at the local APIC, es at the IOAPIC.
SERVER = bytes.fromhex(
    "66c706f000ff010000"  # spurious interrupt vector register: APIC on
    "66c706800000000000"  # task priority 0
    "2666c706000024000000 2666c706100050000000"  # IOAPIC, pin 10: edge, vector 0x50
    "2666c706000025000000 2666c706100000000000"  # to APIC 0
    "2666c706000026000000 2666c706100051800000"  # pin 11: level, vector 0x51
    "2666c706000027000000 2666c706100000000000"
    "b001 e6f4"  # report READY
    "fb f4 fa"  # wait: sti; hlt; cli
    "e4f5 3c01 740a 3c02 7423 3c03 743e ebed"  # in PROBE + 1: je one_shot, deadline, self; jmp wait
    "66c706e0030b000000 66c706200340000000 66c706800300000008 ebd0"  # divide by 1, vector 0x40, count 128 Mi: 134 ms
    "66c706200341000400 0f31 660500000008 6683d200 66b9e0060000 0f30 ebb1"  # vector 0x41, TSC + 128 Mi
    "66c706100300000000 66c706000342000000 eb9d"  # ICR: vector 0x42 to APIC 0
)


def handler(vector: int) -> bytes:
    # push ax; mov al, vector; out PROBE, al; end of interrupt; pop ax; iret
    return b"\x50\xb0" + bytes((vector,)) + bytes.fromhex("e6f4 66c706b00000000000 58 cf")


class Probe(PortDevice):
    """Hears what the guest reports. `on_report` runs on the vCPU's thread."""

    kind, base, size = "probe", PROBE, 2

    def __init__(self) -> None:
        self.heard: list[int] = []
        self.command = 0
        self.on_report: Callable[[int], None] = lambda value: None
        super().__init__("probe")

    def read(self, offset: int, size: int) -> int:
        command, self.command = self.command, 0
        return command

    def write(self, offset: int, size: int, value: int) -> None:
        self.heard.append(value)
        self.on_report(value)


class Guest:
    """A machine that answers interrupts with reports."""

    def __init__(self, program: Program, memory: int = 2 * MIB) -> None:
        self.program, self.size = program, memory
        self.probe = Probe()
        self.machine = restored.either(self._make, program.mode)

    def _make(self) -> Machine:
        try:
            machine = bare_machine(self.program, MachineConfig(memory=MemoryConfig(size=self.size)))
        except HostError as error:
            pytest.skip(str(error))
        machine.add(self.probe)
        for vector in range(0x40, 0x60):
            place = HANDLERS + 32 * (vector - 0x40)
            machine.memory.write(place, handler(vector))
            machine.memory.write(4 * vector, struct.pack("<HH", place, 0))
        if self.program.mode == "real":
            special = machine.vcpus[0].vcpu.sregs()
            special.ds.base, special.es.base = LAPIC, IOAPIC
            machine.vcpus[0].vcpu.set_sregs(special)
        return machine

    def move(self) -> None:
        """State and memory into another machine, which goes on."""
        old = self.machine
        old.pause()
        state = capture(old)
        low = old.memory.read(0, 64 * 1024)
        heard = self.probe.heard
        old.close()
        self.probe = Probe()
        self.probe.heard = heard
        self.machine = self._make()
        self.machine.memory.write(0, low)
        apply(self.machine, state, "moved", identity=True)
        self.machine.start()

    def until(self, condition: Callable[[], object]) -> None:
        end = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < end, f"heard {self.probe.heard}"
            self.machine.loop.run_once(0.01)

    def reports(self, *values: int) -> None:
        """Wait for reports after those that were waited for."""
        self.until(lambda: len(self.probe.heard) >= len(values))
        assert self.probe.heard == list(values)
        self.probe.heard.clear()

    def command(self, value: int) -> None:
        self.probe.command = value
        self.machine.interrupts.line(EDGE_PIN).pulse()


@pytest.fixture(params=["booted", "moved"])
def guest(request: pytest.FixtureRequest) -> Iterator[Guest]:
    made = Guest(Program(SERVER, CODE))
    try:
        made.machine.start()
        made.reports(READY)
        if request.param == "moved":
            made.move()
        yield made
    finally:
        made.machine.close()


def test_an_edge_interrupts_once(guest: Guest) -> None:
    line = guest.machine.interrupts.line(EDGE_PIN)
    for _ in range(3):
        line.set(True)  # and it stays up: an edge counts, not a level
        guest.reports(EDGE)
        line.set(False)


def test_a_level_interrupts_until_it_falls(guest: Guest) -> None:
    line = guest.machine.interrupts.line(LEVEL_PIN)

    def heard(value: int) -> None:
        if guest.probe.heard.count(LEVEL) == 3:
            line.set(False)

    guest.probe.on_report = heard
    line.set(True)
    guest.until(lambda: guest.probe.heard.count(LEVEL) >= 3)
    guest.command(0)
    guest.until(lambda: EDGE in guest.probe.heard)
    # A fourth may be on its way when the line falls (KVM-PVM has the next one pending by then), a fifth may not.
    assert guest.probe.heard in ([LEVEL] * 3 + [EDGE], [LEVEL] * 4 + [EDGE])


def test_a_message_reaches_its_vector(guest: Guest) -> None:
    guest.machine.interrupts.send(LAPIC, MESSAGE)
    guest.reports(MESSAGE)


def test_a_message_by_descriptor_reaches_its_vector(guest: Guest) -> None:
    route = guest.machine.interrupts.msi()
    route.update(LAPIC, MESSAGE)
    route.signal()
    guest.reports(MESSAGE)
    route.close()


def test_the_apics_timer_rings_once(guest: Guest) -> None:
    guest.command(ARM_ONE_SHOT)
    guest.reports(EDGE, ONE_SHOT)


def test_a_tsc_deadline_rings(guest: Guest) -> None:
    guest.command(ARM_DEADLINE)
    guest.reports(EDGE, DEADLINE)


def test_a_processor_interrupts_itself(guest: Guest) -> None:
    guest.command(SEND_SELF)
    guest.reports(EDGE, SELF)


@pytest.mark.parametrize(("command", "vector"), [(ARM_ONE_SHOT, ONE_SHOT), (ARM_DEADLINE, DEADLINE)])
def test_a_timer_that_runs_goes_on_elsewhere(command: int, vector: int) -> None:
    made = Guest(Program(SERVER, CODE))
    try:
        made.machine.start()
        made.reports(READY)
        made.command(command)
        made.until(lambda: made.probe.heard and not made.probe.command)
        made.move()
        made.reports(EDGE, vector)
    finally:
        made.machine.close()


def test_a_level_that_is_up_interrupts_elsewhere() -> None:
    """The line was up and its interrupt not taken yet: the machine was paused."""
    made = Guest(Program(SERVER, CODE))
    try:
        made.machine.start()
        made.reports(READY)
        made.machine.pause()
        made.machine.interrupts.line(LEVEL_PIN).set(True)
        made.probe.heard.clear()
        made.move()
        made.until(lambda: LEVEL in made.probe.heard)
        made.machine.interrupts.drive(LEVEL_PIN, 1)  # the new machine's device holds it; now it lets go
        made.machine.interrupts.drive(LEVEL_PIN, -1)
    finally:
        made.machine.close()


ABSENT = (0x40, 0x43, 0x60, 0x64, 0x1F0)  # 8254, 8042, IDE


@either_way
@pytest.mark.parametrize("port", ABSENT)
def test_what_is_not_there_reads_all_ones(port: int) -> None:
    # mov dx, port; in al, dx; out PROBE, al; hlt
    program = Program(b"\xba" + struct.pack("<H", port) + bytes.fromhex("ec e6f4 f4"), CODE)
    made = Guest(program)
    try:
        made.machine.start()
        made.reports(0xFF)
    finally:
        made.machine.close()


# For each address of the list at 0x4000: write 0x5a, read it back, report it; then READY.
EDGES = bytes.fromhex("be00400000 48ad 4885c0 7409 c6005a 8a00 e6f4 ebf0 b001 e6f4 f4 ebf9")
MAPPED = 0x9000  # the boot page tables: four page directories from 0xB000


@either_way
@pytest.mark.parametrize("size", [2 * MIB, 64 * MIB, RAM_LOW_END, RAM_LOW_END + GIB // 4])
def test_memory_ends_where_it_ends(size: int) -> None:
    """The last byte is there; the next one is not, nor is the hole below 4 GiB; above it the rest is."""
    high = size > RAM_LOW_END
    last = RAM_HIGH + size - RAM_LOW_END - 1 if high else size - 1
    there = [0x10_0000, min(size, RAM_LOW_END) - 1, last]
    absent = [PCI32, last + 1]
    made = Guest(Program(EDGES, CODE, "long"), size)
    try:
        memory = made.machine.memory
        # Two more GiB from the fourth on, in two more page directories of 2 MiB pages, below the stack's page.
        for number in range(2):
            directory = 0x1_0000 + 0x1000 * number
            memory.put_u64(MAPPED + 0x1000 + 8 * (4 + number), directory | 3)
            for page in range(512):
                memory.put_u64(directory + 8 * page, RAM_HIGH + number * GIB + (page << 21) | 0x83)
        memory.write(0x4000, struct.pack("<6Q", *there, *absent, 0))
        made.machine.start()
        made.reports(*[0x5A] * len(there), *[0xFF] * len(absent), READY)
        for address in there:
            assert memory.read(address, 1) == b"\x5a"
    finally:
        made.machine.close()


# Processors that come and go ------------------------------------------------------------------------------------------

STARTED, AP_PAGE = 0x77, 4  # the second processor starts at 0x4000
INIT, STARTUP = 0x4500, 0x0600 | AP_PAGE  # message data: delivery mode 5, asserted; 6 with the page (SDM vol. 3, 11.6)


@either_way
def test_a_processor_comes_goes_and_comes_again() -> None:
    """It waits for INIT and start-up, runs, leaves when ejected, and the same vCPU starts anew."""
    made = Guest(Program(SERVER, CODE))
    machine = made.machine
    events: list[tuple[str, object]] = []
    machine.listeners.append(lambda name, data: events.append((name, data)))
    try:
        acpi = AcpiEvents()
        registers = CpuHotplug(acpi, 1, 3)
        machine.config.cpus.maximum = 3
        hotplug = VcpuHotplug(machine, registers, lambda index: add_vcpu(machine, index))
        # mov al, STARTED; out PROBE, al; hlt; jmp to the hlt
        machine.memory.write(AP_PAGE << 12, bytes((0xB0, STARTED, 0xE6, PROBE, 0xF4, 0xEB, 0xFD)))
        machine.start()
        made.reports(READY)

        def start(number: int) -> None:
            for message in (INIT, STARTUP):
                machine.interrupts.send(LAPIC | number << 12, message)
            made.reports(STARTED)

        hotplug.plug(2, "late")
        start(2)
        assert [thread.index for thread in machine.vcpus] == [0, 2]
        with pytest.raises(OperationInvalid):
            hotplug.plug(2)
        with pytest.raises(InvalidArgument):
            hotplug.plug(3)
        first = machine.vcpus[1]
        registers.write(0, 4, 2)
        registers.write(4, 4, CPU_EJECT)  # as the guest does
        made.until(lambda: len(machine.vcpus) == 1)
        deleted = {"device": "late", "path": "/machine/peripheral/late"}
        made.until(lambda: ("DEVICE_DELETED", deleted) in events)
        hotplug.plug(2)
        assert machine.vcpus[1] is first  # KVM has no way to delete one
        start(2)
        machine.reset()
        made.reports(READY)
        assert [thread.index for thread in machine.vcpus] == [0, 2]
        start(2)  # it waits again
    finally:
        machine.close()
