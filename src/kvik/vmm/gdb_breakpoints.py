"""Breakpoints and watchpoints of a debugging session: int3 in the guest's memory, and the debug registers.

KVM turns what they raise into exits (KVM_SET_GUEST_DEBUG, api.rst 4.87).
"""

from __future__ import annotations

import contextlib

from kvik.kvm import constants as k
from kvik.vmm import guestview
from kvik.vmm.faults import GuestFault

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.vmm.machine import Machine
    from kvik.vmm.vcpu import VcpuThread

__all__ = ["HARDWARE", "Breakpoints"]

MAX_BREAKPOINTS = 1024
_INT3 = b"\xcc"
# gdb's Z type -> the kind of DR7: execute, write, read or write. x86 has none for reads alone.
HARDWARE = {1: 0, 2: 1, 4: 3}
_LENGTHS = {1: 0, 2: 1, 4: 3, 8: 2}


class Breakpoints:
    """Those of one debugging session, and how KVM is told of them."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self.software: dict[int, tuple[bytes, VcpuThread]] = {}  # address -> what was there, seen by which vCPU
        self.hardware: dict[tuple[int, int, int], None] = {}  # (type, address, length), at most 4

    def insert(self, thread: VcpuThread, kind: int, address: int, length: int) -> bool:
        """Raises `GuestFault`; False if there is no room for it."""
        if kind == 0:
            if address in self.software:
                return True
            if len(self.software) >= MAX_BREAKPOINTS:
                return False
            before = guestview.read_virtual(self._machine, thread, address, 1)
            guestview.write_virtual(self._machine, thread, address, _INT3)
            self.software[address] = (before, thread)
            return True
        if kind == 1:
            length = 1
        if len(self.hardware) >= 4 or length not in _LENGTHS or address % length:
            return (kind, address, length) in self.hardware
        self.hardware[kind, address, length] = None
        return True

    def remove(self, kind: int, address: int, length: int) -> None:
        if kind != 0:
            self.hardware.pop((kind, address, 1 if kind == 1 else length), None)
        elif address in self.software:
            before, thread = self.software.pop(address)
            with contextlib.suppress(GuestFault):  # the guest unmapped it meanwhile: nothing to give back
                if guestview.read_virtual(self._machine, thread, address, 1) == _INT3:
                    guestview.write_virtual(self._machine, thread, address, before)

    def clear(self) -> None:
        for address in list(self.software):
            self.remove(0, address, 1)
        self.hardware.clear()

    def hidden(self, address: int, data: bytes) -> bytes:
        """What lies at `address` when our int3s are not seen: gdb shows the program as it is."""
        shown = bytearray(data)
        for place, (before, _) in self.software.items():
            if 0 <= place - address < len(shown):
                shown[place - address] = before[0]
        return bytes(shown)

    def control(self, stepping: bool) -> tuple[int, tuple[int, ...]]:
        """Flags and debug registers for KVM_SET_GUEST_DEBUG; 0 when there is nothing to watch for."""
        flags = 0
        registers = [0] * 8
        if self.software:
            flags |= k.GUESTDBG_ENABLE | k.GUESTDBG_USE_SW_BP
        if stepping:
            flags |= k.GUESTDBG_ENABLE | k.GUESTDBG_SINGLESTEP
        if self.hardware:
            flags |= k.GUESTDBG_ENABLE | k.GUESTDBG_USE_HW_BP
            registers[7] = 0x0600  # reserved bit 10, and exact matching, as QEMU sets them
            for number, (kind, address, length) in enumerate(self.hardware):
                registers[number] = address
                registers[7] |= 2 << 2 * number
                registers[7] |= (HARDWARE[kind] | _LENGTHS[length] << 2) << 16 + 4 * number
        return flags, tuple(registers)

    def hit(self, dr6: int) -> tuple[int, int] | None:
        """(type, address) of the hardware breakpoint that DR6 tells of."""
        for number, (kind, address, _) in enumerate(self.hardware):
            if dr6 >> number & 1:
                return kind, address
        return None
