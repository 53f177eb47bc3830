"""Figures of this host, read from /proc and /sys without any tool.

What libvirt's NODE_GET_INFO, NODE_GET_CPU_STATS, NODE_GET_MEMORY_STATS, NODE_GET_CELLS_FREE_MEMORY, NODE_GET_CPU_MAP
and the host part of the capabilities document report. `root` moves /proc, /sys and /etc below another directory, for
tests. Sources: proc(5), Documentation/admin-guide/cputopology.rst, Documentation/ABI/stable/sysfs-devices-node.
"""

from __future__ import annotations

import os
import platform
import re
import socket
import uuid
from dataclasses import dataclass
from pathlib import Path

from kvik.errors import HostError
from kvik.host.files import atomic_write, ensure_directory

_ROOT = Path("/")
_TICK = os.sysconf("SC_CLK_TCK")
_PAGE_KIB = os.sysconf("SC_PAGE_SIZE") // 1024
_LIMIT = 4 << 20  # bytes of any one file of /proc or /sys
_MAX_CPUS = 8192


def read_text(path: Path, limit: int = _LIMIT) -> str:
    """A file of /proc or /sys, bounded; empty if it is not there or may not be read."""
    try:
        with path.open("rb") as file:
            return file.read(limit).decode("utf-8", "replace").strip()
    except OSError:
        return ""


def _read_int(path: Path, default: int = 0) -> int:
    text = read_text(path, 64)
    try:
        return int(text)
    except ValueError:
        return default


def parse_cpu_list(text: str) -> list[int]:
    """The kernel's list format ("0-3,8,10-11"), ascending; rubbish and ids beyond 8191 are left out."""
    cpus: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if not first.isdigit() or (last and not last.isdigit()):
            continue
        low, high = int(first), int(last or first)
        cpus.update(range(low, min(high, _MAX_CPUS - 1) + 1))
    return sorted(cpus)


def format_cpu_list(cpus: list[int]) -> str:
    """The inverse of `parse_cpu_list`."""
    parts: list[str] = []
    start = previous = None
    for cpu in [*sorted(cpus), None]:
        if previous is not None and cpu == previous + 1:
            previous = cpu
            continue
        if start is not None:
            parts.append(str(start) if start == previous else f"{start}-{previous}")
        start = previous = cpu
    return ",".join(parts)


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
        socket_id=max(_read_int(base / "physical_package_id"), 0),  # -1 where firmware does not say
        die_id=max(_read_int(base / "die_id"), 0),
        core_id=max(_read_int(base / "core_id", cpu), 0),
        siblings=parse_cpu_list(read_text(base / "thread_siblings_list")) or [cpu],
    )


@dataclass(frozen=True, slots=True)
class CpuModel:
    """The first CPU as /proc/cpuinfo describes it."""

    arch: str  # as uname -m says: "x86_64"
    vendor_id: str  # "GenuineIntel", "AuthenticAMD", ...
    name: str  # marketing name
    family: int
    model: int
    stepping: int
    microcode: int
    mhz: int
    flags: frozenset[str]  # the kernel's spellings
    physical_bits: int  # 0: unknown
    virtual_bits: int

    @property
    def vendor(self) -> str:
        """libvirt's name of the vendor: "Intel", "AMD", ..., or empty."""
        return _VENDORS.get(self.vendor_id, "")

    @property
    def features(self) -> list[str]:
        """The flags in QEMU's and libvirt's spelling, those that are CPUID bits, sorted."""
        return sorted({_FLAG_NAMES.get(flag, flag) for flag in self.flags if flag not in _KERNEL_FLAGS})

    @property
    def known_model(self) -> str:
        """The newest of QEMU's named CPU models whose defining features are all here, or "qemu64"."""
        for vendor, name, needed in _MODELS:
            if vendor == self.vendor and needed <= self.flags:
                return name
        return "qemu64"


_VENDORS = {"GenuineIntel": "Intel", "AuthenticAMD": "AMD", "HygonGenuine": "Hygon", "CentaurHauls": "VIA"}

# Where the kernel's name in /proc/cpuinfo differs from QEMU's (both come from the vendors' manuals).
_FLAG_NAMES = {
    "pni": "pni",
    "sse4_1": "sse4.1",
    "sse4_2": "sse4.2",
    "cr8_legacy": "cr8legacy",
    "sha_ni": "sha-ni",
    "tsc_deadline_timer": "tsc-deadline",
    "avx512_bf16": "avx512-bf16",
    "avx512_vbmi2": "avx512vbmi2",
    "avx512_vnni": "avx512vnni",
    "avx512_bitalg": "avx512bitalg",
    "avx512_vpopcntdq": "avx512-vpopcntdq",
    "avx512_fp16": "avx512-fp16",
    "avx_vnni": "avx-vnni",
    "amx_tile": "amx-tile",
    "amx_int8": "amx-int8",
    "amx_bf16": "amx-bf16",
    "nonstop_tsc": "invtsc",
    "arch_capabilities": "arch-capabilities",
    "md_clear": "md-clear",
    "lm": "lm",
}
# Made up by Linux, without a CPUID bit that a guest could have.
_KERNEL_FLAGS = frozenset(
    [
        "constant_tsc",
        "rep_good",
        "nopl",
        "xtopology",
        "extd_apicid",
        "tsc_known_freq",
        "cpuid",
        "aperfmperf",
        "art",
        "arch_perfmon",
        "pebs",
        "bts",
        "tpr_shadow",
        "flexpriority",
        "ept",
        "vpid",
        "ept_ad",
        "vnmi",
        "hypervisor",
        "pti",
        "ibrs_enhanced",
        "fsrm_kernel",
        "tsc_reliable",
        "amd_dcm",
        "fxsave_leak",
        "cqm",
        "cat_l3",
        "cat_l2",
        "cdp_l3",
        "cdp_l2",
        "mba",
        "ssbd_kernel",
        "retpoline",
    ]
)

_LEVEL_V2 = frozenset(["cx16", "lahf_lm", "popcnt", "sse4_1", "sse4_2", "ssse3"])
_HASWELL = _LEVEL_V2 | frozenset(["avx", "avx2", "bmi1", "bmi2", "fma", "movbe", "abm", "aes", "xsave", "fsgsbase"])
_SKYLAKE = _HASWELL | frozenset(["adx", "rdseed", "smap", "xsavec", "clflushopt"])
_AVX512 = _SKYLAKE | frozenset(["avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"])
_ZEN = _HASWELL | frozenset(["adx", "rdseed", "smap", "sha_ni", "sse4a", "clflushopt"])
_MODELS: tuple[tuple[str, str, frozenset[str]], ...] = (
    ("Intel", "SapphireRapids", _AVX512 | {"amx_tile", "avx512_bf16", "avx512_vnni"}),
    ("Intel", "Icelake-Server", _AVX512 | {"avx512_vnni", "avx512_vbmi2", "la57"}),
    ("Intel", "Cascadelake-Server", _AVX512 | {"avx512_vnni"}),
    ("Intel", "Skylake-Server", _AVX512),
    ("Intel", "Skylake-Client", _SKYLAKE),
    ("Intel", "Haswell", _HASWELL),
    ("Intel", "IvyBridge", _LEVEL_V2 | {"avx", "aes", "f16c", "rdrand", "fsgsbase"}),
    ("Intel", "SandyBridge", _LEVEL_V2 | {"avx", "aes"}),
    ("Intel", "Nehalem", _LEVEL_V2),
    ("AMD", "EPYC-Genoa", _ZEN | _AVX512 | {"avx512_bf16", "vaes", "clwb"}),
    ("AMD", "EPYC-Milan", _ZEN | {"vaes", "vpclmulqdq", "clwb", "pcid"}),
    ("AMD", "EPYC-Rome", _ZEN | {"clwb", "rdpid"}),
    ("AMD", "EPYC", _ZEN),
    ("AMD", "Opteron_G5", _LEVEL_V2 | {"avx", "aes", "fma4", "tbm"}),
    ("AMD", "Opteron_G4", _LEVEL_V2 | {"avx", "aes", "fma4"}),
)


def cpu_model(root: Path = _ROOT) -> CpuModel:
    """Bounded: only the first processor's paragraph is read."""
    fields: dict[str, str] = {}
    try:
        with (root / "proc/cpuinfo").open(encoding="utf-8", errors="replace") as file:
            for _ in range(200):
                line = file.readline(65536)
                key, _, value = line.partition(":")
                if not line.strip():
                    break
                fields[key.strip()] = value.strip()
    except OSError:
        pass

    def number(key: str, base: int = 10) -> int:
        try:
            return int(fields.get(key, "0"), base)
        except ValueError:
            return 0

    bits = [int(match) for match in re.findall(r"(\d{1,3}) bits", fields.get("address sizes", ""))]
    return CpuModel(
        arch=platform.machine() or "x86_64",
        vendor_id=fields.get("vendor_id", ""),
        name=fields.get("model name", ""),
        family=number("cpu family"),
        model=number("model"),
        stepping=number("stepping"),
        microcode=number("microcode", 0),
        mhz=_mhz(fields.get("cpu MHz", ""), root),
        flags=frozenset(fields.get("flags", "").split()),
        physical_bits=bits[0] if len(bits) == 2 else 0,
        virtual_bits=bits[1] if len(bits) == 2 else 0,
    )


def _mhz(cpuinfo: str, root: Path) -> int:
    # The base frequency where the host tells it: the current one swings with load.
    base = _read_int(root / "sys/devices/system/cpu/cpu0/cpufreq/base_frequency")
    if base > 0:
        return base // 1000
    try:
        return int(float(cpuinfo))
    except ValueError:
        return 0


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
        Pages(size, _read_int(directory / "nr_hugepages"), _read_int(directory / "free_hugepages"))
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
