"""device_add and device_del: QEMU's drivers and properties -> kvik-vmm's settings classes (`vmm.config`).

A back end comes first, as with QEMU (blockdev-add, netdev_add, chardev-add, object-add), then the device that uses it.
The seam to the machine is `table.Hotplug`, which whoever builds the machine gives to the `MonitorServer`.

Reference: QEMU's qapi/qdev.json, qapi/qom.json.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from kvik.named import NamedTuple
from kvik.vmm import config as c
from kvik.vmm.monitor import block, char, cpus, net
from kvik.vmm.monitor.errors import QmpError, device_not_found
from kvik.vmm.monitor.schema import ANYTHING, ID, NOTHING, Struct
from kvik.vmm.monitor.table import Arguments, Command, Context

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MAX_OBJECTS = 256


class Driver(NamedTuple):
    properties: tuple[str, ...]  # besides COMMON
    make: Callable[[Context, str, Arguments], Any]  # id, properties -> a settings object


# PCI devices have these; what says nothing to us (the ROM, the bus's name) is taken and left alone, so that a document
# written for QEMU works. `addr` is the slot.
COMMON = (
    "driver", "id", "bus", "addr", "multifunction", "romfile", "rombar", "bootindex", "iommu_platform", "ats",
    "disable-legacy", "disable-modern", "packed", "page-per-vq", "event_idx", "indirect_desc", "vectors",
    "acpi-index", "failover_pair_id",
)  # fmt: skip


def boolean(name: str, value: Any) -> bool:
    """A QOM bool, which may come as JSON's or as on a command line."""
    if isinstance(value, bool):
        return value
    if value in ("on", "yes", "true", "y"):
        return True
    if value in ("off", "no", "false", "n"):
        return False
    raise QmpError(f"Invalid parameter type for '{name}', expected: boolean")


def number(name: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, str):
        try:
            value = int(value, 0)
        except ValueError:
            value = None
    if not isinstance(value, int) or isinstance(value, bool):
        raise QmpError(f"Parameter '{name}' expects a number")
    if not low <= value <= high:
        raise QmpError(f"Property '.{name}' doesn't take value {value} (minimum: {low}, maximum: {high})")
    return value


def text(name: str, value: Any) -> str:
    if not isinstance(value, str) or len(value) > 4096:
        raise QmpError(f"Invalid parameter type for '{name}', expected: string")
    return value


def slot(properties: Arguments) -> int:
    """The PCI slot that `addr` names: 3, "0x3" or "03.0"."""
    value = properties.get("addr", 0)
    if isinstance(value, str):
        first, _, function = value.partition(".")
        if function not in ("", "0"):
            raise QmpError("Property 'addr' names a function; devices here have function 0 only")
        value = f"0x{first.removeprefix('0x')}"
    return number("addr", value, 0, 31)


def _disk(context: Context, name: str, properties: Arguments) -> c.DiskConfig:
    node = block.node(context, text("drive", properties.get("drive", "")))
    settings = block.settings_of(context, node)
    settings.id, settings.slot = name, slot(properties)
    settings.serial = text("serial", properties.get("serial", ""))[:20]
    settings.queues = number("num-queues", properties.get("num-queues", 0), 0, 64)
    settings.queue_size = number("queue-size", properties.get("queue-size", 256), 2, 1024)
    settings.packed = boolean("packed", properties.get("packed", False))
    if not boolean("write-cache", properties.get("write-cache", True)) and settings.cache != "unsafe":
        settings.cache = "directsync" if settings.cache == "none" else "writethrough"
    for ours in ("werror", "rerror"):
        value = text(ours, properties.get(ours, "report"))
        if value not in ("report", "stop", "enospc", "ignore"):
            raise QmpError(f"Property '.{ours}' doesn't take value '{value[:40]}'")
        setattr(settings, ours, value)
    return settings


def _nic(context: Context, name: str, properties: Arguments) -> c.NetConfig:
    settings = net.settings_of(context, text("netdev", properties.get("netdev", "")))
    settings.id, settings.slot = name, slot(properties)
    settings.mac = text("mac", properties.get("mac", ""))
    settings.mtu = number("host_mtu", properties.get("host_mtu", 0), 0, 65535)
    settings.queue_size = number("rx_queue_size", properties.get("rx_queue_size", 256), 16, 1024)
    settings.packed = boolean("packed", properties.get("packed", False))
    # Ours alone: QEMU leaves rates to the host.
    settings.rx_bps = number("x-rx-bps", properties.get("x-rx-bps", 0), 0, 1 << 50)
    settings.tx_bps = number("x-tx-bps", properties.get("x-tx-bps", 0), 0, 1 << 50)
    return settings


def _rng(context: Context, name: str, properties: Arguments) -> c.RngConfig:
    period = number("period", properties.get("period", 1000), 1, 2**31)
    most = number("max-bytes", properties.get("max-bytes", 0), 0, 2**40)
    return c.RngConfig(id=name, slot=slot(properties), rate=most * 1000 // period)


def _balloon(context: Context, name: str, properties: Arguments) -> c.BalloonConfig:
    return c.BalloonConfig(
        id=name,
        slot=slot(properties),
        deflate_on_oom=boolean("deflate-on-oom", properties.get("deflate-on-oom", False)),
        free_page_reporting=boolean("free-page-reporting", properties.get("free-page-reporting", False)),
    )


def _vsock(context: Context, name: str, properties: Arguments) -> c.VsockConfig:
    fd = properties.get("vhostfd")
    return c.VsockConfig(
        id=name,
        slot=slot(properties),
        cid=number("guest-cid", properties.get("guest-cid", 0), 3, 2**32 - 2),
        fd=net.named_fd(context, text("vhostfd", fd)) if fd is not None else -1,
    )


def _socket(context: Context, properties: Arguments) -> tuple[str, int]:
    """(path, -1), or ("", descriptor): a duplicate, which is the device's from then on."""
    backend = str(char.added(context).get(text("chardev", properties.get("chardev", "")), ""))
    if backend.startswith("fd="):
        return "", os.dup(int(backend.removeprefix("fd=")))
    if not backend.startswith("unix:"):
        raise QmpError("Property 'chardev' needs a socket of type unix or fd")
    return backend.removeprefix("unix:"), -1


def _fs(context: Context, name: str, properties: Arguments) -> c.FsConfig:
    tag = text("tag", properties.get("tag", ""))
    place = slot(properties)
    path, fd = _socket(context, properties)
    return c.FsConfig(id=name, slot=place, tag=tag, socket=path, fd=fd)


def _vhost_user_blk(context: Context, name: str, properties: Arguments) -> c.VhostUserBlkConfig:
    settings = c.VhostUserBlkConfig(id=name, slot=slot(properties))
    settings.queues = number("num-queues", properties.get("num-queues", 1), 1, 64)
    settings.queue_size = number("queue-size", properties.get("queue-size", 256), 2, 1024)
    life = properties.get("lifefd")
    settings.socket, settings.fd = _socket(context, properties)
    try:
        settings.life_fd = net.named_fd(context, text("lifefd", life)) if life is not None else -1
    except QmpError:
        if settings.fd >= 0:
            os.close(settings.fd)
        raise
    return settings


def _virtio_mem(context: Context, name: str, properties: Arguments) -> c.VirtioMemConfig:
    backend = objects(context).get(text("memdev", properties.get("memdev", "")))
    if backend is None:
        raise QmpError("'memdev' property is not set to a memory backend")
    return c.VirtioMemConfig(
        id=name,
        slot=slot(properties),
        size=number("size", backend.get("size", 0), 2 << 20, 1 << 46),
        requested=number("requested-size", properties.get("requested-size", 0), 0, 1 << 46),
        block=number("block-size", properties.get("block-size", 2 << 20), 4096, 1 << 40),
        node=number("node", properties.get("node", 0), 0, 63),
    )


DRIVERS: dict[str, Driver] = {
    "virtio-blk-pci": Driver(
        (
            "drive", "serial", "num-queues", "queue-size", "werror", "rerror", "write-cache", "share-rw", "discard",
            "write-zeroes", "iothread", "logical_block_size", "physical_block_size", "scsi", "config-wce",
        ),
        _disk,
    ),
    "virtio-net-pci": Driver(
        (
            "netdev", "mac", "mq", "host_mtu", "rx_queue_size", "tx_queue_size", "tx", "csum", "gso", "host_tso4",
            "host_tso6", "host_ecn", "host_ufo", "guest_csum", "guest_tso4", "guest_tso6", "guest_ecn", "guest_ufo",
            "mrg_rxbuf", "x-rx-bps", "x-tx-bps",
        ),
        _nic,
    ),
    "virtio-rng-pci": Driver(("rng", "max-bytes", "period"), _rng),
    "virtio-balloon-pci": Driver(("deflate-on-oom", "free-page-reporting"), _balloon),
    "vhost-vsock-pci": Driver(("guest-cid", "vhostfd"), _vsock),
    "vhost-user-fs-pci": Driver(("chardev", "tag", "queue-size"), _fs),
    "vhost-user-blk-pci": Driver(("chardev", "num-queues", "queue-size", "lifefd"), _vhost_user_blk),
    "virtio-mem-pci": Driver(("memdev", "requested-size", "block-size", "node"), _virtio_mem),
}  # fmt: skip
ALIASES = {name.removesuffix("-pci"): name for name in DRIVERS if name.startswith("virtio-")} | {
    f"{name}-non-transitional": name for name in DRIVERS
}

# object-add: kept for the devices that name them
OBJECTS: dict[str, tuple[str, ...]] = {
    "rng-random": ("filename",),
    "rng-builtin": (),
    "memory-backend-ram": ("size", "prealloc", "share", "reserve", "host-nodes", "policy", "merge", "dump"),
    "memory-backend-memfd": ("size", "prealloc", "share", "reserve", "host-nodes", "policy", "merge", "dump"),
    "iothread": ("poll-max-ns", "poll-grow", "poll-shrink"),
}


def objects(context: Context) -> dict[str, Arguments]:
    kept: dict[str, Arguments] = context.server.values.setdefault("objects", {})
    return kept


def device_add(context: Context, arguments: Arguments) -> None:
    machine = context.machine
    driver_name = str(arguments["driver"])
    name = arguments.get("id")
    if name is not None and (
        not name or not name[0].isalpha() or not name.replace("-", "").replace("_", "").replace(".", "").isalnum()
    ):
        raise QmpError("Parameter 'id' expects an identifier")
    name = name or _free_name(context)
    if name in machine.devices:
        raise QmpError(f"Duplicate device ID '{name}'")
    if driver_name in (cpus.TYPE, "host-x86_64-cpu") or driver_name.endswith("-x86_64-cpu"):
        cpus.plug(context, name, arguments)
        return
    driver = DRIVERS.get(ALIASES.get(driver_name, driver_name))
    if driver is None:
        raise QmpError(f"'{driver_name[:80]}' is not a valid device model name")
    for key in arguments:
        if key not in driver.properties and key not in COMMON:
            raise QmpError(f"Property '{driver_name}.{key[:80]}' not found")
    context.server.hotplug().plug(driver.make(context, name, arguments))
    if "drive" in arguments:
        context.server.values.setdefault("node-users", {})[arguments["drive"]] = name
    context.server.values.setdefault("drivers", {})[name] = (driver_name, dict(arguments))


def _free_name(context: Context) -> str:
    count = 0
    while f"device{count}" in context.machine.devices:
        count += 1
    return f"device{count}"


def device_del(context: Context, arguments: Arguments) -> None:
    name = arguments["id"].removeprefix("/machine/peripheral/")
    if cpus.unplug(context, name):
        return
    if name not in context.machine.devices:
        raise device_not_found(arguments["id"])
    context.server.hotplug().unplug(name)


def object_add(context: Context, arguments: Arguments) -> None:
    kind, name = arguments["qom-type"], arguments["id"]
    if kind not in OBJECTS:
        raise QmpError(f"Parameter 'qom-type' does not accept value '{kind[:80]}'")
    if name in objects(context):
        raise QmpError(f"attempt to add duplicate property '{name}' to object (type 'container')")
    for key in arguments:
        if key not in OBJECTS[kind] and key not in ("qom-type", "id"):
            raise QmpError(f"Parameter '{key[:80]}' is unexpected")
    if len(objects(context)) >= MAX_OBJECTS:
        raise QmpError(f"more than {MAX_OBJECTS} objects")
    objects(context)[name] = arguments


def object_del(context: Context, arguments: Arguments) -> None:
    if objects(context).pop(arguments["id"], None) is None:
        raise QmpError(f"object '{arguments['id']}' not found")


def query_iothreads(context: Context, arguments: Arguments) -> list[dict[str, Any]]:
    zeroes = {"poll-max-ns": 0, "poll-grow": 0, "poll-shrink": 0, "aio-max-batch": 0}
    threads = getattr(context.machine, "io_threads", ())
    return [{"id": thread.name, "thread-id": thread.thread_id} | zeroes for thread in threads]


COMMANDS: Sequence[Command] = (
    Command(
        "device_add",
        device_add,
        Struct({"driver": ANYTHING, "*id": ID, "*bus": ANYTHING}, others=True),
        NOTHING,
        summary="plug a device: virtio-blk-pci, virtio-net-pci, ..., or a vCPU",
    ),
    Command("device_del", device_del, Struct({"id": ID}), NOTHING, summary="ask the guest to let a device go"),
    Command("object-add", object_add, Struct({"qom-type": ID, "id": ID}, others=True), NOTHING, summary="a back end"),
    Command("object-del", object_del, Struct({"id": ID}), NOTHING),
    Command("query-iothreads", query_iothreads, summary="threads that serve disks and interfaces"),
)
