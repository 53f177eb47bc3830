"""Run in the lab: a machine with PCI devices of its own, plugged and unplugged from outside while it runs.

    python vmm_pci_machine.py KERNEL INITRD CMDLINE [plug [entropy]] [restored]

The console is standard output. With `plug`: when the guest prints "ready to plug", a device comes (`entropy`: a virtio
one); on "ready to unplug" it is asked to leave. With `restored` it is saved where the guest's script begins, ended, and
another machine goes on with what was saved. Figures and events are printed to standard error at the end.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "devices"))

from adder import Adder
from repeatable_entropy import RepeatableEntropy

from kvik.vmm.build import build
from kvik.vmm.machine import Machine
from kvik.vmm.options import parse
from kvik.vmm.state.snapshot import fill_and_apply, read

BEGIN = b"--- the guest begins"  # vmm_guest's


def main() -> None:
    kernel, initrd, cmdline, *words = sys.argv[1:]
    out, console = os.pipe()
    config = parse(
        [
            *("--kernel", kernel, "--initrd", initrd, "--append", cmdline, "--memory", "256M"),
            *("--serial", f"file:/dev/fd/{console}", "--sandbox", "off"),
        ]
    )
    events: list[tuple[str, object]] = []
    seen = bytearray()
    late = RepeatableEntropy("late0", seed=2) if "entropy" in words else Adder("late0")

    def heard() -> None:
        data = os.read(out, 65536)
        os.write(1, data)
        before = bytes(seen)
        seen.extend(data)
        if "plug" in words:
            if b"ready to plug" in seen and b"ready to plug" not in before:
                machine.add(late)
            if b"ready to unplug" in seen and b"ready to unplug" not in before:
                machine.pci.request_unplug(machine.devices["late0"])

    def make(*, boot: bool = True) -> Machine:
        made = build(config, boot=boot)
        made.add(RepeatableEntropy("entropy0", seed=1))
        made.add(Adder("adder0"))
        made.listeners.append(lambda name, data: events.append((name, data)))
        made.loop.add_reader(out, heard)
        return made

    machine = make()
    if "restored" in words:
        machine.start()
        while BEGIN not in seen:
            machine.loop.run_once(0.05)
        machine.pause()
        with tempfile.TemporaryDirectory() as directory:
            machine.save(f"{directory}/saved")
            machine.close()
            machine = make(boot=False)
            fill_and_apply(machine, read(f"{directory}/saved"), fresh=True)
    outcome = machine.run()
    os.set_blocking(out, False)
    try:
        os.write(1, os.read(out, 65536))
    except BlockingIOError:
        pass
    print(json.dumps({"outcome": outcome, "events": events}), file=sys.stderr)


main()
