"""Why a vCPU came back from KVM_RUN, as values (api.rst 5). One class an exit reason; `UnknownExit` for the rest."""

from __future__ import annotations

from kvik.kvm.constants import ExitReason, InternalErrorKind, SystemEvent
from kvik.named import NamedTuple


class IoExit(NamedTuple):
    """Port I/O: `repeat` accesses of `size` bytes each. For `out`, `data` is what was written; for `in`, write the
    answer into it before the next run."""

    out: bool
    port: int
    size: int
    repeat: int
    data: memoryview


class MmioExit(NamedTuple):
    """Access to guest-physical memory that no slot backs. `data` as in `IoExit`, 1 to 8 bytes."""

    write: bool
    address: int
    data: memoryview


class HltExit(NamedTuple):
    """The guest halted and there is no in-kernel interrupt controller to wait in."""


class ShutdownExit(NamedTuple):
    """Triple fault, usually."""


class InterruptedExit(NamedTuple):
    """A signal, or `immediate_exit` was set; nothing is wrong. Also KVM_RUN's EINTR and EAGAIN."""


class IrqWindowExit(NamedTuple):
    """The guest can take an interrupt now (asked for with `request_interrupt_window`)."""


class NmiExit(NamedTuple):
    """A host's non-maskable interrupt that KVM hands on."""


class DebugExit(NamedTuple):
    """A single step, breakpoint or watchpoint that `Vcpu.set_guest_debug` asked for. `pc` is linear (CS base added);
    `dr6` has bit 14 set after a step, bits 0 to 3 for the hardware breakpoints."""

    exception: int
    pc: int
    dr6: int
    dr7: int


class ExceptionExit(NamedTuple):
    """An exception that KVM hands on (older kernels)."""

    exception: int
    error_code: int


class HypercallExit(NamedTuple):
    """A hypercall that user space asked to handle (KVM_CAP_EXIT_HYPERCALL): answer with
    `Vcpu.set_hypercall_result`."""

    number: int
    arguments: tuple[int, ...]
    long_mode: bool


class FailEntryExit(NamedTuple):
    """The CPU refused the guest's state."""

    hardware_reason: int
    cpu: int


class InternalErrorExit(NamedTuple):
    """KVM gave up, most often on an instruction that it had to emulate and could not: then `instruction` has the bytes
    from the guest's RIP on, if KVM tells them."""

    kind: int  # `InternalErrorKind`
    data: tuple[int, ...]
    flags: int = 0  # of an emulation failure: bit 0, the instruction's bytes are valid
    instruction: bytes = b""

    def __str__(self) -> str:
        what = f"KVM_INTERNAL_ERROR_{InternalErrorKind.name_of(self.kind)}"
        if self.instruction:
            return f"{what}: instruction {self.instruction.hex(' ')}"
        return what + (": " + " ".join(f"{value:#x}" for value in self.data) if self.data else "")


class SystemEventExit(NamedTuple):
    """Shutdown, reset or crash asked for through a paravirtual interface."""

    type: int  # `SystemEvent`
    data: tuple[int, ...]

    def __str__(self) -> str:
        return f"KVM_SYSTEM_EVENT_{SystemEvent.name_of(self.type)}"


class MsrExit(NamedTuple):
    """Access to a model-specific register that user space asked to handle (KVM_CAP_X86_USER_SPACE_MSR, or a filter).
    Answer with `Vcpu.set_msr_result`; `why` is MSR_EXIT_REASON_*."""

    write: bool
    msr: int
    data: int
    why: int


class IoapicEoiExit(NamedTuple):
    """With the split irqchip: the guest ended the level interrupt `vector`."""

    vector: int


class TprAccessExit(NamedTuple):
    """Access to the task priority register that user space asked to see (KVM_TPR_ACCESS_REPORTING)."""

    rip: int
    write: bool


class SetTprExit(NamedTuple):
    """The guest lowered CR8 and the irqchip is in user space."""


class DirtyRingFullExit(NamedTuple):
    """Take the entries of `Vcpu.dirty_ring`, `Vm.reset_dirty_rings`, run again."""


class BusLockExit(NamedTuple):
    """The guest locked the bus (KVM_CAP_X86_BUS_LOCK_EXIT, api.rst 7.22)."""


class NotifyExit(NamedTuple):
    """The guest let no event window open for too long (KVM_CAP_X86_NOTIFY_VMEXIT)."""

    context_invalid: bool


class MemoryFaultExit(NamedTuple):
    """Guest memory that cannot be had (KVM_CAP_MEMORY_FAULT_INFO); KVM_RUN failed with EFAULT."""

    flags: int
    address: int
    size: int


class ApResetHoldExit(NamedTuple):
    """An application processor of an SEV-ES guest waits for its start."""


class UnknownExit(NamedTuple):
    """Any other reason; `reason` is the kernel's number, `hardware_reason` the first word of its data."""

    reason: int
    hardware_reason: int

    def __str__(self) -> str:
        return f"exit KVM_EXIT_{ExitReason.name_of(self.reason)}, hardware reason {self.hardware_reason:#x}"


Exit = (
    IoExit
    | MmioExit
    | HltExit
    | ShutdownExit
    | InterruptedExit
    | IrqWindowExit
    | NmiExit
    | DebugExit
    | ExceptionExit
    | HypercallExit
    | FailEntryExit
    | InternalErrorExit
    | SystemEventExit
    | MsrExit
    | IoapicEoiExit
    | TprAccessExit
    | SetTprExit
    | DirtyRingFullExit
    | BusLockExit
    | NotifyExit
    | MemoryFaultExit
    | ApResetHoldExit
    | UnknownExit
)
