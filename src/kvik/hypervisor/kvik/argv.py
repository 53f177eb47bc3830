"""`build`: a complete document to kvik-vmm's command line. Pure: the same input gives the same words, for ever.

Descriptors come in as numbers by name (see `hypervisor/names.py`); a name that is missing means that kvik-vmm opens
the path itself, which is what a person wants to see in `domxml-to-native`. The options are those of
`kvik-vmm --help`; a comma in a value is written twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from kvik.conf.cpuset import parse_cpuset
from kvik.conf.devices.chardev import Channel, Chardev
from kvik.conf.devices.common import Device
from kvik.conf.devices.disk import Disk
from kvik.conf.devices.interface import Interface, Rate
from kvik.conf.devices.memory import Memballoon, Memory
from kvik.conf.devices.other import Filesystem, Rng, Vsock, Watchdog
from kvik.conf.domain import Domain
from kvik.conf.os import SysinfoBlock
from kvik.errors import ConfigUnsupported
from kvik.hypervisor.cpus import boot_vcpus
from kvik.hypervisor.names import (
    MONITOR,
    TAP_TYPES,
    alias_of,
    chardev_name,
    image_name,
    is_passt,
    life_name,
    log_name,
    passt_name,
    switch_name,
    tap_name,
    vhost_name,
    vhost_user_name,
)
from kvik.hypervisor.sidecars import storage_daemon

__all__ = [
    "CommandLine",
    "Files",
    "build",
    "disk_options",
    "net_options",
    "rate_of",
    "slot_of",
    "vhost_user_options",
]

Options = dict[str, object]

_SECTION = 128 << 10  # KiB: Linux's unit of memory that comes and goes


@dataclass(frozen=True, slots=True)
class CommandLine:
    """`fds` are the descriptors that kvik-vmm must inherit, under the numbers that `argv` mentions."""

    argv: list[str]
    fds: tuple[int, ...]


class Files:
    """Descriptors by name."""

    def __init__(self, fds: Mapping[str, int]) -> None:
        self._fds = fds

    def get(self, name: str) -> int | None:
        return self._fds.get(name)

    def numbered(self, prefix: str) -> str | None:
        """`prefix:0`, `prefix:1`, ... as 10:11:...; None if there is none."""
        found: list[str] = []
        while (fd := self._fds.get(f"{prefix}:{len(found)}")) is not None:
            found.append(str(fd))
        return ":".join(found) or None


def build(
    domain: Domain,
    emulator: str,
    files: Mapping[str, int] | None = None,
    *,
    paused: bool = True,
    now: float = 0.0,
    cached_kernel: bool = False,
) -> CommandLine:
    """`now`, in seconds since the epoch, matters to <clock offset='variable'> only. `cached_kernel`: the kernel among
    `files` is one of our cache, which nobody writes any more. Raises `ConfigUnsupported`."""
    fds = dict(files or {})
    passed = Files(fds)
    argv = [emulator, "--name", domain.name]
    for name, value in _options(domain, passed, now, cached_kernel):
        argv += [f"--{name}", value] if value is not None else [f"--{name}"]
    if paused:
        argv.append("--paused")
    if any("\0" in word for word in argv):
        raise ConfigUnsupported("a value contains a NUL character, which no command line can hold")
    return CommandLine(argv, tuple(sorted(set(fds.values()))))


def _options(domain: Domain, files: Files, now: float, cached_kernel: bool) -> Iterator[tuple[str, str | None]]:
    """(option, value or None for a flag), machine first, then the devices kind by kind in the document's order."""
    if domain.uuid:
        yield "uuid", domain.uuid
    yield from _memory(domain)
    yield from _cpus(domain)
    yield from _boot(domain, files, cached_kernel)
    yield from _smbios(domain)
    yield "rtc", _clock(domain, now)
    yield "on-poweroff", "shutdown" if domain.on_poweroff in (None, "destroy") else "pause"
    yield "on-reboot", "reset" if domain.on_reboot in (None, "restart") else "shutdown"
    yield "on-panic", "shutdown" if domain.on_crash in (None, "destroy") else "pause"
    fd = files.get(MONITOR)
    yield "qmp", f"fd={fd}" if fd is not None else "monitor.sock"
    incoming = files.get("state")
    if incoming is not None:
        yield "incoming", f"fd={incoming}"
    devices = domain.devices
    for serial in devices.serials:
        yield "serial", _chardev(serial, files)
    for disk in devices.disks:
        if storage_daemon.by_vhost_user(disk):
            yield "vhost-user-blk", _joined(vhost_user_options(disk, files, boot_vcpus(domain)))
        else:
            yield "disk", _joined(disk_options(disk, files))
    for nic in devices.interfaces:
        yield "net", _joined(net_options(nic, files))
    # All are ports of one device, whose place is that of the document's first virtio-serial controller.
    ports = next((slot_of(item) for item in devices.controllers if item.type == "virtio-serial"), None)
    for console in devices.consoles:
        if console.target is not None and console.target.type == "virtio":
            yield "console", _chardev(console, files, ports)
    for channel in devices.channels:
        yield "channel", _chardev(channel, files, ports)
    for share in devices.filesystems:
        yield "fs", _joined(_filesystem(share, files))
    for rng in devices.rngs:
        yield "rng", _joined(_rng(rng))
    if devices.memballoon is not None and devices.memballoon.model != "none":
        yield "balloon", _joined(_balloon(devices.memballoon))
    if devices.vsock is not None:
        yield "vsock", _joined(_vsock(devices.vsock, files))
    for memory in devices.memorys:
        yield "virtio-mem", _joined(_virtio_mem(memory))
    for watchdog in devices.watchdogs:
        yield "watchdog", _joined(_watchdog(watchdog))
    yield "pvpanic", _on_off(bool(devices.panics))
    yield "vmgenid", _on_off(domain.genid is not None)


def _joined(options: Mapping[str, object], *first: str) -> str:
    """FIRST,key=value,...: None is left out, commas are doubled."""
    words = [item.replace(",", ",,") for item in first]
    for key, value in options.items():
        if value is not None:
            text = _on_off(value) if isinstance(value, bool) else str(value).replace(",", ",,")
            words.append(f"{key}={text}" if key else text)
    return ",".join(words)


def _on_off(value: bool) -> str:
    return "on" if value else "off"


def slot_of(device: Device) -> int | None:
    """Its place on the one PCI bus."""
    if device.address is None or device.address.type != "pci":
        return None
    _, _, slot, _ = device.address.pci
    return slot


# -- the machine


def _memory(domain: Domain) -> Iterator[tuple[str, str]]:
    backing = domain.memory_backing
    # What serves a disk from another process reads and writes the guest's memory.
    options: Options = {"shared": True if storage_daemon.of(domain) else None}
    pluggable = sum(item.target.size or 0 for item in domain.devices.memorys if item.target is not None)
    if backing is not None:
        shared = backing.access is not None and backing.access.mode == "shared"
        memfd = backing.source is not None and backing.source.type == "memfd"
        if shared or memfd:
            options["shared"] = True
        if backing.hugepages is not None:
            pages = backing.hugepages.pages
            options["hugepages"] = f"{pages[0].size}K" if pages and pages[0].size else "2M"
        immediate = backing.allocation is not None and backing.allocation.mode == "immediate"
        options["prealloc"] = True if immediate or backing.locked else None
    room = pluggable
    if domain.max_memory is not None and domain.max_memory.value:
        # What may come later as well; each device begins at a multiple of 128 MiB.
        room = max(room, domain.max_memory.value - domain.memory + pluggable) + _SECTION * (
            domain.max_memory.slots or 0
        )
    if room:
        options["hotplug"] = f"{room}K"
    yield "memory", _joined(options, f"{domain.memory - pluggable}K")
    cells = domain.cpu.numa.cells if domain.cpu is not None and domain.cpu.numa is not None else []
    tuned = domain.numatune.memnodes if domain.numatune is not None else []
    for cell in cells:
        node: Options = {"cpus": _ranges(cell.cpus) if cell.cpus else None}
        if cell.distances is not None:
            known = {item.id: item.value for item in cell.distances.siblings}
            node["distances"] = ":".join(str(known.get(other.id or 0, 10 if other is cell else 20)) for other in cells)
        for bound in tuned:
            if bound.cellid == cell.id:
                node["host-nodes"] = _ranges(bound.nodeset)
                node["policy"] = {"strict": "bind", "preferred": "preferred", "interleave": "interleave"}.get(
                    bound.mode or "strict"
                )
        yield "numa", _joined(node, f"{cell.memory or 0}K")


def _ranges(text: str) -> str:
    """A set of numbers as 0:1:5: what kvik-vmm reads where a comma would end the value."""
    return ":".join(map(str, sorted(parse_cpuset(text))))


def _cpus(domain: Domain) -> Iterator[tuple[str, str]]:
    most = domain.vcpu.value if domain.vcpu is not None else 1
    now = boot_vcpus(domain)
    options: Options = {"maximum": most if most != now else None}
    cpu = domain.cpu
    if cpu is not None and cpu.topology is not None:
        topology = cpu.topology
        options |= {
            "sockets": topology.sockets,
            "dies": topology.dies,
            "cores": topology.cores,
            "threads": topology.threads,
        }
    yield "cpus", _joined(options, str(now))
    if cpu is not None:
        model = cpu.model.value if cpu.mode in (None, "custom") and cpu.model is not None else None
        words = [model or "host"]
        for feature in cpu.features:
            if feature.policy == "optional":
                continue  # the host's own model has it already, if there is one (`support` refuses it for others)
            words.append(f"{'-' if feature.policy in ('disable', 'forbid') else '+'}{feature.name}")
        yield "cpu", ",".join(words)


def _boot(domain: Domain, files: Files, cached_kernel: bool) -> Iterator[tuple[str, str]]:
    described = domain.os
    options: Options = {}
    for name, path in (("kernel", described.kernel), ("initrd", described.initrd)):
        fd = files.get(name)
        if path and fd is not None:
            options[f"{name}-fd"] = fd
        elif path:
            yield name, path
    loader, nvram = described.loader, described.nvram
    code = loader.value if loader is not None else None
    variables = ((nvram.source.location if nvram.source else None) or nvram.value) if nvram is not None else None
    for name, option, path in (("loader", "firmware", code), ("nvram", "nvram", variables)):
        fd = files.get(name)
        if path and fd is not None:
            options[f"{option}-fd"] = fd
        elif path:
            yield option, path
    if cached_kernel and "kernel-fd" in options:
        options["stable-kernel"] = True  # mapped, not read: one copy for all machines
    if options:
        yield "boot", _joined(options)
    if described.cmdline:
        yield "append", described.cmdline


_SYSTEM = ("manufacturer", "product", "version", "serial", "sku", "family")


def _smbios(domain: Domain) -> Iterator[tuple[str, str]]:
    if domain.os.smbios is None or domain.os.smbios.mode != "sysinfo":
        return
    options: Options = {}
    for info in domain.sysinfos:
        if info.type != "smbios":
            continue
        for entry in _entries(info.system):
            options[entry[0]] = entry[1]
        strings = [value for _, value in _entries(info.oem_strings, named=False)]
        if strings:
            options["oem-strings"] = ":".join(strings)
    if options:
        yield "smbios", _joined(options)


def _entries(block: SysinfoBlock | None, *, named: bool = True) -> Iterator[tuple[str, str]]:
    for entry in block.entries if block is not None else []:
        if not named or entry.name in _SYSTEM:
            yield entry.name or "", entry.value or ""


def _clock(domain: Domain, now: float) -> str:
    described = domain.clock
    if described is None or described.offset == "utc":
        return "utc"
    if described.offset == "absolute" and described.start is not None:
        return str(described.start)
    if described.offset == "variable" and described.basis != "localtime":
        return str(int(now) + int(described.adjustment or 0))
    return "localtime"


# -- devices


def _chardev(device: Chardev, files: Files, slot: int | None = None) -> str:
    alias, source = alias_of(device), device.source
    fd = files.get(chardev_name(alias))
    path = (source.path if source is not None else None) or ""
    if fd is not None:
        backend = f"fd={fd}"
    elif device.type in ("file", "unix"):
        backend = f"{device.type}:{path}"
    else:
        backend = device.type
    options: Options = {"id": alias, "slot": slot}
    log = files.get(log_name(alias))
    if log is not None:
        options["log"] = f"fd={log}"
    elif device.log is not None:
        options["log"] = f"file:{device.log.file}"
    if isinstance(device, Channel):
        target = device.target
        return _joined({"": (target.name if target is not None else "") or "", "backend": backend, **options})
    return _joined(options, backend)


def disk_options(disk: Disk, files: Files) -> Options:
    """What `--disk` takes of it."""
    alias = alias_of(disk)
    fd = files.get(image_name(alias, 0))
    driver, tune = disk.driver, disk.iotune
    options: Options = {"fd": fd} if fd is not None else {"path": disk.source.location if disk.source else ""}
    options |= {
        "id": alias,
        "slot": slot_of(disk),
        "readonly": True if disk.readonly else None,
        "serial": disk.serial or None,
        "lock": False if disk.shareable else None,
    }
    if driver is not None:
        policy = {"enospace": "enospc"}.get(driver.error_policy or "", driver.error_policy)
        options |= {
            "cache": driver.cache if driver.cache != "default" else None,
            "aio": {"threads": "threads", "io_uring": "io_uring"}.get(driver.io or ""),
            "discard": None if driver.discard is None else driver.discard == "unmap",
            "queues": driver.queues,
            "queue-size": driver.queue_size,
            "packed": driver.packed,
            "werror": policy,
            "rerror": driver.rerror_policy or {"enospc": "report"}.get(policy or "", policy),
        }
    if tune is not None:
        options |= {
            "bps": tune.total_bytes_sec or None,
            "bps-burst": tune.total_bytes_sec_max or None,
            "iops": tune.total_iops_sec or None,
            "iops-burst": tune.total_iops_sec_max or None,
        }
    return options


def vhost_user_options(disk: Disk, files: Files, vcpus: int) -> Options:
    """What `--vhost-user-blk` takes of it."""
    alias = alias_of(disk)
    fd = files.get(vhost_user_name(alias))
    theirs = disk.source.path if disk.source is not None and disk.type == "vhostuser" else None
    return {
        **({"fd": fd} if fd is not None else {"socket": theirs or f"{alias}-export.sock"}),
        "life-fd": files.get(life_name(alias)),
        "id": alias,
        "slot": slot_of(disk),
        "queues": storage_daemon.queues(disk, vcpus) if storage_daemon.served(disk) else _queues(disk),
        "queue-size": disk.driver.queue_size if disk.driver is not None else None,
    }


def _queues(disk: Disk) -> int | None:
    return disk.driver.queues if disk.driver is not None else None


def net_options(nic: Interface, files: Files) -> Options:
    """What `--net` takes of it; the first value is the backend."""
    alias = alias_of(nic)
    options: Options = {"": _net_backend(nic)}
    switch = files.get(switch_name(alias))
    if switch is not None:
        options |= {"": "stream", "fds": switch}
    elif nic.type in TAP_TYPES:
        taps = files.numbered(tap_name(alias))
        vhosts = files.numbered(vhost_name(alias))
        backend = nic.driver.name if nic.driver is not None else None
        options |= {
            "fds": taps,
            "ifname": nic.target.dev if taps is None and nic.target is not None else None,
            "vhost-fds": vhosts,
            "vhost": True if backend == "vhost" else False if taps is not None and vhosts is None else None,
        }
    elif is_passt(nic):
        options["fds"] = files.get(passt_name(alias))
    options |= {
        "id": alias,
        "slot": slot_of(nic),
        "mac": nic.mac.address if nic.mac is not None else None,
        "mtu": nic.mtu.size if nic.mtu is not None else None,
        "link": False if nic.link is not None and nic.link.state == "down" else None,
    }
    if nic.driver is not None:
        options |= {
            "queues": nic.driver.queues,
            "queue-size": nic.driver.rx_queue_size,
            "packed": nic.driver.packed,
        }
    if nic.bandwidth is not None and files.numbered(tap_name(alias)) is None:  # of a tap by the host's traffic control
        # As the host sees it, inbound is what the guest receives.
        options |= {"rx-bps": rate_of(nic.bandwidth.inbound), "tx-bps": rate_of(nic.bandwidth.outbound)}
    return options


def rate_of(rate: Rate | None) -> int | None:
    return rate.average * 1024 if rate is not None and rate.average else None


def _net_backend(nic: Interface) -> str:
    if nic.type in TAP_TYPES:
        return "tap"
    return "passt" if is_passt(nic) else "none"


def _filesystem(share: Filesystem, files: Files) -> Options:
    alias = alias_of(share)
    fd = files.get(f"fs:{alias}")
    socket = share.source.socket if share.source is not None else None
    return {
        "": share.target.dir if share.target is not None else "",
        **({"fd": fd} if fd is not None else {"socket": socket or f"{alias}.sock"}),
        "id": alias,
        "slot": slot_of(share),
    }


def _rng(rng: Rng) -> Options:
    rate = rng.rate
    limit = rate.bytes * 1000 // (rate.period or 1000) if rate is not None else None
    return {"id": alias_of(rng), "slot": slot_of(rng), "rate": limit}


def _balloon(balloon: Memballoon) -> Options:
    return {
        "id": alias_of(balloon),
        "slot": slot_of(balloon),
        "deflate-on-oom": balloon.autodeflate,
        "free-page-reporting": balloon.free_page_reporting,
    }


def _vsock(vsock: Vsock, files: Files) -> Options:
    alias = alias_of(vsock)
    cid = vsock.cid.address if vsock.cid is not None else None
    return {"cid": cid, "fd": files.get(f"vsock:{alias}"), "id": alias, "slot": slot_of(vsock)}


def _virtio_mem(memory: Memory) -> Options:
    target = memory.target
    kib: Callable[[int | None], str | None] = lambda value: f"{value}K" if value is not None else None  # noqa: E731
    return {
        "size": kib(target.size if target is not None else 0),
        "requested": kib(target.requested if target is not None else None),
        "block": kib(target.block if target is not None else None),
        "node": target.node if target is not None else None,
        "id": alias_of(memory),
        "slot": slot_of(memory),
    }


def _watchdog(watchdog: Watchdog) -> Options:
    return {"": watchdog.action or "reset", "id": alias_of(watchdog), "slot": slot_of(watchdog)}
