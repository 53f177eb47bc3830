"""A machine is built and taken apart before any is wanted, for the sake of a zygote's forks.

CPython rewrites code in place while that is new (PEP 659), and fills its caches at the first use. In a fork each such
write is a page of its own, and time. So the zygote goes the way of a start up to the guest's first instruction, with a
kernel of one instruction. Nothing of it stays open, no thread is started and no guest runs.
"""

from __future__ import annotations

import os
import socket
import struct

from kvik.errors import KvikError
from kvik.vmm import sandbox
from kvik.vmm.build import build
from kvik.vmm.main import Prepared, open_control

__all__ = ["rehearse"]

TIMES = 10  # the interpreter takes a function for settled after eight calls
_LOAD = 0x10_0000
_WORDS = ("--name", "rehearsal", "--memory", "4M", "--sandbox", "on", "--serial", "null", "--rng", "", "--balloon", "")


def rehearse() -> None:
    """Where a machine cannot be made (no /dev/kvm, say) this does nothing: the first one will tell its user why."""
    kernel = os.memfd_create("rehearsal", os.MFD_CLOEXEC)
    try:
        os.write(kernel, _kernel())
        for _ in range(TIMES):
            _once(kernel)
    except (KvikError, OSError):
        return
    finally:
        os.close(kernel)


def _once(kernel: int) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("")  # a name that the kernel chooses, and nobody else has
        listener.listen()
        words = [*_WORDS, "--boot", f"kernel-fd={kernel},stable-kernel=on", "--qmp", f"fd={listener.fileno()}"]
        prepared = Prepared.parse(words)
        assert prepared.confinement is not None
        machine = build(prepared.config, prepared.confinement)
        try:
            open_control(machine)
        finally:
            machine.close()
            listener.detach()  # the monitor closed it
    for role in ("vcpu", "io", "main"):
        sandbox.assemble(role, prepared.confinement.policy)


def _kernel() -> bytes:
    """An ELF file with a PVH entry: hlt."""
    note = struct.pack("<III4sI", 4, 4, 18, b"Xen\0", _LOAD)  # XEN_ELFNOTE_PHYS32_ENTRY
    at = 64 + 2 * 56
    header = b"\x7fELF\2\1\1".ljust(16, b"\0")
    header += struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, _LOAD, 64, 0, 0, 64, 56, 2, 0, 0, 0)
    segments = struct.pack("<IIQQQQQQ", 1, 5, 4096, _LOAD, _LOAD, 4096, 4096, 4096)  # PT_LOAD
    segments += struct.pack("<IIQQQQQQ", 4, 4, at, 0, 0, len(note), len(note), 4)  # PT_NOTE
    return (header + segments + note).ljust(4096, b"\0") + b"\xf4".ljust(4096, b"\0")
