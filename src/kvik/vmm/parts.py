"""One function a kind of device: from its part of the configuration to the device, ready for `Machine.add`.

Used at start, by `build`, and for hot-plug, by the monitor. What a function opened it closes again when it fails. The
module of a device is imported when the first such device is made.
"""

from __future__ import annotations

from kvik.errors import InvalidArgument
from kvik.vmm.layout import DEBUGCON_PORT, FIRMWARE_LOG_PORT

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from kvik.vmm import config as c
    from kvik.vmm.device import Device
    from kvik.vmm.loop import EventLoop
    from kvik.vmm.machine import Machine

__all__ = ["KINDS", "console", "debugcon", "make", "serial"]

MAX_QUEUES = 4  # a disk's, unless asked for more: one thread serves them all


def make(machine: Machine, field: str, config: Any, index: int) -> Device:
    """The device that `config` describes, item `index` of MachineConfig's list `field`; one of KINDS."""
    prefix, maker = KINDS[field]
    device = maker(machine, config, config.id or f"{prefix}{index}")
    machine.made[device.name] = field, config
    return device


def _loop(machine: Machine, wanted: bool, name: str) -> EventLoop | None:
    """An I/O thread's loop for a device that wants one."""
    return machine.io_thread(name).loop if wanted else None


# Not on the PCI bus -----------------------------------------------------------------------------------------------


def serial(machine: Machine, config: c.CharConfig, index: int) -> Device:
    from kvik.vmm.backends.char import Chardev
    from kvik.vmm.devices.serial import Serial

    name = config.id or f"serial{index}"
    chardev = Chardev(config.backend, name, config.log)
    chardev.on_quit = machine.quit
    return Serial(name, chardev, index)


def debugcon(machine: Machine, config: c.CharConfig, index: int) -> Device:
    from kvik.vmm.backends.char import Chardev
    from kvik.vmm.devices.debugcon import Debugcon

    name = config.id or f"debugcon{index}"
    return Debugcon(name, Chardev(config.backend, name), FIRMWARE_LOG_PORT if machine.firmware else DEBUGCON_PORT)


# On it ------------------------------------------------------------------------------------------------------------


def console(machine: Machine) -> Device:
    """All consoles and channels of a machine are ports of one device."""
    from kvik.vmm.backends.char import Chardev
    from kvik.vmm.virtio.console import Console, Port

    ports: list[Port] = []
    try:
        for index, item in enumerate(machine.config.consoles):
            name = item.id or f"console{index}"
            chardev = Chardev(item.backend, name, item.log)
            chardev.on_quit = machine.quit
            ports.append(Port(chardev, console=True, alias=name))
        for index, channel in enumerate(machine.config.channels):
            name = channel.id or f"channel{index}"
            ports.append(Port(Chardev(channel.backend, name, channel.log), name=channel.name, alias=name))
        return Console("virtio-serial0", ports)
    except BaseException:
        for port in ports:
            port.chardev.close()
        raise


def disk(machine: Machine, config: c.DiskConfig, name: str) -> Device:
    from kvik.vmm.backends.block import BlockImage
    from kvik.vmm.ratelimit import RateLimiter
    from kvik.vmm.virtio.blk import Blk
    from kvik.vmm.virtio.queue import RING_PACKED

    if bool(config.path) == (config.fd >= 0):
        raise InvalidArgument(f"disk {name} needs either a path or a descriptor", remedy="give --disk FILE or fd=N")
    image = BlockImage(
        config.path or config.fd,
        image_format=config.format,
        read_only=config.readonly,
        cache=config.cache,
        aio=config.aio,
        locking=config.lock,
        discard=config.discard,
        name=name,
    )
    try:
        device = Blk(
            name,
            image,
            serial=config.serial,
            queues=config.queues or min(machine.config.cpus.count, MAX_QUEUES),
            queue_size=config.queue_size,
            rerror=config.rerror,
            werror=config.werror,
            loop=_loop(machine, config.iothread, name),
        )
    except BaseException:
        image.close()
        raise
    if config.packed:
        device.ring_features |= RING_PACKED
    if config.bps or config.iops:
        device.limits["total"] = RateLimiter(
            config.bps, config.iops, bytes_burst=config.bps_burst, ops_burst=config.iops_burst
        )
    return device


def net(machine: Machine, config: c.NetConfig, name: str) -> Device:
    from kvik.vmm.nets import make_net

    device = make_net(config, name)
    if (loop := _loop(machine, config.iothread, name)) is not None:
        device.loop = loop
    return device


def vsock(machine: Machine, config: c.VsockConfig, name: str) -> Device:
    from kvik.vmm.nets import make_vsock

    return make_vsock(config, name)


def vhost_user_blk(machine: Machine, config: c.VhostUserBlkConfig, name: str) -> Device:
    from kvik.vmm.virtio.vhost_user_blk import VhostUserBlk

    return VhostUserBlk(
        name, _socket(config, name), config.queues, queue_size=config.queue_size, life_fd=config.life_fd
    )


def fs(machine: Machine, config: c.FsConfig, name: str) -> Device:
    from kvik.vmm.virtio.fs import Fs

    return Fs(name, _socket(config, name), config.tag, config.queues)


def _socket(config: c.VhostUserBlkConfig | c.FsConfig, name: str) -> str | int:
    if bool(config.socket) == (config.fd >= 0):
        raise InvalidArgument(f"{name} needs its back end's socket, by path or by descriptor")
    return config.socket or config.fd


def rng(machine: Machine, config: c.RngConfig, name: str) -> Device:
    from kvik.vmm.virtio.rng import Rng

    return Rng(name, rate=config.rate)


def balloon(machine: Machine, config: c.BalloonConfig, name: str) -> Device:
    from kvik.vmm.virtio.balloon import Balloon

    return Balloon(name, deflate_on_oom=config.deflate_on_oom, reporting=config.free_page_reporting)


def virtio_mem(machine: Machine, config: c.VirtioMemConfig, name: str) -> Device:
    from kvik.vmm.virtio.mem import Mem

    return Mem(
        name,
        config.size,
        requested=config.requested,
        block=config.block,
        node=config.node,
        shared=machine.config.memory.shared,
    )


def watchdog(machine: Machine, config: c.WatchdogConfig, name: str) -> Device:
    from kvik.vmm.devices.watchdog import Watchdog

    return Watchdog(name, config.action)


# The lists of MachineConfig whose items are devices: field -> (prefix of a name that nobody chose, maker). In this
# order they get the free PCI slots.
KINDS: dict[str, tuple[str, Callable[[Machine, Any, str], Device]]] = {
    "disks": ("disk", disk),
    "vhost_user_blk": ("vhost-user-blk", vhost_user_blk),
    "nets": ("net", net),
    "vsock": ("vsock", vsock),
    "rng": ("rng", rng),
    "balloon": ("balloon", balloon),
    "fs": ("fs", fs),
    "virtio_mem": ("mem", virtio_mem),
    "watchdog": ("watchdog", watchdog),
}
