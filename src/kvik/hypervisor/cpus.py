"""vCPUs of a running machine: which there are, plugging more, unplugging those."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kvik.conf.cpu import Vcpu, VcpuEntry
from kvik.conf.domain import Domain
from kvik.errors import ConfigUnsupported, HypervisorError, OperationFailed, OperationInvalid

if TYPE_CHECKING:
    from kvik.hypervisor.machine import QmpMachine

__all__ = ["boot_vcpus", "plug_listed", "set_vcpus", "vcpus"]


def boot_vcpus(domain: Domain) -> int:
    """How many vCPUs the VMM itself makes; those that can be unplugged again are plugged before the guest runs.

    Raises `ConfigUnsupported`: it makes the first ones, whichever the document wants.
    """
    maximum = domain.vcpu.value if domain.vcpu else 1
    entries = domain.vcpus.vcpus if domain.vcpus else []
    if not entries:
        return (domain.vcpu.current if domain.vcpu else None) or maximum
    fixed = sorted(entry.id for entry in entries if entry.enabled and not entry.hotpluggable)
    if fixed != list(range(len(fixed))):
        raise ConfigUnsupported(
            "the vCPUs that cannot be unplugged have to be the first ones",
            path="/domain/vcpus",
            remedy="mark those behind a gap hotpluggable='yes'",
        )
    return len(fixed)


def _objects(value: Any, what: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise HypervisorError(f"the reply to {what} is no list of objects")
    return value


async def vcpus(machine: QmpMachine) -> list[Mapping[str, Any]]:
    """`id`, `thread` (Linux thread id), `online`; in the order of ids."""
    found: list[Mapping[str, Any]] = []
    for item in _objects(await machine.execute("query-cpus-fast"), "query-cpus-fast"):
        number, thread = item.get("cpu-index"), item.get("thread-id")
        if isinstance(number, int) and isinstance(thread, int):
            found.append({"id": number, "thread": thread, "online": True, "qom": str(item.get("qom-path", ""))})
    return sorted(found, key=lambda item: int(item["id"]))


async def set_vcpus(machine: QmpMachine, count: int) -> None:
    """Plug or unplug until `count` are there. Raises `OperationInvalid`, `OperationFailed`.

    Only vCPUs that were plugged can be unplugged, and the guest must agree; this returns when it was asked.
    """
    domain = machine.domain
    most = domain.vcpu.value if domain.vcpu else 1
    if not 1 <= count <= most:
        raise OperationInvalid(f"machine {machine.name} can have 1 to {most} vCPUs, not {count}")
    slots = _objects(await machine.execute("query-hotpluggable-cpus"), "query-hotpluggable-cpus")
    present = [slot for slot in slots if "qom-path" in slot]
    width = max((int(slot.get("vcpus-count", 1)) for slot in slots), default=1)
    have = sum(int(slot.get("vcpus-count", 1)) for slot in present)
    if count % width:
        raise OperationInvalid(f"vCPUs come in groups of {width} here")
    if count > have:
        free = sorted((slot for slot in slots if "qom-path" not in slot), key=_position)
        if len(free) * width < count - have:
            raise OperationInvalid(f"machine {machine.name} cannot plug vCPUs")
        for slot in free[: (count - have) // width]:
            await _plug(machine, slot)
    elif count < have:
        plugged = [slot for slot in present if str(slot["qom-path"]).startswith("/machine/peripheral/vcpu")]
        leaving = sorted(plugged, key=_position, reverse=True)[: (have - count) // width]
        if len(leaving) * width < have - count:
            raise OperationFailed(
                f"only {len(plugged) * width} of machine {machine.name}'s vCPUs were plugged and can be unplugged"
            )
        for slot in leaving:
            await machine.execute("device_del", {"id": str(slot["qom-path"]).rsplit("/", 1)[-1]})
    if domain.vcpu is None:
        domain.vcpu = Vcpu(value=most)
    domain.vcpu.current = count if count != most else None
    if domain.vcpus is not None and domain.vcpus.vcpus:
        await _tell(machine, most)


async def _plug(machine: QmpMachine, slot: Mapping[str, Any]) -> None:
    name = "vcpu" + "-".join(str(number) for number in _position(slot))
    await machine.execute("device_add", {"driver": slot["type"], "id": name, **slot["props"]}, deadline=30.0)


async def _slots(machine: QmpMachine) -> list[dict[str, Any]]:
    """In the order of the vCPUs' numbers."""
    slots = _objects(await machine.execute("query-hotpluggable-cpus"), "query-hotpluggable-cpus")
    return sorted(slots, key=_position)


async def plug_listed(machine: QmpMachine) -> None:
    """Before the guest runs: the vCPUs that the document wants there and able to go, in its order."""
    entries = machine.domain.vcpus.vcpus if machine.domain.vcpus else []
    wanted = [entry for entry in entries if entry.enabled and entry.hotpluggable]
    if not wanted:
        return
    slots = await _slots(machine)
    for entry in sorted(wanted, key=lambda item: (item.order or 0, item.id)):
        if entry.id >= len(slots) or int(slots[entry.id].get("vcpus-count", 1)) != 1:
            raise OperationInvalid(f"machine {machine.name} cannot plug vCPU {entry.id}")
        await _plug(machine, slots[entry.id])


async def _tell(machine: QmpMachine, most: int) -> None:
    """What <vcpus> of the live document says: who is there now."""
    domain = machine.domain
    slots = await _slots(machine)
    if domain.vcpus is None or len(slots) != most:
        return
    known = {entry.id: entry for entry in domain.vcpus.vcpus}
    last = max((entry.order or 0 for entry in known.values()), default=0)
    for number, slot in enumerate(slots):
        entry = known.setdefault(number, VcpuEntry(id=number, enabled=False, hotpluggable=True))
        there = "qom-path" in slot
        if there and not entry.enabled:
            entry.order = last = last + 1
        entry.enabled = there
        entry.order = entry.order if there else None
    domain.vcpus.vcpus = [known[number] for number in sorted(known)]


def _position(slot: Mapping[str, Any]) -> tuple[int, ...]:
    props = slot.get("props")
    if not isinstance(props, dict):
        raise HypervisorError("a vCPU slot has no position")
    order = ("node-id", "socket-id", "die-id", "cluster-id", "core-id", "thread-id")
    return tuple(int(props[name]) for name in order if isinstance(props.get(name), int))
