"""Disks: block nodes that hot-plugged disks use, what is known of all disks, changes while they run.

A node (blockdev-add) is a file, opened at once so that a mistake shows at once, with what its layers say about it: the
raw format on a file, a qcow2 image. A device takes a duplicate of the descriptor.

Reference: QEMU's qapi/block-core.json.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator, Sequence

from kvik.vmm import config as c
from kvik.vmm.monitor.errors import QmpError, refused
from kvik.vmm.monitor.schema import ANYTHING, ID, NOTHING, TEXT, Bool, Int, List, Struct
from kvik.vmm.monitor.table import Arguments, Command, Context

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MAX_NODES = 256
SECTOR = 512
KINDS = ("virtio-blk", "vhost-user-blk")
PROTOCOLS = ("file", "host_device")
FORMATS = ("raw", "qcow2")


class Node:
    """One blockdev-add. `below` is the node under it; the lowest one owns `fd`."""

    def __init__(self, name: str, driver: str, *, filename: str = "", fd: int = -1, below: Node | None = None) -> None:
        self.name, self.driver, self.filename, self.fd, self.below = name, driver, filename, fd, below
        self.readonly = False
        self.cache = "writeback"
        self.aio = "auto"
        self.discard = False
        self.lock = True
        self.inline = False  # written inside the node above: it goes with that

    @property
    def bottom(self) -> Node:
        return self.below.bottom if self.below is not None else self

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        if self.below is not None and self.below.inline:
            self.below.close()


def nodes(context: Context) -> dict[str, Node]:
    kept: dict[str, Node] = context.server.values.setdefault("nodes", {})
    return kept


def node(context: Context, name: str) -> Node:
    found = nodes(context).get(name)
    if found is None:
        raise QmpError(f"Cannot find device='{name[:80]}' nor node-name='{name[:80]}'")
    return found


def settings_of(context: Context, top: Node) -> c.DiskConfig:
    """Settings for a disk on `top`, with a descriptor of its own. Raises `QmpError` if another disk has it."""
    used: dict[str, str] = context.server.values.setdefault("node-users", {})
    holder = used.get(top.name)
    if holder in context.machine.devices:
        raise QmpError(f"Node '{top.name}' is busy: device '{holder}' uses it")
    bottom = top.bottom
    return c.DiskConfig(
        fd=os.dup(bottom.fd),
        format=top.driver if top.driver in FORMATS else "raw",
        readonly=top.readonly or bottom.readonly,
        cache=top.cache if top.cache != "writeback" else bottom.cache,
        aio=bottom.aio,
        discard=top.discard or bottom.discard,
        lock=top.lock and bottom.lock,
    )


def _open(context: Context, arguments: Arguments, depth: int = 0) -> Node:
    """Raises `QmpError`, OSError."""
    driver = arguments.get("driver")
    if not isinstance(driver, str):
        raise QmpError("Parameter 'driver' is missing")
    name = arguments.get("node-name") or f"#block{len(nodes(context))}{'abcd'[depth]}"
    if not isinstance(name, str) or len(name) > 255:
        raise QmpError("Invalid parameter type for 'node-name', expected: string")
    if driver in FORMATS:
        lower = arguments.get("file")
        if lower is None:
            raise QmpError("Parameter 'file' is missing")
        if isinstance(lower, str):
            below = nodes(context).get(lower)
            if below is None:
                raise QmpError(f"Cannot find device='' nor node-name='{lower[:80]}'")
        elif isinstance(lower, dict) and depth < 3:
            below = _open(context, lower, depth + 1)
            below.inline = True
        else:
            raise QmpError("Invalid parameter type for 'file', expected: object")
        if arguments.get("backing") is not None and driver == "raw":
            raise QmpError("Parameter 'backing' is unexpected")
        made = Node(name, driver, below=below)
        made.readonly = below.readonly
    elif driver in PROTOCOLS:
        filename = arguments.get("filename")
        if not isinstance(filename, str) or "\0" in filename or len(filename) > 4096:
            raise QmpError("Parameter 'filename' is missing")
        made = Node(name, driver, filename=filename)
    else:
        raise QmpError(f"Parameter 'driver' does not accept value '{driver[:80]}'")
    try:
        _options(made, arguments)
        if driver in PROTOCOLS:
            made.fd = _descriptor(context, made, auto=arguments.get("auto-read-only") is True)
    except BaseException:
        made.close()
        raise
    return made


def _options(made: Node, arguments: Arguments) -> None:
    known = {"driver", "node-name", "filename", "file", "read-only", "auto-read-only", "cache", "aio", "discard",
             "detect-zeroes", "locking", "force-share", "pr-manager", "size", "offset", "backing"}  # fmt: skip
    for key in arguments:
        if key not in known:
            raise QmpError(f"Parameter '{key[:80]}' is unexpected")
    for key in ("size", "offset"):
        if arguments.get(key):
            raise refused("cannot use a part of an image", f"'{key}' must be left out")
    readonly = arguments.get("read-only", made.readonly)
    if not isinstance(readonly, bool):
        raise QmpError("Invalid parameter type for 'read-only', expected: boolean")
    made.readonly = readonly
    cache = arguments.get("cache", {})
    if not isinstance(cache, dict):
        raise QmpError("Invalid parameter type for 'cache', expected: object")
    if cache.get("no-flush") is True:
        made.cache = "unsafe"
    elif cache.get("direct") is True:
        made.cache = "none"
    aio = arguments.get("aio", "auto")
    if aio not in ("auto", "threads", "native", "io_uring"):
        raise QmpError(f"Parameter 'aio' does not accept value '{str(aio)[:80]}'")
    made.aio = aio if aio in ("threads", "io_uring") else "auto"
    locking = arguments.get("locking", "auto")
    if locking not in ("on", "off", "auto"):
        raise QmpError(f"Parameter 'locking' does not accept value '{str(locking)[:80]}'")
    made.lock = locking != "off"
    discard = arguments.get("discard", "ignore")
    if discard not in ("ignore", "unmap"):
        raise QmpError(f"Parameter 'discard' does not accept value '{str(discard)[:80]}'")
    made.discard = discard == "unmap"


def _descriptor(context: Context, made: Node, *, auto: bool) -> int:
    extra = os.O_DIRECT if made.cache == "none" else 0
    if made.filename.startswith("/dev/fdset/"):
        extra = 0  # whoever opened it decided
    flags = os.O_RDONLY if made.readonly else os.O_RDWR
    try:
        fd = context.fdsets.open(made.filename, flags | extra | os.O_NONBLOCK)
    except (OSError, QmpError) as error:
        if made.readonly or not auto:
            if isinstance(error, OSError):
                raise QmpError(f"Could not open '{made.filename}': {error.strerror}") from error
            raise
        made.readonly = True
        return _descriptor(context, made, auto=False)
    mode = os.fstat(fd).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        os.close(fd)
        raise QmpError(f"Could not open '{made.filename}': neither a regular file nor a block device")
    return fd


def blockdev_add(context: Context, arguments: Arguments) -> None:
    if "node-name" not in arguments:
        raise QmpError("'node-name' must be specified for the root node")
    if arguments["node-name"] in nodes(context):
        raise QmpError("Duplicate nodes with node-name='" + arguments["node-name"] + "'")
    if len(nodes(context)) >= MAX_NODES:
        raise QmpError(f"more than {MAX_NODES} block nodes")
    made = _open(context, arguments)
    nodes(context)[made.name] = made


def blockdev_del(context: Context, arguments: Arguments) -> None:
    name = arguments["node-name"]
    kept = nodes(context)
    if name not in kept:
        raise QmpError(f"Failed to find node with node-name='{name}'")
    if any(other.below is kept[name] for other in kept.values()):
        raise QmpError(f"Node {name} is in use")
    holder = context.server.values.get("node-users", {}).get(name)
    if holder in context.machine.devices:
        raise QmpError(f"Node {name} is in use")
    kept.pop(name).close()


def drives(context: Context) -> Iterator[Any]:
    yield from context.devices(*KINDS)


def drive(context: Context, arguments: Arguments) -> Any:
    """The disk that `id`, `device`, `qdev` or `node-name` names. Raises `QmpError`."""
    wanted = next((arguments[key] for key in ("id", "qdev", "device", "node-name") if key in arguments), "")
    users: dict[str, str] = context.server.values.get("node-users", {})
    wanted = users.get(wanted, wanted)
    for device in drives(context):
        if wanted in (device.name, qdev(device), f"/machine/peripheral/{device.name}", node_name(context, device)):
            return device
    raise QmpError(
        f"Cannot find device='{arguments.get('device', arguments.get('id', ''))}' "
        f"nor node-name='{arguments.get('node-name', '')}'"
    )


def qdev(device: Any) -> str:
    return f"/machine/peripheral/{device.name}/virtio-backend"


def node_name(context: Context, device: Any) -> str:
    users: dict[str, str] = context.server.values.get("node-users", {})
    return next((name for name, holder in users.items() if holder == device.name), f"{device.name}-storage")


def _rate(limiter: Any, bucket: str) -> int:
    return int(getattr(getattr(limiter, bucket, None), "rate", 0))


def _inserted(context: Context, device: Any) -> dict[str, Any]:
    image = getattr(device, "image", None)  # none: another process has it (vhost-user-blk)
    total = device.limits["total"] if hasattr(device, "limits") else None
    path, size, actual, mode, read_only, kind = "", 0, 0, "writeback", False, "raw"
    if image is not None:
        path, size, mode, read_only = str(image.name), image.size, image.cache, image.read_only
        kind = getattr(getattr(image, "image", None), "format", kind)  # in kvik-blk
        with contextlib.suppress(OSError):  # beyond the sandbox
            path = os.readlink(f"/proc/self/fd/{image.fd}")  # noqa: PTH115
        with contextlib.suppress(OSError):
            actual = os.fstat(image.fd).st_blocks * SECTOR
    else:
        with contextlib.suppress(AttributeError, KeyError):
            size = device.config["capacity"] * SECTOR
    return {
        "file": path,
        "node-name": node_name(context, device),
        "ro": read_only,
        "drv": kind,
        "encrypted": False,
        "detect_zeroes": "off",
        "bps": _rate(total, "_bytes"), "bps_rd": 0, "bps_wr": 0,
        "iops": _rate(total, "_ops"), "iops_rd": 0, "iops_wr": 0,
        "image": {"filename": path, "format": kind, "virtual-size": size, "actual-size": actual},
        "cache": {"writeback": mode != "writethrough", "direct": mode == "none", "no-flush": mode == "unsafe"},
        "write_threshold": 0,
        "backing_file_depth": 0,
    }  # fmt: skip


def _io_status(context: Context, device: Any) -> str:
    """A request that failed and stopped the machine waits inside the device until it goes on; a disk whose back end
    has gone fails for good, unless it waits for another."""
    if getattr(device, "back_end", device) is None and not device.waiting:
        return "failed"
    if context.machine.status != "io-error" or not getattr(device, "parked", 0):
        return "ok"
    return "nospace" if getattr(device, "out_of_space", False) else "failed"


def query_block(context: Context, arguments: Arguments) -> list[dict[str, Any]]:
    return [
        {
            "device": "",
            "qdev": qdev(device),
            "type": "unknown",
            "removable": False,
            "locked": False,
            "io-status": _io_status(context, device),
            "inserted": _inserted(context, device),
        }
        for device in drives(context)
    ]


def query_named_block_nodes(context: Context, arguments: Arguments) -> list[dict[str, Any]]:
    used = {node_name(context, device) for device in drives(context)}
    idle = [
        {
            "node-name": item.name,
            "drv": item.driver,
            "file": item.bottom.filename,
            "ro": item.readonly,
            "image": {
                "filename": item.bottom.filename,
                "format": item.driver,
                "virtual-size": os.lseek(item.bottom.fd, 0, os.SEEK_END),
                "actual-size": os.fstat(item.bottom.fd).st_blocks * 512,
            },
        }
        for item in nodes(context).values()
        if item.name not in used
    ]
    return [_inserted(context, device) for device in drives(context)] + idle


# What BlockDeviceStats must have (QEMU's schema has no default for these)
_COUNTERS = ("rd_bytes", "wr_bytes", "unmap_bytes", "rd_operations", "wr_operations", "flush_operations",
             "unmap_operations", "rd_total_time_ns", "wr_total_time_ns", "flush_total_time_ns",
             "unmap_total_time_ns", "wr_highest_offset", "rd_merged", "wr_merged", "unmap_merged",
             "failed_rd_operations", "failed_wr_operations", "failed_flush_operations", "failed_unmap_operations",
             "invalid_rd_operations", "invalid_wr_operations", "invalid_flush_operations",
             "invalid_unmap_operations")  # fmt: skip


def query_blockstats(context: Context, arguments: Arguments) -> list[dict[str, Any]]:
    found = []
    for device in drives(context):
        counted = device.block_stats.report() if hasattr(device, "block_stats") else {}
        figures: dict[str, Any] = dict.fromkeys(_COUNTERS, 0)
        figures |= {"account_invalid": True, "account_failed": True, "timed_stats": []} | counted
        found.append({"device": "", "qdev": qdev(device), "node-name": node_name(context, device), "stats": figures})
    return found


def block_resize(context: Context, arguments: Arguments) -> None:
    device = drive(context, arguments)
    if not hasattr(device, "resize"):
        raise refused(f"cannot resize disk {device.name}", "its storage is another process's")
    device.resize(arguments["size"])


def block_set_io_throttle(context: Context, arguments: Arguments) -> None:
    device = drive(context, arguments)
    if not hasattr(device, "set_limits"):
        raise refused(f"cannot limit disk {device.name}", "its storage is another process's")
    limits = {}
    for ours, way in (("total", ""), ("read", "_rd"), ("write", "_wr")):
        size, ops = arguments[f"bps{way}"], arguments[f"iops{way}"]
        if (way and size and arguments["bps"]) or (way and ops and arguments["iops"]):
            raise QmpError("bps/iops total values and read/write values cannot be used at the same time")
        limits[ours] = (size, arguments.get(f"bps{way}_max", 0), ops, arguments.get(f"iops{way}_max", 0))
    device.set_limits(**limits)


def _no_medium(context: Context, arguments: Arguments) -> None:
    drive(context, arguments)
    raise QmpError(f"Device '{arguments.get('id', arguments.get('device', ''))}' is not removable")


def _no_job(context: Context, arguments: Arguments) -> None:
    raise refused("does not copy or re-chain images while it runs", "use QEMU for block jobs")


def _job_not_found(context: Context, arguments: Arguments) -> None:
    raise QmpError("Job not found")


def _empty(context: Context, arguments: Arguments) -> list[Any]:
    return []


_NAMED = {"*device": ID, "*node-name": ID}
_RATE = Int(0, 2**50)
_OTHER = Struct(others=True)

COMMANDS: Sequence[Command] = (
    Command("blockdev-add", blockdev_add, Struct({"driver": ID, "*node-name": ID}, others=True), NOTHING),
    Command("blockdev-del", blockdev_del, Struct({"node-name": ID}), NOTHING),
    Command("query-block", query_block, summary="disks, their images and whether one has an error"),
    Command("query-named-block-nodes", query_named_block_nodes, Struct({"*flat": Bool()}), summary="images and sizes"),
    Command("query-blockstats", query_blockstats, Struct({"*query-nodes": Bool()}), summary="counters of each disk"),
    Command("block_resize", block_resize, Struct(_NAMED | {"size": Int(0)}), NOTHING, summary="a new size"),
    Command(
        "block_set_io_throttle",
        block_set_io_throttle,
        Struct(
            {"*device": ID, "*id": ID, "bps": _RATE, "bps_rd": _RATE, "bps_wr": _RATE, "iops": _RATE}
            | {"iops_rd": _RATE, "iops_wr": _RATE, "*bps_max": _RATE, "*iops_max": _RATE, "*group": ID}
            | {f"*{name}": _RATE for name in ("bps_rd_max", "bps_wr_max", "iops_rd_max", "iops_wr_max", "iops_size")}
            | {f"*{one}{way}_max_length": Int(1, 2**31) for one in ("bps", "iops") for way in ("", "_rd", "_wr")}
        ),
        NOTHING,
        summary="limits in bytes and operations a second",
    ),
    *(
        Command(name, _no_medium, Struct({"*id": ID, "*device": ID, "*node-name": ID, "*force": Bool()}), NOTHING)
        for name in ("blockdev-open-tray", "blockdev-close-tray", "blockdev-insert-medium", "blockdev-remove-medium")
    ),
    *(
        Command(name, _no_job, _OTHER, NOTHING, summary="refused: no block jobs")
        for name in ("blockdev-snapshot-sync", "blockdev-snapshot", "blockdev-mirror", "block-commit", "block-stream",
                     "blockdev-backup", "blockdev-create", "transaction")
    ),
    Command("query-jobs", _empty, returns=List(ANYTHING), summary="none: there are no block jobs"),
    Command("query-block-jobs", _empty, returns=List(ANYTHING), summary="none"),
    *(
        Command(name, _job_not_found, Struct({"id": TEXT}), NOTHING)
        for name in ("job-cancel", "job-complete", "job-dismiss", "job-finalize", "job-pause", "job-resume")
    ),
)  # fmt: skip
