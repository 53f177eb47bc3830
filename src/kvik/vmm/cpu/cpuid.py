"""The CPUID table of one processor: what this host and its KVM support, with the guest's own topology written in.

Sources: KVM_GET_SUPPORTED_CPUID (api.rst 4.46), which says what must be filled in by us: topology, APIC ids, the TSC
deadline bit; Intel SDM vol. 2, CPUID; AMD APM vol. 3, appendix E; Documentation/virt/kvm/x86/cpuid.rst.
"""

from __future__ import annotations

import struct

from kvik.errors import InvalidArgument
from kvik.vmm.cpu.topology import Topology

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    from kvik.kvm.structs import CpuidTable
    from kvik.vmm.cpu.topology import TopologyConfig

    class ProcessorConfig(TopologyConfig, Protocol):
        """`features`: "+name" or "-name"."""

        model: str
        features: tuple[str, ...]

    Leaves = dict[tuple[int, int], list[int]]  # (function, index) -> [eax, ebx, ecx, edx]

SIGNIFICANT_INDEX = 1  # KVM_CPUID_FLAG_SIGNIFCANT_INDEX
EAX, EBX, ECX, EDX = range(4)
X2APIC, TSC_DEADLINE, OSXSAVE, HYPERVISOR = 1 << 21, 1 << 24, 1 << 27, 1 << 31  # leaf 1 ecx
LEAF_1_ECX_ALWAYS = X2APIC | TSC_DEADLINE | HYPERVISOR  # KVM emulates them
HTT = 1 << 28  # leaf 1 edx
MSI_EXT_DEST_ID = 1 << 15  # leaf 0x40000001 eax
LARGEST_PLAIN_DESTINATION = 254  # of an interrupt message without that
CMP_LEGACY, TOPOEXT = 1 << 1, 1 << 22  # leaf 0x80000001 ecx
_ENTRY = struct.Struct("<7I12x")


def leaves(table: CpuidTable) -> tuple[Leaves, set[int]]:
    """A table as a dictionary, and the functions whose index counts."""
    found: Leaves = {}
    indexed = set()
    data = memoryview(table).cast("B")[8 : 8 + table.nent * _ENTRY.size]
    for function, index, flags, *registers in _ENTRY.iter_unpack(data):
        if flags & SIGNIFICANT_INDEX:
            indexed.add(function)
        found[function, index if flags & SIGNIFICANT_INDEX else 0] = registers
    return found, indexed


def fill(table: CpuidTable, found: Leaves, indexed: set[int]) -> CpuidTable:
    """Write leaves into a table, in order."""
    data = b"".join(
        _ENTRY.pack(function, index, function in indexed, *registers)
        for (function, index), registers in sorted(found.items())
    )
    if len(found) > table.MAX:
        raise ValueError(f"{len(found)} CPUID leaves are more than the {table.MAX} that KVM takes")
    memoryview(table).cast("B")[8 : 8 + len(data)] = data
    table.nent = len(found)
    return table


def cpuid_for(supported: CpuidTable, config: ProcessorConfig, index: int) -> CpuidTable:
    """The table for the processor with that index, for KVM_SET_CPUID2. Raises `InvalidArgument` for a model or feature
    that does not exist, `OperationUnsupported` for one that this host has not."""
    found, indexed = leaves(supported)
    topology = Topology.of(config)
    one = found[1, 0]
    one[ECX] = one[ECX] & ~OSXSAVE | LEAF_1_ECX_ALWAYS  # KVM keeps OSXSAVE right
    if topology.largest_apic_id > LARGEST_PLAIN_DESTINATION:
        # Interrupts reach such processors only if message addresses have room for the id: 15 bits of it.
        found[0x40000001, 0][EAX] |= MSI_EXT_DEST_ID
    if config.model not in ("host", "max") or config.features:
        from kvik.vmm.cpu.models import apply_model

        apply_model(found, config.model, config.features)
    _topology(found, indexed, topology, topology.apic_id(index))
    return fill(type(supported)(), found, indexed)


def physical_bits(table: CpuidTable) -> int:
    """How many bits the physical addresses of such a CPU have."""
    found, _ = leaves(table)
    return found.get((0x80000008, 0), [36])[EAX] & 0xFF


def check_physical_bits(table: CpuidTable, end: int) -> None:
    """Raises `InvalidArgument` if the guest's address map, up to `end`, is larger than its CPUs can name."""
    bits = physical_bits(table)
    if end > 1 << bits:
        raise InvalidArgument(
            f"the machine's addresses reach {end >> 30} GiB, its CPUs have {bits} bits: {1 << bits >> 30} GiB",
            remedy="give it less memory, or the CPU model host on a host that can address more",
        )


def _topology(found: Leaves, indexed: set[int], topology: Topology, apic_id: int) -> None:
    many = topology.per_socket > 1
    one = found[1, 0]
    one[EBX] = one[EBX] & 0xFFFF | min(topology.per_socket, 255) << 16 | (apic_id & 0xFF) << 24
    one[EDX] = one[EDX] | HTT if many else one[EDX] & ~HTT
    _caches(found, topology)
    _extended_topology(found, indexed, topology, apic_id)
    _amd(found, topology, apic_id)


def _caches(found: Leaves, topology: Topology) -> None:
    """Who shares a cache (leaf 4 on Intel, 0x8000001D on AMD): levels 1 and 2 a core's threads, level 3 the die's."""
    for (function, _), registers in found.items():
        if function not in (4, 0x8000001D) or not registers[EAX] & 0x1F:
            continue
        level = registers[EAX] >> 5 & 7
        sharing = 1 << (topology.core_shift if level < 3 else topology.die_shift)
        registers[EAX] = registers[EAX] & 0x3FFF | sharing - 1 << 14
        if function == 4:
            registers[EAX] |= min((1 << topology.socket_shift - topology.core_shift) - 1, 63) << 26


def _extended_topology(found: Leaves, indexed: set[int], topology: Topology, apic_id: int) -> None:
    """Leaf 0xB knows threads and cores, leaf 0x1F dies too; each level says how far to shift to the next one's id."""
    threads, per_die = topology.threads, topology.cores * topology.threads
    levels = [(topology.core_shift, threads, 1), (topology.socket_shift, topology.per_socket, 2)]
    deep = [(topology.core_shift, threads, 1), (topology.die_shift, per_die, 2)]
    if topology.dies > 1:
        deep.append((topology.socket_shift, topology.per_socket, 5))
    for function, shape in ((0xB, levels), (0x1F, deep)):
        if function > found[0, 0][EAX]:
            if function == 0x1F:
                continue
            found[0, 0][EAX] = function
        for key in [key for key in found if key[0] == function]:
            del found[key]
        indexed.add(function)
        for number, (shift, count, kind) in enumerate([*shape, (0, 0, 0)]):
            found[function, number] = [shift, count, number | kind << 8, apic_id]


def _amd(found: Leaves, topology: Topology, apic_id: int) -> None:
    if not _is_amd(found):
        return
    if (sizes := found.get((0x80000008, 0))) is not None:
        many = min(topology.per_socket, 256) - 1
        sizes[ECX] = sizes[ECX] & ~0xF0FF | topology.socket_shift << 12 | many
    if (extended := found.get((0x80000001, 0))) is not None:
        extended[ECX] = extended[ECX] | CMP_LEGACY if topology.per_socket > 1 else extended[ECX] & ~CMP_LEGACY
        if extended[ECX] & TOPOEXT:
            core = apic_id >> topology.core_shift & 0xFF
            node = apic_id >> topology.die_shift
            nodes = topology.dies - 1
            found[0x8000001E, 0] = [apic_id, topology.threads - 1 << 8 | core, nodes << 8 | node & 0xFF, 0]


def _is_amd(found: Leaves) -> bool:
    vendor = struct.pack("<3I", *(found[0, 0][register] for register in (EBX, EDX, ECX)))
    return vendor in (b"AuthenticAMD", b"HygonGenuine")
