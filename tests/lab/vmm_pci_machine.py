"""Run in the lab: a machine with PCI devices of its own, plugged and unplugged from outside while it runs.

    python vmm_pci_machine.py KERNEL INITRD CMDLINE [plug [entropy]]

The console is standard output. With `plug`: when the guest prints "ready to plug", a device comes (`entropy`: a virtio
one); on "ready to unplug" it is asked to leave. Figures and events are printed to standard error at the end.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "devices"))

from adder import Adder
from repeatable_entropy import RepeatableEntropy

from kvik.vmm.build import build
from kvik.vmm.options import parse


def main() -> None:
    kernel, initrd, cmdline, *words = sys.argv[1:]
    out, console = os.pipe()
    config = parse(
        [
            *("--kernel", kernel, "--initrd", initrd, "--append", cmdline, "--memory", "256M"),
            *("--serial", f"file:/dev/fd/{console}", "--sandbox", "off"),
        ]
    )
    machine = build(config)
    machine.add(RepeatableEntropy("entropy0", seed=1))
    machine.add(Adder("adder0"))
    events: list[tuple[str, object]] = []
    machine.listeners.append(lambda name, data: events.append((name, data)))
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

    machine.loop.add_reader(out, heard)
    outcome = machine.run()
    os.set_blocking(out, False)
    try:
        os.write(1, os.read(out, 65536))
    except BlockingIOError:
        pass
    print(json.dumps({"outcome": outcome, "events": events}), file=sys.stderr)


main()
