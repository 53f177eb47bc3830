"""From a `MachineConfig` to a machine: which device classes there are, and what runs at power-on.

Device modules are imported here and only when the machine has such a device.
"""

from __future__ import annotations

from kvik.errors import InvalidArgument
from kvik.kvm import constants as c
from kvik.vmm import acpi, boot, parts, smbios
from kvik.vmm.acpi.description import Cpu, Description, spread_ram
from kvik.vmm.acpi.dsdt import PCI_HOTPLUG
from kvik.vmm.cpu.cpuid import LARGEST_PLAIN_DESTINATION, check_physical_bits, cpuid_for
from kvik.vmm.cpu.hotplug import VcpuHotplug
from kvik.vmm.cpu.topology import Topology
from kvik.vmm.devices.acpi_events import AcpiEvents, CpuHotplug
from kvik.vmm.devices.pvpanic import Pvpanic
from kvik.vmm.devices.rtc import Rtc
from kvik.vmm.devices.vmgenid import VmGenId
from kvik.vmm.layout import COM_PORTS, RSDP
from kvik.vmm.machine import Machine

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.vmm.config import MachineConfig
    from kvik.vmm.confinement import Confinement
    from kvik.vmm.vcpu import VcpuThread

__all__ = ["add_vcpus", "build"]

DEFAULT_CMDLINE = "console=ttyS0"


def build(config: MachineConfig, confinement: Confinement | None = None, *, boot: bool = True) -> Machine:
    """A machine with everything that `config` names, ready to start. On an error nothing is left open.

    `confinement`: what its threads do first of all. Without `boot` nothing is put into its memory, for the state of
    another is to come.
    """
    if boot and config.restore:
        from kvik.vmm.state.snapshot import restore

        return restore(config, confinement)
    if not config.serials and not config.consoles:
        from kvik.vmm.config import CharConfig

        config.serials = [CharConfig(backend="stdio")]
    machine = Machine(config)
    if confinement is not None:
        machine.on_vcpu_start, machine.on_thread_start = confinement.enter_vcpu, confinement.enter_io
    try:
        if config.trace:
            from kvik.vmm.trace import Trace

            machine.trace = Trace()
        _add_platform(machine)
        _add_virtio(machine)
        add_vcpus(machine)
        machine.remember_power_on()
        if config.boot.kernel or config.boot.kernel_fd >= 0:
            config.boot.cmdline = config.boot.cmdline or DEFAULT_CMDLINE
            machine.loader = loader = KernelLoader(machine)
            loader.fresh = boot
        elif machine.firmware:
            from kvik.vmm.boot.firmware import FirmwareLoader

            machine.loader = FirmwareLoader(machine, lambda: (_describe(machine), _smbios(machine)))
        if boot:
            machine.boot()
    except BaseException:
        machine.close()
        raise
    return machine


def _add_platform(machine: Machine) -> None:
    """What is not on the PCI bus."""
    config = machine.config
    events = AcpiEvents()
    machine.add(events)
    machine.pci.hotplug.on_event = lambda: events.raise_event(PCI_HOTPLUG)
    if config.vmgenid:
        machine.add(VmGenId(events))
    machine.add(Rtc("rtc", config.rtc.base))
    if config.pvpanic:
        machine.add(Pvpanic("pvpanic"))
    if config.cpus.maximum > config.cpus.count:
        registers = CpuHotplug(events, config.cpus.count, config.cpus.maximum)
        machine.add(registers)
        machine.vcpu_hotplug = VcpuHotplug(machine, registers, lambda index: add_vcpu(machine, index))
    if len(config.serials) > len(COM_PORTS):
        raise InvalidArgument(f"a PC has {len(COM_PORTS)} serial lines, not {len(config.serials)}")
    if machine.firmware:
        from kvik.vmm.boot.firmware import add_firmware

        add_firmware(machine)
    for index, serial in enumerate(config.serials):
        machine.add(parts.serial(machine, serial, index))
    for index, debugcon in enumerate(config.debugcon):
        machine.add(parts.debugcon(machine, debugcon, index))


def _add_virtio(machine: Machine) -> None:
    """What is."""
    config = machine.config
    if config.consoles or config.channels:
        slots = [port.slot for port in config.consoles] + [port.slot for port in config.channels]
        machine.add(parts.console(machine), max(slots))
    for field in parts.KINDS:
        for index, item in enumerate(getattr(config, field)):
            machine.add(parts.make(machine, field, item, index), item.slot)


def add_vcpus(machine: Machine) -> None:
    """The vCPUs that the configuration asks for, as they are at power-on."""
    config = machine.config.cpus
    supported = machine.system.supported_cpuid()
    topology = Topology.of(config)
    if topology.largest_apic_id > LARGEST_PLAIN_DESTINATION:
        ids = c.X2APIC_API_USE_32BIT_IDS | c.X2APIC_API_DISABLE_BROADCAST_QUIRK
        machine.vm.enable_cap(c.Capability.X2APIC_API, ids)
    for index in range(config.count):
        table = cpuid_for(supported, config, index)
        if not index:
            check_physical_bits(table, machine.memory.layout.end)
        machine.add_vcpu(topology.apic_id(index)).vcpu.set_cpuid(table)


def add_vcpu(machine: Machine, index: int) -> VcpuThread:
    """One more, for hot-plug. On an error nothing of it stays but its number, which KVM does not give out again."""
    config = machine.config.cpus
    table = cpuid_for(machine.system.supported_cpuid(), config, index)
    thread = machine.add_vcpu(Topology.of(config).apic_id(index), index)
    try:
        thread.vcpu.set_cpuid(table)
    except BaseException:
        machine.vcpus.remove(thread)
        thread.vcpu.close()
        raise
    return thread


class KernelLoader:
    """Loads the kernel, its initrd and the tables: at power-on, and again at each reset, from files that stay open."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.fresh = True
        self.files = boot.BootFiles(machine.config.boot)
        machine.on_close.append(self.files.close)
        self.description = _describe(machine)

    def __call__(self) -> None:
        machine = self.machine
        self.description.cpus = _cpus(machine)  # hot-plug changes who is there
        tables = acpi.build(self.description)
        for address, data in tables + _smbios(machine):
            machine.memory.write(address, data)
        assert tables[0][0] == RSDP
        entry = boot.load_kernel(machine.memory, machine.config.boot, tables=tables, fresh=self.fresh, files=self.files)
        self.fresh = False
        entry.apply(machine.vcpus[0].vcpu)


def _smbios(machine: Machine) -> list[tuple[int, bytes]]:
    """What the machine is called: the entry point and the tables."""
    config, memory = machine.config, machine.memory
    return smbios.build(
        config.smbios,
        uuid=config.uuid,
        memory=memory.boot_size,
        topology=Topology.of(config.cpus),
        ram=memory.layout.ram,
    )


def _cpus(machine: Machine) -> list[Cpu]:
    """Those that are there and those that may come."""
    config = machine.config
    topology = Topology.of(config.cpus)
    node_of = {cpu: number for number, node in enumerate(config.memory.nodes) for cpu in node.cpus}
    present = {thread.index for thread in machine.vcpus}
    return [
        Cpu(topology.apic_id(index), index in present, node_of.get(index, 0))
        for index in range(max(config.cpus.maximum, config.cpus.count))
    ]


def _describe(machine: Machine) -> Description:
    """What the ACPI tables say."""
    config = machine.config
    nodes = config.memory.nodes
    cpus = _cpus(machine)
    return Description(
        machine.memory.layout,
        cpus,
        ram=spread_ram(machine.memory.layout, [node.memory for node in nodes]) if nodes else None,
        distances=[list(node.distances) for node in nodes] if nodes and nodes[0].distances else None,
        slots=tuple(range(1 + machine.firmware, 32)),  # firmware's chipset is in slot 1
        com_ports=tuple(range(len(config.serials))),
        pvpanic="pvpanic" in machine.devices,
        vmgenid=config.vmgenid,
        cpu_hotplug=machine.vcpu_hotplug is not None,
    )
