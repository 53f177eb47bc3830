"""One function a kind of device: from its part of the configuration to the device, ready for `Machine.add`.

Used at start, by `build`, and for hot-plug, by the monitor. What a function opened it closes again when it fails. The
module of a device is imported when the first such device is made.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from kvik.vmm import config as c
    from kvik.vmm.device import Device
    from kvik.vmm.machine import Machine

__all__ = ["LISTS", "debugcon", "make", "serial"]

# The lists of MachineConfig whose items are devices of their own: (field, prefix of a name that nobody chose), in the
# order in which they get the free PCI slots.
LISTS = (
    ("disks", "disk"),
    ("vhost_user_blk", "vub"),
    ("nets", "net"),
    ("rng", "rng"),
    ("balloon", "balloon"),
    ("vsock", "vsock"),
    ("fs", "fs"),
    ("virtio_mem", "mem"),
    ("watchdog", "watchdog"),
)


def serial(machine: Machine, config: c.CharConfig, index: int) -> Device:
    from kvik.vmm.backends.char import Chardev
    from kvik.vmm.devices.serial import Serial

    name = config.id or f"serial{index}"
    chardev = Chardev(config.backend, name)
    chardev.on_quit = machine.quit
    return Serial(name, chardev, index)


def debugcon(machine: Machine, config: c.CharConfig, index: int) -> Device:
    from kvik.vmm.backends.char import Chardev
    from kvik.vmm.devices.debugcon import Debugcon

    name = config.id or f"debugcon{index}"
    return Debugcon(name, Chardev(config.backend, name))


def make(machine: Machine, field: str, config: Any, name: str) -> Device:
    """The device that `config`, an item of MachineConfig's list `field`, describes."""
    if field == "watchdog":
        from kvik.vmm.devices.watchdog import Watchdog

        return Watchdog(name, config.action)
    from kvik.vmm.virtio import make as virtio

    if field == "disks":
        return virtio.make_disk(config, name, machine.config.cpus.count)
    if field == "vhost_user_blk":
        return virtio.make_vhost_user_blk(config, name)
    if field == "rng":
        return virtio.make_rng(config, name)
    if field == "balloon":
        return virtio.make_balloon(config, name)
    if field == "fs":
        return virtio.make_fs(config, name)
    if field == "virtio_mem":
        return virtio.make_mem(config, name, shared=machine.config.memory.shared)
    raise ValueError(field)
