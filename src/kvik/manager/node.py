"""This host as clients of the wire protocol ask about it: a facade over `kvik.host.node` and the drivers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lxml import etree

from kvik.conf.capabilities import GuestArch, GuestMachine, HostCapabilities, HostCell, format_capabilities
from kvik.conf.cpuset import format_cpuset
from kvik.conf.domain import parse_domain
from kvik.conf.reader import read_xml
from kvik.errors import ConfigError, KvikError, OperationUnsupported
from kvik.host import node
from kvik.host.cpu_model import cpu_model
from kvik.host.sysfs import read_text
from kvik.hypervisor.driver import Driver, Feature

if TYPE_CHECKING:
    from kvik.manager.manager import Manager

__all__ = ["Node"]

INCOMPATIBLE, IDENTICAL, SUPERSET = 0, 1, 2  # virCPUCompareResult
MACHINE_ALIASES = ("q35", "pc", "kvik")
DMI = Path("/sys/class/dmi/id")
KSM = Path("/sys/kernel/mm/ksm")


class Node:
    """Plain methods read /proc or /sys, microseconds each; coroutines ask a driver."""

    def __init__(self, manager: Manager) -> None:
        self._manager = manager
        self._uuid = ""

    # figures

    def hostname(self) -> str:
        return node.hostname()

    def info(self) -> node.NodeInfo:
        return node.node_info()

    def cpu_map(self) -> node.CpuMap:
        return node.cpu_map()

    def cpu_stats(self) -> dict[int, node.CpuStats]:
        return node.cpu_stats()

    def memory_stats(self) -> node.MemoryStats:
        return node.memory_stats()

    def cells(self) -> list[node.Cell]:
        return node.cells()

    def memory_merging(self) -> dict[str, int]:
        """Kernel same-page merging, by libvirt's parameter names; empty where the kernel has none."""
        names = {
            "shm_pages_to_scan": "pages_to_scan",
            "shm_sleep_millisecs": "sleep_millisecs",
            "shm_merge_across_nodes": "merge_across_nodes",
            "shm_pages_shared": "pages_shared",
            "shm_pages_sharing": "pages_sharing",
            "shm_pages_unshared": "pages_unshared",
            "shm_pages_volatile": "pages_volatile",
            "shm_full_scans": "full_scans",
        }
        values = {name: read_text(KSM / file, 64) for name, file in names.items()}
        return {name: int(value) for name, value in values.items() if value.isdigit()}

    def sysinfo(self) -> str:
        """The firmware's account of the host (SMBIOS), in libvirt's sysinfo document."""
        root = etree.Element("sysinfo", type="smbios")
        sections = {
            "bios": {"vendor": "bios_vendor", "version": "bios_version", "date": "bios_date"},
            "system": {
                "manufacturer": "sys_vendor",
                "product": "product_name",
                "version": "product_version",
                "serial": "product_serial",
                "uuid": "product_uuid",
                "sku": "product_sku",
                "family": "product_family",
            },
            "baseBoard": {
                "manufacturer": "board_vendor",
                "product": "board_name",
                "version": "board_version",
                "serial": "board_serial",
            },
        }
        for section, entries in sections.items():
            values = {name: read_text(DMI / file, 256) for name, file in entries.items()}
            present = {name: "".join(c for c in value if c.isprintable()) for name, value in values.items() if value}
            if present:
                parent = etree.SubElement(root, section)
                for name, value in present.items():
                    etree.SubElement(parent, "entry", name=name).text = value
        etree.indent(root)
        return etree.tostring(root, encoding="unicode") + "\n"

    # drivers

    def _driver(self, kind: str = "", emulator: str = "") -> Driver:
        drivers = self._manager.drivers
        found = drivers.get(emulator.rsplit("/", 1)[-1])
        found = found or (drivers.get(kind) if kind else next(iter(drivers.values())))
        if found is None:
            raise OperationUnsupported(f"no hypervisor here runs machines of type '{kind}'")
        return found

    async def hypervisor_version(self) -> int:
        """major * 1_000_000 + minor * 1_000 + micro."""
        return await self._driver().version()

    async def max_vcpus(self, kind: str) -> int:
        document = await self._domain_capabilities(self._driver(kind), "", "", kind, "")
        vcpu = document.find("vcpu")
        return int(vcpu.get("max", "1")) if vcpu is not None else 1

    async def _domain_capabilities(
        self, driver: Driver, arch: str, machine: str, virttype: str, emulator: str
    ) -> etree._Element:
        return read_xml(await driver.domain_capabilities(arch, machine, virttype, emulator), "domain capabilities")

    async def domain_capabilities(self, arch: str, machine: str, virttype: str, emulator: str) -> str:
        return await self._driver(virttype, emulator).domain_capabilities(arch, machine, virttype, emulator)

    async def native(self, xml: str) -> str:
        """The command line that would run the machine `xml` describes."""
        domain = parse_domain(xml)
        return await self._driver(domain.type, domain.devices.emulator or "").native(domain)

    async def capabilities(self) -> str:
        cpu = cpu_model()
        if not self._uuid:
            self._uuid = node.host_uuid(self._manager.paths.data / "host-uuid")
        info = node.node_info()
        return format_capabilities(
            HostCapabilities(
                uuid=self._uuid,
                arch=cpu.arch,
                model=cpu.known_model,
                vendor=cpu.vendor,
                sockets=info.sockets,
                cores=info.cores,
                threads=info.threads,
                features=cpu.features,
                page_sizes_kib=node.page_sizes(),
                cells=[_cell(cell) for cell in node.cells()],
                iommu=any(Path("/sys/class/iommu").glob("*")),
                guests=await self._guests(cpu.arch),
            )
        )

    async def _guests(self, arch: str) -> list[GuestArch]:
        """The host's own architecture on each driver; a driver that cannot say is left out."""
        guests = []
        for driver in dict.fromkeys(self._manager.drivers.values()):
            features = driver.features()
            types = [name for name, needed in (("qemu", Feature.EMULATION), ("kvm", Feature.KVM)) if needed in features]
            if not types:
                continue  # kvik-vmm where KVM cannot be used
            try:
                emulator = await driver.default_emulator(arch)
                machines: dict[str, GuestMachine] = {}
                for alias in MACHINE_ALIASES:
                    try:
                        document = await self._domain_capabilities(driver, arch, alias, "", emulator)
                    except KvikError:
                        continue  # not every architecture has both
                    vcpu = document.find("vcpu")
                    count = int(vcpu.get("max", "0")) if vcpu is not None else 0
                    canonical = document.findtext("machine") or alias
                    machines[alias] = GuestMachine(alias, count or 255, canonical if canonical != alias else "")
                    machines.setdefault(canonical, GuestMachine(canonical, count or 255))
            except (KvikError, OSError):
                continue
            guests.append(GuestArch(arch, emulator, list(machines.values()), types))
        return guests

    # CPU models

    async def cpu_models(self, arch: str) -> list[str]:
        document = await self._domain_capabilities(self._driver(), arch, "", "", "")
        return [model.text for model in document.iterfind("cpu/mode[@name='custom']/model") if model.text]

    def compare_cpu(self, xml: str, fail: bool) -> int:
        """virCPUCompareResult of a CPU document against the host: its model by name, its features one by one."""
        root = read_xml(xml, "CPU document")
        if root.tag != "cpu":
            raise ConfigError(f"a CPU document starts with <cpu>, not <{root.tag}>", path=f"/{root.tag}")
        cpu = cpu_model()
        here = set(cpu.features)
        wanted = {
            feature.get("name", "")
            for feature in root.iterfind("feature")
            if feature.get("policy", "require") in ("require", "force")
        }
        forbidden = {feature.get("name", "") for feature in root.iterfind("feature[@policy='forbid']")}
        arch, model, vendor = root.findtext("arch"), root.findtext("model"), root.findtext("vendor")
        missing = wanted - here
        fits = (
            arch in (None, cpu.arch)
            and vendor in (None, "", cpu.vendor)
            and model in (None, "", cpu.known_model, "qemu64", "kvm64")
            and not missing
            and not forbidden & here
        )
        if not fits and fail:
            raise CpuIncompatible(
                f"the host lacks what this CPU needs: {', '.join(sorted(missing)) or 'another model'}"
            )
        if not fits:
            return INCOMPATIBLE
        return IDENTICAL if wanted == here and model == cpu.known_model else SUPERSET

    def baseline_cpu(self, documents: list[str]) -> str:
        raise OperationUnsupported("CPU baselines need descriptions of CPU models, which there are none of yet")


def _cell(cell: node.Cell) -> HostCell:
    return HostCell(
        id=cell.id,
        memory_kib=cell.memory_kib,
        cpus=[(cpu.id, cpu.socket_id, cpu.die_id, cpu.core_id, format_cpuset(cpu.siblings)) for cpu in cell.cpus],
        pages={pages.size_kib: pages.total for pages in cell.pages},
        distances=cell.distances,
    )


class CpuIncompatible(KvikError):
    """The CPU asked for is not compatible with the host's."""

    code = 91  # VIR_ERR_CPU_INCOMPATIBLE
