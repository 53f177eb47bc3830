"""Figures of a running machine under libvirt's names: from /proc where Linux keeps them, from QMP for the rest."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvik.conf.enums import DomainDiskErrorCode
from kvik.errors import HypervisorError, KvikError, MonitorError
from kvik.host.interface_counters import interface_counters
from kvik.hypervisor import cpus

if TYPE_CHECKING:
    from kvik.hypervisor.machine import QmpMachine

__all__ = ["balloon", "collect", "disk_errors", "disk_figures"]

_DEADLINE = 2.0
_NET = tuple(f"{side}.{what}" for side in ("rx", "tx") for what in ("bytes", "pkts", "errs", "drop"))
_BLOCK = (
    ("rd.reqs", "rd_operations"), ("rd.bytes", "rd_bytes"), ("rd.times", "rd_total_time_ns"),
    ("wr.reqs", "wr_operations"), ("wr.bytes", "wr_bytes"), ("wr.times", "wr_total_time_ns"),
    ("fl.reqs", "flush_operations"), ("fl.times", "flush_total_time_ns"),
)  # fmt: skip
_GUEST = {
    "stat-swap-in": "swap_in", "stat-swap-out": "swap_out", "stat-major-faults": "major_fault",
    "stat-minor-faults": "minor_fault", "stat-free-memory": "unused", "stat-total-memory": "available",
    "stat-available-memory": "usable", "stat-disk-caches": "disk_caches",
    "stat-htlb-pgalloc": "hugetlb_pgalloc", "stat-htlb-pgfail": "hugetlb_pgfail",
}  # fmt: skip
_NUMBERS = {"major_fault", "minor_fault", "hugetlb_pgalloc", "hugetlb_pgfail", "last_update"}


async def collect(machine: QmpMachine, groups: frozenset[str]) -> dict[str, int | str]:
    """Groups: "cpu", "net" and those in `_ASKED`; empty: all. What QEMU does not answer in time is left out."""
    wanted = groups or frozenset({"cpu", "net", *_ASKED})
    figures: dict[str, int | str] = {}
    if "cpu" in wanted:
        figures |= _cpu(machine)
    if "net" in wanted:
        figures |= _net(machine)
    asked = [maker(machine) for name, maker in _ASKED.items() if name in wanted]
    for result in await asyncio.gather(*asked, return_exceptions=True):
        if isinstance(result, dict):
            figures |= result
        elif not isinstance(result, KvikError):
            raise result
    return figures


def _cpu(machine: QmpMachine) -> dict[str, int | str]:
    stat = machine.process.stat()
    if stat is None:
        return {}
    return {
        "cpu.time": stat.user_ns + stat.system_ns,
        "cpu.user": stat.user_ns,
        "cpu.system": stat.system_ns,
        "cpu.cache.monitor.count": 0,  # no <monitor> of the cache is ever set up
        "cpu.haltpoll.success.time": _halt_polling(machine, "success"),
        "cpu.haltpoll.fail.time": _halt_polling(machine, "fail"),
    }


def _halt_polling(machine: QmpMachine, end: str) -> int:
    """ns that KVM waited, awake, for a halted vCPU; 0 under emulation, and where nobody mounted debugfs."""
    total = 0
    if machine.accelerator == "kvm":
        with contextlib.suppress(OSError, ValueError):
            for file in Path("/sys/kernel/debug/kvm").glob(f"{machine.pid}-*/halt_poll_{end}_ns"):
                total += int(file.read_text())
    return total


def _net(machine: QmpMachine) -> dict[str, int | str]:
    figures: dict[str, int | str] = {"net.count": len(machine.domain.devices.interfaces)}
    for number, nic in enumerate(machine.domain.devices.interfaces):
        name = nic.target.dev if nic.target else None
        if not name:
            continue  # user networking: QEMU counts nothing
        figures[f"net.{number}.name"] = name
        found = interface_counters(name)
        if found is not None:
            # What a tap receives, its machine sent.
            numbers = found if nic.is_macvtap else (*found[4:], *found[:4])
            figures |= {f"net.{number}.{key}": value for key, value in zip(_NET, numbers, strict=True)}
    return figures


async def _block(machine: QmpMachine) -> dict[str, int | str]:
    reply = await machine.execute("query-blockstats", deadline=_DEADLINE)
    if not isinstance(reply, list):
        raise HypervisorError(f"{machine.name}: the reply to query-blockstats is no list")
    by_device: dict[str, dict[str, Any]] = {}
    for item in reply:
        path = item.get("qdev") if isinstance(item, dict) else None
        if isinstance(path, str) and isinstance(item.get("stats"), dict):
            by_device[path.removeprefix("/machine/peripheral/").split("/")[0]] = item
    nodes = await _image_sizes(machine)
    figures: dict[str, int | str] = {"block.count": len(machine.domain.devices.disks)}
    for number, disk in enumerate(machine.domain.devices.disks):
        prefix = f"block.{number}"
        figures[f"{prefix}.name"] = disk.target.dev or ""
        location = disk.source.location if disk.source else None
        if location:
            figures[f"{prefix}.path"] = location
        if disk.alias is None:
            continue
        figures |= disk_figures(prefix, by_device.get(disk.alias.name, {}), nodes.get(machine.top_node(disk), {}))
    return figures


def disk_figures(prefix: str, device: Mapping[str, Any], image: Mapping[str, Any]) -> dict[str, int]:
    """Of one disk: `device` as query-blockstats has it, `image` as query-named-block-nodes has it; both may lack
    anything."""
    counted = device.get("stats", {})
    found: dict[str, int] = {}
    for key, name in _BLOCK:
        value = counted.get(name)
        if isinstance(value, int):
            found[f"{prefix}.{key}"] = value
    size, actual, offset = (image.get("virtual-size"), image.get("actual-size"), _end_of_writes(device, image))
    if isinstance(size, int):
        found |= {f"{prefix}.capacity": size, f"{prefix}.physical": actual if isinstance(actual, int) else 0}
        if isinstance(offset, int):
            found[f"{prefix}.allocation"] = offset
    return found


def _end_of_writes(device: Mapping[str, Any], image: Mapping[str, Any]) -> int | None:
    """Offset behind the last byte written in the image's file; None where that is not told.

    The device's own figure is of the guest's offsets: those of the file are with the node at the bottom ("parent", in
    the words of query-blockstats). Only of a raw image they are the same.
    """
    if not isinstance(device.get("parent"), dict) and image.get("format") != "raw":
        return None
    while isinstance(below := device.get("parent"), dict):
        device = below
    counted = device.get("stats")
    offset = counted.get("wr_highest_offset") if isinstance(counted, dict) else None
    return offset if isinstance(offset, int) else None


_ERRORS = {"failed": DomainDiskErrorCode.UNSPEC, "nospace": DomainDiskErrorCode.NO_SPACE}  # io-status -> ours


async def disk_errors(machine: QmpMachine) -> dict[str, int]:
    """alias -> virDomainDiskErrorCode of the disks whose last request failed and stopped the machine."""
    reply = await machine.execute("query-block", deadline=_DEADLINE)
    found: dict[str, int] = {}
    for item in reply if isinstance(reply, list) else []:
        path, code = (item.get("qdev"), _ERRORS.get(str(item.get("io-status")))) if isinstance(item, dict) else ("", 0)
        if code and isinstance(path, str):
            found[path.removeprefix("/machine/peripheral/").split("/")[0]] = code
    return found


async def _image_sizes(machine: QmpMachine) -> dict[str, dict[str, Any]]:
    """node name -> what is told of its image."""
    found: dict[str, dict[str, Any]] = {}
    reply = await machine.execute("query-named-block-nodes", {"flat": True}, deadline=_DEADLINE)
    for item in reply if isinstance(reply, list) else []:
        image = item.get("image") if isinstance(item, dict) else None
        if isinstance(image, dict):
            found[str(item.get("node-name"))] = image
    return found


async def _vcpu(machine: QmpMachine) -> dict[str, int | str]:
    listed = await cpus.vcpus(machine)
    most = machine.domain.vcpu.value if machine.domain.vcpu else 1
    figures: dict[str, int | str] = {"vcpu.current": len(listed), "vcpu.maximum": most}
    for item in listed:
        number = item["id"]
        figures[f"vcpu.{number}.state"] = 1  # VIR_VCPU_RUNNING: it is there
        with contextlib.suppress(OSError, ValueError, IndexError):
            thread = Path(f"/proc/{machine.pid}/task/{item['thread']}")
            schedule = (thread / "schedstat").read_text().split()
            figures[f"vcpu.{number}.time"] = int(schedule[0])
            figures[f"vcpu.{number}.wait"] = _waited(thread)
            figures[f"vcpu.{number}.delay"] = int(schedule[1])  # ready, but on no CPU yet
    return figures


def _waited(thread: Path) -> int:
    """ns that a thread slept for I/O or a lock, by the scheduler's own statistics; 0 where they are switched off."""
    with contextlib.suppress(OSError, ValueError):
        for line in (thread / "sched").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("wait_sum", "se.statistics.wait_sum"):
                return int(float(value) * 1_000_000)
    return 0


async def _iothread(machine: QmpMachine) -> dict[str, int | str]:
    if not machine.domain.iothreads and machine.domain.iothreadids is None:
        return {}
    reply = await machine.execute("query-iothreads", deadline=_DEADLINE)
    figures: dict[str, int | str] = {"iothread.count": len(reply) if isinstance(reply, list) else 0}
    for item in reply if isinstance(reply, list) else []:
        number = str(item.get("id", "")).removeprefix("iothread")
        for name in ("poll-max-ns", "poll-grow", "poll-shrink"):
            if number.isdecimal() and isinstance(item.get(name), int):
                figures[f"iothread.{number}.{name}"] = item[name]
    return figures


_DIRTY_RATE = {"unstarted": 0, "measuring": 1, "measured": 2}  # virDomainDirtyRateStatus


async def _dirtyrate(machine: QmpMachine) -> dict[str, int | str]:
    reply = await machine.execute("query-dirty-rate", deadline=_DEADLINE)
    if not isinstance(reply, dict):
        return {}
    figures: dict[str, int | str] = {"dirtyrate.calc_status": _DIRTY_RATE.get(str(reply.get("status")), 0)}
    for ours, theirs in (("calc_start_time", "start-time"), ("calc_period", "calc-time")):
        if isinstance(reply.get(theirs), int):
            figures[f"dirtyrate.{ours}"] = reply[theirs]
    figures["dirtyrate.calc_mode"] = str(reply.get("mode", "page-sampling"))
    if isinstance(reply.get("dirty-rate"), int):
        figures["dirtyrate.megabytes_per_second"] = reply["dirty-rate"]
    return figures


async def _balloon(machine: QmpMachine) -> dict[str, int | str]:
    memory = await balloon(machine)
    figures: dict[str, int | str] = {"balloon.maximum": machine.domain.memory}
    for name, value in memory.items():
        key = name.replace("_", "-") if name in ("hugetlb_pgalloc", "hugetlb_pgfail", "last_update") else name
        figures[f"balloon.{key}"] = value if name in _NUMBERS else value // 1024
    return figures


async def balloon(machine: QmpMachine) -> Mapping[str, int]:
    """Bytes: "current", "rss", and what the guest's driver reports ("available", "unused", "usable", ...)."""
    figures: dict[str, int] = {}
    stat = machine.process.stat()
    if stat is not None:
        figures["rss"] = stat.rss
    figures["current"] = machine.domain.memory * 1024
    device = machine.domain.devices.memballoon
    if device is None or device.model == "none" or device.alias is None:
        return figures
    with contextlib.suppress(MonitorError):  # no driver in the guest yet
        reply = await machine.execute("query-balloon", deadline=_DEADLINE)
        if isinstance(reply, dict) and isinstance(reply.get("actual"), int):
            figures["current"] = reply["actual"]
    if device.stats is None:
        return figures
    with contextlib.suppress(MonitorError):
        place = {"path": f"/machine/peripheral/{device.alias.name}", "property": "guest-stats"}
        reply = await machine.execute("qom-get", place, deadline=_DEADLINE)
        reported = reply.get("stats") if isinstance(reply, dict) else None
        for key, value in reported.items() if isinstance(reported, dict) else ():
            # The guest's driver reports -1 for what it does not know.
            if key in _GUEST and isinstance(value, int) and 0 <= value < 2**63:
                figures[_GUEST[key]] = value
        if isinstance(reply, dict) and isinstance(reply.get("last-update"), int):
            figures["last_update"] = reply["last-update"]
    return figures


_ASKED = {"block": _block, "vcpu": _vcpu, "balloon": _balloon, "iothread": _iothread, "dirtyrate": _dirtyrate}
