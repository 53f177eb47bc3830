"""vCPUs that come and go while the machine runs: the host's side of `devices.acpi_events.CpuHotplug`.

    plug     a vCPU is made (or one that left before is used again), its thread waits for the guest's INIT and SIPI
    unplug   the guest is asked; it takes the processor offline, then ejects it, and only then it leaves

KVM cannot delete a vCPU before the machine ends: one that left stays parked until it is plugged again or the end.
"""

from __future__ import annotations

from kvik.errors import InvalidArgument, OperationInvalid
from kvik.vmm.cpu.state import IA32_TSC, restore_vcpu

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from kvik.vmm.devices.acpi_events import CpuHotplug
    from kvik.vmm.machine import Machine
    from kvik.vmm.vcpu import VcpuThread

__all__ = ["VcpuHotplug"]


class VcpuHotplug:
    """Belongs to the machine's thread. `make(index)` adds a vCPU to the machine, with its CPUID, not yet started."""

    def __init__(self, machine: Machine, registers: CpuHotplug, make: Callable[[int], VcpuThread]) -> None:
        self.machine, self.registers, self._make = machine, registers, make
        self._away: dict[int, VcpuThread] = {}  # left, and parked
        registers.on_eject = self._ejected
        machine.on_close.append(self._close)

    def plug(self, index: int, name: str = "") -> None:
        """Add processor `index`; `name` is what DEVICE_DELETED will call it. InvalidArgument if there is no place for
        it, OperationInvalid if it is there."""
        machine, present = self.machine, self.registers.present
        if not 0 <= index < len(present):
            raise InvalidArgument(
                f"the machine has no place for processor {index}", remedy=f"at most {len(present)} processors"
            )
        if present[index] or any(thread.index == index for thread in machine.vcpus):
            raise OperationInvalid(f"processor {index} is there already")
        thread = self._away.pop(index, None)
        known = thread is not None
        if thread is None:
            thread = self._make(index)
            thread.on_debug = machine.vcpus[0].on_debug
        else:
            machine.vcpus.append(thread)
        state = machine.vcpu_at_power_on(thread)
        # A TSC of 0 means to KVM: as the others' (x86.c, kvm_synchronize_tsc). Its map of APIC ids knows a new vCPU
        # only when the APIC is set (lapic.c, kvm_apic_set_state): before, INIT finds nobody.
        msrs = [[number, 0 if number == IA32_TSC else value] for number, value in state["msrs"]]
        restore_vcpu(thread.vcpu, {**state, "msrs": msrs})
        if known and not machine.still:
            thread.unpark()
        elif not known:
            if machine.still:
                thread.ask_to_park()
            if machine.started_threads:
                thread.start()
        machine.vcpus.sort(key=lambda vcpu: vcpu.index)
        thread.name = name
        self.registers.plug(index)

    def arrange(self, indices: list[int]) -> None:
        """Before the guest's first step here: let the processors of these numbers be those that are there, as they were
        where it comes from. `devices.acpi_events` learns it from its own state."""
        machine = self.machine
        for thread in [thread for thread in machine.vcpus if thread.index not in indices]:
            machine.vcpus.remove(thread)
            self._away[thread.index] = thread
            if not machine.started_threads:
                thread.ask_to_park()
                thread.start()
        for index in indices:
            if all(thread.index != index for thread in machine.vcpus):
                thread = self._make(index)
                if machine.started_threads:
                    thread.ask_to_park()
                    thread.start()
        machine.vcpus.sort(key=lambda vcpu: vcpu.index)

    def request_unplug(self, index: int) -> None:
        """Ask the guest to give processor `index` up. It may take its time, or refuse by doing nothing."""
        self.registers.request_unplug(index)

    def _ejected(self, index: int) -> None:
        """On the thread of a vCPU, perhaps of the very one that leaves."""
        self.machine.loop.call_soon(lambda: self._take_out(index))

    def _take_out(self, index: int) -> None:
        machine = self.machine
        thread = next((vcpu for vcpu in machine.vcpus if vcpu.index == index), None)
        if thread is None or self.registers.present[index]:
            return
        thread.ask_to_park()
        thread.wait_parked()
        machine.vcpus.remove(thread)
        self._away[index] = thread
        path = f"/machine/peripheral/{thread.name}" if thread.name else f"/machine/unattached/device[{index}]"
        machine.emit("DEVICE_DELETED", {"path": path} | ({"device": thread.name} if thread.name else {}))
        thread.name = ""

    def _close(self) -> None:
        for thread in self._away.values():
            thread.end()
            thread.vcpu.close()
        self._away.clear()
