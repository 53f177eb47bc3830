"""<vcpu>, <vcpus>, <cpu>: https://libvirt.org/formatdomain.html#cpu-model-and-topology"""

from __future__ import annotations

from typing import Annotated, Literal

from kvik.conf.codec import KIB, ON_OFF, VALUE, Element, Text, YesNo


class Vcpu(Element):
    """`value` is the most that can ever be plugged; `current`, if given, how many are there at start."""

    placement: Literal["static", "auto"] | None = None
    cpuset: str | None = None
    current: int | None = None
    value: Annotated[int, VALUE] = 1


class VcpuEntry(Element):
    id: int
    enabled: YesNo = None
    hotpluggable: YesNo = None
    order: int | None = None


class Vcpus(Element):
    vcpus: Annotated[list[VcpuEntry], "vcpu"] = []


class CpuModel(Element):
    fallback: Literal["allow", "forbid"] | None = None
    vendor_id: str | None = None
    value: Annotated[str | None, VALUE] = None


class CpuTopology(Element, kw_only=True):
    sockets: int
    dies: int | None = None
    clusters: int | None = None
    cores: int
    threads: int

    @property
    def total(self) -> int:
        return self.sockets * (self.dies or 1) * (self.clusters or 1) * self.cores * self.threads


class CpuFeature(Element, kw_only=True):
    policy: Literal["force", "require", "optional", "disable", "forbid"] | None = None
    name: str


class CpuCache(Element, kw_only=True):
    level: int | None = None
    mode: Literal["emulate", "passthrough", "disable"]


class MaxPhysAddr(Element):
    mode: Literal["emulate", "passthrough"]
    bits: int | None = None
    limit: int | None = None


class Sibling(Element):
    id: int
    value: int


class Distances(Element):
    siblings: Annotated[list[Sibling], "sibling"] = []


class CacheValue(Element):
    """KiB."""

    value: Annotated[int | None, KIB] = None


class NumaCache(Element):
    level: int
    associativity: Literal["none", "direct", "full"]
    policy: Literal["none", "writeback", "writethrough"]
    size: CacheValue | None = None
    line: CacheLine | None = None


class CacheLine(Element):
    """Bytes."""

    value: int | None = None
    unit: str | None = None


class NumaCell(Element):
    """`memory` in KiB; `cpus` is a set of vCPU numbers."""

    id: int | None = None
    cpus: str | None = None
    memory: Annotated[int | None, KIB] = None
    mem_access: Annotated[Literal["shared", "private"] | None, "memAccess"] = None
    discard: YesNo = None
    distances: Distances | None = None
    caches: Annotated[list[NumaCache], "cache"] = []


class Interconnect(Element):
    """Figures of the guest's HMAT."""

    initiator: int | None = None
    target: int | None = None
    cache: int | None = None
    type: str | None = None
    value: int | None = None
    unit: str | None = None


class Interconnects(Element):
    latencies: Annotated[list[Interconnect], "latency"] = []
    bandwidths: Annotated[list[Interconnect], "bandwidth"] = []


class Numa(Element):
    cells: Annotated[list[NumaCell], "cell"] = []
    interconnects: Interconnects | None = None


class Cpu(Element):
    mode: Literal["custom", "host-model", "host-passthrough", "maximum"] | None = None
    match: Literal["minimum", "exact", "strict"] | None = None
    check: Literal["none", "partial", "full"] | None = None
    migratable: Annotated[bool | None, ON_OFF] = None
    deprecated_features: Annotated[bool | None, ON_OFF] = None
    model: CpuModel | None = None
    vendor: Text = None
    topology: CpuTopology | None = None
    cache: CpuCache | None = None
    maxphysaddr: MaxPhysAddr | None = None
    features: Annotated[list[CpuFeature], "feature"] = []
    numa: Numa | None = None
