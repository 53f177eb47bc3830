"""Why a vCPU came back from KVM_RUN, as values (api.rst 5). One class an exit reason; `UnknownExit` for the rest."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class IoExit:
    """Port I/O: `count` accesses of `size` bytes. For `out`, `data` is what was written; for `in`, write the answer
    into it before the next run."""

    out: bool
    port: int
    size: int
    count: int
    data: memoryview


@dataclass(frozen=True, slots=True)
class MmioExit:
    """Access to guest-physical memory that no slot backs. `data` as in `IoExit`, 1 to 8 bytes."""

    write: bool
    address: int
    data: memoryview


@dataclass(frozen=True, slots=True)
class HltExit:
    """The guest halted and there is no in-kernel interrupt controller to wait in."""


@dataclass(frozen=True, slots=True)
class ShutdownExit:
    """Triple fault, usually."""


@dataclass(frozen=True, slots=True)
class InterruptedExit:
    """A signal, or `immediate_exit` was set; nothing is wrong. Also KVM_RUN's EINTR and EAGAIN."""


@dataclass(frozen=True, slots=True)
class FailEntryExit:
    """The CPU refused the guest's state."""

    hardware_reason: int
    cpu: int


@dataclass(frozen=True, slots=True)
class InternalErrorExit:
    """KVM gave up, most often on an instruction that it had to emulate and could not."""

    kind: int  # `InternalErrorKind`
    data: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SystemEventExit:
    """Shutdown, reset or crash asked for through a paravirtual interface."""

    type: int
    data: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class MsrExit:
    """Access to a model-specific register that user space asked to handle (KVM_CAP_X86_USER_SPACE_MSR)."""

    write: bool
    index: int
    data: int


@dataclass(frozen=True, slots=True)
class UnknownExit:
    """Any other reason; `reason` is the kernel's number, `hardware_reason` the first word of its data."""

    reason: int
    hardware_reason: int


Exit = (
    IoExit
    | MmioExit
    | HltExit
    | ShutdownExit
    | InterruptedExit
    | FailEntryExit
    | InternalErrorExit
    | SystemEventExit
    | MsrExit
    | UnknownExit
)
