"""Hot-plug for device_add: a settings object -> `vmm.parts` makes the device, the machine takes it in."""

from __future__ import annotations

from kvik.vmm import config as c
from kvik.vmm import parts
from kvik.vmm.monitor.errors import QmpError, device_not_found, refused

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from kvik.vmm.cpu.hotplug import VcpuHotplug
    from kvik.vmm.device import Device
    from kvik.vmm.machine import Machine

# settings class -> the list of MachineConfig that such settings belong to
FIELDS = {
    c.DiskConfig: "disks",
    c.NetConfig: "nets",
    c.RngConfig: "rng",
    c.BalloonConfig: "balloon",
    c.VsockConfig: "vsock",
    c.FsConfig: "fs",
    c.VhostUserBlkConfig: "vhost_user_blk",
    c.VirtioMemConfig: "virtio_mem",
}


class MachineHotplug:
    """`table.Hotplug` for a machine that `vmm.build` made."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._made = 0

    def plug(self, settings: Any) -> Device:
        field = FIELDS[type(settings)]
        if field not in parts.KINDS:
            raise refused(f"cannot plug one of {field}", "this version has no such device")
        self._made += 1
        # The index names a device without an id; ours have one.
        device = self._machine.add(parts.make(self._machine, field, settings, self._made), settings.slot)
        return device

    def unplug(self, name: str) -> None:
        carrier: Any = self._machine.devices.get(name)
        if carrier is None:
            raise device_not_found(name)
        if not hasattr(carrier, "bars"):
            raise QmpError(f"Device '{name}' does not support hotplugging")
        device: Any = self._machine.find(name)
        if device.kind == "virtio-mem" and (device.plugged or device.requested):
            # Its window would go with the device, and with it memory that the guest uses.
            raise refused(
                f"cannot unplug {name} while the guest may use {max(device.plugged, device.requested) >> 20} MiB of it",
                "set requested-size to 0 and wait until its size is 0",
            )
        if self._machine.status == "prelaunch":
            self._machine.remove(name)
            self._machine.emit("DEVICE_DELETED", {"device": name, "path": f"/machine/peripheral/{name}"})
            return
        self._machine.pci.request_unplug(carrier)

    def plug_vcpu(self, number: int, name: str) -> None:
        self._vcpus().plug(number, name)

    def unplug_vcpu(self, number: int) -> None:
        self._vcpus().request_unplug(number)

    def _vcpus(self) -> VcpuHotplug:
        if self._machine.vcpu_hotplug is None:
            raise refused("cannot change the number of vCPUs", "this machine was started with as many as it can have")
        return self._machine.vcpu_hotplug
