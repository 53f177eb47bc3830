"""vCPUs: which there are, which may come.

Reference: QEMU's qapi/machine.json.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from kvik.vmm.monitor.errors import QmpError
from kvik.vmm.monitor.table import Arguments, Command, Context

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from kvik.vmm.config import CpuConfig

TYPE = "host-x86_64-cpu"


def topology(config: CpuConfig, number: int) -> dict[str, int]:
    """Where vCPU `number` sits."""
    maximum = max(config.maximum, config.count)
    threads, dies = max(config.threads, 1), max(config.dies, 1)
    cores = config.cores or max(maximum // (max(config.sockets, 1) * dies * threads), 1)
    core, thread = divmod(number, threads)
    die, core = divmod(core, cores)
    socket, die = divmod(die, dies)
    return {"socket-id": socket, "die-id": die, "core-id": core, "thread-id": thread}


def query_cpus_fast(context: Context, arguments: Arguments) -> list[dict[str, Any]]:
    machine = context.machine
    for _ in range(100):  # a thread tells its number in its first microseconds
        if machine.status == "prelaunch" or all(vcpu.thread_id for vcpu in machine.vcpus):
            break
        time.sleep(0.001)
    return [
        {
            "cpu-index": vcpu.index,
            "qom-path": qom_path(context, vcpu.index),
            "thread-id": vcpu.thread_id,
            "props": topology(machine.config.cpus, vcpu.index),
            "target": "x86_64",
        }
        for vcpu in machine.vcpus
    ]


def qom_path(context: Context, index: int) -> str:
    name = next((vcpu.name for vcpu in context.machine.vcpus if vcpu.index == index), "")
    return f"/machine/peripheral/{name}" if name else f"/machine/unattached/device[{index}]"


def query_hotpluggable_cpus(context: Context, arguments: Arguments) -> list[dict[str, Any]]:
    config = context.machine.config.cpus
    present = {vcpu.index for vcpu in context.machine.vcpus}
    slots = []
    for number in reversed(range(max(config.maximum, config.count))):
        slot: dict[str, Any] = {"type": TYPE, "vcpus-count": 1, "props": topology(config, number)}
        if number in present:
            slot["qom-path"] = qom_path(context, number)
        slots.append(slot)
    return slots


def plug(context: Context, name: str, properties: dict[str, Any]) -> None:
    """device_add of a vCPU: its place decides its number. Raises `QmpError`."""
    machine, config = context.machine, context.machine.config.cpus
    wanted = {key: value for key, value in properties.items() if key in topology(config, 0)}
    if set(properties) - set(wanted) - {"driver", "id", "node-id"}:
        unknown = sorted(set(properties) - set(wanted) - {"driver", "id", "node-id"})
        raise QmpError(f"Property '{TYPE}.{unknown[0][:80]}' not found")
    for number in range(max(config.maximum, config.count)):
        place = topology(config, number)
        if all(place[key] == value for key, value in wanted.items()) and len(wanted) == len(place):
            if any(vcpu.index == number for vcpu in machine.vcpus):
                raise QmpError(f"CPU[{number}] with APIC ID {number} exists")
            context.server.hotplug().plug_vcpu(number, name)
            return
    raise QmpError("no vCPU slot is at that place; query-hotpluggable-cpus lists them")


def unplug(context: Context, name: str) -> bool:
    """Whether `name` is a plugged vCPU; the guest is asked to let it go."""
    for vcpu in context.machine.vcpus:
        if vcpu.name and vcpu.name == name:
            context.server.hotplug().unplug_vcpu(vcpu.index)
            return True
    return False


COMMANDS: Sequence[Command] = (
    Command("query-cpus-fast", query_cpus_fast, summary="number, place and thread of each vCPU"),
    Command("query-hotpluggable-cpus", query_hotpluggable_cpus, summary="all places for vCPUs"),
)
