"""Run in the lab: a stock kernel that is saved, restored, rewound and migrated, while it checks itself.

    python vmm_state_machine.py KERNEL INITRD CMDLINE DISK DIRECTORY

What the guest says goes to standard output, with a line "== STEP" before each step; figures as JSON at the end.
"""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import time
from collections.abc import Callable

from kvik.vmm.build import build
from kvik.vmm.config import CharConfig, MachineConfig
from kvik.vmm.machine import Machine
from kvik.vmm.options import parse
from kvik.vmm.state.migration import await_incoming, migration_of

KERNEL, INITRD, CMDLINE, DISK, DIRECTORY = sys.argv[1:]
TICK = re.compile(rb"tick (\d+) (\S+) (\S+)")


class Guest:
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

    def wait(self, condition: Callable[[], object], *others: Guest, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                raise SystemExit(f"it did not come about: {self.heard[-300:]!r}\n{self.stands()}")
            for guest in (self, *others):
                guest.turn()

    def stands(self) -> str:
        """Where its processors are, and what waits for them."""
        with self.machine.paused():
            rows = [f"{self.machine.status}; {vars(self.machine.find('serial0'))}"]
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


def step(name: str) -> None:
    os.write(1, f"\n== {name}\n".encode())


def config(serial: CharConfig) -> MachineConfig:
    made = parse(
        [
            *("--kernel", KERNEL, "--initrd", INITRD, "--append", CMDLINE, "--memory", "256M", "--cpus", "2", "--rng"),
            *("--disk", f"{DISK},lock=off", "--sandbox", "off"),
        ]
    )
    made.serials = [serial]
    return made


def main() -> None:
    figures: dict[str, object] = {}
    saved = f"{DIRECTORY}/saved"
    step("boot")
    first = Guest(lambda serial: build(config(serial)))
    first.machine.start()
    first.wait(lambda: len(first.ticks()) >= 2, seconds=100)
    first.check()
    began = time.monotonic()
    first.machine.save(saved)
    figures["save"] = time.monotonic() - began
    first.check()
    first.machine.close()

    step("restore")
    began = time.monotonic()
    second = Guest(lambda serial: Machine.restore(saved, MachineConfig(serials=[serial])))
    second.machine.start()
    figures["restore"] = time.monotonic() - began
    second.wait(lambda: b"tick" in second.heard)
    second.check()

    step("rewind")
    second.machine.checkpoint()
    pages = []
    began = time.monotonic()
    for _ in range(20):
        pages.append(second.machine.rewind())
    figures["rewinds a second"] = 20 / (time.monotonic() - began)
    second.check()
    pages.append(second.machine.rewind())
    figures["pages"] = pages
    second.heard = b""
    second.check()
    second.machine.forget_checkpoint()

    step("migrate")
    address = f"unix:{DIRECTORY}/there"
    third = Guest(lambda serial: build(config(serial), boot=False))
    await_incoming(third.machine, address)
    migration = migration_of(second.machine)
    migration.start(address)
    second.wait(lambda: migration.report()["status"] in ("completed", "failed", "cancelled"), third)
    figures["migration"] = migration.report()
    third.wait(lambda: third.machine.status == "running")
    second.machine.close()
    third.check()

    step("postcopy")
    address = f"unix:{DIRECTORY}/further"
    fourth = Guest(lambda serial: build(config(serial), boot=False))
    await_incoming(fourth.machine, address)
    migration = migration_of(third.machine)
    migration.set_capability("postcopy-ram", True)
    migration.set_parameters({"max-bandwidth": 8 << 20, "max-postcopy-bandwidth": 16 << 20, "downtime-limit": 1})
    migration.start(address)
    third.wait(lambda: migration.report()["ram"]["transferred"] > 4 << 20, fourth)
    migration.start_postcopy()
    third.wait(lambda: migration.report()["status"] in ("completed", "failed"), fourth)
    figures["postcopy"] = migration.report()
    fourth.wait(lambda: migration_of(fourth.machine).report()["status"] == "completed")
    third.machine.close()
    fourth.check()
    fourth.line.sendall(b"end\n")
    fourth.wait(lambda: fourth.machine.outcome)
    figures["outcome"] = fourth.machine.outcome
    fourth.machine.close()
    print(json.dumps(figures, default=str), file=sys.stderr)


main()
