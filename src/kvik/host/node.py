"""Figures of this host, read from /proc and /sys without any tool.

What libvirt's NODE_GET_INFO, NODE_GET_CPU_STATS, NODE_GET_MEMORY_STATS, NODE_GET_CELLS_FREE_MEMORY, NODE_GET_CPU_MAP
and the host part of the capabilities document report. `root` moves /proc, /sys and /etc below another directory, for
tests. Sources: proc(5), Documentation/admin-guide/cputopology.rst, Documentation/ABI/stable/sysfs-devices-node.
"""

from __future__ import annotations

import os
import re
import socket
import uuid
from dataclasses import dataclass
from pathlib import Path

from kvik.errors import HostError
from kvik.host.cpu_model import cpu_model
from kvik.host.files import atomic_write, ensure_directory
from kvik.host.sysfs import parse_cpu_list, read_int, read_text

_ROOT = Path("/")
_TICK = os.sysconf("SC_CLK_TCK")
_PAGE_KIB = os.sysconf("SC_PAGE_SIZE") // 1024


# CPUs -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CpuMap:
    """Which logical CPUs exist and which are online."""

    present: list[int]
    online: list[int]

    def bitmap(self) -> bytes:
        """One bit a present CPU, least significant first, set if online (the form of NODE_GET_CPU_MAP)."""
        bits = 0
        for cpu in self.online:
            bits |= 1 << cpu
        count = max(self.present, default=-1) + 1
        return (bits & ((1 << count) - 1)).to_bytes((count + 7) // 8, "little")


def cpu_map(root: Path = _ROOT) -> CpuMap:
    base = root / "sys/devices/system/cpu"
    present = parse_cpu_list(read_text(base / "present")) or list(range(os.cpu_count() or 1))
    return CpuMap(present, parse_cpu_list(read_text(base / "online")) or present)


@dataclass(frozen=True, slots=True)
class CpuTopology:
    """One logical CPU's place."""

    id: int
    socket_id: int
    die_id: int
    core_id: int
    siblings: list[int]  # the logical CPUs of the same core, itself included


def cpu_topology(cpu: int, root: Path = _ROOT) -> CpuTopology:
    base = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
    return CpuTopology(
        id=cpu,
        socket_id=max(read_int(base / "physical_package_id"), 0),  # -1 where firmware does not say
        die_id=max(read_int(base / "die_id"), 0),
        core_id=max(read_int(base / "core_id", cpu), 0),
        siblings=parse_cpu_list(read_text(base / "thread_siblings_list")) or [cpu],
    )


# NODE_GET_INFO --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """The fields of virNodeInfo."""

    model: str  # architecture
    memory_kib: int
    cpus: int  # online
    mhz: int
    nodes: int  # NUMA cells; nodes * sockets * cores * threads is at least `cpus`
    sockets: int  # per cell
    cores: int  # per socket
    threads: int  # per core


def node_info(root: Path = _ROOT) -> NodeInfo:
    model = cpu_model(root)
    online = cpu_map(root).online
    topology = [cpu_topology(cpu, root) for cpu in online]
    cells = max(len(_cell_ids(root)), 1)
    packages = {cpu.socket_id for cpu in topology}
    cores = {(cpu.socket_id, cpu.die_id, cpu.core_id) for cpu in topology}
    per_socket = max((sum(core[0] == package for core in cores) for package in packages), default=1)
    threads = max((len(set(cpu.siblings) & set(online)) for cpu in topology), default=1)
    sockets = max(len(packages) // cells, 1)
    if cells * sockets * per_socket * threads != len(online) or len(packages) % cells:
        # libvirt's convention for a topology that is no full product (CPUs offline, cells within a socket).
        cells, sockets, per_socket, threads = 1, 1, len(online), 1
    return NodeInfo(
        model=model.arch,
        memory_kib=memory_stats(root).total_kib,
        cpus=len(online),
        mhz=model.mhz,
        nodes=cells,
        sockets=sockets,
        cores=per_socket,
        threads=threads,
    )


# Memory ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MemoryStats:
    """KiB. `available_kib` is what could be had without swapping; libvirt knows only the other four."""

    total_kib: int
    free_kib: int
    buffers_kib: int
    cached_kib: int
    available_kib: int


def _meminfo(text: str) -> dict[str, int]:
    values: dict[str, int] = {}
    for line in text.splitlines()[:200]:
        # "MemTotal:   24684096 kB", in a cell's file after "Node 0 "
        match = re.match(r"(?:Node \d+ )?(\w+(?:\(\w+\))?):\s+(\d{1,15})", line)
        if match:
            values[match[1]] = int(match[2])
    return values


def memory_stats(root: Path = _ROOT) -> MemoryStats:
    values = _meminfo(read_text(root / "proc/meminfo"))
    return MemoryStats(
        total_kib=values.get("MemTotal", 0),
        free_kib=values.get("MemFree", 0),
        buffers_kib=values.get("Buffers", 0),
        cached_kib=values.get("Cached", 0),
        available_kib=values.get("MemAvailable", values.get("MemFree", 0)),
    )


def free_memory(root: Path = _ROOT) -> int:
    """Bytes, as NODE_GET_FREE_MEMORY reports."""
    return memory_stats(root).free_kib * 1024


def page_sizes(root: Path = _ROOT) -> list[int]:
    """Page sizes in KiB, ascending: the normal one and those of hugetlbfs."""
    return sorted({_PAGE_KIB, *_huge_pages(root / "sys/kernel/mm/hugepages")})


def _huge_pages(directory: Path) -> dict[int, Path]:
    found: dict[int, Path] = {}
    try:
        for entry in directory.iterdir():
            match = re.fullmatch(r"hugepages-(\d{1,12})kB", entry.name)
            if match:
                found[int(match[1])] = entry
    except OSError:
        pass
    return found


# NUMA cells -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Pages:
    size_kib: int
    total: int
    free: int


@dataclass(frozen=True, slots=True)
class Cell:
    """One NUMA node."""

    id: int
    memory_kib: int
    free_kib: int
    cpus: list[CpuTopology]
    pages: list[Pages]
    distances: dict[int, int]  # to each cell, ACPI SLIT: 10 is local


def _cell_ids(root: Path) -> list[int]:
    base = root / "sys/devices/system/node"
    return [cell for cell in parse_cpu_list(read_text(base / "online")) if (base / f"node{cell}").is_dir()]


def cells(root: Path = _ROOT) -> list[Cell]:
    """All NUMA cells; one made-up cell 0 of everything on a kernel without NUMA."""
    found = []
    online = set(cpu_map(root).online)
    ids = _cell_ids(root)
    for cell in ids:
        base = root / f"sys/devices/system/node/node{cell}"
        memory = _meminfo(read_text(base / "meminfo"))
        total, free = memory.get("MemTotal", 0), memory.get("MemFree", 0)
        if len(ids) == 1:
            # All of it, whatever the cell counts: memory that the kernel initialises later is missing there.
            stats = memory_stats(root)
            total, free = stats.total_kib, stats.free_kib
        values = [int(word) for word in read_text(base / "distance").split() if word.isdigit()]
        found.append(
            Cell(
                id=cell,
                memory_kib=total,
                free_kib=free,
                cpus=[cpu_topology(cpu, root) for cpu in parse_cpu_list(read_text(base / "cpulist")) if cpu in online],
                pages=_cell_pages(base / "hugepages", total, free),
                distances=dict(zip(ids, values, strict=False)),
            )
        )
    if not found:
        stats = memory_stats(root)
        pages = _cell_pages(root / "sys/kernel/mm/hugepages", stats.total_kib, stats.free_kib)
        cpus = [cpu_topology(cpu, root) for cpu in sorted(online)]
        found.append(Cell(0, stats.total_kib, stats.free_kib, cpus, pages, {0: 10}))
    return found


def _cell_pages(hugepages: Path, total_kib: int, free_kib: int) -> list[Pages]:
    huge = [
        Pages(size, read_int(directory / "nr_hugepages"), read_int(directory / "free_hugepages"))
        for size, directory in sorted(_huge_pages(hugepages).items())
    ]
    reserved = sum(pages.size_kib * pages.total for pages in huge)
    return [Pages(_PAGE_KIB, max(total_kib - reserved, 0) // _PAGE_KIB, free_kib // _PAGE_KIB), *huge]


# CPU time -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CpuStats:
    """Nanoseconds since boot (libvirt's four names)."""

    kernel: int
    user: int
    idle: int
    iowait: int


def cpu_stats(root: Path = _ROOT) -> dict[int, CpuStats]:
    """By CPU; key -1 is their sum (VIR_NODE_CPU_STATS_ALL_CPUS)."""
    found: dict[int, CpuStats] = {}
    for line in read_text(root / "proc/stat").splitlines():
        if not line.startswith("cpu"):
            break
        name, *values = line.split()
        if not (name == "cpu" or name[3:].isdigit()) or len(values) < 7:
            continue
        user, nice, system, idle, iowait, irq, softirq = (int(value) * 1_000_000_000 // _TICK for value in values[:7])
        found[int(name[3:] or -1)] = CpuStats(system + irq + softirq, user + nice, idle, iowait)
    return found


# Identity -------------------------------------------------------------------------------------------------------


def hostname() -> str:
    return socket.gethostname()


def host_uuid(persist: Path | None = None, root: Path = _ROOT) -> str:
    """The host's UUID: the firmware's (DMI product_uuid, readable for root), else the one kept at `persist`.

    A firmware UUID whose digits are all the same is a placeholder and not believed. Without either, a random one is
    made and, if `persist` is given, kept there for good.
    """
    firmware = _valid_uuid(read_text(root / "sys/class/dmi/id/product_uuid", 64))
    if firmware:
        return firmware
    if persist is not None:
        kept = _valid_uuid(read_text(persist, 64))
        if kept:
            return kept
    made = str(uuid.uuid4())
    if persist is not None:
        try:
            ensure_directory(persist.parent)
            atomic_write(persist, made.encode() + b"\n")
        except HostError:
            pass  # a read-only state directory is the doctor's finding, not a reason to answer nothing
    return made


def _valid_uuid(text: str) -> str:
    try:
        value = uuid.UUID(text)
    except ValueError:
        return ""
    return "" if len(set(value.hex)) == 1 else str(value)
