"""RAM: how much, and the balloon.

Reference: QEMU's qapi/machine.json.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvik.vmm.monitor.errors import QmpError
from kvik.vmm.monitor.schema import NOTHING, Int, Struct
from kvik.vmm.monitor.table import Arguments, Command, Context

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def balloon_device(context: Context) -> Any:
    """Raises `QmpError` if the machine has none."""
    for device in context.devices("virtio-balloon"):
        return device
    raise QmpError("No balloon device has been activated", "DeviceNotActive")


def balloon(context: Context, arguments: Arguments) -> None:
    device = balloon_device(context)
    value = arguments["value"]
    if value <= 0:
        raise QmpError("Parameter 'target' expects a size")
    device.set_target(min(value, context.machine.memory.boot_size))


def query_balloon(context: Context, arguments: Arguments) -> dict[str, int]:
    return {"actual": balloon_device(context).actual}


def query_memory_size_summary(context: Context, arguments: Arguments) -> dict[str, int]:
    plugged = sum(device.plugged for device in context.devices("virtio-mem"))
    return {"base-memory": context.machine.memory.boot_size, "plugged-memory": plugged}


def query_memory_devices(context: Context, arguments: Arguments) -> list[dict[str, Any]]:
    devices = context.devices("virtio-mem")
    return [
        {
            "type": "virtio-mem",
            "data": {
                "id": device.name,
                "memaddr": device.address,
                "requested-size": device.requested,
                "size": device.plugged,
                "max-size": device.size,
                "block-size": device.block,
                "node": device.node,
                "memdev": f"/objects/{device.name}",
            },
        }
        for device in devices
    ]


def query_memdev(context: Context, arguments: Arguments) -> list[dict[str, Any]]:
    settings = context.machine.config.memory
    return [
        {
            "id": "pc.ram",
            "size": context.machine.memory.boot_size,
            "merge": True,
            "dump": True,
            "prealloc": settings.prealloc,
            "share": settings.shared,
            "host-nodes": [],
            "policy": "default",
        }
    ]


COMMANDS: Sequence[Command] = (
    Command("balloon", balloon, Struct({"value": Int()}), NOTHING, summary="how much RAM the guest is to keep, bytes"),
    Command("query-balloon", query_balloon, returns=Struct({"actual": Int()}), summary="how much it has, bytes"),
    Command(
        "query-memory-size-summary",
        query_memory_size_summary,
        returns=Struct({"base-memory": Int(), "*plugged-memory": Int()}),
    ),
    Command("query-memory-devices", query_memory_devices, summary="virtio-mem devices"),
    Command("query-memdev", query_memdev, summary="what backs the RAM"),
)
