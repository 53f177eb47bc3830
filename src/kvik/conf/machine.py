"""What a machine type implies: which bus is its root and what is soldered on. Facts of QEMU's boards, and of ours, by
name only.

`kvik-N` is the board of kvik-vmm: one PCI Express bus with 31 slots, on which everything is virtio, and nothing else
on board but a serial line, a clock and the power buttons.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from kvik.conf.domain import Domain


@dataclass(frozen=True, slots=True)
class MachineDefaults:
    """What fills the gaps of a document. The driver knows its binary's own; these suit QEMU on x86.

    `machines` maps a machine's alias to the versioned type it stands for today, which then stays for good.
    """

    arch: str = "x86_64"
    machine: str = "pc"
    machines: Mapping[str, str] = field(default_factory=dict)
    emulator: str = ""
    video_model: str = "vga"
    scsi_model: str = "virtio-scsi"
    spare_root_ports: int = 2  # left free for hotplug on PCI Express machines
    random: Callable[[int], bytes] = os.urandom


Q35, I440FX, PCIE, PCI, MMIO, KVIK, NONE = "q35", "i440fx", "pcie", "pci", "mmio", "kvik", "none"
BARE = (MMIO, KVIK)  # nothing is on these boards that the document does not name


def family(domain: Domain) -> str:
    """One of the constants above."""
    machine = domain.os.type.machine or "pc"
    if machine.startswith(("pc-q35", "q35")):
        return Q35
    if machine == "kvik" or machine.startswith("kvik-"):
        return KVIK
    if machine.startswith("microvm"):
        return MMIO
    if machine in ("isapc", "none"):
        return NONE
    if machine == "pc" or machine.startswith(("pc-", "rhel6")):
        return I440FX
    if machine.startswith(("virt", "sbsa", "raspi")):
        return PCIE
    return PCI if machine.startswith(("pseries", "malta")) else I440FX


def is_x86(domain: Domain) -> bool:
    return domain.os.type.arch in (None, "x86_64", "i686", "amd64")
