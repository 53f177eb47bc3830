"""The few objects and properties that management looks at, under QEMU's paths.

    /machine                            the machine
    /machine/peripheral                 devices with an id
    /machine/peripheral/NAME            one of them
    /machine/unattached/device[N]       vCPUs that were there from the start
    /objects, /objects/NAME             back ends of object-add

Reference: QEMU's qapi/qom.json.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from kvik.vmm.monitor import cpus
from kvik.vmm.monitor.errors import QmpError, device_not_found
from kvik.vmm.monitor.schema import ANYTHING, NOTHING, TEXT, Struct
from kvik.vmm.monitor.table import Arguments, Command, Context

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# Device.kind -> the type's name in QEMU
TYPES = {
    "virtio-blk": "virtio-blk-pci",
    "virtio-net": "virtio-net-pci",
    "virtio-rng": "virtio-rng-pci",
    "virtio-balloon": "virtio-balloon-pci",
    "virtio-console": "virtio-serial-pci",
    "virtio-vsock": "vhost-vsock-pci",
    "virtio-fs": "vhost-user-fs-pci",
    "virtio-mem": "virtio-mem-pci",
    "vhost-user-blk": "vhost-user-blk-pci",
}


def _objects(context: Context) -> dict[str, Any]:
    kept: dict[str, Any] = context.server.values.get("objects", {})
    return kept


def _device(context: Context, path: str) -> Any:
    name = path.removeprefix("/machine/peripheral/").split("/")[0]
    return context.machine.find(name) if name in context.machine.devices else None


def _child(name: str, kind: str) -> dict[str, str]:
    return {"name": name, "type": f"child<{kind}>"}


def qom_list(context: Context, arguments: Arguments) -> list[dict[str, str]]:
    path = arguments["path"].rstrip("/") or "/"
    machine = context.machine
    kind = {"name": "type", "type": "string"}
    if path == "/":
        return [kind, _child("machine", "kvik-machine"), _child("objects", "container")]
    if path == "/machine":
        return [kind, _child("peripheral", "container"), _child("unattached", "container")]
    if path == "/machine/peripheral":
        plugged = [vcpu.name for vcpu in machine.vcpus if vcpu.name]
        listed = [_child(device.name, TYPES.get(device.kind, device.kind)) for device in context.devices()]
        return [kind, *listed, *(_child(name, cpus.TYPE) for name in plugged)]
    if path == "/machine/unattached":
        return [kind, *(_child(f"device[{vcpu.index}]", cpus.TYPE) for vcpu in machine.vcpus if not vcpu.name)]
    if path == "/objects":
        return [kind, *(_child(name, item["qom-type"]) for name, item in _objects(context).items())]
    if path.startswith("/objects/") and path.removeprefix("/objects/") in _objects(context):
        return [kind]
    device = _device(context, path) if path.startswith("/machine/peripheral/") else None
    if device is None:
        raise device_not_found(arguments["path"])
    names = [*_properties(context, device), *_WRITABLE.get(device.kind, ())]
    return [kind, *({"name": name, "type": "any"} for name in dict.fromkeys(names))]


def _properties(context: Context, device: Any) -> dict[str, Any]:
    """What qom-get tells of a device."""
    found: dict[str, Any] = {"type": TYPES.get(device.kind, device.kind), "realized": True, "hotplugged": False}
    if device.kind == "virtio-balloon":
        found["guest-stats-polling-interval"] = device.interval
        found["guest-stats"] = {
            "last-update": int(device.stats_time),
            # -1: the driver did not tell (QEMU's word for it)
            "stats": {name: int(device.guest_stats.get(name, -1)) for name in _GUEST_STATS},
        }
    if device.kind == "virtio-mem":
        found["requested-size"], found["size"] = device.requested, device.plugged
    return found


_GUEST_STATS = (
    "stat-swap-in", "stat-swap-out", "stat-major-faults", "stat-minor-faults", "stat-free-memory", "stat-total-memory",
    "stat-available-memory", "stat-disk-caches", "stat-htlb-pgalloc", "stat-htlb-pgfail",
)  # fmt: skip
_WRITABLE = {"virtio-balloon": ("guest-stats-polling-interval",), "virtio-mem": ("requested-size",)}


def qom_get(context: Context, arguments: Arguments) -> Any:
    path, name = arguments["path"].rstrip("/") or "/", arguments["property"]
    machine = context.machine
    properties: dict[str, Any]
    if path == "/machine":
        kind = "kvik-machine"
        properties = {"type": kind, "kernel": machine.config.boot.kernel, "memory": {"size": machine.memory.boot_size}}
        if name == "rtc-time":
            now = time.gmtime()
            return {"tm_year": now.tm_year - 1900, "tm_mon": now.tm_mon - 1, "tm_mday": now.tm_mday,
                    "tm_hour": now.tm_hour, "tm_min": now.tm_min, "tm_sec": now.tm_sec}  # fmt: skip
    elif path.startswith("/objects/") and path.removeprefix("/objects/") in _objects(context):
        properties = dict(_objects(context)[path.removeprefix("/objects/")])
        kind = str(properties["qom-type"])
        properties["type"] = kind
    elif path.startswith("/machine/peripheral/") and (device := _device(context, path)) is not None:
        properties = _properties(context, device)
        kind = str(properties["type"])
    elif path.startswith("/machine/unattached/device[") and path[27:-1].isdecimal():
        if not any(f"{vcpu.index}" == path[27:-1] for vcpu in machine.vcpus):
            raise device_not_found(arguments["path"])
        kind, properties = cpus.TYPE, {"type": cpus.TYPE, "hotplugged": False}
    else:
        raise device_not_found(arguments["path"])
    if name not in properties:
        raise QmpError(f"Property '{kind}.{name[:80]}' not found")
    return properties[name]


def qom_set(context: Context, arguments: Arguments) -> None:
    path, name, value = arguments["path"], arguments["property"], arguments["value"]
    device = _device(context, path) if path.startswith("/machine/peripheral/") else None
    if device is None:
        raise device_not_found(path)
    if name not in _WRITABLE.get(device.kind, ()):
        raise QmpError(f"Property '{TYPES.get(device.kind, device.kind)}.{name[:80]}' not found")
    if not isinstance(value, int) or isinstance(value, bool):
        raise QmpError(f"Invalid parameter type for '{name}', expected: integer")
    if name == "guest-stats-polling-interval":
        if not 0 <= value <= 2**31 - 1:
            raise QmpError("timer value must be greater than zero" if value < 0 else "timer value is too big")
        device.set_interval(value)
    else:
        if not 0 <= value <= device.size or value % device.block:
            raise QmpError(f"'requested-size' must be a multiple of {device.block}, to {device.size}")
        device.request(value)


_PLACE = {"path": TEXT, "property": TEXT}

COMMANDS: Sequence[Command] = (
    Command("qom-list", qom_list, Struct({"path": TEXT}), summary="what is below a path"),
    Command("qom-get", qom_get, Struct(_PLACE), summary="a property"),
    Command(
        "qom-set", qom_set, Struct(_PLACE | {"value": ANYTHING}), NOTHING, summary="the balloon's and virtio-mem's"
    ),
)
