"""Run in the lab: a stock kernel that goes from machine to machine, again and again, with all its devices at work.

    python -m lab.vmm_hand_over KERNEL INITRD CMDLINE DISK DIRECTORY TIMES

By pre-copy, by post-copy, and by its state alone with memory copied, in turns. After each move every one of the guest's
loops must go on: one that waits for an interrupt or a kick that was lost does not. What the guest says goes to standard
output, the number of moves to standard error.
"""

from __future__ import annotations

import sys
import time

from kvik.vmm.build import build
from kvik.vmm.config import CharConfig
from kvik.vmm.machine import Machine
from kvik.vmm.state.capture import apply, capture
from kvik.vmm.state.migration import await_incoming, migration_of
from kvik.vmm.state.values import decode, encode
from lab.vmm_moving import MovingGuest, config, step

KERNEL, INITRD, CMDLINE, DISK, DIRECTORY, TIMES = sys.argv[1:]


def machine(serial: CharConfig, boot: bool) -> Machine:
    return build(config(serial, KERNEL, INITRD, CMDLINE, DISK, memory="96M"), boot=boot)


def counts(guest: MovingGuest) -> list[tuple[int, int, int]]:
    """What each of its loops has reached, each time that it said so."""
    return [(number, int(reads), int(random)) for number, reads, random in guest.ticks()]


def check(guest: MovingGuest) -> None:
    """Its loops count, each by what it waits for; and it hears what is typed."""
    guest.heard = b""
    guest.wait(lambda: len(guest.ticks()) >= 1)
    first = counts(guest)[0]
    guest.wait(lambda: all(new > old for new, old in zip(counts(guest)[-1], first, strict=True)))
    guest.line.sendall(b"hello\n")
    guest.wait(lambda: b"heard hello" in guest.heard)


def copied(guest: MovingGuest, other: MovingGuest) -> None:
    """All that a migration does but the wire: hundreds of moves in the time of tens."""
    other.machine.hold_devices()
    other.machine.start(paused=True)
    other.machine.status = "inmigrate"
    guest.machine.pause("finish-migrate")
    guest.machine.hold()
    state = decode(encode({**capture(guest.machine), "status": "running"}), "there")
    for here, there in zip(guest.machine.memory.regions, other.machine.memory.regions, strict=True):
        there.view[:] = here.view
    apply(other.machine, state, "here", identity=True, catch_up=True, same=True)
    other.machine.resume()


def migrated(guest: MovingGuest, other: MovingGuest, address: str, postcopy: bool) -> None:
    await_incoming(other.machine, address)
    migration = migration_of(guest.machine)
    migration.set_capability("postcopy-ram", postcopy)
    migration.set_parameters({"downtime-limit": 1 if postcopy else 2000})
    if postcopy:
        migration.set_parameters({"max-bandwidth": 8 << 20, "max-postcopy-bandwidth": 64 << 20})
    migration.start(address)
    if postcopy:
        guest.wait(lambda: migration.report()["ram"]["transferred"] > 1 << 20, other)
        migration.start_postcopy()
    guest.wait(lambda: migration.report()["status"] in ("completed", "failed", "cancelled"), other)
    assert migration.report()["status"] == "completed", migration.report()
    other.wait(lambda: other.machine.status == "running")
    other.wait(lambda: migration_of(other.machine).report()["status"] == "completed")


def main() -> None:
    guest = MovingGuest(lambda serial: machine(serial, True))
    guest.machine.start()
    guest.wait(lambda: guest.ticks(), seconds=100)
    check(guest)
    for number in range(int(TIMES)):
        how = ("copied", "precopy", "copied", "postcopy")[number % 4]
        step(how)
        other = MovingGuest(lambda serial: machine(serial, False))
        end = time.monotonic() + number % 7 * 0.03  # amid whatever it does then
        while time.monotonic() < end:
            guest.turn()
        if how == "copied":
            copied(guest, other)
        else:
            migrated(guest, other, f"unix:{DIRECTORY}/{number}", how == "postcopy")
        guest.machine.close()
        guest.line.close()
        guest = other
        check(guest)
    guest.line.sendall(b"end\n")
    guest.wait(lambda: guest.machine.outcome)
    guest.machine.close()
    print(f"{TIMES} moves: {guest.machine.outcome}", file=sys.stderr)


main()
