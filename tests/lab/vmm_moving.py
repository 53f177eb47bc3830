"""A machine in this process, and what its guest says. Used inside the lab, by the scenarios in which a guest moves."""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Callable

from kvik.vmm.config import CharConfig, MachineConfig
from kvik.vmm.machine import Machine
from kvik.vmm.options import parse

__all__ = ["MovingGuest", "config", "step"]

TICK = re.compile(rb"tick (\d+) (\S+) (\S+)")


class MovingGuest:
    """A machine, and what it says."""

    def __init__(self, make: Callable[[CharConfig], Machine]) -> None:
        self.line, theirs = socket.socketpair()
        self.line.setblocking(False)
        self.machine = make(CharConfig(backend=f"fd={theirs.detach()}"))
        self.heard = b""

    def turn(self) -> None:
        self.machine.loop.run_once(0.01)
        try:
            data = self.line.recv(65536)
        except BlockingIOError:
            return
        self.heard += data
        os.write(1, data)

    def wait(self, condition: Callable[[], object], *others: MovingGuest, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                raise SystemExit(f"it did not come about: {self.heard[-300:]!r}\n{self.stands()}")
            for guest in (self, *others):
                guest.turn()

    def stands(self) -> str:
        """Where its processors are, and what waits for them."""
        with self.machine.paused():
            migration = self.machine.migration
            rows = [
                f"{self.machine.status}; migration {migration.report() if migration else 'none'}",
                f"{vars(self.machine.find('serial0'))}",
            ]
            for name in self.machine.devices:
                for queue in getattr(self.machine.find(name), "queues", []):
                    rows += [f"{name} {queue.index}: {queue.state()} pending {queue.pending()}"] if queue.ready else []
            for thread in self.machine.vcpus:
                regs, lapic = thread.vcpu.regs(), thread.vcpu.lapic()
                # Advanced Programmable Interrupt Controller: 256 bits each, 32 in 16 bytes; LVT timer, initial, current
                in_service, requested = (
                    [
                        vector
                        for vector in range(256)
                        if lapic[at + vector // 32 * 16 + vector % 32 // 8] >> vector % 8 & 1
                    ]
                    for at in (0x100, 0x200)
                )
                timer = [int.from_bytes(lapic[at : at + 4], "little") for at in (0x320, 0x380, 0x390)]
                rows.append(
                    f"rip {regs.rip:#x} rflags {regs.rflags:#x} mp_state {thread.vcpu.mp_state()} "
                    f"in service {in_service} requested {requested} timer {timer} "
                    f"deadline, TSC {thread.vcpu.msrs([0x6E0, 0x10])}"
                )
        return "\n".join(rows)

    def ticks(self) -> list[tuple[int, bytes, bytes]]:
        return [(int(number), memory, disk) for number, memory, disk in TICK.findall(self.heard)]

    def check(self) -> None:
        """Timers, memory, disk and console of a machine that runs, however it came to be."""
        before = len(self.ticks())
        self.wait(lambda: len(self.ticks()) >= before + 3)
        self.line.sendall(b"hello\n")
        self.wait(lambda: b"heard hello" in self.heard)
        self.heard = b""


def config(serial: CharConfig, kernel: str, initrd: str, cmdline: str, disk: str, *, memory: str) -> MachineConfig:
    made = parse(
        [
            *("--kernel", kernel, "--initrd", initrd, "--append", cmdline, "--memory", memory, "--cpus", "2", "--rng"),
            *("--disk", f"{disk},lock=off", "--sandbox", "off"),
        ]
    )
    made.serials = [serial]
    return made


def step(name: str) -> None:
    os.write(1, f"\n== {name}\n".encode())
