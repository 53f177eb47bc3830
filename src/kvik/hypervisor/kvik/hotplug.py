"""Devices that come to a running kvik-vmm and go, by QEMU's commands: a backend, then the device in front of it.

Descriptors go first, by `add-fd` (images) and `getfd` (taps, sockets): kvik-vmm, in its sandbox, opens nothing. What
was done is taken back if a later step fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from kvik.conf.devices.chardev import Channel, Console, Serial
from kvik.conf.devices.controller import Controller
from kvik.conf.devices.disk import Disk
from kvik.conf.devices.interface import Interface
from kvik.conf.devices.memory import Memory
from kvik.conf.devices.other import Filesystem, Rng, Vsock
from kvik.errors import ConfigUnsupported, HypervisorError, KvikError, MonitorError, OperationUnsupported
from kvik.hypervisor.cpus import boot_vcpus
from kvik.hypervisor.descriptors import Opened, open_disk, open_vsock
from kvik.hypervisor.kvik import support
from kvik.hypervisor.kvik.argv import Files, disk_options, rate_of, slot_of, vhost_user_options
from kvik.hypervisor.kvik.changes import throttle
from kvik.hypervisor.names import (
    TAP_TYPES,
    alias_of,
    image_name,
    life_name,
    passt_name,
    switch_name,
    tap_name,
    vhost_name,
    vhost_user_name,
)
from kvik.hypervisor.sidecars import storage_daemon
from kvik.hypervisor.sidecars.start import start_for_device

if TYPE_CHECKING:
    from kvik.hypervisor.kvik.machine import KvikMachine

__all__ = ["attach", "finish_detach", "netdev_name", "node_name"]

Props = dict[str, Any]

_DEADLINE = 20.0


def node_name(alias: str) -> str:
    """The block node of a disk."""
    return f"{alias}-storage"  # kvik-vmm calls those of its command line so


def netdev_name(alias: str) -> str:
    return f"host{alias}"


async def attach(machine: KvikMachine, device: Any, files: Mapping[str, int]) -> None:
    """Raises `OperationUnsupported`, `ConfigUnsupported`, `MonitorError`, `HostError`; then nothing has changed."""
    kind: Any = type(device)
    plug = _PLUGS.get(kind)
    if plug is None:
        why = _FIXED.get(kind, "it is made at the start only")
        raise OperationUnsupported(
            f"kvik-vmm cannot plug a {type(device).__name__.lower()} into running machine {machine.name}: {why}",
            remedy="put it into the definition (--config) and start the machine again",
        )
    if isinstance(device, Interface):
        support.complete_interface(device)
    with ExitStack() as close, ExitStack() as undo:
        opened = Opened(close, undo, files, machine.bases())
        steps = _Steps(machine)
        try:
            await _open(machine, device, opened)
            await plug(steps, device, opened)
        except BaseException:
            await asyncio.shield(steps.undo())
            await asyncio.shield(machine.sidecars.end(alias_of(device)))
            raise
        undo.pop_all()


async def _open(machine: KvikMachine, device: Any, opened: Opened) -> None:
    """The host's side: files, and processes that serve the device."""
    if isinstance(device, Vsock):
        open_vsock(opened, device)
    if isinstance(device, Disk):
        await opened.beside(open_disk, device)
        if not storage_daemon.by_vhost_user(device):
            return
        await _need_shared_memory(machine)
    if isinstance(device, Disk | Filesystem | Interface):
        log_fd = os.open(machine.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        vcpus = boot_vcpus(machine.domain)
        try:
            member = await start_for_device(machine.sidecars, device, machine.directory, opened, log_fd, vcpus=vcpus)
        finally:
            os.close(log_fd)
        if member is not None:
            machine.watch_sidecar(member)


async def _need_shared_memory(machine: KvikMachine) -> None:
    reply = await machine.execute("query-memdev")
    if not any(isinstance(item, dict) and item.get("share") is True for item in reply or []):
        raise OperationUnsupported(
            f"machine {machine.name}: a disk that another process serves needs guest memory that can be shared",
            remedy="add <memoryBacking><source type='memfd'/></memoryBacking> to the definition and start it again",
        )


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

    async def give(self, label: str, fd: int) -> str:
        """The descriptor under a name, which a device then takes."""
        await self.do("getfd", {"fdname": label}, "closefd", {"fdname": label}, fd=fd)
        return label

    async def undo(self) -> None:
        for command, arguments in reversed(self._back):
            with contextlib.suppress(KvikError):
                await self.machine.execute(command, arguments)


async def _attach_disk(steps: _Steps, disk: Disk, opened: Opened) -> None:
    if storage_daemon.by_vhost_user(disk):
        await _attach_served(steps, disk, opened)
        return
    alias = alias_of(disk)
    name = image_name(alias, 0)
    reply = await steps.do("add-fd", {"opaque": name}, fd=opened.fds[name])
    number = reply.get("fdset-id") if isinstance(reply, dict) else None
    if not isinstance(number, int):
        raise HypervisorError(f"{steps.machine.name}: the reply to add-fd is malformed")
    steps._back.append(("remove-fd", {"fdset-id": number}))
    driver = disk.driver
    cache = driver.cache if driver is not None else None
    file: Props = {"driver": "file", "filename": f"/dev/fdset/{number}"}
    if driver is not None and driver.io is not None:
        file["aio"] = driver.io
    if disk.shareable:
        file["locking"] = "off"
    node = {
        "driver": "raw",
        "node-name": node_name(alias),
        "read-only": disk.readonly,
        "discard": "ignore" if driver is not None and driver.discard == "ignore" else "unmap",
        "cache": {"direct": cache in ("none", "directsync"), "no-flush": cache == "unsafe"},
        "file": file,
    }
    await steps.do("blockdev-add", node, "blockdev-del", {"node-name": node_name(alias)})
    asked = disk_options(disk, Files({}))
    await _device_add(
        steps,
        {
            "driver": "virtio-blk-pci",
            "id": alias,
            "drive": node_name(alias),
            "serial": disk.serial or None,
            "num-queues": asked.get("queues"),
            "queue-size": asked.get("queue-size"),
            "packed": asked.get("packed"),
            "werror": asked.get("werror"),
            "rerror": asked.get("rerror"),
            "write-cache": "off" if cache in ("writethrough", "directsync") else "on",
            "addr": _addr(slot_of(disk)),
        },
        str(disk.source.location if disk.source is not None else alias),
    )
    if disk.iotune is not None:
        await throttle(steps.machine, disk, disk.iotune)
    steps.machine.own_disks.add(alias)


async def _attach_served(steps: _Steps, disk: Disk, opened: Opened) -> None:
    alias = alias_of(disk)
    label = await steps.give(f"vublk-{alias}", opened.fds[vhost_user_name(alias)])
    life = opened.fds.get(life_name(alias))
    socket = {"type": "socket", "data": {"addr": {"type": "fd", "data": {"str": label}}, "server": False}}
    await steps.do("chardev-add", {"id": _backend(alias), "backend": socket}, "chardev-remove", {"id": _backend(alias)})
    asked = vhost_user_options(disk, Files({}), boot_vcpus(steps.machine.domain))
    props = {
        "driver": "vhost-user-blk-pci",
        "id": alias,
        "chardev": _backend(alias),
        "lifefd": await steps.give(f"life-{alias}", life) if life is not None else None,
        "num-queues": asked["queues"],
        "queue-size": asked["queue-size"],
        "addr": _addr(slot_of(disk)),
    }
    await _device_add(steps, props, str(disk.source.location if disk.source is not None else alias))
    # The device has a duplicate: what is left here would keep the connection open when it goes.
    await steps.machine.execute("chardev-remove", {"id": _backend(alias)})
    await steps.machine.execute("closefd", {"fdname": label})


async def _attach_interface(steps: _Steps, nic: Interface, opened: Opened) -> None:
    alias = alias_of(nic)
    netdev: Props = {"id": netdev_name(alias)}
    queues = 1
    stream = next((name for name in (switch_name(alias), passt_name(alias)) if name in opened.fds), None)
    if stream is not None:
        label = await steps.give(stream.replace(":", "-"), opened.fds[stream])
        netdev |= {"type": "stream", "server": stream.startswith("switch:"), "addr": {"type": "fd", "str": label}}
    elif nic.type in TAP_TYPES:
        named: dict[str, list[str]] = {"fds": [], "vhostfds": []}
        for key, prefix in (("fds", tap_name(alias)), ("vhostfds", vhost_name(alias))):
            while (fd := opened.fds.get(f"{prefix}:{len(named[key])}")) is not None:
                named[key].append(await steps.give(f"{prefix}:{len(named[key])}".replace(":", "-"), fd))
        netdev |= {
            "type": "tap",
            "fds": ":".join(named["fds"]),
            "vhost": bool(named["vhostfds"]) or None,
            "vhostfds": ":".join(named["vhostfds"]) or None,
        }
        queues = len(named["fds"])
    else:
        raise ConfigUnsupported(
            f"an interface of type {nic.type!r} cannot be plugged into running machine {steps.machine.name}",
            remedy="bridge, network, direct, ethernet, or user with <backend type='passt'/>",
        )
    await steps.do("netdev_add", netdev, "netdev_del", {"id": netdev_name(alias)})
    bandwidth = nic.bandwidth if not netdev.get("fds") else None  # a tap's is the host's traffic control
    card = {
        "driver": "virtio-net-pci",
        "id": alias,
        "netdev": netdev_name(alias),
        "mac": nic.mac.address if nic.mac is not None else None,
        "host_mtu": nic.mtu.size if nic.mtu is not None else None,
        "mq": True if queues > 1 else None,
        "rx_queue_size": nic.driver.rx_queue_size if nic.driver is not None else None,
        "packed": nic.driver.packed if nic.driver is not None else None,
        "x-rx-bps": rate_of(bandwidth.inbound) if bandwidth is not None else None,
        "x-tx-bps": rate_of(bandwidth.outbound) if bandwidth is not None else None,
        "addr": _addr(slot_of(nic)),
    }
    await _device_add(steps, card, f"interface {alias}")
    if nic.link is not None and nic.link.state == "down":
        await steps.do("set_link", {"name": alias, "up": False})


async def _attach_rng(steps: _Steps, rng: Rng, opened: Opened) -> None:
    alias, rate = alias_of(rng), rng.rate
    backend = {"qom-type": "rng-builtin", "id": _backend(alias)}
    await steps.do("object-add", backend, "object-del", {"id": _backend(alias)})
    props: Props = {"driver": "virtio-rng-pci", "id": alias, "rng": _backend(alias), "addr": _addr(slot_of(rng))}
    if rate is not None:
        props |= {"max-bytes": rate.bytes, "period": rate.period or 1000}
    await _device_add(steps, props, f"rng {alias}")


async def _attach_vsock(steps: _Steps, vsock: Vsock, opened: Opened) -> None:
    alias = alias_of(vsock)
    label = await steps.give(f"vsock-{alias}", opened.fds[f"vsock:{alias}"])
    cid = vsock.cid.address if vsock.cid is not None else None
    props = {
        "driver": "vhost-vsock-pci",
        "id": alias,
        "guest-cid": cid,
        "vhostfd": label,
        "addr": _addr(slot_of(vsock)),
    }
    await _device_add(steps, props, f"vsock {alias}")


async def _attach_filesystem(steps: _Steps, share: Filesystem, opened: Opened) -> None:
    alias = alias_of(share)
    fd = opened.fds.get(f"fs:{alias}")
    if fd is None:
        raise OperationUnsupported(
            f"a virtiofsd that somebody else started cannot be connected to running machine {steps.machine.name}",
            remedy="give <source dir=.../>, or put it into the definition (--config) and start the machine again",
        )
    label = await steps.give(f"fs-{alias}", fd)
    backend = {"type": "socket", "data": {"addr": {"type": "fd", "data": {"str": label}}, "server": False}}
    await steps.do(
        "chardev-add", {"id": _backend(alias), "backend": backend}, "chardev-remove", {"id": _backend(alias)}
    )
    tag = share.target.dir if share.target is not None else ""
    props = {"driver": "vhost-user-fs-pci", "id": alias, "chardev": _backend(alias), "tag": tag}
    await _device_add(steps, props | {"addr": _addr(slot_of(share))}, f"filesystem {tag}")


async def _attach_memory(steps: _Steps, memory: Memory, opened: Opened) -> None:
    alias, target = alias_of(memory), memory.target
    assert target is not None
    backend = {"qom-type": "memory-backend-ram", "id": _backend(alias), "size": (target.size or 0) * 1024}
    await steps.do("object-add", backend, "object-del", {"id": _backend(alias)})
    props = {
        "driver": "virtio-mem-pci",
        "id": alias,
        "memdev": _backend(alias),
        "requested-size": (target.requested or 0) * 1024,
        "block-size": target.block * 1024 if target.block is not None else None,
        "node": target.node,
        "addr": _addr(slot_of(memory)),
    }
    await _device_add(steps, props, f"memory {alias}")


def _backend(alias: str) -> str:
    return f"back{alias}"


# Each opens nothing: that was done before, and what is passed on is duplicated by kvik-vmm's side of the socket.
_PLUGS: Mapping[type, Callable[[_Steps, Any, Opened], Awaitable[None]]] = {
    Disk: _attach_disk,
    Interface: _attach_interface,
    Rng: _attach_rng,
    Vsock: _attach_vsock,
    Filesystem: _attach_filesystem,
    Memory: _attach_memory,
}
_FIXED = {
    Channel: "the ports of its console device are counted when it starts",
    Console: "the ports of its console device are counted when it starts",
    Controller: "the ports of its console device are counted when it starts",
    Serial: "its serial lines are on fixed ports",
}


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
    if isinstance(device, Disk) and machine.by_vhost_user(device):
        storage_daemon.monitor_path(machine.directory, alias).unlink(missing_ok=True)
        storage_daemon.redo_path(machine.directory, alias).unlink(missing_ok=True)
        steps.append(("chardev-remove", {"id": _backend(alias)}))  # of an attach that was cut off
        steps += [("closefd", {"fdname": f"{prefix}-{alias}"}) for prefix in ("vublk", "life")]
    elif isinstance(device, Disk):
        steps.append(("blockdev-del", {"node-name": node_name(alias)}))
    elif isinstance(device, Interface):
        steps.append(("netdev_del", {"id": netdev_name(alias)}))
    elif isinstance(device, Filesystem):
        steps.append(("chardev-remove", {"id": _backend(alias)}))
        steps.append(("closefd", {"fdname": f"fs-{alias}"}))
    elif isinstance(device, Rng | Memory):
        steps.append(("object-del", {"id": _backend(alias)}))
    for command, arguments in steps:
        with contextlib.suppress(KvikError):
            await machine.execute(command, arguments)
    await machine.sidecars.end(alias)
    if isinstance(device, Disk):
        machine.own_disks.discard(alias)
        await _remove_fdsets(machine, image_name(alias, 0))


async def _remove_fdsets(machine: KvikMachine, opaque: str) -> None:
    with contextlib.suppress(KvikError):
        reply = await machine.execute("query-fdsets")
        for item in reply if isinstance(reply, list) else []:
            if any(entry.get("opaque") == opaque for entry in item.get("fds", [])):
                await machine.execute("remove-fd", {"fdset-id": item["fdset-id"]})
