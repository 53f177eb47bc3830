"""Every processor's state at power-on follows from the boot processor's."""

from __future__ import annotations

from guests import machine_with, needs_kvm

from kvik.kvm.structs import Sregs
from kvik.vmm.cpu.state import application_processor, msr_indices, save_vcpu

pytestmark = needs_kvm


def test_what_is_derived_is_what_kvm_made() -> None:
    machine = machine_with(b"\xf4", cpus=3)  # hlt
    with machine:
        indices = msr_indices(machine.system)
        assert machine._power_on is not None
        boot_processor = machine._power_on["vcpus"][0]
        for thread in machine.vcpus[1:]:
            made = save_vcpu(thread.vcpu, indices)
            derived = application_processor(boot_processor, thread.apic_id)
            # Not the TSC, which runs, and not the identity, which a reset leaves alone
            for state in (made, derived):
                del state["cpuid"]
                state["msrs"] = [pair for pair in state["msrs"] if pair[0] not in (0x10, 0x3B)]
                state["apic_base"] = Sregs.from_buffer_copy(state["sregs"]).apic_base
            assert derived == made
