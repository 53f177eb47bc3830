"""The capabilities document: what this host is and which guests it runs. Pure: figures in, XML out.

Format: https://libvirt.org/formatcaps.html. virt-install and virt-manager choose architecture, machine type, domain
type and emulator from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from lxml import etree

from kvik.host.node import Cell, CpuModel, CpuTopology, NodeInfo

__all__ = ["Guest", "GuestMachine", "capabilities_xml"]


@dataclass(frozen=True, slots=True)
class GuestMachine:
    """A machine type. `canonical` is the versioned name that an alias such as "q35" means."""

    name: str
    canonical: str = ""
    max_cpus: int = 0


@dataclass(frozen=True, slots=True)
class Guest:
    """What can run for one architecture."""

    arch: str
    emulator: str
    machines: Sequence[GuestMachine]
    domain_types: Sequence[str]  # "qemu", "kvm"
    wordsize: int = 64
    acpi: bool = field(default=True)


def _add(parent: etree._Element, tag: str, text: str | int | None = None, **attributes: str | int) -> etree._Element:
    element = etree.SubElement(parent, tag, {name: str(value) for name, value in attributes.items()})
    if text is not None:
        element.text = str(text)
    return element


def capabilities_xml(
    uuid: str,
    cpu: CpuModel,
    info: NodeInfo,
    *,
    cells: Sequence[Cell],
    page_sizes: Sequence[int],
    guests: Sequence[Guest],
    iommu: bool = False,
) -> str:
    root = etree.Element("capabilities")
    host = _add(root, "host")
    _add(host, "uuid", uuid)
    _host_cpu(host, cpu, info, page_sizes)
    _add(host, "power_management")
    _add(host, "iommu", support="yes" if iommu else "no")
    topology = _add(_add(host, "topology"), "cells", num=len(cells))
    for cell in cells:
        _cell(topology, cell)
    for guest in guests:
        _guest(root, guest)
    etree.indent(root)
    return etree.tostring(root, encoding="unicode") + "\n"


def _host_cpu(host: etree._Element, cpu: CpuModel, info: NodeInfo, page_sizes: Sequence[int]) -> None:
    element = _add(host, "cpu")
    _add(element, "arch", cpu.arch)
    _add(element, "model", cpu.known_model)
    if cpu.vendor:
        _add(element, "vendor", cpu.vendor)
    if cpu.microcode:
        _add(element, "microcode", version=cpu.microcode)
    _add(element, "topology", sockets=info.sockets, dies=1, cores=info.cores, threads=info.threads)
    if cpu.physical_bits:
        _add(element, "maxphysaddr", mode="emulate", bits=cpu.physical_bits)
    for feature in cpu.features:
        _add(element, "feature", name=feature)
    for size in page_sizes:
        _add(element, "pages", unit="KiB", size=size)


def _cell(cells: etree._Element, cell: Cell) -> None:
    element = _add(cells, "cell", id=cell.id)
    _add(element, "memory", cell.memory_kib, unit="KiB")
    for pages in cell.pages:
        _add(element, "pages", pages.total, unit="KiB", size=pages.size_kib)
    distances = _add(element, "distances")
    for other, value in sorted(cell.distances.items()):
        _add(distances, "sibling", id=other, value=value)
    cpus = _add(element, "cpus", num=len(cell.cpus))
    for cpu in cell.cpus:
        _cpu(cpus, cpu)


def _cpu(cpus: etree._Element, cpu: CpuTopology) -> None:
    from kvik.host.node import format_cpu_list

    _add(
        cpus,
        "cpu",
        id=cpu.id,
        socket_id=cpu.socket_id,
        die_id=cpu.die_id,
        core_id=cpu.core_id,
        siblings=format_cpu_list(cpu.siblings),
    )


def _guest(root: etree._Element, guest: Guest) -> None:
    element = _add(root, "guest")
    _add(element, "os_type", "hvm")
    arch = _add(element, "arch", name=guest.arch)
    _add(arch, "wordsize", guest.wordsize)
    _add(arch, "emulator", guest.emulator)
    for machine in guest.machines:
        attributes: dict[str, str | int] = {}
        if machine.max_cpus:
            attributes["maxCpus"] = machine.max_cpus
        if machine.canonical and machine.canonical != machine.name:
            attributes["canonical"] = machine.canonical
        _add(arch, "machine", machine.name, **attributes)
    for name in guest.domain_types:
        _add(arch, "domain", type=name)
    features = _add(element, "features")
    if guest.acpi:
        _add(features, "acpi", default="on", toggle="yes")
        _add(features, "apic", default="on", toggle="no")
    _add(features, "cpuselection")
    _add(features, "deviceboot")
