"""A few instructions in place of a kernel: for teaching, for tests of devices, for fuzzing.

    machine = bare_machine(Program(bytes.fromhex("b0 07 e6 10 f4")))   # mov $7,%al; out %al,$0x10; hlt
    machine.add(MyDevice("mine"))
    machine.run()

The program is put into memory at power-on and after each reset, and the first vCPU starts at its first byte.
"""

from __future__ import annotations

from kvik.errors import InvalidArgument
from kvik.vmm.boot.entry import Entry
from kvik.vmm.build import add_vcpus
from kvik.vmm.config import MachineConfig, MemoryConfig
from kvik.vmm.layout import BOOT_STACK, MIB
from kvik.vmm.machine import Machine

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.kvm.vcpu import Vcpu

__all__ = ["MODES", "Program", "bare_machine"]

MODES = ("real", "protected", "long")
STACK = 0xF000  # grows down from here
_REAL_LIMIT = 0x10000


class Program:
    """`code` at guest-physical `address`. `mode` is how the first vCPU starts there:

    real        16 bits, all segments at 0: it reaches the first 64 KiB; interrupt table at 0
    protected   32 bits, flat; an empty interrupt table, so that every exception is a triple fault
    long        64 bits, the first 4 GiB identity mapped; likewise
    """

    __slots__ = ("address", "code", "mode")

    def __init__(self, code: bytes, address: int = 0x1000, mode: str = "real") -> None:
        if mode not in MODES:
            raise InvalidArgument(f"a program cannot start in mode {mode!r}", remedy=f"one of {', '.join(MODES)}")
        if mode == "real" and address + len(code) > _REAL_LIMIT:
            raise InvalidArgument(f"a real-mode program ends below {_REAL_LIMIT:#x}, not at {address + len(code):#x}")
        if mode == "long" and 0x9000 <= address < 0xF000:
            raise InvalidArgument("page tables lie from 0x9000 to 0xEFFF", remedy="put the program elsewhere")
        self.code, self.address, self.mode = code, address, mode

    def load(self, machine: Machine) -> None:
        """Into memory, and the first vCPU to its start."""
        vcpu = machine.vcpus[0].vcpu
        if self.mode == "real":
            self._real(vcpu)
        else:
            entry = Entry("long64" if self.mode == "long" else "pvh32", self.address, 0)
            entry.prepare(machine.memory)
            entry.apply(vcpu)
            registers = vcpu.regs()
            registers.rsp = BOOT_STACK if self.mode == "long" else STACK  # below the page tables, which end at 0xF000
            vcpu.set_regs(registers)
        machine.memory.write(self.address, self.code)

    def _real(self, vcpu: Vcpu) -> None:
        special = vcpu.sregs()
        special.cs.base = special.cs.selector = 0
        vcpu.set_sregs(special)
        registers = vcpu.regs()
        registers.rip, registers.rflags, registers.rsp = self.address, 2, STACK
        vcpu.set_regs(registers)


def bare_machine(program: Program, config: MachineConfig | None = None) -> Machine:
    """A machine of `config` (2 MiB and one vCPU unless it says otherwise) with RAM, vCPUs, buses and interrupt
    controllers, but no device and no tables: what is needed is added by the caller."""
    machine = Machine(config or MachineConfig(memory=MemoryConfig(size=2 * MIB)))
    try:
        add_vcpus(machine)
        machine.remember_power_on()
        machine.loader = lambda: program.load(machine)
        machine.boot()
    except BaseException:
        machine.close()
        raise
    return machine
