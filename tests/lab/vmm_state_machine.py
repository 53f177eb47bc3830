"""Run in the lab: a stock kernel that is saved, restored, rewound and migrated, while it checks itself.

    python -m lab.vmm_state_machine KERNEL INITRD CMDLINE DISK DIRECTORY

What the guest says goes to standard output, with a line "== STEP" before each step; figures as JSON at the end.
"""

from __future__ import annotations

import json
import sys
import time

from kvik.vmm.build import build
from kvik.vmm.config import CharConfig, MachineConfig
from kvik.vmm.machine import Machine
from kvik.vmm.state.migration import await_incoming, migration_of
from lab import vmm_moving as moving
from lab.vmm_moving import MovingGuest, step

KERNEL, INITRD, CMDLINE, DISK, DIRECTORY = sys.argv[1:]


def config(serial: CharConfig) -> MachineConfig:
    return moving.config(serial, KERNEL, INITRD, CMDLINE, DISK, memory="256M")


def main() -> None:
    figures: dict[str, object] = {}
    saved = f"{DIRECTORY}/saved"
    step("boot")
    first = MovingGuest(lambda serial: build(config(serial)))
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
    second = MovingGuest(lambda serial: Machine.restore(saved, MachineConfig(serials=[serial])))
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
    third = MovingGuest(lambda serial: build(config(serial), boot=False))
    await_incoming(third.machine, address)
    migration = migration_of(second.machine)
    # Here a stop alone takes longer than the usual limit: the rounds would go on for as long as the host is busy.
    migration.set_parameters({"downtime-limit": 2000})
    migration.start(address)
    second.wait(lambda: migration.report()["status"] in ("completed", "failed", "cancelled"), third)
    figures["migration"] = migration.report()
    third.wait(lambda: third.machine.status == "running")
    second.machine.close()
    third.check()

    step("postcopy")
    address = f"unix:{DIRECTORY}/further"
    fourth = MovingGuest(lambda serial: build(config(serial), boot=False))
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
