"""Disks and interfaces of a running kvik-vmm, by QEMU's commands: a backend, then the device in front of it.

Descriptors go first, by `add-fd` (images) and `getfd` (taps). What was done is taken back if a later step fails.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from kvik.conf.devices.disk import Disk, IoTune
from kvik.conf.devices.interface import Interface
from kvik.conf.devices.memory import Memballoon
from kvik.errors import ConfigUnsupported, HypervisorError, KvikError, MonitorError, OperationUnsupported
from kvik.hypervisor.descriptors import Opened, open_disk
from kvik.hypervisor.kvik.argv import Files, slot_of, vcpus_now, vhost_user_options
from kvik.hypervisor.names import (
    TAP_TYPES,
    alias_of,
    image_name,
    life_name,
    tap_name,
    vhost_name,
    vhost_user_name,
)
from kvik.hypervisor.sidecars import storage_daemon

if TYPE_CHECKING:
    from kvik.hypervisor.kvik.machine import KvikMachine

__all__ = ["attach", "finish_detach", "netdev_name", "node_name", "start_settings", "update"]

Props = dict[str, Any]

_DEADLINE = 20.0


def node_name(alias: str) -> str:
    """The block node of a disk."""
    return f"{alias}-storage"  # kvik-vmm calls those of its command line so


def netdev_name(alias: str) -> str:
    return f"host{alias}"


async def attach(machine: KvikMachine, device: Any, files: Mapping[str, int]) -> None:
    """Raises `OperationUnsupported`, `ConfigUnsupported`, `MonitorError`; then nothing has changed."""
    if not isinstance(device, Disk | Interface):
        raise OperationUnsupported(
            f"kvik-vmm cannot plug a {type(device).__name__.lower()} into a running machine",
            remedy="put it into the definition (--config) and start the machine again",
        )
    with ExitStack() as close, ExitStack() as undo:
        opened = Opened(close, undo, files)
        if isinstance(device, Disk):
            open_disk(opened, device)
        steps = _Steps(machine)
        try:
            if isinstance(device, Disk) and (storage_daemon.served(device) or device.type == "vhostuser"):
                await _attach_served(steps, device, opened, files.get("log", 2), undo)
            elif isinstance(device, Disk):
                await _attach_disk(steps, device, opened)
            else:
                await _attach_interface(steps, device, opened)
        except BaseException:
            await asyncio.shield(steps.undo())
            if isinstance(device, Disk) and storage_daemon.served(device):
                await asyncio.shield(machine.sidecars.end(alias_of(device)))
            raise
        undo.pop_all()


class _Steps:
    """Monitor commands, and what takes them back, last first; those may fail."""

    def __init__(self, machine: KvikMachine) -> None:
        self.machine = machine
        self._back: list[tuple[str, Props]] = []

    async def do(
        self, command: str, arguments: Props, back: str = "", back_arguments: Props | None = None, fd: int | None = None
    ) -> Any:
        given = {key: value for key, value in arguments.items() if value is not None}
        fds = [] if fd is None else [fd]
        reply = await self.machine.execute(command, given, fds=fds, deadline=_DEADLINE)
        if back:
            self._back.append((back, back_arguments or {}))
        return reply

    async def undo(self) -> None:
        for command, arguments in reversed(self._back):
            with contextlib.suppress(KvikError):
                await self.machine.execute(command, arguments)


async def _attach_disk(steps: _Steps, disk: Disk, opened: Opened) -> None:
    alias = alias_of(disk)
    name = image_name(alias, 0)
    reply = await steps.do("add-fd", {"opaque": name}, fd=opened.fds[name])
    number = reply.get("fdset-id") if isinstance(reply, dict) else None
    if not isinstance(number, int):
        raise HypervisorError(f"{steps.machine.name}: the reply to add-fd is malformed")
    steps._back.append(("remove-fd", {"fdset-id": number}))
    driver = disk.driver
    cache = driver.cache if driver is not None else None
    node = {
        "driver": "raw",
        "node-name": node_name(alias),
        "read-only": disk.readonly,
        "discard": "ignore" if driver is not None and driver.discard == "ignore" else "unmap",
        "cache": {"direct": cache in ("none", "directsync"), "no-flush": cache == "unsafe"},
        "file": {"driver": "file", "filename": f"/dev/fdset/{number}"},
    }
    await steps.do("blockdev-add", node, "blockdev-del", {"node-name": node_name(alias)})
    await _device_add(
        steps,
        {
            "driver": "virtio-blk-pci",
            "id": alias,
            "drive": node_name(alias),
            "serial": disk.serial or None,
            "num-queues": driver.queues if driver is not None else None,
            "write-cache": "off" if cache in ("writethrough", "directsync") else "on",
            "addr": _addr(slot_of(disk)),
        },
        str(disk.source.location if disk.source is not None else alias),
    )
    if disk.iotune is not None:
        await throttle(steps.machine, disk, disk.iotune)


async def _attach_served(steps: _Steps, disk: Disk, opened: Opened, log_fd: int, undo: ExitStack) -> None:
    machine, alias = steps.machine, alias_of(disk)
    reply = await machine.execute("query-memdev")
    if not any(isinstance(item, dict) and item.get("share") is True for item in reply or []):
        raise OperationUnsupported(
            f"machine {machine.name}: a disk that another process serves needs guest memory that can be shared",
            remedy="add <memoryBacking><source type='memfd'/></memoryBacking> to the definition and start it again",
        )
    vcpus = vcpus_now(machine.domain)
    daemon = storage_daemon.start(
        disk, machine.directory, opened, machine.sidecars, vcpus=vcpus, log_fd=log_fd, undo=undo
    )
    if daemon is not None:
        await daemon.ready()
    labels = {}
    for prefix in (vhost_user_name(alias), life_name(alias)):
        if prefix in opened.fds:
            labels[prefix] = label = prefix.replace(":", "-")
            await steps.do("getfd", {"fdname": label}, "closefd", {"fdname": label}, fd=opened.fds[prefix])
    name = f"char-{alias}"
    address = {"type": "fd", "data": {"str": labels[vhost_user_name(alias)]}}
    socket = {"type": "socket", "data": {"addr": address, "server": False}}
    await steps.do("chardev-add", {"id": name, "backend": socket}, "chardev-remove", {"id": name})
    options = vhost_user_options(disk, Files({}), vcpus)
    props = {
        "driver": "vhost-user-blk-pci",
        "id": alias,
        "chardev": name,
        "lifefd": labels.get(life_name(alias)),
        "num-queues": options["queues"],
        "queue-size": options["queue-size"],
        "addr": _addr(slot_of(disk)),
    }
    await _device_add(steps, props, str(disk.source.location if disk.source is not None else alias))
    # The device has duplicates of both.
    await machine.execute("chardev-remove", {"id": name})
    await machine.execute("closefd", {"fdname": labels[vhost_user_name(alias)]})
    if daemon is not None:
        machine.watch_sidecar(daemon.member)


async def _attach_interface(steps: _Steps, nic: Interface, opened: Opened) -> None:
    alias = alias_of(nic)
    if nic.type not in TAP_TYPES:
        raise ConfigUnsupported(f"an interface of type {nic.type!r} cannot be plugged into a running machine")
    named: dict[str, list[str]] = {"fds": [], "vhostfds": []}
    for key, prefix in (("fds", tap_name(alias)), ("vhostfds", vhost_name(alias))):
        while (fd := opened.fds.get(f"{prefix}:{len(named[key])}")) is not None:
            label = f"{prefix}:{len(named[key])}".replace(":", "-")
            await steps.do("getfd", {"fdname": label}, "closefd", {"fdname": label}, fd=fd)
            named[key].append(label)
    netdev = {
        "type": "tap",
        "id": netdev_name(alias),
        "fds": ":".join(named["fds"]),
        "vhost": bool(named["vhostfds"]) or None,
        "vhostfds": ":".join(named["vhostfds"]) or None,
    }
    await steps.do("netdev_add", netdev, "netdev_del", {"id": netdev_name(alias)})
    card = {
        "driver": "virtio-net-pci",
        "id": alias,
        "netdev": netdev_name(alias),
        "mac": nic.mac.address if nic.mac is not None else None,
        "host_mtu": nic.mtu.size if nic.mtu is not None else None,
        "mq": True if len(named["fds"]) > 1 else None,
        "addr": _addr(slot_of(nic)),
    }
    await _device_add(steps, card, f"interface {alias}")
    if nic.link is not None and nic.link.state == "down":
        await steps.do("set_link", {"name": alias, "up": False})


async def _device_add(steps: _Steps, props: Props, what: str) -> None:
    """A refusal is told with the name of what was to be plugged in."""
    try:
        await steps.do("device_add", props, "device_del", {"id": props["id"]})
    except MonitorError as error:
        raise MonitorError(f"{what}: {error.message}", qmp_class=error.qmp_class, remedy=error.remedy) from error


def _addr(slot: int | None) -> str | None:
    return None if slot is None else f"0x{slot:x}"


async def finish_detach(machine: KvikMachine, device: Any) -> None:
    """The device is gone: its host side goes as well."""
    alias = alias_of(device)
    steps: list[tuple[str, Props]] = []
    if isinstance(device, Disk) and (storage_daemon.served(device) or device.type == "vhostuser"):
        storage_daemon.monitor_path(machine.directory, alias).unlink(missing_ok=True)
        for prefix in (vhost_user_name(alias), life_name(alias)):  # of an attach that was cut off
            steps.append(("closefd", {"fdname": prefix.replace(":", "-")}))
        steps.append(("chardev-remove", {"id": f"char-{alias}"}))
    elif isinstance(device, Disk):
        steps.append(("blockdev-del", {"node-name": node_name(alias)}))
    elif isinstance(device, Interface):
        steps.append(("netdev_del", {"id": netdev_name(alias)}))
    for command, arguments in steps:
        with contextlib.suppress(KvikError):
            await machine.execute(command, arguments)
    await machine.sidecars.end(alias)
    if isinstance(device, Disk):
        await _remove_fdsets(machine, image_name(alias, 0))


async def _remove_fdsets(machine: KvikMachine, opaque: str) -> None:
    with contextlib.suppress(KvikError):
        reply = await machine.execute("query-fdsets")
        for item in reply if isinstance(reply, list) else []:
            if any(entry.get("opaque") == opaque for entry in item.get("fds", [])):
                await machine.execute("remove-fd", {"fdset-id": item["fdset-id"]})


async def update(machine: KvikMachine, old: Any, new: Any) -> None:
    """Changes what can be changed while the guest runs. Raises `OperationUnsupported` for the rest."""
    if isinstance(new, Disk) and new.iotune is not None:
        await throttle(machine, new, new.iotune)
    elif isinstance(new, Interface):
        up = new.link is None or new.link.state == "up"
        await machine.execute("set_link", {"name": alias_of(new), "up": up})
    elif isinstance(new, Memballoon):
        await machine.tell_balloon_period(new)
    else:
        raise OperationUnsupported(f"a {type(new).__name__.lower()} cannot be changed while the machine runs")


async def throttle(machine: KvikMachine, disk: Disk, tune: IoTune) -> None:
    """Bytes and requests a second, reads and writes together; 0: no limit. Its daemon's, for a disk that has one."""
    if storage_daemon.served(disk):
        group = {"path": f"/objects/{storage_daemon.limits_name(alias_of(disk))}", "property": "limits"}
        await machine.ask_storage(disk, "qom-set", group | {"value": storage_daemon.limits(tune)})
        return
    arguments: Props = {"id": alias_of(disk), "bps_rd": 0, "bps_wr": 0, "iops_rd": 0, "iops_wr": 0}
    arguments |= {"bps": tune.total_bytes_sec or 0, "iops": tune.total_iops_sec or 0}
    if tune.total_bytes_sec_max:
        arguments["bps_max"] = tune.total_bytes_sec_max
    if tune.total_iops_sec_max:
        arguments["iops_max"] = tune.total_iops_sec_max
    await machine.execute("block_set_io_throttle", arguments)


async def start_settings(machine: KvikMachine) -> None:
    """Before the first instruction: what is no option of the command line."""
    domain = machine.domain
    balloon = domain.devices.memballoon
    if balloon is not None and balloon.model != "none":
        if balloon.stats is not None:
            await machine.tell_balloon_period(balloon)
        if domain.current_memory and domain.current_memory < domain.memory:
            await machine.set_balloon(domain.current_memory * 1024)
