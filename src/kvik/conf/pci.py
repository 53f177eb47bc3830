"""PCI addresses: every device gets one at definition time and keeps it.

What is placed where follows libvirt: on PCI Express machines modern endpoints sit alone behind root ports (so that
they can be unplugged), conventional ones behind a pcie-to-pci-bridge, the primary display and what the chipset has on
board on the root bus; on i440fx, and on kvik-vmm's board, everything sits on the root bus. Root ports are packed
eight to a slot of pcie.0.

Two rounds: the first finds out which controllers are missing, the second places everything, bridges first. Addresses
that a document already has are never touched, so a document that went through here once comes out unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator

from kvik.conf.devices.common import Address, Device
from kvik.conf.devices.controller import Controller, ControllerModelName, ControllerTarget
from kvik.conf.devices_xml import path_of
from kvik.conf.domain import Devices, Domain
from kvik.conf.machine import I440FX, KVIK, PCI, PCIE, Q35, family
from kvik.errors import ConfigError

Slot = tuple[int, int, int]  # bus, slot, function

# What a device needs to plug into
EXPRESS, CONVENTIONAL = "express", "conventional"

ROOTS = ("pci-root", "pcie-root")
# model -> (kind of slot it offers, first slot, last slot, kind of slot it needs)
BUSES: dict[str, tuple[str, int, int, str]] = {
    "pci-root": (CONVENTIONAL, 1, 31, ""),
    "pcie-root": ("root", 1, 31, ""),
    "pcie-root-port": (EXPRESS, 0, 0, "root"),
    "pcie-to-pci-bridge": (CONVENTIONAL, 1, 31, EXPRESS),
    "pci-bridge": (CONVENTIONAL, 1, 31, CONVENTIONAL),
    "dmi-to-pci-bridge": (CONVENTIONAL, 0, 31, "root"),
    "pcie-switch-upstream-port": ("switch", 0, 31, EXPRESS),
    "pcie-switch-downstream-port": (EXPRESS, 0, 0, "switch"),
    "pci-expander-bus": (CONVENTIONAL, 0, 31, CONVENTIONAL),
    "pcie-expander-bus": ("root", 0, 31, "root"),
}
MODEL_NAMES = {
    "pcie-root-port": "pcie-root-port",
    "pcie-to-pci-bridge": "pcie-pci-bridge",
    "pci-bridge": "pci-bridge",
    "dmi-to-pci-bridge": "i82801b11-bridge",
    "pcie-switch-upstream-port": "x3130-upstream",
    "pcie-switch-downstream-port": "xio3130-downstream",
    "pci-expander-bus": "pxb",
    "pcie-expander-bus": "pxb-pcie",
}
_EXPRESS_NICS = frozenset({"virtio", "virtio-non-transitional", "e1000e", "igb", "vmxnet3"})
_NON_PCI_NICS = frozenset({"usb-net", "virtio-net-device", "spapr-vlan", "lan9118", "smc91c111", "ne2k_isa"})
_ICH9_USB = {"ich9-ehci1": 7, "ich9-uhci1": 0, "ich9-uhci2": 1, "ich9-uhci3": 2}


def _virtio(model: str | None) -> str:
    # Transitional devices have I/O ports and legacy interrupts: on PCI Express they belong behind a bridge.
    return CONVENTIONAL if model == "virtio-transitional" else EXPRESS


def _controller_slot(item: Controller) -> str:
    model = item.model or ""
    if item.type == "usb":
        return "" if model == "none" else EXPRESS if model in ("qemu-xhci", "nec-xhci") else CONVENTIONAL
    if item.type == "nvme":
        return EXPRESS
    if item.type == "scsi":
        return EXPRESS if model in ("virtio-scsi", "virtio-non-transitional", "vmpvscsi") else CONVENTIONAL
    if item.type == "virtio-serial":
        return _virtio(model)
    return CONVENTIONAL if item.type == "sata" else ""


def pci_devices(devices: Devices) -> Iterator[tuple[Device, str]]:
    """(device, kind of slot it needs), in the order in which slots are handed out; without PCI bridges."""
    for filesystem in devices.filesystems:
        yield filesystem, _virtio(filesystem.model)
    for interface in devices.interfaces:
        model = interface.model.type if interface.model else ""
        if interface.type == "hostdev":
            yield interface, EXPRESS
        elif model not in _NON_PCI_NICS:
            yield interface, EXPRESS if model in _EXPRESS_NICS else CONVENTIONAL
    for sound in devices.sounds:
        if sound.model not in ("sb16", "pcspk", "usb"):
            yield sound, EXPRESS if sound.model == "virtio" else CONVENTIONAL
    for controller in devices.controllers:
        if need := _controller_slot(controller):
            yield controller, need
    for disk in devices.disks:
        if disk.target.bus == "virtio":
            yield disk, _virtio(disk.model)
    for hostdev in devices.hostdevs:
        if hostdev.type == "pci" or (hostdev.type == "mdev" and hostdev.model == "vfio-pci"):
            yield hostdev, EXPRESS
        elif hostdev.type == "scsi_host":
            yield hostdev, _virtio(hostdev.model)
    if devices.memballoon is not None and devices.memballoon.model not in ("none", "xen"):
        yield devices.memballoon, _virtio(devices.memballoon.model)
    for rng in devices.rngs:
        yield rng, _virtio(rng.model)
    for watchdog in devices.watchdogs:
        if watchdog.model == "i6300esb":
            yield watchdog, CONVENTIONAL
    for video in devices.videos:
        if video.model is not None and video.model.type not in ("none", "ramfb"):
            yield video, EXPRESS if video.model.type == "virtio" else CONVENTIONAL
    for shmem in devices.shmems:
        yield shmem, CONVENTIONAL
    for input_ in devices.inputs:
        if input_.bus == "virtio":
            yield input_, _virtio(input_.model)
    for serial in devices.serials:
        if serial.target is not None and serial.target.type == "pci-serial":
            yield serial, CONVENTIONAL
    for panic in devices.panics:
        if panic.model == "pvpanic":
            yield panic, CONVENTIONAL
    if devices.vsock is not None:
        yield devices.vsock, _virtio(devices.vsock.model)
    for memory in devices.memorys:
        if memory.model in ("virtio-mem", "virtio-pmem"):
            yield memory, EXPRESS
    if devices.iommu is not None and devices.iommu.model == "virtio":
        yield devices.iommu, "root"
    for crypto in devices.cryptos:
        yield crypto, EXPRESS


def _unplaced(device: Device) -> bool:
    return device.address is None or device.address.type is None


def _address(slot: Slot, multifunction: bool = False) -> Address:
    return Address(
        type="pci", domain=0, bus=slot[0], slot=slot[1], function=slot[2], multifunction=True if multifunction else None
    )


class _Map:
    """Who sits where, while addresses are handed out."""

    def __init__(self, domain: Domain, machine: str, grow: bool) -> None:
        devices = domain.devices
        self.devices, self.machine, self.grow = devices, machine, grow
        self.firmware = domain.os.firmware is not None or domain.os.loader is not None
        self.root = "root" if machine in (Q35, PCIE, KVIK) else CONVENTIONAL
        self.used: dict[Slot, Device | None] = {}
        self.slots: set[tuple[int, int]] = set()  # (bus, slot) with a function in use
        self.buses: dict[int, str] = {0: "pcie-root" if self.root == "root" else "pci-root"}
        self.created: list[Controller] = []
        self.above: dict[int, int | None] = {}  # bus -> the bus that its controller sits on, None while it has no place
        for item in devices.controllers:
            if item.type == "pci" and item.model and item.index is not None:
                self.buses[item.index] = item.model
                if item.index:
                    placed = item.address is not None and item.address.type == "pci"
                    self.above[item.index] = (item.address.bus or 0) if placed and item.address else None
        for device, _ in [*pci_devices(devices), *((item, "") for item in devices.controllers if item.type == "pci")]:
            if device.address is not None and device.address.type == "pci":
                self.take(device.address.pci[1:], device)
        self._reserve()

    def take(self, slot: Slot, device: Device | None) -> None:
        self.used[slot] = device  # two on one slot: `validate` says so, with their paths
        self.slots.add(slot[:2])

    def _reserve(self) -> None:
        """The functions that the chipset itself occupies."""
        occupied = [(0, 0, 0)]
        if self.machine == I440FX:
            occupied += [(0, 1, 0), (0, 1, 3)]  # ISA bridge, power management
        elif self.machine == Q35:
            occupied += [(0, 0x1F, 0), (0, 0x1F, 3)]  # LPC bridge, SMBus
        elif self.machine == KVIK and self.firmware:
            occupied += [(0, 1, 0), (0, 1, 3)]  # what firmware looks for
        for slot in occupied:
            self.take(slot, self.used.get(slot))

    def slot_free(self, bus: int, slot: int) -> bool:
        return (bus, slot) not in self.slots

    def fixed(self) -> None:
        """What has its place on the board."""
        videos = [item for item in self.devices.videos if item.model and item.model.type not in ("none", "ramfb")]
        for item in self.devices.controllers:
            if not _unplaced(item) or item.type == "pci":
                continue
            wanted: Slot | None = None
            if self.machine == Q35:
                if item.type == "sata" and item.index == 0:
                    wanted = (0, 0x1F, 2)
                elif item.type == "usb" and item.model in _ICH9_USB and (item.index or 0) < 2:
                    wanted = (0, 0x1D if not item.index else 0x1A, _ICH9_USB[item.model])
            elif self.machine == I440FX:
                if item.type == "ide" and item.index == 0:
                    wanted = (0, 1, 1)
                elif item.type == "usb" and item.model in (None, "piix3-uhci", "piix4-uhci") and item.index == 0:
                    wanted = (0, 1, 2)
            if wanted is not None and wanted not in self.used:
                self.put(item, wanted, multifunction=item.model == "ich9-uhci1")
        if self.machine == I440FX:
            self._ich9_groups()
        if videos and _unplaced(videos[0]) and self.machine in (Q35, I440FX):
            first = 2 if self.machine == I440FX else 1
            slot = next((slot for slot in range(first, 32) if self.slot_free(0, slot)), None)
            if slot is not None:
                self.put(videos[0], (0, slot, 0))
        if self.machine == Q35:
            for sound in self.devices.sounds:
                if sound.model == "ich9" and _unplaced(sound) and self.slot_free(0, 0x1B):
                    self.put(sound, (0, 0x1B, 0))
                    break

    def _ich9_groups(self) -> None:
        """An EHCI controller and its UHCI companions share one slot: they are one device to the guest."""
        groups: dict[int, int] = {}
        for item in self.devices.controllers:
            if item.type != "usb" or item.model not in _ICH9_USB:
                continue
            index = item.index or 0
            if not _unplaced(item):
                assert item.address is not None
                if item.address.type == "pci" and not item.address.bus:
                    groups.setdefault(index, item.address.slot or 0)
                continue
            if index not in groups:
                groups[index] = next((slot for slot in range(2, 32) if self.slot_free(0, slot)), 0)
            wanted = (0, groups[index], _ICH9_USB[item.model])
            if groups[index] and wanted not in self.used:  # else it finds a slot of its own
                self.put(item, wanted, multifunction=item.model == "ich9-uhci1")

    def put(self, device: Device, slot: Slot, multifunction: bool = False) -> None:
        device.address = _address(slot, multifunction)
        self.take(slot, device)
        if isinstance(device, Controller) and device.type == "pci" and device.index:
            self.above[device.index] = slot[0]

    def rooted(self, bus: int) -> bool:
        """Whether the bus hangs, by controllers that have a place, on the root: nothing else may hang on it yet, lest
        two bridges end up each behind the other."""
        seen: set[int] = set()
        while bus:
            upper = self.above.get(bus)
            if upper is None or bus in seen:
                return False
            seen.add(bus)
            bus = upper
        return True

    def place_bridges(self) -> None:
        """Those without a place, in the document's order, but none before the one that it will hang on."""
        waiting = [
            item
            for item in self.devices.controllers
            if item.type == "pci" and item.model in BUSES and item.model not in ROOTS and _unplaced(item)
        ]
        while waiting:
            ready = [item for item in waiting if self._place_bridge(item)]
            if not ready:
                able = waiting if self.grow else []
                ready = [next((item for item in able if self.can_make(_need_of(item))), waiting[0])]
                self.place(ready[0], _need_of(ready[0]))
            waiting = [item for item in waiting if item not in ready]

    def _place_bridge(self, item: Controller) -> bool:
        if self.existing(_need_of(item), item) is None:
            return False
        self.place(item, _need_of(item))
        return True

    def can_make(self, need: str) -> bool:
        return need == CONVENTIONAL or (need == EXPRESS and self.root == "root")

    def place(self, device: Device, need: str) -> None:
        """Find it a slot of the kind it needs, making one where that is allowed."""
        if self.machine == KVIK:
            need = "root"  # its one bus takes everything, and lets go of everything
        slot = self.find(need, device)
        if slot is None:
            raise ConfigError(
                f"no free {need} PCI slot is left",
                path=path_of(self.devices, device),
                remedy=_remedy(self.machine, need),
            )
        self.put(device, slot, multifunction=_is_root_port(device) and slot[2] == 0)
        if isinstance(device, Controller) and device.model == "pcie-root-port" and not self.grow:
            port = slot[1] << 3 | slot[2]
            device.target = device.target or ControllerTarget()
            if device.target.port is None:
                device.target.port = port

    def find(self, need: str, device: Device | None = None) -> Slot | None:
        if self.root == CONVENTIONAL and need == EXPRESS and not _is_bridge(device):
            need = CONVENTIONAL
        slot = self.existing(need, device)
        return slot if slot is not None or not self.grow else self.make(need)

    def existing(self, need: str, device: Device | None = None) -> Slot | None:
        """A free slot on a bus that is there."""
        root_port = _is_root_port(device)
        for index in sorted(self.buses):
            offers, first, last, _ = BUSES[self.buses[index]]
            if offers != need or not self.rooted(index):
                continue
            if root_port:
                if (slot := self._root_port_slot(index)) is not None:
                    return slot
                continue
            for number in range(first, last + 1):
                if self.slot_free(index, number):
                    return index, number, 0
        return None

    def _root_port_slot(self, bus: int) -> Slot | None:
        for number in range(1, 32):
            if self.slot_free(bus, number):
                return bus, number, 0
            first = self.used.get((bus, number, 0))
            if _is_root_port(first) and first is not None and first.address and first.address.multifunction:
                for function in range(1, 8):
                    if (bus, number, function) not in self.used:
                        return bus, number, function
        return None

    def make(self, need: str, index: int | None = None) -> Slot | None:
        """A new controller with a free slot of this kind, and that slot; `index` if its number is already known."""
        if not self.can_make(need):
            return None
        bridge = "pcie-to-pci-bridge" if self.root == "root" else "pci-bridge"
        model = "pcie-root-port" if need == EXPRESS else bridge
        controller = Controller(type="pci", model=model, index=index or max(self.buses) + 1)
        bus = controller.index or 0
        if model == "pci-bridge":
            # It takes a slot of the root bus and offers 31 others. The root bus is full by now, so the count is kept
            # by closing one slot here; in the second round bridges are placed first.
            self.take((bus, BUSES[model][2], 0), controller)
            self.above[bus] = 0
        else:
            upstream = self.find(BUSES[model][3], controller)
            if upstream is None:
                return None
            # Finding the upstream slot may itself have made a controller.
            controller.index = bus = index or max(self.buses) + 1
            self.put(controller, upstream, multifunction=_is_root_port(controller) and upstream[2] == 0)
        self.buses[bus] = model
        self.created.append(controller)
        return bus, BUSES[model][1], 0


def _need_of(bridge: Controller) -> str:
    return BUSES[bridge.model or ""][3]


def _is_bridge(device: Device | None) -> bool:
    return isinstance(device, Controller) and device.type == "pci"


def _is_root_port(device: Device | None) -> bool:
    return isinstance(device, Controller) and device.model == "pcie-root-port"


def _remedy(machine: str, need: str) -> str:
    if need == "switch":
        return "add <controller type='pci' model='pcie-switch-upstream-port'/> to the definition"
    if machine == KVIK:
        return "kvik-vmm has one PCI bus of 31 slots: leave a device out"
    if machine not in (Q35, PCIE) and need != CONVENTIONAL:
        return "this machine type has no PCI Express: use q35, or leave the controller out"
    if machine in (Q35, PCIE):
        return "add <controller type='pci' model='pcie-root-port'/> to the definition while the machine is off"
    return "add <controller type='pci' model='pci-bridge'/> to the definition while the machine is off"


def assign_pci(domain: Domain, *, grow: bool = True, spare_root_ports: int = 0) -> None:
    """Give every PCI device that has no address one. With `grow`, missing controllers are added; without (a running
    machine), ConfigError when no slot is left."""
    machine = family(domain)
    if machine not in (Q35, I440FX, PCIE, PCI, KVIK):
        return
    devices = domain.devices
    _complete_controllers(devices)
    missing = [device for device, _ in pci_devices(devices) if _unplaced(device)]
    bridges = [item for item in devices.controllers if item.type == "pci" and item.model not in ROOTS]
    if not missing and not any(_unplaced(item) for item in bridges):
        return
    if grow:
        had_ports = any(item.model == "pcie-root-port" for item in bridges)
        _add_missing(domain, machine, 0 if had_ports else spare_root_ports)
    places = _Map(domain, machine, grow=False)
    places.fixed()
    places.place_bridges()
    for device, need in pci_devices(devices):
        if _unplaced(device):
            places.place(device, need)


def _add_missing(domain: Domain, machine: str, spare: int) -> None:
    """The first round: place everything on a trial map, keep only the controllers it had to make."""
    devices = domain.devices
    before = [(device, device.address) for device, _ in pci_devices(devices)]
    before += [(item, item.address) for item in devices.controllers if item.type == "pci"]
    trial = _Map(domain, machine, grow=True)
    try:
        # Buses that addresses already name come first, so that nothing new lands on them.
        named = {bus for bus, _, _ in trial.used}
        for index in range(1, max(named) + 1):
            if index not in trial.buses:
                trial.make(EXPRESS if trial.root == "root" else CONVENTIONAL, index)
        trial.fixed()
        trial.place_bridges()
        for device, need in pci_devices(devices):
            if _unplaced(device):
                trial.place(device, need)
        if machine in (Q35, PCIE):
            for _ in range(spare):
                trial.make(EXPRESS)
        elif machine != KVIK:
            # A bridge needs a slot itself: it is made while there is one, for the devices that come later.
            trial.find(CONVENTIONAL)
    finally:
        for device, address in before:
            device.address = address
    for controller in trial.created:
        controller.address = None
        devices.controllers.append(controller)
    _complete_controllers(devices)


def _complete_controllers(devices: Devices) -> None:
    """Index, implementing device, chassis: what a PCI controller always has."""
    taken = {item.index for item in devices.controllers if item.type == "pci" and item.index is not None}
    for item in devices.controllers:
        if item.type != "pci":
            continue
        if item.index is None:
            item.index = next(number for number in range(len(devices.controllers) + 1) if number not in taken)
            taken.add(item.index)
        if item.model in MODEL_NAMES and item.model_name is None:
            item.model_name = ControllerModelName(name=MODEL_NAMES[item.model])
        if item.model in ("pcie-root-port", "pcie-switch-downstream-port"):
            item.target = item.target or ControllerTarget()
            if item.target.chassis is None:
                item.target.chassis = item.index
        elif item.model == "pci-bridge":
            item.target = item.target or ControllerTarget()
            if item.target.chassis_nr is None:
                item.target.chassis_nr = item.index
