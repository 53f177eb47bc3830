"""From the settings of `kvik.vmm.config` to the devices of this package that need something of the host opened.

Nothing is attached to a machine here: the files and sockets are open, so that a sandbox may close behind them.
"""

from __future__ import annotations

from kvik.errors import InvalidArgument

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.vmm.config import (
        BalloonConfig,
        ChannelConfig,
        CharConfig,
        DiskConfig,
        FsConfig,
        RngConfig,
        VhostUserBlkConfig,
        VirtioMemConfig,
    )
    from kvik.vmm.virtio.balloon import Balloon
    from kvik.vmm.virtio.blk import Blk
    from kvik.vmm.virtio.console import Console
    from kvik.vmm.virtio.fs import Fs
    from kvik.vmm.virtio.mem import Mem
    from kvik.vmm.virtio.rng import Rng
    from kvik.vmm.virtio.vhost_user_blk import VhostUserBlk

__all__ = ["make_balloon", "make_console", "make_disk", "make_fs", "make_mem", "make_rng", "make_vhost_user_blk"]

DEFAULT_QUEUES = 4  # at most, where nobody says how many


def make_disk(config: DiskConfig, name: str, vcpus: int) -> Blk:
    """Opens and locks the image."""
    from kvik.vmm.backends.block import BlockImage
    from kvik.vmm.loop import IoThread
    from kvik.vmm.virtio.blk import Blk
    from kvik.vmm.virtio.queue import RING_PACKED

    if (config.fd >= 0) == bool(config.path):
        raise InvalidArgument(f"{name}: a disk needs a path or a descriptor, and not both")
    image = BlockImage(
        config.fd if config.fd >= 0 else config.path,
        image_format=config.format,
        read_only=config.readonly,
        cache=config.cache,
        aio=config.aio,
        locking=config.lock,
        discard=config.discard,
    )
    try:
        disk = Blk(
            name,
            image,
            serial=config.serial,
            queues=config.queues or min(vcpus, DEFAULT_QUEUES),
            queue_size=config.queue_size,
            rerror=config.rerror,
            werror=config.werror,
            thread=IoThread(name) if config.iothread else None,
        )
    except BaseException:
        image.close()
        raise
    if config.packed:
        disk.ring_features |= RING_PACKED
    if config.bps or config.iops:
        disk.set_limits(total=(config.bps, config.bps_burst, config.iops, config.iops_burst))
    return disk


def make_console(consoles: list[CharConfig], channels: list[ChannelConfig], name: str) -> Console:
    """One device for all terminals and channels of a machine."""
    from kvik.vmm.backends.char import Chardev
    from kvik.vmm.virtio.console import Console, Port

    ports = [
        Port(Chardev(config.backend, config.id or f"{name}.{index}"), console=True, alias=config.id)
        for index, config in enumerate(consoles)
    ]
    for config in channels:
        alias = config.id or config.name
        ports.append(Port(Chardev(config.backend, alias), name=config.name, alias=alias))
    return Console(name, ports)


def make_rng(config: RngConfig, name: str) -> Rng:
    from kvik.vmm.virtio.rng import Rng

    return Rng(name, rate=config.rate)


def make_balloon(config: BalloonConfig, name: str) -> Balloon:
    from kvik.vmm.virtio.balloon import Balloon

    return Balloon(name, deflate_on_oom=config.deflate_on_oom, reporting=config.free_page_reporting)


def make_mem(config: VirtioMemConfig, name: str, *, shared: bool) -> Mem:
    from kvik.vmm.virtio.mem import Mem

    return Mem(name, config.size, requested=config.requested, block=config.block, node=config.node, shared=shared)


def make_vhost_user_blk(config: VhostUserBlkConfig, name: str) -> VhostUserBlk:
    from kvik.vmm.virtio.vhost_user_blk import VhostUserBlk

    return VhostUserBlk(name, config.fd if config.fd >= 0 else config.socket, config.queues)


def make_fs(config: FsConfig, name: str) -> Fs:
    from kvik.vmm.virtio.fs import Fs

    return Fs(name, config.fd if config.fd >= 0 else config.socket, config.tag, config.queues)
