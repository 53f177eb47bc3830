"""The state of vCPUs and of what KVM keeps beside them, out and in again: for reset, snapshots and migration.

Values are bytes in the kernel's layouts, ints, lists and dicts. The order of restoring is not free:

    the machine   interrupt chips, clock
    each vCPU     CPUID, TSC frequency; special registers (they hold the APIC's mode, which its registers depend on),
                  XSAVE area, XCRs, debug registers, local APIC, MSRs, events, run state, general registers
    MSRs          the TSC first; IA32_TSC_DEADLINE last, because writing it arms the timer, which reads TSC and APIC

Sources: api.rst 4.18 to 4.58; arch/x86/kvm/lapic.c, kvm_set_lapic_tscdeadline_msr.
"""

from __future__ import annotations

from kvik.errors import OperationFailed
from kvik.kvm.constants import Irqchip, MpState
from kvik.kvm.descriptor import KvmError
from kvik.kvm.structs import CpuidTable, Debugregs, Regs, Sregs, VcpuEvents, Xcrs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Protocol

    from kvik.kvm.system import System
    from kvik.kvm.vcpu import Vcpu
    from kvik.kvm.vm import Vm

    State = dict[str, Any]

    class _Machine(Protocol):
        """What is needed of a `Machine`; its vCPUs stand still."""

        system: System
        vm: Vm

        @property
        def vcpus(self) -> list[Any]: ...


__all__ = [
    "application_processor",
    "restore_machine",
    "restore_vcpu",
    "restore_vm",
    "save_machine",
    "save_vcpu",
    "save_vm",
]

IA32_TSC, IA32_TSC_DEADLINE = 0x10, 0x6E0
APIC_BASE_BSP = 1 << 8  # in IA32_APIC_BASE (Intel SDM 3A, 11.4.4)
APIC_ID, LVT_LINT0 = 0x20, 0x350  # in the local APIC's page (11.4.1)
LVT_MASKED = 1 << 16
X2APIC_MSRS = range(0x800, 0x900)  # the local APIC's registers, which KVM_GET_LAPIC has already
CHIPS = (Irqchip.PIC_MASTER, Irqchip.PIC_SLAVE, Irqchip.IOAPIC)
TSC_TOLERANCE = 250  # parts per million; KVM takes a guest's TSC as its host's own within that


def msr_indices(system: System) -> list[int]:
    """What a snapshot must hold, in the order in which it must be restored."""
    indices = [index for index in system.msr_index_list() if index not in X2APIC_MSRS]
    rank = {IA32_TSC: -1, IA32_TSC_DEADLINE: 1}
    return sorted(indices, key=lambda index: rank.get(index, 0))


def save_vcpu(vcpu: Vcpu, indices: list[int]) -> State:
    """Everything of one vCPU. `indices` is `msr_indices`; MSRs that this vCPU does not have are left out."""
    mp_state = vcpu.mp_state()  # first: asking for it lets KVM take INIT and SIPI that are on their way into the rest
    pairs, _ = vcpu.msrs(indices)
    return {
        "cpuid": bytes(vcpu.cpuid()),
        "tsc_khz": vcpu.tsc_khz(),
        "mp_state": mp_state,
        "regs": bytes(vcpu.regs()),
        "sregs": bytes(vcpu.sregs()),
        "xsave": vcpu.xsave(),
        "xcrs": bytes(vcpu.xcrs()),
        "debugregs": bytes(vcpu.debugregs()),
        "lapic": vcpu.lapic(),
        "msrs": [[index, value] for index, value in pairs],
        "events": bytes(vcpu.vcpu_events()),
    }


def restore_vcpu(vcpu: Vcpu, state: State) -> list[int]:
    """Make a vCPU what `save_vcpu` saw, but for CPUID and TSC frequency; the MSRs that this host refused. Raises
    ValueError or KeyError for a malformed state."""
    vcpu.set_sregs(Sregs.from_buffer_copy(state["sregs"]))
    vcpu.set_xsave(state["xsave"])
    xcrs = Xcrs.from_buffer_copy(state["xcrs"])
    if xcrs.nr_xcrs:  # none where the CPU has no XSAVE
        vcpu.set_xcrs(xcrs)
    vcpu.set_debugregs(Debugregs.from_buffer_copy(state["debugregs"]))
    vcpu.set_lapic(state["lapic"])
    pairs = [(index, value) for index, value in state["msrs"]]
    refused = vcpu.set_msrs(pairs)
    vcpu.set_vcpu_events(VcpuEvents.from_buffer_copy(state["events"]))
    vcpu.set_mp_state(state["mp_state"])
    vcpu.set_regs(Regs.from_buffer_copy(state["regs"]))
    return refused


def _restore_identity(vcpu: Vcpu, state: State) -> None:
    try:
        vcpu.set_cpuid(CpuidTable.from_buffer_copy(state["cpuid"]))
    except KvmError as error:
        raise OperationFailed(
            f"this host refuses the saved CPUID: {error}",
            remedy="save the machine with a CPU model that both hosts have",
        ) from error
    wanted, here = state["tsc_khz"], vcpu.tsc_khz()
    if abs(wanted - here) * 1_000_000 > TSC_TOLERANCE * here:
        try:
            vcpu.set_tsc_khz(wanted)
        except KvmError as error:
            raise OperationFailed(
                f"the machine's TSC runs at {wanted} kHz, this host's at {here} kHz and cannot be scaled",
                remedy="use a host with TSC scaling, or one with the same clock",
            ) from error


def _leave_creation_behind(vcpu: Vcpu, state: State) -> None:
    """Of the first vCPU, before its TSC is restored. KVM takes a TSC that lies within a second of what another vCPU's
    would be now for an attempt to make the two equal, and lets it run on as that does; in kernels before 6.7 also of
    what its own would be, had it not been written since it was made. A guest that is about as old as this machine would
    find its TSC up to a second earlier than it was, and its timers would ring as much later. So it goes far away first
    (arch/x86/kvm/x86.c, kvm_synchronize_tsc); the other vCPUs then follow this one."""
    tsc = next((value for index, value in state["msrs"] if index == IA32_TSC), None)
    if tsc is not None:
        vcpu.set_msrs([(IA32_TSC, tsc ^ 1 << 62)])


def application_processor(boot_processor: State, apic_id: int) -> State:
    """From the boot processor's state at power-on, another's, without its identity: what KVM gives each at its making
    differs in these few places (arch/x86/kvm/lapic.c, kvm_lapic_reset; x86.c, kvm_arch_vcpu_create)."""
    sregs = Sregs.from_buffer_copy(boot_processor["sregs"])
    sregs.apic_base &= ~APIC_BASE_BSP
    lapic = bytearray(boot_processor["lapic"])
    lapic[APIC_ID : APIC_ID + 4] = bytes((0, 0, 0, apic_id & 0xFF))
    lapic[LVT_LINT0 : LVT_LINT0 + 4] = LVT_MASKED.to_bytes(4, "little")  # the boot processor's takes the PIC
    return {**boot_processor, "sregs": bytes(sregs), "lapic": bytes(lapic), "mp_state": MpState.UNINITIALIZED}


def save_vm(vm: Vm) -> State:
    """Interrupt chips and clock. `realtime` is 0 where the kernel does not tell it."""
    clock = vm.clock()
    return {
        "irqchips": [vm.irqchip(chip) for chip in CHIPS],
        "clock": int(clock.clock),
        "realtime": int(clock.realtime),
    }


def restore_vm(vm: Vm, state: State, *, catch_up: bool = False) -> None:
    """`catch_up`: let the guest's clock run on while the state was at rest, as far as the host knows how long that
    was; otherwise it goes on where it stopped."""
    for chip, data in zip(CHIPS, state["irqchips"], strict=True):
        vm.set_irqchip(chip, data)
    vm.set_clock(state["clock"], state["realtime"] or None if catch_up else None)


def save_machine(machine: _Machine) -> State:
    """All vCPUs and the machine's chips; the machine is paused."""
    indices = msr_indices(machine.system)
    return {"vm": save_vm(machine.vm), "vcpus": [save_vcpu(thread.vcpu, indices) for thread in machine.vcpus]}


def restore_machine(machine: _Machine, state: State, *, identity: bool = False, catch_up: bool = False) -> list[int]:
    """The MSRs that were refused, of all vCPUs. `identity`: they have not run yet, and take over CPUID and TSC
    frequency; `OperationFailed` when the host cannot be such a CPU."""
    saved = state["vcpus"]
    if len(saved) > len(machine.vcpus):
        raise OperationFailed(f"the saved machine has {len(saved)} vCPUs, this one {len(machine.vcpus)}")
    restore_vm(machine.vm, state["vm"], catch_up=catch_up)
    refused: set[int] = set()
    for number, (thread, vcpu_state) in enumerate(zip(machine.vcpus, saved, strict=False)):
        if identity:
            _restore_identity(thread.vcpu, vcpu_state)
            if not number:
                _leave_creation_behind(thread.vcpu, vcpu_state)
        refused.update(restore_vcpu(thread.vcpu, vcpu_state))
    return sorted(refused)
