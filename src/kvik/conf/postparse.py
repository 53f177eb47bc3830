"""The second pass: fill in what a document leaves out, once and for good.

What libvirt adds is added where libvirt adds it (ps/2 input, a memory balloon, the first USB controller, the console
beside the first serial line), so a document means the same machine to both. Deliberate differences, each for a device
that every guest of the last ten years drives better: SCSI is virtio-scsi, the display is standard VGA, the network
card of a PCI Express machine is e1000e. Running it twice changes nothing.
"""

from __future__ import annotations

from kvik.conf.addresses import (
    NVME_NAMESPACES,
    NVME_SERIAL,
    assign_addresses,
    assign_drives,
    target_index,
    target_name,
    usb_devices,
)
from kvik.conf.cpu import Vcpu
from kvik.conf.devices.chardev import (
    ChardevTargetModel,
    Console,
    ConsoleTarget,
    ParallelTarget,
    Serial,
    SerialTarget,
)
from kvik.conf.devices.controller import Controller
from kvik.conf.devices.disk import Bus, Disk, DiskDriver
from kvik.conf.devices.display import Audio, Graphics, Input, Listen, Video, VideoModel
from kvik.conf.devices.interface import InterfaceModel, Mac, VirtualPortParameters
from kvik.conf.devices.memory import Memballoon
from kvik.conf.devices.other import Vsock
from kvik.conf.devices_xml import bootable_devices
from kvik.conf.domain import Devices, Domain
from kvik.conf.features import Clock
from kvik.conf.machine import BARE, I440FX, KVIK, MMIO, PCIE, Q35, MachineDefaults, family, is_x86
from kvik.conf.os import OsBoot
from kvik.conf.tree import clone

_VIDEO_MEMORY = {"vga": 16384, "cirrus": 16384, "bochs": 16384, "vmvga": 16384, "qxl": 65536, "xen": 4096, "vbox": 8192}
_IMPLIED = {"scsi": "scsi", "ide": "ide", "fdc": "fdc", "sata": "sata", "nvme": "nvme"}


def postparse(domain: Domain, caps: MachineDefaults | None = None) -> None:
    """Complete `domain` in place. Raises ConfigError when a device finds no room."""
    caps = caps or MachineDefaults()
    _identity(domain, caps)
    _machine(domain, caps)
    for disk in domain.devices.disks:
        _disk(disk, domain)
    _consoles(domain)
    _displays(domain, caps)
    _network(domain, caps)
    _small_devices(domain)
    _controllers(domain, caps)
    assign_addresses(domain, spare_root_ports=caps.spare_root_ports)


def new_uuid(caps: MachineDefaults) -> str:
    """A random (version 4) UUID from the given source."""
    data = bytearray(caps.random(16))
    data[6] = data[6] & 0x0F | 0x40
    data[8] = data[8] & 0x3F | 0x80
    text = data.hex()
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


def new_mac(caps: MachineDefaults) -> str:
    """52:54:00 is the range that QEMU and KVM guests use."""
    return "52:54:00:" + caps.random(3).hex(":")


def _identity(domain: Domain, caps: MachineDefaults) -> None:
    if domain.uuid is None:
        domain.uuid = new_uuid(caps)
    for action, default in (("on_poweroff", "destroy"), ("on_reboot", "restart"), ("on_crash", "destroy")):
        if getattr(domain, action) is None:
            setattr(domain, action, default)


def _machine(domain: Domain, caps: MachineDefaults) -> None:
    os_type = domain.os.type
    os_type.arch = os_type.arch or caps.arch
    os_type.machine = os_type.machine or caps.machine
    os_type.machine = caps.machines.get(os_type.machine, os_type.machine)
    if domain.devices.emulator is None and caps.emulator:
        domain.devices.emulator = caps.emulator
    if not domain.os.boots and all(item.boot is None for _, item in bootable_devices(domain.devices)):
        domain.os.boots.append(OsBoot(dev="hd"))
    domain.vcpu = domain.vcpu or Vcpu(value=1)
    if domain.vcpu.placement is None:
        domain.vcpu.placement = "static"
    if domain.vcpus is not None and domain.vcpus.vcpus:
        # Told one by one: the count follows; those not told of are not there.
        domain.vcpu.current = sum(bool(item.enabled) for item in domain.vcpus.vcpus) or None
    if domain.vcpu.current == domain.vcpu.value:
        domain.vcpu.current = None
    if domain.cpu is not None and domain.cpu.mode is None and domain.cpu.model is not None:
        domain.cpu.mode = "custom"
    cells = domain.cpu.numa.cells if domain.cpu is not None and domain.cpu.numa is not None else []
    for index, cell in enumerate(cells):
        if cell.id is None:
            cell.id = index
    if cells:
        # The cells are the guest's memory; what <memory> says gives way, as in libvirt.
        domain.memory = sum(cell.memory or 0 for cell in cells) + sum(
            (module.target.size or 0) for module in domain.devices.memorys if module.target is not None
        )
    if domain.current_memory is None or (cells and domain.current_memory > domain.memory):
        domain.current_memory = domain.memory
    domain.clock = domain.clock or Clock(offset="utc")
    clock = domain.clock
    if clock.offset in ("utc", "localtime") and clock.adjustment not in (None, "reset"):
        # A number there means, as in libvirt, a clock that the guest may set and that keeps it.
        clock.basis = "localtime" if clock.offset == "localtime" else "utc"
        clock.offset = "variable"
    if clock.offset == "variable":
        clock.adjustment = clock.adjustment or "0"
        clock.basis = clock.basis or "utc"


def _disk(disk: Disk, domain: Domain) -> None:
    if disk.target.bus is None:
        disk.target.bus = _bus_of(disk, domain)
    if not disk.target.dev:
        bus = str(disk.target.bus)
        prefix = target_name(bus, 0)[:-1]
        taken = {
            target_index(other.target.dev)
            for other in domain.devices.disks
            if other.target.dev and other.target.dev.startswith(prefix)
        }
        disk.target.dev = next(target_name(bus, number) for number in range(4096) if number not in taken)
    if disk.device == "cdrom":
        disk.readonly = True
    if disk.type in ("file", "block", "network", "dir", "nvme"):
        disk.driver = disk.driver or DiskDriver()
        disk.driver.name = disk.driver.name or "qemu"
        # The format is never probed: what a guest writes into a raw disk could then name a host file.
        disk.driver.type = disk.driver.type or ("fat" if disk.type == "dir" else "raw")


def _bus_of(disk: Disk, domain: Domain) -> Bus:
    if disk.device == "floppy":
        return "fdc"
    name = disk.target.dev or ""
    prefixes: tuple[tuple[str, Bus], ...] = (
        ("vd", "virtio"), ("hd", "ide"), ("fd", "fdc"), ("xvd", "xen"), ("sd", "scsi"), ("nvme", "nvme"),
    )  # fmt: skip
    for prefix, bus in prefixes:
        if name.startswith(prefix):
            return bus
    if disk.device == "cdrom":
        return "sata" if family(domain) == Q35 else "ide" if family(domain) == I440FX else "scsi"
    return "virtio"


def _consoles(domain: Domain) -> None:
    """The first <console> and the first <serial> are one device: each is made from the other."""
    devices = domain.devices
    default = "isa-serial" if is_x86(domain) else "system-serial"
    for index, serial in enumerate(devices.serials):
        _serial_target(serial, index, default)
    first = devices.consoles[0] if devices.consoles else None
    if first is not None and (first.target is None or first.target.type in (None, "serial")):
        if not devices.serials:
            serial = Serial(
                type=first.type, tty=first.tty, sources=[clone(item) for item in first.sources],
                protocol=first.protocol and clone(first.protocol), log=first.log and clone(first.log),
                alias=first.alias and clone(first.alias),
            )  # fmt: skip
            _serial_target(serial, 0, default)
            devices.serials.append(serial)
        _mirror(first, devices.serials[0])
    elif devices.serials:
        console = Console()
        _mirror(console, devices.serials[0])
        devices.consoles.insert(0, console)
    virtio = 0
    for index, console in enumerate(devices.consoles):
        console.target = console.target or ConsoleTarget(type="serial")
        if console.target.type is None:
            console.target.type = "serial"
        if console.target.type == "virtio":
            console.target.port = virtio if console.target.port is None else console.target.port
            virtio += 1
        elif console.target.port is None:
            console.target.port = index
    for index, parallel in enumerate(devices.parallels):
        parallel.target = parallel.target or ParallelTarget()
        parallel.target.port = index if parallel.target.port is None else parallel.target.port


def _serial_target(serial: Serial, index: int, default: str) -> None:
    serial.target = serial.target or SerialTarget()
    target = serial.target
    if target.type is None:
        target.type = default
    if target.port is None:
        target.port = index
    if target.model is None and target.type in ("isa-serial", "usb-serial", "pci-serial", "isa-debug"):
        target.model = ChardevTargetModel(name="isa-debugcon" if target.type == "isa-debug" else target.type)


def _mirror(console: Console, serial: Serial) -> None:
    console.type, console.tty = serial.type, serial.tty
    console.sources = [clone(item) for item in serial.sources]
    console.protocol = serial.protocol and clone(serial.protocol)
    console.log = serial.log and clone(serial.log)
    console.alias = serial.alias and clone(serial.alias)
    port = serial.target.port if serial.target is not None else 0
    console.target = ConsoleTarget(type="serial", port=port)


def _displays(domain: Domain, caps: MachineDefaults) -> None:
    devices = domain.devices
    for graphics in devices.graphics:
        _graphics(graphics)
    if any(item.type not in ("egl-headless",) for item in devices.graphics) and not devices.videos:
        devices.videos.append(Video(model=VideoModel(type=caps.video_model)))  # type: ignore[arg-type]  # its Literal
    for index, video in enumerate(devices.videos):
        video.model = video.model or VideoModel(type=caps.video_model)  # type: ignore[arg-type]  # as above
        model = video.model
        if model.type in ("none", "ramfb"):
            continue
        if (
            index == 0
            and model.primary is None
            and not any(item.model is not None and item.model.primary for item in devices.videos)
        ):
            model.primary = True
        model.heads = 1 if model.heads is None else model.heads
        if model.type in _VIDEO_MEMORY and model.vram is None:
            model.vram = _VIDEO_MEMORY[model.type]
        if model.type == "qxl":
            model.ram = 65536 if model.ram is None else model.ram
            model.vgamem = 16384 if model.vgamem is None else model.vgamem
    if (
        is_x86(domain)
        and family(domain) not in BARE
        and not (domain.features is not None and domain.features.ps2 is not None and domain.features.ps2.state is False)
    ):
        for kind in ("mouse", "keyboard"):
            if not any(item.type == kind and item.bus in (None, "ps2") for item in devices.inputs):
                devices.inputs.append(Input(type=kind, bus="ps2"))
    for input_ in devices.inputs:
        if input_.bus is None and input_.type not in ("evdev",):
            input_.bus = "ps2" if input_.type in ("mouse", "keyboard") and is_x86(domain) else "usb"
            if input_.type == "passthrough":
                input_.bus = "virtio"
    if not devices.audios and is_x86(domain) and family(domain) not in BARE:
        spice = any(item.type == "spice" for item in devices.graphics)
        devices.audios.append(Audio(id=1, type="spice" if spice else "none"))


def _graphics(graphics: Graphics) -> None:
    if graphics.type not in ("vnc", "spice", "rdp"):
        return
    if graphics.listens and graphics.listens[0].type == "address" and graphics.listens[0].address:
        graphics.listen_attribute = graphics.listens[0].address
    if not graphics.listens:
        if graphics.socket:
            graphics.listens.append(Listen(type="socket", socket=graphics.socket))
        else:
            graphics.listens.append(Listen(type="address", address=graphics.listen_attribute))
    if graphics.listens[0].type in ("socket", "none"):
        return
    if graphics.port in (None, -1, 0) and graphics.tls_port in (None, -1, 0) and graphics.autoport is not False:
        graphics.port, graphics.autoport = (-1 if graphics.type == "vnc" else graphics.port), True


def _network(domain: Domain, caps: MachineDefaults) -> None:
    for interface in domain.devices.interfaces:
        if interface.mac is None:
            interface.mac = Mac(address=new_mac(caps))
        interface.mac.address = interface.mac.address.lower().replace("-", ":")
        if interface.model is None and interface.type not in ("hostdev", "vdpa"):
            model = {Q35: "e1000e", I440FX: "rtl8139"}.get(family(domain), "virtio")
            interface.model = InterfaceModel(type="virtio" if interface.type == "vhostuser" else model)
        if interface.type in ("bridge", "direct") and interface.source is not None:
            source = interface.source  # a live document's (libvirt's too) says by which network it came there
            source.network = source.portgroup = source.portid = None
        port = interface.virtualport
        if port is not None and port.type == "openvswitch":
            port.parameters = port.parameters or VirtualPortParameters()
            if port.parameters.interfaceid is None:  # by which a controller of the switch knows it, for good
                port.parameters.interfaceid = new_uuid(caps)


def _small_devices(domain: Domain) -> None:
    devices = domain.devices
    if devices.memballoon is None:
        devices.memballoon = Memballoon(model="virtio")
    for filesystem in devices.filesystems:
        if filesystem.accessmode is None and filesystem.type == "mount":
            filesystem.accessmode = "passthrough"
    for watchdog in devices.watchdogs:
        watchdog.action = watchdog.action or "reset"
    for panic in devices.panics:
        panic.model = panic.model or "isa"
    for hostdev in devices.hostdevs:
        if hostdev.managed is None and hostdev.type in ("pci", "usb"):
            hostdev.managed = False
    for tpm in devices.tpms:
        tpm.model = tpm.model or "tpm-tis"
        if tpm.backend is not None and tpm.backend.type == "emulator" and tpm.backend.version is None:
            tpm.backend.version = "2.0"
    for redirdev in devices.redirdevs:
        redirdev.bus = redirdev.bus or "usb"
    vsock: Vsock | None = devices.vsock
    if vsock is not None:
        vsock.model = vsock.model or "virtio"


def _has(devices: Devices, kind: str) -> bool:
    return any(item.type == kind for item in devices.controllers)


def _controllers(domain: Domain, caps: MachineDefaults) -> None:
    """The controllers that the machine type and the devices imply."""
    devices = domain.devices
    machine = family(domain)
    _indexes(devices)
    add = devices.controllers.append
    if machine not in BARE and not _has(devices, "usb") and (is_x86(domain) or any(usb_devices(devices))):
        add(Controller(type="usb", index=0, model="piix3-uhci" if machine == I440FX else "qemu-xhci"))
    for item in devices.controllers:
        if item.type == "usb" and item.model is None:
            item.model = "piix3-uhci" if machine == I440FX else "qemu-xhci"
    if machine == Q35 and not any(item.type == "sata" for item in devices.controllers):
        add(Controller(type="sata", index=0))
    root = {Q35: "pcie-root", PCIE: "pcie-root", KVIK: "pcie-root", MMIO: ""}.get(machine, "pci-root")
    for item in devices.controllers:
        if item.type == "pci" and item.index == 0 and item.model is None:
            item.model = root
    if root and not any(item.type == "pci" and item.model in ("pci-root", "pcie-root") for item in devices.controllers):
        for item in devices.controllers:
            if item.type == "pci" and item.index == 0:
                item.index = None
        add(Controller(type="pci", index=0, model=root))
        _indexes(devices)
    if any(disk.target.bus in _IMPLIED for disk in devices.disks):
        # Where the drives will sit tells which controllers they need; they are placed once those are there.
        disks = [clone(disk) for disk in devices.disks]
        assign_drives(
            Domain(type=domain.type, os=domain.os, devices=Devices(disks=disks, controllers=devices.controllers))
        )
        for disk in disks:
            kind = _IMPLIED.get(disk.target.bus or "")
            if kind is not None and disk.address is not None:
                _need(devices, kind, disk.address.controller or 0, caps.scsi_model if kind == "scsi" else None)
    for item in devices.controllers:
        if item.type == "nvme" and not item.serial:
            # A guest finds its disks by it: fixed with the definition. At most 20 characters (NVM Express, SN).
            item.serial = (
                _disk_serial(devices, item.index or 0)
                or f"{(domain.uuid or '').replace('-', '')[:16]}-{item.index or 0}"
            )
    for hostdev in devices.hostdevs:
        if hostdev.type == "scsi":
            _need(devices, "scsi", 0, caps.scsi_model)
    for smartcard in devices.smartcards:
        _need(devices, "ccid", (smartcard.address.controller or 0) if smartcard.address is not None else 0, None)
    for item in devices.controllers:
        if item.type == "scsi" and item.model in (None, "auto"):
            item.model = caps.scsi_model


def _indexes(devices: Devices) -> None:
    """Number the controllers that have no index, kind by kind; USB companions share their master's."""
    leader: int | None = None
    for item in devices.controllers:
        if item.index is None and str(item.model).startswith("ich9-uhci") and leader is not None:
            item.index = leader
        if item.index is None:
            taken = {other.index for other in devices.controllers if other.type == item.type}
            # The first PCI bridge of a document without a root is not the root.
            start = 1 if item.type == "pci" and item.model not in (None, "pci-root", "pcie-root") else 0
            item.index = next(number for number in range(start, 4096) if number not in taken)
        if item.type == "usb" and item.model == "ich9-ehci1":
            leader = item.index


def _disk_serial(devices: Devices, controller: int) -> str | None:
    """What the first disk on an NVMe controller says: an older place for the same."""
    for disk in devices.disks:
        number = disk.address.controller if disk.address is not None else None
        if number is None:
            number = (target_index(disk.target.dev or "") or 0) // NVME_NAMESPACES
        if disk.target.bus == "nvme" and number == controller and disk.serial and len(disk.serial) <= NVME_SERIAL:
            return disk.serial
    return None


def _need(devices: Devices, kind: str, index: int, model: str | None) -> None:
    for number in range(index + 1):
        if not any(item.type == kind and item.index == number for item in devices.controllers):
            made = Controller(type=kind, index=number, model=model)  # type: ignore[arg-type]  # Literals of ours
            devices.controllers.append(made)
