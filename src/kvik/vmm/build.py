"""From a `MachineConfig` to a machine: which device classes there are, and what runs at power-on.

Device modules are imported here and only when the machine has such a device.
"""

from __future__ import annotations

from kvik.errors import InvalidArgument
from kvik.vmm import acpi, boot, parts
from kvik.vmm.acpi.description import Cpu, Description, spread_ram
from kvik.vmm.cpu.cpuid import cpuid_for
from kvik.vmm.cpu.topology import Topology
from kvik.vmm.layout import COM_PORTS, RSDP
from kvik.vmm.machine import Machine

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.vmm.config import MachineConfig

__all__ = ["build"]

DEFAULT_CMDLINE = "console=ttyS0"


def build(config: MachineConfig) -> Machine:
    """A machine with everything that `config` names, ready to start. On an error nothing is left open."""
    if not config.serials and not config.consoles:
        from kvik.vmm.config import CharConfig

        config.serials = [CharConfig(backend="stdio")]
    machine = Machine(config)
    try:
        if config.trace:
            from kvik.vmm.trace import Trace

            machine.trace = Trace()
        _add_platform(machine)
        _add_virtio(machine)
        _add_vcpus(machine)
        # machine.remember_power_on()
        if config.boot.kernel or config.boot.kernel_fd >= 0:
            config.boot.cmdline = config.boot.cmdline or DEFAULT_CMDLINE
            machine.loader = KernelLoader(machine)
        machine.boot()
    except BaseException:
        machine.close()
        raise
    return machine


def _add_platform(machine: Machine) -> None:
    """What is not on the PCI bus."""
    config = machine.config
    if len(config.serials) > len(COM_PORTS):
        raise InvalidArgument(f"a PC has {len(COM_PORTS)} serial lines, not {len(config.serials)}")
    for index, serial in enumerate(config.serials):
        machine.add(parts.serial(machine, serial, index))


def _add_virtio(machine: Machine) -> None:
    """What is. In this order they get the free slots."""
    config = machine.config
    if config.consoles or config.channels:
        slots = [port.slot for port in config.consoles] + [port.slot for port in config.channels]
        machine.add(parts.console(machine, config.consoles, config.channels), max(slots))
    for index, disk in enumerate(config.disks):
        machine.add(parts.disk(machine, disk, index), disk.slot)
    for index, rng in enumerate(config.rng):
        machine.add(parts.rng(machine, rng, index), rng.slot)
    for index, balloon in enumerate(config.balloon):
        machine.add(parts.balloon(machine, balloon, index), balloon.slot)


def _add_vcpus(machine: Machine) -> None:
    config = machine.config.cpus
    supported = machine.system.supported_cpuid()
    topology = Topology.of(config)
    for index in range(config.count):
        vcpu = machine.vm.create_vcpu(topology.apic_id(index))
        machine.add_vcpu(vcpu)
        vcpu.set_cpuid(cpuid_for(supported, config, index))


class KernelLoader:
    """Loads the kernel, its initrd and the tables: at power-on, and again at each reset, from files that stay open."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.fresh = True
        self.description = _describe(machine)

    def __call__(self) -> None:
        machine = self.machine
        tables = acpi.build(self.description)
        for address, data in tables:
            machine.memory.write(address, data)
        assert tables[0][0] == RSDP
        entry = boot.load_kernel(machine.memory, machine.config.boot, tables=tables, fresh=self.fresh)
        self.fresh = False
        entry.apply(machine.vcpus[0].vcpu)


def _describe(machine: Machine) -> Description:
    """What the ACPI tables say."""
    config = machine.config
    topology = Topology.of(config.cpus)
    nodes = config.memory.nodes
    node_of = {cpu: number for number, node in enumerate(nodes) for cpu in node.cpus}
    count = config.cpus.count
    cpus = [
        Cpu(topology.apic_id(index), index < count, node_of.get(index, 0))
        for index in range(max(config.cpus.maximum, count))
    ]
    return Description(
        machine.memory.layout,
        cpus,
        ram=spread_ram(machine.memory.layout, [node.memory for node in nodes]) if nodes else None,
        distances=[list(node.distances) for node in nodes] if nodes and nodes[0].distances else None,
        slots=tuple(range(1, 32)),
        com_ports=tuple(range(len(config.serials))),
        pvpanic="pvpanic" in machine.devices,
        cpu_hotplug=len(cpus) > count,
    )
