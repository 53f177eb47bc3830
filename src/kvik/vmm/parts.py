"""One function a kind of device: from its part of the configuration to the device, ready for `Machine.add`.

Used at start, by `build`, and for hot-plug, by the monitor. A module of a device is imported when the first such
device is made. What a function opened it closes again when it fails.
"""

from __future__ import annotations

from kvik.errors import InvalidArgument

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvik.vmm import config as c
    from kvik.vmm.device import Device
    from kvik.vmm.loop import EventLoop
    from kvik.vmm.machine import Machine
    from kvik.vmm.virtio.device import VirtioDevice

__all__ = ["balloon", "console", "disk", "rng", "serial"]

MAX_QUEUES = 4  # a disk's, unless asked for more: one thread serves them all


def _loop(machine: Machine, wanted: bool, name: str) -> EventLoop | None:
    """An I/O thread's loop for a device that wants one."""
    return machine.io_thread(name).loop if wanted else None


def serial(machine: Machine, config: c.CharConfig, index: int) -> Device:
    from kvik.vmm.backends.char import Chardev
    from kvik.vmm.devices.serial import Serial

    name = config.id or f"serial{index}"
    chardev = Chardev(config.backend, name, config.log)
    chardev.on_quit = machine.quit
    return Serial(name, chardev, index)


def console(machine: Machine, consoles: Sequence[c.CharConfig], channels: Sequence[c.ChannelConfig]) -> VirtioDevice:
    """All consoles and channels of a machine are ports of one device."""
    from kvik.vmm.backends.char import Chardev
    from kvik.vmm.virtio.console import Console, Port

    ports: list[Port] = []
    try:
        for index, item in enumerate(consoles):
            name = item.id or f"console{index}"
            chardev = Chardev(item.backend, name, item.log)
            chardev.on_quit = machine.quit
            ports.append(Port(chardev, console=True, alias=name))
        for index, channel in enumerate(channels):
            name = channel.id or f"channel{index}"
            ports.append(Port(Chardev(channel.backend, name, channel.log), name=channel.name, alias=name))
        return Console("virtio-serial0", ports)
    except BaseException:
        for port in ports:
            port.chardev.close()
        raise


def disk(machine: Machine, config: c.DiskConfig, index: int) -> VirtioDevice:
    from kvik.vmm.backends.block import BlockImage
    from kvik.vmm.ratelimit import RateLimiter
    from kvik.vmm.virtio.blk import Blk

    name = config.id or f"disk{index}"
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
    if config.bps or config.iops:
        device.limits["total"] = RateLimiter(
            config.bps, config.iops, bytes_burst=config.bps_burst, ops_burst=config.iops_burst
        )
    return device


def rng(machine: Machine, config: c.RngConfig, index: int) -> VirtioDevice:
    from kvik.vmm.virtio.rng import Rng

    return Rng(config.id or f"rng{index}", rate=config.rate)


def balloon(machine: Machine, config: c.BalloonConfig, index: int) -> VirtioDevice:
    from kvik.vmm.virtio.balloon import Balloon

    name = config.id or f"balloon{index}"
    return Balloon(name, deflate_on_oom=config.deflate_on_oom, reporting=config.free_page_reporting)
