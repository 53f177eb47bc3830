"""What the tables tell the guest about its machine. Plain data, made by the machine, read by the table builders."""

from __future__ import annotations

from kvik.named import NamedTuple
from kvik.vmm.layout import RAM_HIGH, RAM_LOW_END, Layout


class Cpu(NamedTuple):
    """A processor that is there or may come. `node` is its NUMA node."""

    apic_id: int
    enabled: bool = True
    node: int = 0


class MemoryRange(NamedTuple):
    """RAM, or with `hotplug` room for it, that belongs to a NUMA node; bytes."""

    start: int
    size: int
    node: int = 0
    hotplug: bool = False


class Description:
    """`cpus` in the order of their indices; `ram` empty means no NUMA. `distances[i][j]` as in SLIT: 10 is local.

    `slots`: PCI slots that devices may come into and go from. `com_ports`:
    indices of the 16550s that exist. `cpu_hotplug`: processors may come; the registers answer.
    """

    __slots__ = (
        *("com_ports", "cpu_hotplug", "cpus", "distances", "layout"),
        *("nodes", "pvpanic", "ram", "rtc", "slots", "vmgenid"),
    )

    def __init__(
        self,
        layout: Layout,
        cpus: list[Cpu],
        *,
        ram: list[MemoryRange] | None = None,
        distances: list[list[int]] | None = None,
        slots: tuple[int, ...] = (),
        com_ports: tuple[int, ...] = (0,),
        rtc: bool = True,
        pvpanic: bool = False,
        vmgenid: bool = False,
        cpu_hotplug: bool = False,
    ) -> None:
        self.layout, self.cpus, self.ram, self.distances = layout, cpus, ram or [], distances or []
        self.slots, self.com_ports, self.rtc, self.pvpanic = slots, com_ports, rtc, pvpanic
        self.vmgenid, self.cpu_hotplug = vmgenid, cpu_hotplug
        self.nodes = 1 + max([0, *(cpu.node for cpu in cpus), *(part.node for part in self.ram)])


def spread_ram(layout: Layout, sizes: list[int]) -> list[MemoryRange]:
    """NUMA nodes of `sizes` bytes laid over RAM in order; a node that crosses the hole below 4 GiB becomes two
    ranges."""
    ranges, at = [], 0
    for node, size in enumerate(sizes):
        while size:
            here = min(size, RAM_LOW_END - at) if at < RAM_LOW_END else size
            ranges.append(MemoryRange(at, here, node))
            at += here
            size -= here
            if at == RAM_LOW_END:
                at = RAM_HIGH
    start, end = layout.hotplug
    if end > start:
        ranges.append(MemoryRange(start, end - start, 0, True))
    return ranges
