"""Fuzz a guest by the reset loop: hundreds of fresh machines a second out of one.

    python examples/fuzz.py [seed]

The guest is a parser of 37 bytes that dies of the input "KVM". It tells how far it got through a port; an input that
gets further than all before is kept and changed again. Every run begins at the same instant of the same machine:
`rewind` puts back the pages that were written, the CPU and the devices.
"""

from __future__ import annotations

import random
import sys
import time

from kvik.kvm.structs import Regs
from kvik.vmm.build import add_vcpus
from kvik.vmm.config import MachineConfig, MemoryConfig
from kvik.vmm.device import PortDevice
from kvik.vmm.machine import Machine

CODE, INPUT, PORT = 0x1000, 0x2000, 0x5F0
FINISHED, CRASHED = 0, 3
# mov $INPUT,%si; mov $PORT,%dx; cld; then for each letter: lodsb; cmp $letter,%al; jne end; mov $n,%al; out %al,(%dx)
# end: mov $0,%al; out %al,(%dx); 1: hlt; jmp 1b
GUEST = bytes.fromhex("be0020 baf005 fcac3c4b7513b001eeac3c56750bb002eeac3c4d7503b003eeb000ee f4ebfd")


class Progress(PortDevice):
    """Where the guest says how far it got."""

    kind, base, size = "progress", PORT, 1

    def attach(self, machine: Machine) -> None:
        super().attach(machine)
        self.machine = machine

    def reset(self) -> None:
        self.reached, self.finished = 0, False

    def write(self, offset: int, size: int, value: int) -> None:
        self.reached = max(self.reached, value)
        if value == FINISHED:
            self.finished = True
            self.machine.hold_caller()  # not another instruction
            self.machine.loop.call_soon(self.machine.pause)

    def state(self) -> dict[str, int]:
        return {}

    def restore(self, state: dict[str, int]) -> None:
        self.reset()


def make() -> tuple[Machine, Progress]:
    machine = Machine(MachineConfig(memory=MemoryConfig(size=128 << 20)))
    add_vcpus(machine)
    progress = Progress("progress")
    machine.add(progress)
    machine.memory.write(CODE, GUEST)
    vcpu = machine.vcpus[0].vcpu
    sregs = vcpu.sregs()
    sregs.cs.base = sregs.cs.selector = 0
    vcpu.set_sregs(sregs)
    vcpu.set_regs(Regs(rip=CODE, rflags=2, rsp=0xF000))
    return machine, progress


def fuzz(seed: int, runs: int = 100_000) -> tuple[bytes, int, float]:
    """The input that the guest died of, after how many runs, in how many seconds."""
    chance = random.Random(seed)
    machine, progress = make()
    best, far = bytearray(b"???"), 0
    with machine:
        machine.start(paused=True)
        machine.checkpoint()
        began = time.monotonic()
        for run in range(1, runs):
            candidate = bytearray(best)
            candidate[chance.randrange(len(candidate))] = chance.randrange(256)
            machine.rewind()
            machine.memory.write(INPUT, candidate)
            machine.resume()
            while machine.status == "running":
                machine.loop.run_once(1)
            if progress.reached == CRASHED:
                return bytes(candidate), run, time.monotonic() - began
            if progress.reached > far:
                best, far = candidate, progress.reached
    raise SystemExit("nothing found")


if __name__ == "__main__":
    found, runs, seconds = fuzz(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
    print(f"the guest dies of {found!r}, found in run {runs} after {seconds:.1f} s: {runs / seconds:.0f} runs a second")
