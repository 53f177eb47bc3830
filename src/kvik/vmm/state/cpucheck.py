"""Whether this host can be the CPU that a state was taken on.

KVM_SET_CPUID2 takes nearly anything; a guest that then uses a feature which is not there dies of an invalid opcode. So
every feature bit of the saved CPUID is looked for in what KVM supports here (api.rst 4.46), and in what a vCPU of this
machine has already (KVM-PVM tells there of more than it says to support).
"""

from __future__ import annotations

from kvik.errors import OperationFailed
from kvik.kvm.structs import CpuidTable
from kvik.vmm.cpu.cpuid import leaves
from kvik.vmm.cpu.features import FEATURES
from kvik.vmm.state.values import Fields

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from kvik.vmm.machine import Machine

__all__ = ["arrange_processors", "check_cpu", "cpuid_equal"]

# Bits that KVM or the VMM provides whatever the host's table says, that follow the guest's own registers, or topology.
_NOT_THE_HOSTS = {"x2apic", "tsc-deadline", "hypervisor", "osxsave", "ospke", "ht", "monitor", "cmp-legacy", "topoext"}
_NOT_THE_HOSTS |= {"kvm-msi-ext-dest-id", "kvm-hint-dedicated", "apic"}
_NONE = [0, 0, 0, 0]


def processors(cpu: Fields) -> list[int]:
    """The numbers of the processors in a state: there are gaps where some left."""
    vcpus = cpu.each("vcpus")
    return [vcpu.number("index", 0, 4095) if "index" in vcpu.members else at for at, vcpu in enumerate(vcpus)]


def _check_processors(machine: Machine, indices: list[int], *, fresh: bool) -> None:
    here = [thread.index for thread in machine.vcpus]
    if indices == here:
        return
    places = max(machine.config.cpus.maximum, machine.config.cpus.count)
    usual = sorted(set(indices)) == indices and indices[0] == 0 and indices[-1] < places
    if not fresh or not usual or machine.vcpu_hotplug is None:
        raise OperationFailed(
            f"the saved machine has processors {', '.join(map(str, indices))}, this one {', '.join(map(str, here))}",
            remedy=f"give it room for processors that are plugged later (--cpus COUNT,max={indices[-1] + 1})",
        )


def arrange_processors(machine: Machine, cpu: Fields) -> None:
    """Let a machine that has not run have processors of the same numbers; `check_cpu` found nothing against it."""
    indices = processors(cpu)
    if indices != [thread.index for thread in machine.vcpus] and machine.vcpu_hotplug is not None:
        machine.vcpu_hotplug.arrange(indices)


def check_cpu(machine: Machine, cpu: Fields, *, fresh: bool = False) -> None:
    """`cpu`: the state's part. OperationFailed names what is missing here. `fresh`: this machine has not run."""
    saved = cpu.each("vcpus")
    if len(saved) != len(machine.vcpus):
        raise OperationFailed(
            f"the saved machine has {len(saved)} vCPUs, this one {len(machine.vcpus)}",
            remedy="leave --cpus out, or give the same number",
        )
    _check_processors(machine, processors(cpu), fresh=fresh)
    supported, _ = leaves(machine.system.supported_cpuid())
    here, _ = leaves(machine.vcpus[0].vcpu.cpuid())
    missing: dict[str, None] = {}
    for vcpu in saved:
        table = _table(vcpu.blob("cpuid"))
        found, _ = leaves(table)
        for name, (function, index, register, mask) in FEATURES.items():
            place = function, index
            had, has = (
                sum(t.get(place, _NONE)[register] & mask for t in tables) for tables in ([found], [supported, here])
            )
            if had and not has and name not in _NOT_THE_HOSTS:
                missing[name] = None
    if missing:
        raise OperationFailed(
            f"this host's CPU lacks what the saved machine uses: {', '.join(missing)}",
            remedy="run the machine with a CPU model that both hosts have (--cpu x86-64-v2), and take its state anew",
        )


def _table(data: bytes) -> CpuidTable:
    try:
        table = CpuidTable.from_buffer_copy(data)
    except ValueError as error:
        raise OperationFailed(f"the saved CPUID table is damaged: {error}") from error
    if table.nent > CpuidTable.MAX:
        raise OperationFailed(f"the saved CPUID table is damaged: {table.nent} entries")
    return table


def cpuid_equal(machine: Machine, cpu: dict[str, Any]) -> bool:
    """Whether the vCPUs, which ran already and cannot change, are those of the state."""
    return all(
        bytes(thread.vcpu.cpuid()) == saved.get("cpuid")
        for thread, saved in zip(machine.vcpus, cpu["vcpus"], strict=True)
    )
