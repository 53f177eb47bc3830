"""The state of vCPUs, out and in again, with a guest of a few bytes on this host's KVM."""

from __future__ import annotations

import ctypes
import errno
import mmap
import time
from collections.abc import Iterator
from typing import Any

import pytest

from kvik.errors import OperationFailed
from kvik.kvm.constants import ExitReason, MpState
from kvik.kvm.system import System
from kvik.vmm.config import CpuConfig
from kvik.vmm.cpu.cpuid import cpuid_for
from kvik.vmm.cpu.state import (
    IA32_TSC,
    IA32_TSC_DEADLINE,
    msr_indices,
    restore_machine,
    save_machine,
)

pytestmark = pytest.mark.functional
HYPERV_TIMES = (0x40000010, 0x40000020)  # of the virtual processor, of the machine (TLFS, 12.4)
CODE = bytes.fromhex("40 e6e9 ebfb")  # 16-bit: inc %ax; out %al,$0xe9; jmp back


class Thread:
    def __init__(self, vcpu: Any) -> None:
        self.vcpu = vcpu


class Machine:
    """A vCPU that counts, and one that waits to be started."""

    def __init__(self) -> None:
        self.system = System()
        self.vm = self.system.create_vm()
        self.vm.set_identity_map_addr(0xFFFBC000)
        self.vm.set_tss_addr(0xFFFBD000)
        self.vm.create_irqchip()
        self.memory = mmap.mmap(-1, 0x10000)
        self.memory[0x1000 : 0x1000 + len(CODE)] = CODE
        address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.vm.set_user_memory_region(0, 0, 0x10000, address)
        self.vcpus = [Thread(self.vm.create_vcpu(index)) for index in range(2)]
        supported = self.system.supported_cpuid()
        for index, thread in enumerate(self.vcpus):
            thread.vcpu.set_cpuid(cpuid_for(supported, CpuConfig(count=2), index))
        first = self.vcpus[0].vcpu
        sregs = first.sregs()
        sregs.cs.base = sregs.cs.selector = 0
        first.set_sregs(sregs)
        regs = first.regs()
        regs.rip, regs.rax, regs.rflags = 0x1000, 0, 2
        first.set_regs(regs)

    def count(self, times: int) -> list[int]:
        """What the guest writes next."""
        vcpu, seen = self.vcpus[0].vcpu, []
        while len(seen) < times:
            reason = vcpu.enter()
            if reason == ExitReason.INTR:
                continue
            assert reason == ExitReason.IO, vcpu.exit()
            _, _, port, _, offset = vcpu.io()
            assert port == 0xE9
            seen.append(vcpu.page[offset])
        self.settle()
        return seen

    def settle(self) -> None:
        """Let KVM finish the last access (api.rst 5), without a step further."""
        vcpu = self.vcpus[0].vcpu
        vcpu.immediate_exit = True
        assert vcpu.enter() == ExitReason.INTR
        vcpu.immediate_exit = False

    def close(self) -> None:
        for thread in self.vcpus:
            thread.vcpu.close()
        self.vm.close()
        self.system.close()


@pytest.fixture
def machine() -> Iterator[Machine]:
    try:
        made = Machine()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EACCES, errno.ENODEV):
            pytest.skip(f"no /dev/kvm: {error}")
        raise
    yield made
    made.close()


def test_a_guest_goes_on_from_where_it_was_saved(machine: Machine) -> None:
    assert machine.count(3) == [1, 2, 3]
    saved = save_machine(machine)
    assert machine.count(4) == [4, 5, 6, 7]
    for _ in range(3):
        restore_machine(machine, saved)
        assert machine.count(2) == [4, 5]


def test_another_machine_goes_on_with_it(machine: Machine) -> None:
    assert machine.count(3) == [1, 2, 3]
    saved = save_machine(machine)
    other = Machine()
    try:
        restore_machine(other, saved, identity=True)
        assert other.count(2) == [4, 5]
    finally:
        other.close()


def test_the_second_processor_still_waits(machine: Machine) -> None:
    saved = save_machine(machine)
    assert [vcpu["mp_state"] for vcpu in saved["vcpus"]] == [MpState.RUNNABLE, MpState.UNINITIALIZED]
    machine.count(1)
    restore_machine(machine, saved)
    assert machine.vcpus[1].vcpu.mp_state() == MpState.UNINITIALIZED
    assert machine.count(2) == [1, 2]


def test_the_state_is_whole_and_comes_back_the_same(machine: Machine) -> None:
    machine.count(2)
    saved = save_machine(machine)
    restore_machine(machine, saved)
    again = save_machine(machine)
    moving = {IA32_TSC, *HYPERV_TIMES}  # time goes on
    for before, after in zip(saved["vcpus"], again["vcpus"], strict=True):
        for key in ("regs", "sregs", "xcrs", "debugregs", "events", "mp_state", "xsave"):
            assert before[key] == after[key], key
        registers = [
            {index: value for index, value in state["msrs"] if index not in moving} for state in (before, after)
        ]
        assert {index for index in registers[0] if registers[0][index] != registers[1].get(index)} == set()
    assert again["vm"]["irqchips"] == saved["vm"]["irqchips"] and again["vm"]["clock"] >= saved["vm"]["clock"]


def test_the_deadline_is_restored_last_and_the_tsc_first(machine: Machine) -> None:
    indices = msr_indices(machine.system)
    assert IA32_TSC in indices and indices[0] == IA32_TSC
    assert IA32_TSC_DEADLINE not in indices or indices[-1] == IA32_TSC_DEADLINE
    assert not any(0x800 <= index < 0x900 for index in indices)


@pytest.mark.parametrize("age", [0.0, 0.3])
def test_the_tsc_goes_on_where_it_was_however_old_the_other_machine_is(machine: Machine, age: float) -> None:
    """Also where both are about as old, which KVM takes for an attempt to make TSCs equal."""
    other = Machine()  # a moment younger
    try:
        time.sleep(age)
        saved = save_machine(machine)
        restore_machine(other, saved, identity=True)
        after = save_machine(other)
    finally:
        other.close()
    before = [dict(vcpu["msrs"])[IA32_TSC] for vcpu in saved["vcpus"]]
    here = [dict(vcpu["msrs"])[IA32_TSC] for vcpu in after["vcpus"]]
    assert all(new >= old for new, old in zip(here, before, strict=True)), (before, here)
    assert here[1] >= here[0]  # read in this order: the second follows the first


def test_a_state_of_more_processors_is_refused(machine: Machine) -> None:
    saved = save_machine(machine)
    saved["vcpus"].append(saved["vcpus"][0])
    with pytest.raises(OperationFailed, match="3 vCPUs, this one 2"):
        restore_machine(machine, saved)


@pytest.mark.parametrize("key", ["regs", "sregs", "lapic", "xsave", "events"])
def test_a_malformed_state_is_an_error_of_the_promised_kind(machine: Machine, key: str) -> None:
    saved = save_machine(machine)
    saved["vcpus"][0][key] = b"short"
    with pytest.raises(ValueError):
        restore_machine(machine, saved)
    del saved["vcpus"][0][key]
    with pytest.raises(KeyError):
        restore_machine(machine, saved)
