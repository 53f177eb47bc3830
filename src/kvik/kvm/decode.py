"""From the shared kvm_run page to a typed exit (api.rst 5). One small function a reason, in a table."""

from __future__ import annotations

from kvik.kvm.constants import ExitReason, InternalErrorKind
from kvik.kvm.exits import (
    ApResetHoldExit,
    BusLockExit,
    DebugExit,
    DirtyRingFullExit,
    ExceptionExit,
    Exit,
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
    NmiExit,
    NotifyExit,
    SetTprExit,
    ShutdownExit,
    SystemEventExit,
    TprAccessExit,
    UnknownExit,
)
from kvik.kvm.structs import Run

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_MMIO_DATA = Run.u.offset + 8
_INSTRUCTION_BYTES = 1  # KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES


def _io(run: Run, view: memoryview) -> Exit:
    io = run.u.io
    size, count, start = io.size, io.count, io.data_offset
    return IoExit(io.direction == 1, io.port, size, count, view[start : start + size * count])


def _mmio(run: Run, view: memoryview) -> Exit:
    mmio = run.u.mmio
    return MmioExit(bool(mmio.is_write), mmio.phys_addr, view[_MMIO_DATA : _MMIO_DATA + min(mmio.len, 8)])


def _debug(run: Run, view: memoryview) -> Exit:
    debug = run.u.debug
    return DebugExit(debug.exception, debug.pc, debug.dr6, debug.dr7)


def _exception(run: Run, view: memoryview) -> Exit:
    return ExceptionExit(run.u.ex.exception, run.u.ex.error_code)


def _hypercall(run: Run, view: memoryview) -> Exit:
    call = run.u.hypercall
    return HypercallExit(call.nr, tuple(call.args), bool(call.longmode))


def _fail_entry(run: Run, view: memoryview) -> Exit:
    return FailEntryExit(run.u.fail_entry.hardware_entry_failure_reason, run.u.fail_entry.cpu)


def _internal_error(run: Run, view: memoryview) -> Exit:
    internal = run.u.internal
    data = tuple(internal.data[: min(internal.ndata, 16)])
    if internal.suberror != InternalErrorKind.EMULATION or not data:
        return InternalErrorExit(internal.suberror, data)
    flags = data[0]
    instruction = b""
    if flags & _INSTRUCTION_BYTES and len(data) >= 3:
        size, *code = data[1].to_bytes(8, "little") + data[2].to_bytes(8, "little")
        instruction = bytes(code[: min(size, 15)])
    return InternalErrorExit(internal.suberror, data, flags, instruction)


def _system_event(run: Run, view: memoryview) -> Exit:
    event = run.u.system_event
    return SystemEventExit(event.type, tuple(event.data[: min(event.ndata, 16)]))


def _msr(run: Run, view: memoryview) -> Exit:
    msr = run.u.msr
    return MsrExit(run.exit_reason == ExitReason.X86_WRMSR, msr.index, msr.data, msr.reason)


def _tpr_access(run: Run, view: memoryview) -> Exit:
    return TprAccessExit(run.u.tpr_access.rip, bool(run.u.tpr_access.is_write))


def _memory_fault(run: Run, view: memoryview) -> Exit:
    fault = run.u.memory_fault
    return MemoryFaultExit(fault.flags, fault.gpa, fault.size)


_DECODERS: dict[int, Callable[[Run, memoryview], Exit]] = {
    ExitReason.IO: _io,
    ExitReason.MMIO: _mmio,
    ExitReason.DEBUG: _debug,
    ExitReason.EXCEPTION: _exception,
    ExitReason.HYPERCALL: _hypercall,
    ExitReason.FAIL_ENTRY: _fail_entry,
    ExitReason.INTERNAL_ERROR: _internal_error,
    ExitReason.SYSTEM_EVENT: _system_event,
    ExitReason.X86_RDMSR: _msr,
    ExitReason.X86_WRMSR: _msr,
    ExitReason.TPR_ACCESS: _tpr_access,
    ExitReason.MEMORY_FAULT: _memory_fault,
    ExitReason.IOAPIC_EOI: lambda run, view: IoapicEoiExit(run.u.eoi_vector),
    ExitReason.NOTIFY: lambda run, view: NotifyExit(bool(run.u.notify_flags & 1)),
    ExitReason.HLT: lambda run, view: HltExit(),
    ExitReason.INTR: lambda run, view: InterruptedExit(),
    ExitReason.SHUTDOWN: lambda run, view: ShutdownExit(),
    ExitReason.IRQ_WINDOW_OPEN: lambda run, view: IrqWindowExit(),
    ExitReason.NMI: lambda run, view: NmiExit(),
    ExitReason.SET_TPR: lambda run, view: SetTprExit(),
    ExitReason.DIRTY_RING_FULL: lambda run, view: DirtyRingFullExit(),
    ExitReason.X86_BUS_LOCK: lambda run, view: BusLockExit(),
    ExitReason.AP_RESET_HOLD: lambda run, view: ApResetHoldExit(),
}


def decode(run: Run, view: memoryview) -> Exit:
    """The exit that `run` tells of; `view` is its whole mapping."""
    decoder = _DECODERS.get(run.exit_reason)
    return decoder(run, view) if decoder else UnknownExit(run.exit_reason, run.u.hardware_exit_reason)
