"""Tiny guests for this host's KVM: a few instructions at a known address, in 16-bit or 64-bit mode.

Tests put them into a `Machine` that has no kernel. Where KVM emulates every instruction (nested, KVM-PVM) they still
take only milliseconds.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from kvik.kvm import Vcpu
from kvik.kvm.structs import Regs, Segment
from kvik.vmm.build import add_vcpus
from kvik.vmm.config import CpuConfig, MachineConfig, MemoryConfig
from kvik.vmm.layout import MIB
from kvik.vmm.machine import Machine

CODE = 0x1000

needs_kvm = pytest.mark.skipif(
    not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="/dev/kvm is not there, or may not be opened"
)


def real_mode(vcpu: Vcpu, address: int = CODE) -> None:
    """Start in 16-bit real mode at a physical address below 64 KiB."""
    sregs = vcpu.sregs()
    sregs.cs.base = sregs.cs.selector = 0
    vcpu.set_sregs(sregs)
    vcpu.set_regs(Regs(rip=address, rflags=2, rsp=0xF000))


def protected_mode(vcpu: Vcpu, address: int = CODE) -> None:
    """Start in flat 32-bit protected mode, with an interrupt table that is empty: every exception is a triple fault."""
    sregs = vcpu.sregs()
    sregs.cs = Segment(0, 0xFFFFFFFF, 8, type=11, present=1, s=1, db=1, g=1)
    data = Segment(0, 0xFFFFFFFF, 16, type=3, present=1, s=1, db=1, g=1)
    sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = data
    sregs.idt.limit = 0
    sregs.cr0 = 0x11  # ET PE
    vcpu.set_sregs(sregs)
    vcpu.set_regs(Regs(rip=address, rflags=2, rsp=0xF000))


def machine_with(
    code: bytes,
    *,
    cpus: int = 1,
    memory: int = 2 * MIB,
    mode: Callable[[Vcpu], None] = real_mode,
    change: Callable[[MachineConfig], None] | None = None,
) -> Machine:
    """A machine whose first vCPU runs `code`, 16-bit if `mode` is not another, at power-on and after each reset."""
    config = MachineConfig(memory=MemoryConfig(size=memory), cpus=CpuConfig(count=cpus), pvpanic=False, vmgenid=False)
    if change is not None:
        change(config)
    machine = Machine(config)

    def load() -> None:
        machine.memory.write(CODE, code)
        mode(machine.vcpus[0].vcpu)

    try:
        add_vcpus(machine)
        machine.remember_power_on()
        machine.loader = load
        machine.boot()
    except BaseException:
        machine.close()
        raise
    return machine
