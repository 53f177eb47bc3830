"""What kvik-vmm cannot run: each refusal names the element, and what to do instead."""

from __future__ import annotations

from collections.abc import Iterator

from kvik.conf.cpu import Cpu
from kvik.conf.devices.chardev import Chardev
from kvik.conf.devices.disk import Disk
from kvik.conf.devices.interface import Backend, Interface, InterfaceModel
from kvik.conf.domain import Domain
from kvik.conf.os import Os
from kvik.errors import ConfigUnsupported
from kvik.hypervisor.names import TAP_TYPES, is_passt
from kvik.hypervisor.sidecars import kvik_blk
from kvik.hypervisor.sidecars.storage_daemon import FORMATS, by_vhost_user

__all__ = [
    "CHARDEVS",
    "FIRMWARE_MACHINE",
    "MACHINE",
    "MACHINES",
    "MAX_VCPUS",
    "check",
    "check_device",
    "complete_interface",
]

MACHINE = "kvik-1"  # the newest of our machine types: what its name says never changes
MACHINES = {"kvik": MACHINE, MACHINE: MACHINE}  # alias or name -> name
FIRMWARE_MACHINE = "pc-i440fx-kvik"  # what our chipset is to firmware (docs/internals/vmm-firmware.md)
MAX_VCPUS = 1024
CHARDEVS = ("null", "pty", "file", "unix")
QEMU = "use QEMU: name it in <emulator>, or leave <emulator> out"
_SERIAL = "let the guest find it by label, UUID or PCI address; or convert it to raw"
_THREADS = "serves each disk by a thread of its own, and has no I/O threads beside those"
_DISKS = "write <disk type='file' device='disk'> with <target dev='vda' bus='virtio'/>, or use QEMU"


def check(domain: Domain) -> None:
    """Raises `ConfigUnsupported` for the first thing. Asks nothing of the host."""
    for path, what, remedy in _missing(domain):
        raise ConfigUnsupported(f"kvik-vmm {what}", path=path, remedy=remedy)


def complete_interface(nic: Interface) -> None:
    """What its document leaves to the VMM."""
    nic.model = nic.model or InterfaceModel(type="virtio")
    if nic.type == "user" and nic.backend is None:
        nic.backend = Backend(type="passt")


def check_device(device: object) -> None:
    """The same for a disk or an interface alone."""
    found: Iterator[Refusal] = iter(())
    if isinstance(device, Disk):
        found = (("disk" + path, what, remedy) for path, what, remedy in _disk(device))
    elif isinstance(device, Interface):
        found = (("interface" + path, what, remedy) for path, what, remedy in _interface(device))
    for path, what, remedy in found:
        raise ConfigUnsupported(f"kvik-vmm {what}", path=path, remedy=remedy)


Refusal = tuple[str, str, str]  # path, what it cannot, what to do


def _missing(domain: Domain) -> Iterator[Refusal]:
    yield from _machine(domain)
    devices = domain.devices
    root = "/domain/devices"
    for number, disk in enumerate(devices.disks, 1):
        yield from ((f"{root}/disk[{number}]{path}", what, remedy) for path, what, remedy in _disk(disk))
    for number, nic in enumerate(devices.interfaces, 1):
        yield from ((f"{root}/interface[{number}]{path}", what, remedy) for path, what, remedy in _interface(nic))
    lines: list[tuple[str, Chardev]] = [("serial", item) for item in devices.serials]
    lines += [("console", item) for item in devices.consoles if item.target and item.target.type == "virtio"]
    lines += [("channel", item) for item in devices.channels]
    for name, line in lines:
        if line.type not in CHARDEVS:
            yield f"{root}/{name}", f"has no character device of type {line.type!r}", f"one of: {', '.join(CHARDEVS)}"
        source = line.source
        if line.type == "unix" and source is not None and source.mode == "connect":
            yield f"{root}/{name}/source", "listens on Unix sockets and does not connect", "write mode='bind'"
    yield from _others(domain)


def _machine(domain: Domain) -> Iterator[Refusal]:
    described = domain.os
    if domain.type != "kvm":
        yield "/domain/@type", "needs KVM", f"write <domain type='kvm'>; without KVM, {QEMU}"
    if described.type.arch not in (None, "x86_64", "amd64"):
        yield "/domain/os/type/@arch", f"runs x86_64 guests, not {described.type.arch}", QEMU
    if described.type.machine is not None and described.type.machine not in MACHINES:
        names = ", ".join(MACHINES)
        yield "/domain/os/type/@machine", f"has no machine type {described.type.machine!r}", f"one of: {names}"
    yield from _firmware(described)
    if described.dtb or described.shim or described.acpi is not None:
        yield "/domain/os", "has its own ACPI tables and no device tree or shim", QEMU
    vcpus = domain.vcpu.value if domain.vcpu is not None else 1
    if vcpus > MAX_VCPUS:
        yield "/domain/vcpu", f"has at most {MAX_VCPUS} vCPUs", f"ask for 1 to {MAX_VCPUS}"
    yield from _cpu(domain.cpu)
    if domain.devices.leases:
        yield "/domain/devices/lease", "holds no leases", QEMU
    if domain.launch_security is not None:
        yield "/domain/launchSecurity", "has no encrypted machines", QEMU
    if domain.qemu_commandline is not None:
        yield "/domain/commandline", "does not take QEMU's arguments", "remove <qemu:commandline>"
    if any(info.type == "fwcfg" for info in domain.sysinfos):
        yield "/domain/sysinfo", "has no fw_cfg", "use SMBIOS strings (type='smbios')"
    if described.smbios is not None and described.smbios.mode == "host":
        yield "/domain/os/smbios", "does not copy the host's SMBIOS", "copy the strings into <sysinfo>"
    features = domain.features
    if features is not None and (features.hyperv is not None or features.viridian):
        yield "/domain/features/hyperv", "has no enlightenments for Windows", QEMU
    if features is not None and features.smm is not None and features.smm.state:
        yield "/domain/features/smm", "has no system management mode", QEMU


def _firmware(described: Os) -> Iterator[Refusal]:
    loader, nvram = described.loader, described.nvram
    if described.firmware == "bios":
        yield "/domain/os/@firmware", "has no BIOS", f"write <os firmware='efi'>, or {QEMU}"
    named = described.firmware is not None or loader is not None
    if described.kernel and named:
        yield "/domain/os", "starts with a kernel or with firmware", "leave one of them out"
    if not described.kernel and not named:
        yield "/domain/os", "needs a <kernel>, or firmware that reads disks", "write <os firmware='efi'>"
    wanted = described.firmware_features.features if described.firmware_features is not None else []
    if any(feature.name == "secure-boot" and feature.enabled for feature in wanted):
        yield "/domain/os/firmware", "has no Secure Boot", QEMU
    if loader is not None:
        if loader.type != "pflash" and loader.value:
            yield "/domain/os/loader/@type", "has firmware in flash only", "write <loader type='pflash' readonly='yes'>"
        if loader.secure:
            yield "/domain/os/loader/@secure", "has no Secure Boot: no system management mode", QEMU
        if loader.readonly is False:
            yield "/domain/os/loader/@readonly", "shows guests firmware that they cannot change", "write readonly='yes'"
        if loader.stateless:
            yield "/domain/os/loader/@stateless", "keeps the firmware's variables", "leave stateless out"
        if loader.format not in (None, "raw"):
            yield "/domain/os/loader/@format", "reads firmware as it is", "write format='raw'"
    if nvram is not None:
        if nvram.format not in (None, "raw"):
            yield "/domain/os/nvram/@format", "keeps variables as they are", "write format='raw'"
        if nvram.type not in (None, "file"):
            yield "/domain/os/nvram/@type", "keeps variables in a file", "write the path of one"


def _cpu(cpu: Cpu | None) -> Iterator[Refusal]:
    if cpu is None:
        return
    if cpu.match == "minimum":
        yield "/domain/cpu/@match", "has no CPU that is at least a model", "write <cpu mode='host-model'/>"
    if cpu.mode in (None, "custom", "host-model") and any(item.policy == "optional" for item in cpu.features):
        yield "/domain/cpu/feature", "cannot leave a feature to the host", "write policy='require' or 'disable'"
    if cpu.maxphysaddr is not None:
        yield "/domain/cpu/maxphysaddr", "has the address size of its CPU model", "leave it out"
    if cpu.cache is not None and cpu.cache.mode != "passthrough":
        yield "/domain/cpu/cache", "tells guests of the host's caches only", "write <cache mode='passthrough'/>"


def _disk(disk: Disk) -> Iterator[Refusal]:
    if disk.device == "cdrom":
        yield "/@device", "has no CD drives", "write device='disk' with <readonly/>: Linux finds it by its label"
    elif disk.device != "disk":
        yield "/@device", f"has no {disk.device} drives", _DISKS
    if disk.target.bus not in (None, "virtio"):
        yield "/target/@bus", f"has no bus {disk.target.bus!r}", _DISKS
    if disk.type not in ("file", "block", "vhostuser"):
        yield "/@type", f"has no disks of type {disk.type!r}", "a file or a block device, or use QEMU"
    format_ = disk.driver.type if disk.driver is not None else None
    if format_ not in (None, "raw") and format_ not in FORMATS:
        yield "/driver/@type", f"knows no image format {format_!r}", f"one of: {', '.join(sorted(FORMATS))}"
    other = by_vhost_user(disk)
    if other:
        yield from _served(disk)
    if disk.driver is not None and disk.driver.cache == "directsync" and not other:
        yield "/driver/@cache", "has no cache mode directsync", "write cache='none', or 'writethrough'"
    if disk.encryption is not None or (disk.source is not None and disk.source.encryption is not None):
        yield "/encryption", "does not decrypt disks", "let the guest do it (LUKS), or use QEMU"
    if disk.backing_store is not None and disk.backing_store.type is not None and not other:
        yield "/backingStore", "reads raw images, which have no backing chain", QEMU
    yield from _not_told(disk, other)
    if disk.model not in (None, "virtio", "virtio-non-transitional"):
        yield "/@model", "has modern virtio devices only", "leave the model out"
    tune = disk.iotune
    if (
        tune is not None
        and not other
        and any((tune.read_bytes_sec, tune.write_bytes_sec, tune.read_iops_sec, tune.write_iops_sec, tune.group_name))
    ):
        yield "/iotune", "limits reads and writes together", "write total_bytes_sec and total_iops_sec"


def _not_told(disk: Disk, other: bool) -> Iterator[Refusal]:
    """What QEMU's disks have and these have not; `other`: another process serves it."""
    driver = disk.driver
    if disk.transient is not None:
        yield "/transient", "writes to a disk's own image", "put an overlay on it (kvik img create -b), or use QEMU"
    for field in ("wwn", "vendor", "product", "geometry"):
        if getattr(disk, field) is not None:
            yield f"/{field}", f"tells the guest no {field} of a disk", "leave it out, or use QEMU"
    if disk.blockio is not None and not (other and disk.blockio.physical_block_size is None):
        yield "/blockio", "has disks with blocks of 512 bytes", "leave it out, or use QEMU"
    if driver is None:
        return
    if driver.iothread is not None or driver.iothreads is not None:
        yield "/driver/@iothread", _THREADS, "leave iothread out, or use QEMU"
    if other:
        return  # its daemon has QEMU's block layer
    if driver.copy_on_read:
        yield "/driver/@copy_on_read", "copies nothing on read", "leave it out, or use QEMU"
    if driver.detect_zeroes not in (None, "off"):
        yield "/driver/@detect_zeroes", "looks for no zeros", "leave it out, or use QEMU"
    if driver.io == "native":
        yield "/driver/@io", "has no io mode native", "write io='io_uring' or 'threads'"


def _served(disk: Disk) -> Iterator[Refusal]:
    """Of a disk whose requests this VMM never sees: what its back end cannot do."""
    driver = disk.driver
    if disk.serial and not kvik_blk.serves(disk):
        # Its vhost-user-blk export answers every guest with a serial of its own.
        yield "/serial", "cannot tell a serial number of a disk that another process serves", _SERIAL
    if driver is not None and (
        driver.error_policy not in (None, "report") or driver.rerror_policy not in (None, "report")
    ):
        yield "/driver/@error_policy", "hands errors of such a disk on to the guest", "write error_policy='report'"
    if driver is not None and driver.packed:
        yield "/driver/@packed", "has split rings for such a disk", "leave packed out"
    if disk.type == "vhostuser" and disk.iotune is not None:
        yield "/iotune", "does not see the requests of a vhostuser disk", "limit them in its back end"
    if disk.iotune is not None and disk.iotune.group_name:
        yield "/iotune/group_name", "limits each disk for itself", "leave group_name out"


def _interface(nic: Interface) -> Iterator[Refusal]:
    model = nic.model.type if nic.model is not None else None
    if model not in (None, "virtio", "virtio-non-transitional"):
        yield "/model", f"has no network card {model!r}", "write <model type='virtio'/>"
    if nic.type == "user" and nic.backend is not None and not is_passt(nic):
        yield "/backend", "has user networking by passt only", "write <backend type='passt'/>"
    if nic.type not in TAP_TYPES | {"user", "null"}:
        yield "/@type", f"has no interfaces of type {nic.type!r}", "bridge, network, direct, ethernet or user"


def _others(domain: Domain) -> Iterator[Refusal]:
    devices = domain.devices
    root = "/domain/devices"
    screens = "use the serial console, or QEMU for a screen"
    videos = [item for item in devices.videos if item.model is not None and item.model.type != "none"]
    refused = (
        (devices.graphics, "graphics", "has no screen", screens),
        (videos, "video", "has no screen", screens),
        (devices.inputs, "input", "has no keyboard or mouse", screens),
        (devices.sounds, "sound", "has no sound card", QEMU),
        (devices.hostdevs, "hostdev", "passes no host devices through", QEMU),
        (devices.redirdevs, "redirdev", "has no USB", QEMU),
        (devices.hubs, "hub", "has no USB", QEMU),
        (devices.smartcards, "smartcard", "has no smartcards", QEMU),
        (devices.tpms, "tpm", "has no TPM", QEMU),
        (devices.shmems, "shmem", "has no ivshmem", "use virtiofs or a vsock"),
        (devices.parallels, "parallel", "has no parallel port", "use a serial line or a channel"),
        (devices.cryptos, "crypto", "has no crypto device", QEMU),
        ([devices.iommu] if devices.iommu is not None else [], "iommu", "has no IOMMU", QEMU),
    )  # fmt: skip
    if domain.iothreads or domain.iothreadids is not None:
        yield "/domain/iothreads", _THREADS, "leave them out, or use QEMU"
    for items, name, what, remedy in refused:
        if items:
            yield f"{root}/{name}", what, remedy
    for number, item in enumerate(devices.controllers, 1):
        allowed = item.type == "virtio-serial" or (item.type == "pci" and item.model in (None, "pcie-root"))
        allowed = allowed or (item.type == "usb" and item.model == "none")
        if not allowed:
            yield (
                f"{root}/controller[{number}]",
                f"has no {item.type} controller of this kind",
                ("leave it out: everything sits on one PCI Express bus"),
            )
    for share in devices.filesystems:
        if share.driver is None or share.driver.type != "virtiofs":
            yield f"{root}/filesystem/driver", "shares directories by virtiofs", "write <driver type='virtiofs'/>"
    for rng in devices.rngs:
        if rng.backend is not None and rng.backend.model == "egd":
            yield f"{root}/rng/backend", "takes randomness from the kernel", "write <backend model='builtin'/>"
    for panic in devices.panics:
        if panic.model not in (None, "isa"):
            yield f"{root}/panic", f"has no panic device of model {panic.model!r}", "write <panic model='isa'/>"
    for watchdog in devices.watchdogs:
        if watchdog.model != "i6300esb" or watchdog.action == "dump":
            yield f"{root}/watchdog", "has the watchdog i6300esb, which does not dump", "model='i6300esb'"
    for memory in devices.memorys:
        if memory.model != "virtio-mem":
            yield f"{root}/memory", f"has no memory of model {memory.model!r}", "write <memory model='virtio-mem'>"
