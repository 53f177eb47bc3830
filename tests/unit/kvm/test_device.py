"""The KVM binding: layouts against the kernel's ABI, exits as typed values, real calls where /dev/kvm is."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

import pytest

from kvik.kvm import KvmError, System, Vcpu, constants, structs
from kvik.kvm.constants import Capability, ExitReason
from kvik.kvm.exits import (
    BusLockExit,
    DebugExit,
    DirtyRingFullExit,
    FailEntryExit,
    HltExit,
    HypercallExit,
    InternalErrorExit,
    InterruptedExit,
    IoapicEoiExit,
    IoExit,
    IrqWindowExit,
    MemoryFaultExit,
    MmioExit,
    MsrExit,
    NotifyExit,
    ShutdownExit,
    SystemEventExit,
    TprAccessExit,
    UnknownExit,
)

needs_kvm = pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="/dev/kvm may not be opened here")


def test_structures_have_the_kernels_sizes() -> None:
    sizes = {
        structs.Regs: 0x90,
        structs.Segment: 24,
        structs.DescriptorTable: 16,
        structs.Sregs: 0x138,
        structs.UserspaceMemoryRegion: 32,
        structs.CpuidEntry: 0x28,
    }
    for structure, size in sizes.items():
        assert ctypes.sizeof(structure) == size, structure
    assert structs.Run.u.offset == 0x20
    assert structs.Run.exit_reason.offset == 8


def test_ioctl_numbers_are_the_kernels() -> None:
    assert constants.GET_API_VERSION == 0xAE00
    assert constants.SET_USER_MEMORY_REGION == 0x4020AE46
    assert constants.SET_IDENTITY_MAP_ADDR == 0x4008AE48
    assert constants.GET_SUPPORTED_CPUID == 0xC008AE05
    assert constants.GET_SREGS == 0x8138AE83
    assert constants.SET_SREGS == 0x4138AE84
    assert constants.SET_CPUID2 == 0x4008AE90


@pytest.fixture
def vcpu(tmp_path: Path) -> Vcpu:
    """A vCPU over a plain file: what it would decode from a shared kvm_run can be written by hand."""
    file = tmp_path / "run"
    file.write_bytes(bytes(8192))
    return Vcpu(os.open(file, os.O_RDWR), 8192)


def test_exits_are_typed(vcpu: Vcpu) -> None:
    run = vcpu._run
    run.exit_reason = ExitReason.IO
    run.u.io.direction, run.u.io.size, run.u.io.port, run.u.io.count, run.u.io.data_offset = 1, 2, 0x3F8, 2, 4096
    vcpu._view[4096:4100] = b"abcd"
    reason = vcpu.exit()
    assert isinstance(reason, IoExit)
    assert (reason.out, reason.port, reason.size, reason.repeat, bytes(reason.data)) == (True, 0x3F8, 2, 2, b"abcd")
    run.exit_reason = ExitReason.MMIO
    run.u.mmio.phys_addr, run.u.mmio.len, run.u.mmio.is_write = 0xFEE00000, 4, 0
    reason = vcpu.exit()
    assert isinstance(reason, MmioExit) and not reason.write and reason.address == 0xFEE00000
    reason.data[:] = b"\x01\x02\x03\x04"  # the answer to a read goes into the shared page
    assert bytes(run.u.mmio.data) == b"\x01\x02\x03\x04\0\0\0\0"
    run.u.internal.suberror, run.u.internal.ndata = 1, 99  # more than there is room for
    for number, kind in (
        (ExitReason.HLT, HltExit),
        (ExitReason.SHUTDOWN, ShutdownExit),
        (ExitReason.INTR, InterruptedExit),
        (ExitReason.FAIL_ENTRY, FailEntryExit),
        (ExitReason.INTERNAL_ERROR, InternalErrorExit),
        (ExitReason.SYSTEM_EVENT, SystemEventExit),
        (ExitReason.X86_RDMSR, MsrExit),
    ):
        run.exit_reason = number
        assert isinstance(vcpu.exit(), kind)
    run.exit_reason = 4242
    found = vcpu.exit()
    assert isinstance(found, UnknownExit) and found.reason == 4242


def test_an_emulation_failure_tells_the_instruction(vcpu: Vcpu) -> None:
    run = vcpu._run
    run.exit_reason = ExitReason.INTERNAL_ERROR
    run.u.internal.suberror, run.u.internal.ndata = 1, 4
    code = bytes.fromhex("0f0b90")
    run.u.internal.data[0] = 1  # the bytes are valid
    packed = bytes([len(code)]) + code.ljust(15, b"\0")
    run.u.internal.data[1], run.u.internal.data[2] = (int.from_bytes(packed[at : at + 8], "little") for at in (0, 8))
    found = vcpu.exit()
    assert isinstance(found, InternalErrorExit)
    assert (found.kind, found.flags, found.instruction) == (1, 1, code)
    assert str(found) == "KVM_INTERNAL_ERROR_EMULATION: instruction 0f 0b 90"
    run.u.internal.data[0] = 0
    found = vcpu.exit()
    assert isinstance(found, InternalErrorExit) and found.instruction == b""
    run.u.internal.ndata = 0
    assert str(vcpu.exit()) == "KVM_INTERNAL_ERROR_EMULATION"


def test_the_rarer_exits_carry_what_the_kernel_says(vcpu: Vcpu) -> None:
    run, u = vcpu._run, vcpu._run.u

    def exit_of(reason: int) -> object:
        run.exit_reason = reason
        return vcpu.exit()

    u.debug.exception, u.debug.pc, u.debug.dr6, u.debug.dr7 = 1, 0x1000, 0x4000, 0x400
    assert exit_of(ExitReason.DEBUG) == DebugExit(1, 0x1000, 0x4000, 0x400)
    u.hypercall.nr, u.hypercall.args[0], u.hypercall.args[5], u.hypercall.longmode = 12, 7, 9, 1
    assert exit_of(ExitReason.HYPERCALL) == HypercallExit(12, (7, 0x4000, 0x400, 0, 0, 9), True)
    vcpu.set_hypercall_result(5)
    assert u.hypercall.ret == 5
    u.memory_fault.flags, u.memory_fault.gpa, u.memory_fault.size = 8, 0xC000, 4096
    assert exit_of(ExitReason.MEMORY_FAULT) == MemoryFaultExit(8, 0xC000, 4096)
    u.tpr_access.rip, u.tpr_access.is_write = 0x1234, 1
    assert exit_of(ExitReason.TPR_ACCESS) == TprAccessExit(0x1234, True)
    u.eoi_vector = 0x55
    assert exit_of(ExitReason.IOAPIC_EOI) == IoapicEoiExit(0x55)
    u.notify_flags = 1
    assert exit_of(ExitReason.NOTIFY) == NotifyExit(True)
    u.system_event.type, u.system_event.ndata = 2, 0
    assert str(exit_of(ExitReason.SYSTEM_EVENT)) == "KVM_SYSTEM_EVENT_RESET"
    for reason, kind in (
        (ExitReason.X86_BUS_LOCK, BusLockExit),
        (ExitReason.DIRTY_RING_FULL, DirtyRingFullExit),
        (ExitReason.IRQ_WINDOW_OPEN, IrqWindowExit),
    ):
        assert isinstance(exit_of(reason), kind)
    assert "KVM_EXIT_HYPERV" in str(exit_of(ExitReason.HYPERV))


def test_closing_is_idempotent_and_survives_held_data(vcpu: Vcpu) -> None:
    vcpu._run.exit_reason = ExitReason.MMIO
    vcpu._run.u.mmio.len = 4
    held = vcpu.exit()
    vcpu.close()
    vcpu.close()
    assert vcpu.fd == -1
    assert isinstance(held, MmioExit) and len(held.data) == 4


def test_an_ioctl_on_something_else_names_itself(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.touch()
    with System(str(plain)) as system, pytest.raises(KvmError, match="KVM_GET_API_VERSION") as raised:
        system.api_version()
    assert raised.value.errno and raised.value.ioctl == "GET_API_VERSION"


@needs_kvm
def test_a_16_bit_guest_runs_and_its_output_is_seen() -> None:
    """hlt after `mov $0x42,%al; out %al,$0x10`; 16-bit code runs even where 64-bit kernels do not."""
    memory = mmap.mmap(-1, 0x1000, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory[:5] = bytes.fromhex("b042 e610 f4")
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    with System() as system:
        assert system.api_version() == constants.API_VERSION
        assert system.check_extension(Capability.USER_MEMORY)
        with system.create_vm() as vm:
            vm.set_identity_map_addr(0xFFFBC000)
            vm.set_tss_addr(0xFFFBD000)
            vm.set_user_memory_region(0, 0x1000, 0x1000, address)
            with vm.create_vcpu(0) as vcpu:
                sregs = vcpu.sregs()
                sregs.cs.base = sregs.cs.selector = 0
                vcpu.set_sregs(sregs)
                vcpu.set_regs(structs.Regs(rip=0x1000, rflags=2))
                out = vcpu.run()
                assert isinstance(out, IoExit)
                assert (out.out, out.port, bytes(out.data)) == (True, 0x10, b"\x42")
                del out
                assert isinstance(vcpu.run(), HltExit)
                assert vcpu.regs().rax & 0xFF == 0x42
                vcpu.immediate_exit = True
                assert vcpu.immediate_exit and isinstance(vcpu.run(), InterruptedExit)
            with pytest.raises(KvmError, match="KVM_SET_USER_MEMORY_REGION"):
                vm.set_user_memory_region(1, 0x10000, 123, address)
