"""A guest under remote control: 64-bit code that does what the test says, one small piece of code at a time.

    guest.write(IOAPIC, 0x10, 4)      guest.rdmsr(0x10)      guest.call("0fa2 c3")   # cpuid; ret

It polls a mailbox in its memory (no exits) and calls what it is told to with rdi, rsi, rdx and rcx; rax is the answer.
Every interrupt and exception is logged with its error code, rip and cr2; an exception ends the call, which then raises
`Fault`. So a test of the platform is a few lines of Python, and between any two of them the machine can move: a test
calls `guest.moves()` where that is hardest, which saves and restores it on the restored way (`restored`).
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable

import pytest
import restored

from kvik.errors import HostError
from kvik.kvm.constants import MpState
from kvik.vmm.config import CpuConfig, MachineConfig, MemoryConfig
from kvik.vmm.layout import LAPIC, MIB
from kvik.vmm.machine import Machine
from kvik.vmm.program import Program, bare_machine

CODE, IDT, STUBS, MAIL, LOG, SNIPPET = 0x1_0000, 0x1_1000, 0x1_2000, 0x1_3000, 0x1_4000, 0x1_5000
FREE = 0x1_8000  # from here on memory is the test's
CS = 0x10  # the 64-bit code segment of `Program`'s GDT
WITH_ERROR_CODE = (8, 10, 11, 12, 13, 14, 17, 21, 29, 30)  # Intel SDM 3A, table 6-1
END_OF_INTERRUPT = 1  # of the mailbox's flags: the handler says it by itself
LENGTH = 128  # of the log
ALL = (1 << 64) - 1

# Mailbox: +0 what to call, +8 rdi, +16 rsi, +24 rdx, +32 rcx, +40 rax, +48 rsp of the call, +56 number of entries that
# were logged, +64 flags, +128 the pointer to the IDT
PROGRAM = bytes.fromhex(
    # lidt MAIL+128; sti
    "0f011c2580300100 fb"
    # loop: mov MAIL,%rax; test %rax,%rax; jz loop
    "488b042500300100 4885c0 74f3"
    # mov MAIL+8,%rdi; mov MAIL+16,%rsi; mov MAIL+24,%rdx; mov MAIL+32,%rcx; mov %rsp,MAIL+48; call *%rax
    "488b3c2508300100 488b342510300100 488b142518300100 488b0c2520300100 4889242530300100 ffd0"
    # done: mov %rax,MAIL+40; movq $0,MAIL; jmp loop
    "4889042528300100 48c704250030010000000000 ebb3"
    # common (vector, error code, rip, cs, rflags, rsp, ss): push %rax; push %rcx; rcx = LOG's next entry
    "50 51 488b0c2538300100 83e17f c1e105"
    # vector, error code, rip, cr2 to the entry; incq MAIL+56
    "488b442410 48898100400100 488b442418 48898108400100 488b442420 48898110400100 0f20d0 48898118400100"
    "48ff042538300100"
    # mov vector,%eax; cmp $2,%eax (NMI); je out; cmp $32,%eax; jae irq
    "8b442410 83f802 743b 83f820 7321"
    # an exception ends the call: rip = done, rsp = that of the call, rax = -1; jmp out
    "48c744242040000100 488b042530300100 4889442438 48c7442408ffffffff eb15"
    # irq: testb $1,MAIL+64; jz out; mov $LAPIC+0xb0,%eax; movl $0,(%rax)
    "f604254030010001 740b b8b000e0fe c70000000000"
    # out: pop %rcx; pop %rax; add $16,%rsp; iretq
    "59 58 4883c410 48cf"
)
COMMON = CODE + 0x56


class Fault(Exception):
    """An exception of the guest's: `vector`, `code` (the error code), `rip`, `cr2`."""

    def __init__(self, vector: int, code: int, rip: int, cr2: int) -> None:
        super().__init__(f"vector {vector}, error code {code:#x}, rip {rip:#x}, cr2 {cr2:#x}")
        self.vector, self.code, self.rip, self.cr2 = vector, code, rip, cr2


def stub(vector: int) -> bytes:
    """[push $0;] push $vector; jmp common"""
    code = (b"" if vector in WITH_ERROR_CODE else b"\x6a\0") + b"\x68" + struct.pack("<I", vector)
    return code + b"\xe9" + struct.pack("<i", COMMON - (STUBS + 16 * vector + len(code) + 5))


def idt() -> bytes:
    gates = b""
    for vector in range(256):
        place = STUBS + 16 * vector
        gates += struct.pack("<HHBBHII", place & 0xFFFF, CS, 0, 0x8E, place >> 16, 0, 0)  # an interrupt gate
    return gates


class RemoteGuest:
    """The machine, its far end, and what the guest can be told to do."""

    def __init__(self, memory: int = 4 * MIB, cpus: int = 1, prepare: Callable[[Machine], None] | None = None) -> None:
        self.memory_size, self.cpus, self.prepare = memory, cpus, prepare
        try:
            self.machine = self._make()
        except HostError as error:
            pytest.skip(str(error))
        self.seen = 0  # entries of the log that were looked at
        self.machine.start()
        self.write(LAPIC + 0xF0, 0x1FF)  # APIC on, spurious vector 0xFF
        self.flags(END_OF_INTERRUPT)

    def _make(self) -> Machine:
        config = MachineConfig(memory=MemoryConfig(size=self.memory_size), cpus=CpuConfig(count=self.cpus))
        machine = bare_machine(Program(PROGRAM, CODE, "long"), config)
        machine.memory.write(IDT, idt())
        machine.memory.write(STUBS, b"".join(stub(vector).ljust(16, b"\xcc") for vector in range(256)))
        machine.memory.write(MAIL + 128, struct.pack("<HQ", 4095, IDT))
        if self.prepare is not None:
            self.prepare(machine)
        return machine

    def close(self) -> None:
        self.machine.close()

    def moves(self) -> None:
        """On the restored way: saved as it is now, ended, and restored in another machine, which goes on."""
        if restored.directory is not None:
            self.machine = restored.moved(self.machine, self._make)
            self.machine.start()

    def until(self, condition: Callable[[], object], what: object = "it") -> None:
        end = time.monotonic() + restored.SECONDS
        while not condition():
            assert time.monotonic() < end, f"{what} did not come about; logged {self.peek()}"
            self.machine.loop.run_once(0.0002)

    # What the guest does -----------------------------------------------------------------------------------------

    def begin(self, code: str | bytes, rdi: int = 0, rsi: int = 0, rdx: int = 0, rcx: int = 0) -> None:
        """Let it call a piece of code, and do not wait."""
        memory = self.machine.memory
        memory.write(SNIPPET, bytes.fromhex(code) if isinstance(code, str) else code)
        memory.write(MAIL + 8, struct.pack("<4Q", rdi & ALL, rsi & ALL, rdx & ALL, rcx & ALL))
        memory.put_u64(MAIL, SNIPPET)

    def end(self) -> int:
        """Wait for the call's end: rax. Raises `Fault`."""
        memory = self.machine.memory
        self.until(lambda: memory.u64(MAIL) == 0, "the end of the call")
        for vector, code, rip, cr2 in self.peek():
            if vector < 32 and vector != 2:
                self.seen = memory.u64(MAIL + 56)
                raise Fault(vector, code, rip, cr2)
        return memory.u64(MAIL + 40)

    def call(self, code: str | bytes, rdi: int = 0, rsi: int = 0, rdx: int = 0, rcx: int = 0) -> int:
        self.begin(code, rdi, rsi, rdx, rcx)
        return self.end()

    def read(self, address: int, size: int = 4) -> int:
        # movzbl, movzwl, mov (%rdi),%eax; mov (%rdi),%rax; ret
        return self.call({1: "0fb607c3", 2: "0fb707c3", 4: "8b07c3", 8: "488b07c3"}[size], address)

    def write(self, address: int, value: int, size: int = 4) -> None:
        # mov %sil, %si, %esi, %rsi to (%rdi); ret
        self.call({1: "408837c3", 2: "668937c3", 4: "8937c3", 8: "488937c3"}[size], address, value)

    def inp(self, port: int, size: int = 1) -> int:
        # xor %eax,%eax; in (%dx),%al or %ax or %eax; ret
        return self.call("31c0" + {1: "ec", 2: "66ed", 4: "ed"}[size] + "c3", rdx=port)

    def outp(self, port: int, value: int, size: int = 1) -> None:
        # mov %edi,%eax; out; ret
        self.call("89f8" + {1: "ee", 2: "66ef", 4: "ef"}[size] + "c3", value, rdx=port)

    def rdmsr(self, index: int) -> int:
        return self.call("0f32 48c1e220 4809d0 c3", rcx=index)  # rdmsr; shl $32,%rdx; or %rdx,%rax; ret

    def wrmsr(self, index: int, value: int) -> None:
        self.call("89f8 0f30 c3", value, rdx=value >> 32, rcx=index)  # mov %edi,%eax; wrmsr; ret

    def halt(self) -> None:
        """Let it wait for an interrupt. None is taken before the hlt: sti holds them back for one instruction."""
        self.mask(True)
        self.begin("fbf4c3")  # sti; hlt; ret
        self.until(self.halted, "the hlt")

    def halted(self) -> bool:
        """Whether it waits for an interrupt."""
        with self.machine.paused():
            return self.machine.vcpus[0].vcpu.mp_state() == MpState.HALTED

    def mask(self, yes: bool) -> None:
        """cli or sti"""
        self.call("fac3" if yes else "fbc3")

    def flags(self, flags: int) -> None:
        self.machine.memory.put_u64(MAIL + 64, flags)

    # What came ---------------------------------------------------------------------------------------------------

    def peek(self) -> list[tuple[int, int, int, int]]:
        """What was logged since `logged`, in order: vector, error code, rip, cr2."""
        memory = self.machine.memory
        return [
            struct.unpack("<4Q", memory.read(LOG + 32 * (number % LENGTH), 32))
            for number in range(self.seen, memory.u64(MAIL + 56))
        ]

    def logged(self) -> list[int]:
        """The vectors that came since the last time."""
        found = [entry[0] for entry in self.peek()]
        self.seen += len(found)
        return found

    def interrupted(self, *vectors: int) -> None:
        """Wait for these, and no others."""
        self.until(lambda: len(self.peek()) >= len(vectors), f"interrupts {vectors}")
        self.call("90c3")  # a turn of the guest's: what is to come has come
        heard = self.logged()
        assert heard == list(vectors), heard

    def quiet(self) -> None:
        """Nothing came, and nothing is on its way: whatever could come is delivered before the guest's next steps."""
        self.call("90c3")
        self.interrupted()
