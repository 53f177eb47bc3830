"""What the host gives and where from: memory backing, pinning, limits. https://libvirt.org/formatdomain.html#cpu-tuning"""

from __future__ import annotations

from typing import Annotated, Literal

from kvik.conf.codec import CHILD, KIB, SIGNED, VALUE, Element, Present, Text


class MaxMemory(Element):
    """KiB; `slots` for memory modules."""

    slots: int | None = None
    value: Annotated[int, VALUE, KIB] = 0


class HugePage(Element):
    """`size` in KiB; `nodeset` is a set of the guest's NUMA nodes."""

    size: Annotated[int | None, KIB] = None
    nodeset: str | None = None


class HugePages(Element):
    pages: Annotated[list[HugePage], "page"] = []


class MemorySourceType(Element):
    type: Literal["anonymous", "file", "memfd"]


class MemoryAccess(Element):
    mode: Literal["shared", "private"]


class MemoryAllocation(Element):
    mode: Literal["immediate", "ondemand"] | None = None
    threads: int | None = None


class MemoryBacking(Element):
    hugepages: HugePages | None = None
    nosharepages: Present = False
    locked: Present = False
    source: MemorySourceType | None = None
    access: MemoryAccess | None = None
    allocation: MemoryAllocation | None = None
    discard: Present = False


class Resource(Element):
    __xml_strict__ = True

    partition: Text = None
    fibrechannel: FibreChannel | None = None


class FibreChannel(Element):
    appid: str | None = None


class VcpuPin(Element):
    vcpu: int
    cpuset: str


class EmulatorPin(Element):
    cpuset: str


class IoThreadPin(Element):
    iothread: int
    cpuset: str


class VcpuSched(Element, kw_only=True):
    vcpus: str | None = None
    scheduler: Literal["batch", "idle", "fifo", "rr"]
    priority: int | None = None


class IoThreadSched(Element, kw_only=True):
    iothreads: str | None = None
    scheduler: Literal["batch", "idle", "fifo", "rr"]
    priority: int | None = None


class EmulatorSched(Element):
    scheduler: Literal["batch", "idle", "fifo", "rr"]
    priority: int | None = None


class CacheAllocation(Element):
    """`size` in KiB."""

    id: int
    level: int
    type: Literal["both", "code", "data"]
    size: Annotated[int, KIB]


class CacheMonitor(Element, kw_only=True):
    level: int | None = None
    vcpus: str


class CacheTune(Element):
    vcpus: str
    id: str | None = None
    caches: Annotated[list[CacheAllocation], "cache"] = []
    monitors: Annotated[list[CacheMonitor], "monitor"] = []


class MemoryNodeBandwidth(Element):
    id: int
    bandwidth: int


class MemoryMonitor(Element):
    vcpus: str


class MemoryTune(Element):
    vcpus: str
    nodes: Annotated[list[MemoryNodeBandwidth], "node"] = []
    monitors: Annotated[list[MemoryMonitor], "monitor"] = []


class CpuTune(Element):
    """Periods and quotas in microseconds; a negative quota is no limit."""

    shares: Annotated[int | None, CHILD] = None
    period: Annotated[int | None, CHILD] = None
    quota: Annotated[int | None, CHILD, SIGNED] = None
    global_period: Annotated[int | None, CHILD] = None
    global_quota: Annotated[int | None, CHILD, SIGNED] = None
    emulator_period: Annotated[int | None, CHILD] = None
    emulator_quota: Annotated[int | None, CHILD, SIGNED] = None
    iothread_period: Annotated[int | None, CHILD] = None
    iothread_quota: Annotated[int | None, CHILD, SIGNED] = None
    vcpupins: Annotated[list[VcpuPin], "vcpupin"] = []
    emulatorpin: EmulatorPin | None = None
    iothreadpins: Annotated[list[IoThreadPin], "iothreadpin"] = []
    vcpuscheds: Annotated[list[VcpuSched], "vcpusched"] = []
    iothreadscheds: Annotated[list[IoThreadSched], "iothreadsched"] = []
    emulatorsched: EmulatorSched | None = None
    cachetunes: Annotated[list[CacheTune], "cachetune"] = []
    memorytunes: Annotated[list[MemoryTune], "memorytune"] = []


class NumaMemory(Element):
    mode: Literal["strict", "preferred", "interleave", "restrictive"] | None = None
    nodeset: str | None = None
    placement: Literal["static", "auto"] | None = None


class NumaMemNode(Element):
    cellid: int
    mode: Literal["strict", "preferred", "interleave", "restrictive"]
    nodeset: str


class NumaTune(Element):
    memory: NumaMemory | None = None
    memnodes: Annotated[list[NumaMemNode], "memnode"] = []


class BlkioDevice(Element):
    path: Text = None
    weight: Annotated[int | None, CHILD] = None
    read_bytes_sec: Annotated[int | None, CHILD] = None
    write_bytes_sec: Annotated[int | None, CHILD] = None
    read_iops_sec: Annotated[int | None, CHILD] = None
    write_iops_sec: Annotated[int | None, CHILD] = None


class BlkioTune(Element):
    weight: Annotated[int | None, CHILD] = None
    devices: Annotated[list[BlkioDevice], "device"] = []


class MemTune(Element):
    """KiB."""

    hard_limit: Annotated[int | None, CHILD, KIB] = None
    soft_limit: Annotated[int | None, CHILD, KIB] = None
    min_guarantee: Annotated[int | None, CHILD, KIB] = None
    swap_hard_limit: Annotated[int | None, CHILD, KIB, "swap_hard_limit"] = None


class IoThreadPoll(Element):
    """Nanoseconds."""

    max: int | None = None
    grow: int | None = None
    shrink: int | None = None


class IoThread(Element):
    id: int
    thread_pool_min: int | None = None
    thread_pool_max: int | None = None
    poll: IoThreadPoll | None = None


class IoThreadIds(Element):
    iothreads: Annotated[list[IoThread], "iothread"] = []


class DefaultIoThread(Element):
    thread_pool_min: int | None = None
    thread_pool_max: int | None = None
