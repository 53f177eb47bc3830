"""What a machine is made of: the parsed form of the command line, and what a Python program gives to `Machine`.

Sizes are bytes. `fd` fields name descriptors that the caller opened for the machine (-1: none).
"""

from __future__ import annotations

from kvik.vmm.layout import MIB
from kvik.vmm.settings import field, settings

__all__ = [
    "CLASSES",
    "BalloonConfig",
    "BootConfig",
    "ChannelConfig",
    "CharConfig",
    "CpuConfig",
    "DiskConfig",
    "FsConfig",
    "MachineConfig",
    "MemoryConfig",
    "NetConfig",
    "NumaConfig",
    "RngConfig",
    "RtcConfig",
    "SmbiosConfig",
    "VhostUserBlkConfig",
    "VirtioMemConfig",
    "VsockConfig",
    "WatchdogConfig",
]


@settings
class NumaConfig:
    """A NUMA node. `distances` to every node in order (10: itself); `host_nodes`: where the host keeps its memory."""

    memory: int = 0
    cpus: tuple[int, ...] = ()
    distances: tuple[int, ...] = ()
    host_nodes: tuple[int, ...] = ()
    policy: str = "bind"  # bind, preferred, interleave


@settings
class MemoryConfig:
    size: int = 512 * MIB
    hotplug: int = 0  # room for memory that comes later (virtio-mem)
    shared: bool = False  # a memfd: for vhost-user, forks
    hugepages: int = 0  # size of explicit huge pages; 0: transparent ones
    prealloc: bool = False
    nodes: list[NumaConfig] = field(default_factory=list)


@settings
class CpuConfig:
    """`maximum`: with hot-plug; 0 for `count`. Topology figures of 0 follow from the others."""

    count: int = 1
    maximum: int = 0
    sockets: int = 0
    dies: int = 1
    cores: int = 0
    threads: int = 1
    model: str = "host"
    features: tuple[str, ...] = ()  # "+name" or "-name"


@settings
class BootConfig:
    kernel: str = ""
    kernel_fd: int = -1
    initrd: str = ""
    initrd_fd: int = -1
    cmdline: str = ""
    protocol: str = "auto"  # auto, pvh, bzimage
    cache: str = ""  # directory of unpacked kernels; empty: unpack in memory
    stable: bool = False  # nobody writes the files while the machine runs: map them, do not read them
    stable_kernel: bool = False  # the same of the kernel alone: one of a cache, which is never written again
    firmware: str = ""  # OVMF code image, instead of a kernel
    firmware_fd: int = -1
    nvram: str = ""  # its variables
    nvram_fd: int = -1


@settings
class SmbiosConfig:
    manufacturer: str = "kvik"
    product: str = "kvik-vmm"
    version: str = ""
    serial: str = ""  # cloud-init reads it: ds=nocloud
    uuid: str = ""
    sku: str = ""
    family: str = ""
    oem_strings: tuple[str, ...] = ()


@settings
class CharConfig:
    """A character backend: `backend` is stdio, null, file:PATH, pty, unix:PATH or fd=N (`backends.char`); `log`, where
    output goes as well, is file:PATH or fd=N. Consoles and channels are ports of one device, in `slot`."""

    backend: str = "null"
    id: str = ""
    log: str = ""
    slot: int = 0


@settings
class ChannelConfig:
    """A named port of the virtio console, for the guest agent and the like."""

    name: str = "org.qemu.guest_agent.0"
    backend: str = "null"
    id: str = ""
    log: str = ""
    slot: int = 0


@settings
class DiskConfig:
    path: str = ""
    fd: int = -1
    id: str = ""
    format: str = "raw"
    readonly: bool = False
    cache: str = "writeback"  # none, writeback, writethrough, unsafe
    aio: str = "auto"  # auto, threads, io_uring
    discard: bool = True
    serial: str = ""
    queues: int = 0  # 0: one a vCPU, at most 4
    queue_size: int = 256
    werror: str = "report"  # report, stop, enospc, ignore
    rerror: str = "report"
    iothread: bool = True  # a thread of its own; off: the main loop
    lock: bool = True  # hold QEMU's image locks
    slot: int = 0  # PCI slot; 0: the next free one
    packed: bool = False
    bps: int = 0  # bytes a second, 0: no limit
    bps_burst: int = 0
    iops: int = 0
    iops_burst: int = 0


@settings
class VhostUserBlkConfig:
    """`life_fd`: held open as long as the device is there; its back end may end when it closes."""

    socket: str = ""
    fd: int = -1
    life_fd: int = -1
    id: str = ""
    queues: int = 1
    queue_size: int = 256
    slot: int = 0


@settings
class NetConfig:
    """`backend`: tap (ours, or a named one), passt (a stream socket), none. `fds`: queues of an open tap."""

    backend: str = "tap"
    fds: tuple[int, ...] = ()
    path: str = ""  # passt's socket
    id: str = ""
    ifname: str = ""
    mac: str = ""
    mtu: int = 0
    queues: int = 1
    queue_size: int = 256
    vhost: str = "auto"  # auto, on, off
    vhost_fds: tuple[int, ...] = ()
    link: bool = True
    iothread: bool = True
    slot: int = 0
    packed: bool = False
    rx_bps: int = 0
    tx_bps: int = 0
    rx_pps: int = 0
    tx_pps: int = 0


@settings
class RngConfig:
    id: str = ""
    rate: int = 0  # bytes a second, 0: no limit
    slot: int = 0


@settings
class BalloonConfig:
    id: str = ""
    deflate_on_oom: bool = True
    free_page_reporting: bool = True
    slot: int = 0


@settings
class VsockConfig:
    cid: int = 3
    uds: str = ""  # our own implementation, on this Unix socket; empty: the kernel's vhost-vsock
    fd: int = -1  # of /dev/vhost-vsock
    id: str = ""
    slot: int = 0


@settings
class FsConfig:
    tag: str = ""
    socket: str = ""  # virtiofsd's
    fd: int = -1
    id: str = ""
    queues: int = 1
    slot: int = 0


@settings
class VirtioMemConfig:
    size: int = 0  # how far it can grow
    requested: int = 0
    block: int = 2 * MIB
    node: int = 0
    id: str = ""
    slot: int = 0


@settings
class WatchdogConfig:
    action: str = "reset"  # reset, shutdown, poweroff, pause, none, inject-nmi
    id: str = ""
    slot: int = 0


@settings
class RtcConfig:
    base: str = "utc"  # utc, localtime, or seconds since the epoch


@settings
class MachineConfig:
    """Everything. A field is named as its option of the command line where there is one."""

    name: str = "kvik-vmm"
    uuid: str = ""
    boot: BootConfig = field(default_factory=BootConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    cpus: CpuConfig = field(default_factory=CpuConfig)
    smbios: SmbiosConfig = field(default_factory=SmbiosConfig)
    rtc: RtcConfig = field(default_factory=RtcConfig)
    serials: list[CharConfig] = field(default_factory=list)
    consoles: list[CharConfig] = field(default_factory=list)
    channels: list[ChannelConfig] = field(default_factory=list)
    disks: list[DiskConfig] = field(default_factory=list)
    vhost_user_blk: list[VhostUserBlkConfig] = field(default_factory=list)
    nets: list[NetConfig] = field(default_factory=list)
    rng: list[RngConfig] = field(default_factory=list)
    balloon: list[BalloonConfig] = field(default_factory=list)
    vsock: list[VsockConfig] = field(default_factory=list)
    fs: list[FsConfig] = field(default_factory=list)
    virtio_mem: list[VirtioMemConfig] = field(default_factory=list)
    watchdog: list[WatchdogConfig] = field(default_factory=list)
    debugcon: list[CharConfig] = field(default_factory=list)
    pvpanic: bool = True
    vmgenid: bool = True
    qmp: list[str] = field(default_factory=list)  # PATH or fd=N
    gdb: str = ""
    metrics: str = ""
    paused: bool = False
    incoming: str = ""  # wait for a migration from this address
    restore: str = ""  # a snapshot's directory
    catch_up: bool = False  # a restored guest's clock counts the time at rest
    sandbox: str = "on"  # on, log, off
    migratable: bool = False  # the sandbox lets the machine be sent elsewhere, which forks sender processes
    snapshots: str = ""  # the directory in which a sandboxed machine may save itself; it exists
    trace: str = ""
    log: str = "text"  # text, json
    on_reboot: str = "reset"  # reset, shutdown, none: what a guest's reboot does
    on_poweroff: str = "shutdown"  # shutdown, pause
    on_panic: str = "pause"  # pause, shutdown, exit-failure, none


CLASSES: dict[str, type] = {
    name: value for name, value in globals().items() if name.endswith("Config") and isinstance(value, type)
}
