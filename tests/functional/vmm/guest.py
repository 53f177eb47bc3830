"""A guest of a few instructions in 64-bit mode, on the host's own /dev/kvm."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import restored

from kvik.errors import HostError
from kvik.vmm.config import MachineConfig
from kvik.vmm.machine import Machine

CODE, DATA, PML4 = 0x10_0000, 0x20_0000, 0x9000
STACK = 0x8000
# counting: inc rax; mov [rbx], rax; jmp counting
COUNTING = bytes.fromhex("48ffc0 488903 ebf8".replace(" ", ""))


def long_mode(machine: Machine, program: bytes, vcpus: int = 1) -> None:
    """Flat 64-bit mode, the first GiB mapped one to one, every vCPU at the program's start with rbx = DATA."""
    memory = machine.memory
    memory.put_u64(PML4, PML4 + 0x1000 | 3)
    memory.put_u64(PML4 + 0x1000, PML4 + 0x2000 | 3)
    for page in range(512):
        memory.put_u64(PML4 + 0x2000 + 8 * page, page << 21 | 0x83)
    memory.write(CODE, program)
    for index in range(vcpus):
        vcpu = machine.add_vcpu(index).vcpu
        vcpu.set_cpuid(machine.system.supported_cpuid())
        s = vcpu.sregs()
        s.cr3, s.cr4, s.cr0, s.efer = PML4, 1 << 5, 0x8000_0011, 1 << 8 | 1 << 10
        for name in ("cs", "ds", "es", "fs", "gs", "ss"):
            segment = getattr(s, name)
            segment.base, segment.limit, segment.selector = 0, 0xFFFF_FFFF, 8 if name == "cs" else 16
            segment.type, segment.present, segment.s, segment.g = 11 if name == "cs" else 3, 1, 1, 1
            segment.l, segment.db = (1, 0) if name == "cs" else (0, 1)
        vcpu.set_sregs(s)
        r = vcpu.regs()
        r.rip, r.rsp, r.rflags, r.rax, r.rbx = CODE, STACK, 2, 0, DATA + 0x1000 * index
        vcpu.set_regs(r)
        vcpu.set_mp_state(0)  # an application processor would wait for its SIPI


def machine(program: bytes = COUNTING, vcpus: int = 1, **settings: object) -> Machine:
    """Skips the test where there is no KVM. Saved and restored on the way (`restored`) once all vCPUs have counted."""

    def make() -> Machine:
        config = MachineConfig(name="tiny", **settings)
        config.memory.size = 16 << 20
        made = Machine(config)
        try:
            long_mode(made, program, vcpus)
        except BaseException:
            made.close()
            raise
        return made

    try:
        made = make()
    except HostError as error:
        pytest.skip(str(error))
    if restored.directory is None:
        return made
    return restored.again(made, make, lambda: all(made.memory.u64(DATA + 0x1000 * index) for index in range(vcpus)))


def run_until(made: Machine, condition: Callable[[], object], seconds: float = 60.0) -> None:
    """Let the loop run until something is so."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        made.loop.run_once(0.02)
