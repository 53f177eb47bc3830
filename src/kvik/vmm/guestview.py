"""The guest's memory as its own program sees it: by virtual address, through the page tables that a vCPU uses.

For debuggers and people. The vCPU must stand still (`machine.paused()`, or parked at a breakpoint).
"""

from __future__ import annotations

from kvik.vmm.faults import GuestFault

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.vmm.machine import Machine
    from kvik.vmm.vcpu import VcpuThread

__all__ = ["read_physical", "read_virtual", "translate", "write_physical", "write_virtual"]

PAGE = 4096


def translate(thread: VcpuThread, address: int) -> int:
    """Guest-physical address of a virtual one. Raises `GuestFault` if no page table maps it."""
    answer = thread.vcpu.translate(address)
    # An x86 kernel says 2^64 - 1 (UNMAPPED_GVA) and valid = 0 for what is not mapped.
    if not answer.valid or answer.physical_address >= 1 << 52:
        raise GuestFault(f"nothing is mapped at virtual address {address:#x}")
    return int(answer.physical_address)


def _pieces(thread: VcpuThread, address: int, size: int) -> list[tuple[int, int]]:
    """(guest-physical address, bytes), page by page; addresses wrap at 2^64."""
    pieces = []
    while size > 0:
        address &= (1 << 64) - 1
        length = min(size, PAGE - address % PAGE)
        pieces.append((translate(thread, address), length))
        address, size = address + length, size - length
    return pieces


def read_virtual(machine: Machine, thread: VcpuThread, address: int, size: int) -> bytes:
    """At most what the caller bounded `size` to. Raises `GuestFault`."""
    return b"".join(machine.memory.read(at, length) for at, length in _pieces(thread, address, size))


def write_virtual(machine: Machine, thread: VcpuThread, address: int, data: bytes) -> None:
    """All of it or, if a part is not mapped RAM, nothing. Also into pages that the guest itself may only read."""
    pieces = _pieces(thread, address, len(data))
    for at, length in pieces:
        machine.memory.view(at, length)  # is it RAM? A fault before anything is written
    offset = 0
    for at, length in pieces:
        machine.memory.write(at, data[offset : offset + length])
        offset += length


def read_physical(machine: Machine, address: int, size: int) -> bytes:
    return machine.memory.read(address, size)


def write_physical(machine: Machine, address: int, data: bytes) -> None:
    machine.memory.write(address, data)
