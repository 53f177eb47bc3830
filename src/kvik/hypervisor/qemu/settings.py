"""What QEMU is told on its monitor only, at the start and later: passwords, links, limits; and the ports that it chose,
read back into the document."""

from __future__ import annotations

from collections.abc import Awaitable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import msgspec

from kvik.conf.devices.disk import Disk, IoTune
from kvik.conf.devices.display import Graphics
from kvik.conf.devices.interface import Interface
from kvik.errors import ConfigUnsupported
from kvik.hypervisor import cpus
from kvik.hypervisor.names import alias_of
from kvik.hypervisor.qemu.argv.options import Props
from kvik.hypervisor.qemu.iothreads import pin_listed

if TYPE_CHECKING:
    from kvik.hypervisor.qemu.machine import QemuMachine

__all__ = [
    "put_limits",
    "query_graphics",
    "set_limits",
    "set_link",
    "set_password",
    "settle",
    "start_settings",
]


async def start_settings(machine: QemuMachine) -> None:
    """Before the first instruction: vCPUs that can go again, passwords, links, limits, balloon."""
    domain = machine.domain
    await cpus.plug_listed(machine)
    await pin_listed(machine)
    waits: list[Awaitable[None]] = [set_password(machine, item) for item in domain.devices.graphics if item.passwd]
    waits += [set_link(machine, nic) for nic in domain.devices.interfaces if nic.link and nic.link.state == "down"]
    waits += [put_limits(machine, disk) for disk in domain.devices.disks if disk.iotune is not None]
    balloon = domain.devices.memballoon
    if balloon is not None and balloon.model not in ("none", "xen"):
        if balloon.stats is not None:
            waits.append(machine.tell_balloon_period(balloon))
        if domain.current_memory and domain.current_memory < domain.memory:
            waits.append(machine.set_balloon(domain.current_memory * 1024))
    for wait in waits:
        await wait


async def set_link(machine: QemuMachine, nic: Interface) -> None:
    """The cable is in unless the document says `down`."""
    up = nic.link is None or nic.link.state == "up"
    await machine.execute("set_link", {"name": alias_of(nic), "up": up})


async def set_password(machine: QemuMachine, device: Graphics) -> None:
    """Of a screen that has one. Raises `ConfigUnsupported` for an end of its validity that is no date."""
    if device.passwd is None or device.type not in ("vnc", "spice"):
        return
    arguments = {"protocol": device.type, "password": device.passwd}
    if device.type == "spice" or device.connected == "keep":
        arguments["connected"] = device.connected or "keep"
    await machine.execute("set_password", arguments)
    valid = device.passwd_valid_to
    if valid is not None:
        await machine.execute("expire_password", {"protocol": device.type, "time": _epoch(valid)})


def _epoch(text: str) -> str:
    try:
        return str(int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()))
    except ValueError as error:
        raise ConfigUnsupported(f"passwdValidTo {text!r} is no date like 2030-01-31T12:00:00") from error


_LIMITS = {
    "total_bytes_sec": "bps", "read_bytes_sec": "bps_rd", "write_bytes_sec": "bps_wr",
    "total_iops_sec": "iops", "read_iops_sec": "iops_rd", "write_iops_sec": "iops_wr",
}  # fmt: skip


async def put_limits(machine: QemuMachine, disk: Disk) -> None:
    """Those of the disk's document, if there are any; one that only names its group takes on the group's."""
    if disk.iotune is None:
        return
    if disk.iotune.group_name and disk.iotune == IoTune(group_name=disk.iotune.group_name):
        for other in machine.domain.devices.disks:  # it says only whose limits it shares
            theirs = other.iotune
            if theirs is not None and theirs.group_name == disk.iotune.group_name and theirs != disk.iotune:
                disk.iotune = msgspec.structs.replace(theirs)
                break
    await set_limits(machine, disk)


async def set_limits(machine: QemuMachine, disk: Disk) -> None:
    """QEMU's own throttle group for the disk or, by its name, for all that share it: one that has the last word sets
    the limits of all."""
    tune = disk.iotune or IoTune()
    # The device that has the block backend is not always the one that was plugged.
    inner = {"virtio": "/virtio-backend", "usb": f"/{alias_of(disk)}.0/legacy[0]"}.get(disk.target.bus or "", "")
    arguments: Props = {"id": f"/machine/peripheral/{alias_of(disk)}{inner}"}
    for ours, theirs in _LIMITS.items():
        arguments[theirs] = getattr(tune, ours) or 0  # these six must be there
        for suffix in ("max", "max_length"):
            value = getattr(tune, f"{ours}_{suffix}")
            if value is not None:
                arguments[f"{theirs}_{suffix}"] = value
    if tune.size_iops_sec is not None:
        arguments["iops_size"] = tune.size_iops_sec
    if tune.group_name:
        arguments["group"] = tune.group_name
    await machine.execute("block_set_io_throttle", arguments)


async def settle(machine: QemuMachine, device: Any) -> None:
    """What an attached device still needs from the monitor."""
    if isinstance(device, Disk):
        await put_limits(machine, device)
    elif isinstance(device, Interface) and device.link is not None and device.link.state == "down":
        await set_link(machine, device)


async def query_graphics(machine: QemuMachine) -> None:
    """Ports that QEMU chose."""
    for device in machine.domain.devices.graphics:
        if device.type != "vnc" or (device.port is not None and device.port > 0) or device.socket:
            continue
        reply = await machine.execute("query-vnc")
        service = reply.get("service") if isinstance(reply, dict) else None
        if isinstance(service, str) and service.isdecimal() and 0 < int(service) < 65536:
            device.port = int(service)
