"""The VM generation ID: 16 bytes in guest memory that change when the machine is not what it was: restored, forked.

A guest that sees them change reseeds its random generator (Linux: drivers/virt/vmgenid.c). "Virtual Machine Generation
ID", Microsoft, 2012: the GUID lies at an address that is a multiple of 8, in a page of reserved memory; a change is
told by a notification (0x80).
"""

from __future__ import annotations

import os

from kvik.vmm.acpi.dsdt import VMGENID
from kvik.vmm.device import Device
from kvik.vmm.layout import VMGENID as ADDRESS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.vmm.device import State
    from kvik.vmm.devices.acpi_events import AcpiEvents
    from kvik.vmm.machine import Machine

__all__ = ["VmGenId"]


class VmGenId(Device):
    """`guid` is the current one. It survives a reset; it changes with every `renew`, which a restore does."""

    kind = "vmgenid"

    def __init__(self, events: AcpiEvents, name: str = "vmgenid") -> None:
        self.events = events
        self.machine: Machine | None = None
        self.guid = os.urandom(16)
        super().__init__(name)

    def attach(self, machine: Machine) -> None:
        self.machine = machine
        self._write()

    def reset(self) -> None:
        self._write()

    def _write(self) -> None:
        if self.machine is not None:
            self.machine.memory.write(ADDRESS, self.guid)

    def renew(self) -> None:
        """A new identity: write it and tell the guest."""
        self.guid = os.urandom(16)
        self._write()
        self.events.raise_event(VMGENID)

    def state(self) -> State:
        return {"guid": self.guid}

    def restore(self, state: State) -> None:
        """What is restored goes on from a moment that others may go on from too: never with the old GUID."""
        if len(state["guid"]) != 16:
            raise ValueError("a GUID has 16 bytes")
        self.renew()
