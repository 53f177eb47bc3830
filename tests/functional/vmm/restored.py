"""Every test that boots a machine also runs on a restored one: saved amid its guest's first steps, ended, made anew.

A test marked with `either_way` runs twice. The second time the helpers that make machines (`guests.machine_with`,
`guest.machine`, `running.Running`) do more: the guest first waits at a gate of a few instructions; there the machine is
saved to a directory and closed; another one is restored from it, in it the gate is open, and the test has that one. So
a test says what is true of a machine, and not how it came to be. Tests that need a richer moment (a timer that runs, an
interrupt in service) save there by themselves: `test_x86.py`, `test_state.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kvik.vmm.machine import Machine
from kvik.vmm.state.snapshot import fill_and_apply, read

either_way = pytest.mark.usefixtures("way")
# For a test in such a file that makes no machine, or one that cannot be saved.
booted_only = pytest.mark.parametrize("way", ["booted"], indirect=True)

SECONDS = 60
GATE, COUNT, OPEN = 0x600, 0x680, 0x684  # in low memory behind the boot GDT, where no guest here has anything
directory: Path | None = None  # where machines are saved on the way, or none: set by the fixture `way`


def gate(mode: str, target: int) -> bytes:
    """1: incl COUNT; cmpl $0, OPEN; je 1b; jmp target. It touches no register but the flags."""
    if mode == "real":  # by cs, whose base is 0; ds may lie elsewhere
        body = b"\x2e\x66\xff\x06" + COUNT.to_bytes(2, "little")
        body += b"\x2e\x66\x83\x3e" + OPEN.to_bytes(2, "little") + b"\0"
        width = 2
    else:  # with a SIB byte: absolute in 32 and in 64 bits
        body = b"\xff\x04\x25" + COUNT.to_bytes(4, "little") + b"\x83\x3c\x25" + OPEN.to_bytes(4, "little") + b"\0"
        width = 4
    body += b"\x74" + (-len(body) - 2).to_bytes(1, "little", signed=True) + b"\xe9"
    return body + (target - GATE - len(body) - width).to_bytes(width, "little", signed=True)


def either(make: Callable[[], Machine], mode: str) -> Machine:
    """What `make` makes, not started yet: as it is, or after a first one was saved at the gate. `mode` is that of the
    first vCPU, which `make` put to its first instruction."""
    first = make()
    if directory is None:
        return first
    try:
        vcpu = first.vcpus[0].vcpu
        registers = vcpu.regs()
        first.memory.write(GATE, gate(mode, registers.rip))
        registers.rip = GATE
        vcpu.set_regs(registers)
        other = again(first, make, lambda: first.memory.u32(COUNT) != 0)
    except BaseException:
        first.close()
        raise
    other.memory.put_u32(OPEN, 1)
    return other


def again(first: Machine, make: Callable[[], Machine], begun: Callable[[], bool]) -> Machine:
    """Run `first` until it has begun, save it, end it; another one of the kind, restored and not started."""
    first.start()
    end = time.monotonic() + SECONDS
    while not begun():
        assert time.monotonic() < end, "the guest did not begin"
        first.loop.run_once(0.001)
    return moved(first, make)


def moved(first: Machine, make: Callable[[], Machine]) -> Machine:
    """Save a machine as it is now, end it; another one of the kind, restored and not started."""
    assert directory is not None
    number = len(list(directory.iterdir()))
    place = directory / str(number)
    first.save(str(place))
    first.close()
    other = make()
    try:
        fill_and_apply(other, read(str(place)), fresh=True)
    except BaseException:
        other.close()
        raise
    return other
