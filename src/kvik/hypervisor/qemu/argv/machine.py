"""The board: machine type, accelerator, firmware, direct kernel boot, clock, SMBIOS, boot order, power events."""

from __future__ import annotations

from datetime import UTC, datetime

from kvik.conf.devices.common import BootableDevice
from kvik.conf.devices.hostdev import Redirdev
from kvik.conf.domain import Domain
from kvik.conf.os import Sysinfo
from kvik.errors import ConfigUnsupported
from kvik.hypervisor.names import alias_of
from kvik.hypervisor.qemu.argv.options import Context, Props, json_text, keyval

__all__ = ["boot_indexes", "clock", "clock_environment", "firmware", "machine", "power_actions", "smbios", "uses_qboot"]


def machine(context: Context, memory_backend: str | None) -> list[str]:
    domain, features = context.domain, context.domain.features
    options: Props = {"usb": False, "dump-guest-core": bool(domain.memory_dump_core)}
    if not context.is_microvm:
        if _firmware_on_serial(domain):
            options["graphics"] = False
        options["vmport"] = features.vmport.state if features and features.vmport else False
        options["smm"] = features.smm.state if features and features.smm else None
        if domain.os.loader is not None and domain.os.loader.secure:
            options["smm"] = True
        hpet = _timer(domain, "hpet")
        options["hpet"] = bool(hpet) if not hpet else None
        if domain.os.loader is not None and domain.os.loader.type == "pflash":
            options["pflash0"] = "pflash0-format"
            if domain.os.nvram is not None:
                options["pflash1"] = "pflash1-format"
    else:
        # ACPI lets the guest power off; PCIe carries what has no mmio form.
        options |= {"rtc": True, "pcie": True}
    if _timer(domain, "pit") is False and context.domain.type != "qemu":
        options["pit"] = False
    options["acpi"] = None if features is None or features.acpi or context.is_microvm else False
    if features is not None:
        options["kernel_irqchip"] = _irqchip(features.ioapic.driver if features.ioapic else None, context)
        options["pcspk-audiodev"] = None
    if domain.memory_backing is not None and domain.memory_backing.nosharepages:
        options["mem-merge"] = False
    options["memory-backend"] = memory_backend
    for sound in domain.devices.sounds:
        if sound.model == "pcspk":
            options["pcspk-audiodev"] = f"audio{sound.audio.id if sound.audio else 1}"
    if domain.devices.iommu is not None and domain.devices.iommu.driver and domain.devices.iommu.driver.intremap:
        options["kernel_irqchip"] = "split" if domain.type == "kvm" else None
    name = context.machine
    return ["-machine", keyval(name, options), "-accel", _accel(domain)]


def _firmware_on_serial(domain: Domain) -> bool:
    """Whether SeaBIOS shall speak on the first serial line: asked for, or where no screen would show what it says."""
    bios = domain.os.bios
    if bios is not None and bios.useserial is not None:
        return bios.useserial
    named = domain.os.loader is not None or domain.os.firmware is not None
    return bool(domain.devices.serials) and not (domain.devices.videos or domain.os.kernel or named)


def _timer(domain: Domain, name: str) -> bool | None:
    """What the document says of a timer's presence; None: nothing."""
    for timer in domain.clock.timers if domain.clock else []:
        if timer.name == name:
            return timer.present
    return None


def _irqchip(driver: str | None, context: Context) -> str | None:
    if driver is None or context.domain.type != "kvm":
        return None
    return {"kvm": "on", "qemu": "split"}[driver]


def _accel(domain: Domain) -> str:
    if domain.type == "kvm":
        options: Props = {}
        features = domain.features
        ring = features.kvm.dirty_ring if features and features.kvm else None
        if ring is not None and ring.state:
            options["dirty-ring-size"] = ring.size
        return keyval("kvm", options)
    cache = domain.features.tcg.tb_cache if domain.features and domain.features.tcg else None
    return keyval("tcg", {"tb-size": cache // 1024 if cache else None})


# -- firmware and kernel


def uses_qboot(domain: Domain) -> bool:
    """Whether the tiny firmware suffices: a kernel is given, and nothing else could be booted or chosen.

    `<boot dev='hd'/>` alone does not count: every document gets it that names no boot device, and QEMU boots a given
    kernel before any disk.
    """
    os = domain.os
    has_boot_devices = any(boot.dev != "hd" for boot in os.boots) or any(
        device.boot is not None
        for device in [*domain.devices.disks, *domain.devices.interfaces, *domain.devices.hostdevs]
    )
    # A screen wants its own BIOS to be run, which the tiny firmware does not do (under emulation it even hangs).
    has_screen = any(video.model is None or video.model.type != "none" for video in domain.devices.videos)
    menu = os.bootmenu is not None and os.bootmenu.enable
    firmware_named = os.loader is not None or os.firmware is not None
    return bool(os.kernel) and not (has_boot_devices or has_screen or menu or firmware_named)


def firmware(context: Context) -> list[str]:
    """Loader and NVRAM as flash, or a BIOS image; kernel, initrd and their command line."""
    os, files = context.domain.os, context.files
    argv: list[str] = []
    loader = os.loader
    if loader is not None and loader.value and loader.type == "pflash":
        argv += _flash(
            "pflash0", files.path("loader", loader.value), loader.format or "raw", loader.readonly is not False
        )
        nvram = os.nvram
        if nvram is not None:
            path = (nvram.source.location if nvram.source else None) or nvram.value
            if not path:
                raise ConfigUnsupported("<nvram> names no file", path="/domain/os/nvram")
            argv += _flash("pflash1", files.path("nvram", path), nvram.format or "raw", False)
    elif loader is not None and loader.value:
        argv += ["-bios", loader.value]
    elif context.is_microvm or ((context.is_q35 or context.is_i440fx) and uses_qboot(context.domain)):
        argv += ["-bios", "qboot.rom"]
    if os.kernel:
        argv += ["-kernel", _readable(context, "kernel", os.kernel)]
        if os.initrd:
            argv += ["-initrd", _readable(context, "initrd", os.initrd)]
        if os.cmdline:
            argv += ["-append", os.cmdline]
        if os.dtb:
            argv += ["-dtb", os.dtb]
    for table in os.acpi.tables if os.acpi else []:
        if table.value:
            kind = {"slic": "sig=SLIC", "msdm": "sig=MSDM"}.get(table.type or "", "")
            argv += ["-acpitable", ",".join(filter(None, [kind, keyval("", {"file": table.value})]))]
    return argv


def _readable(context: Context, name: str, path: str) -> str:
    """-kernel and -initrd know no fdsets; /proc gives a passed descriptor a path."""
    fd = context.files.fd(name)
    return f"/proc/self/fd/{fd}" if fd is not None else path


def _flash(name: str, path: str, image_format: str, read_only: bool) -> list[str]:
    storage = {"driver": "file", "filename": path, "node-name": f"{name}-storage", "read-only": read_only}
    node = {"driver": image_format, "file": f"{name}-storage", "node-name": f"{name}-format", "read-only": read_only}
    return ["-blockdev", json_text(storage), "-blockdev", json_text(node)]


# -- boot order


def boot_indexes(domain: Domain) -> dict[str, int]:
    """alias -> bootindex, from each device's own <boot order> or from <os><boot dev>: the first device of a kind."""
    devices = domain.devices
    bootable: list[BootableDevice | Redirdev] = [*devices.disks, *devices.interfaces, *devices.hostdevs]
    bootable += devices.redirdevs
    own = {
        alias_of(device): device.boot.order
        for device in bootable
        if device.boot is not None and device.alias is not None
    }
    if own:
        return own
    found: dict[str, int] = {}
    for index, boot in enumerate(domain.os.boots, 1):
        if boot.dev == "network":
            candidates = [alias_of(nic) for nic in devices.interfaces]
        else:
            kind = {"hd": ("disk", "lun"), "cdrom": ("cdrom",), "fd": ("floppy",)}[boot.dev]
            candidates = [alias_of(disk) for disk in devices.disks if disk.device in kind]
        if candidates and candidates[0] not in found:
            found[candidates[0]] = index
    return found


def boot_options(context: Context) -> list[str]:
    os = context.domain.os
    options: Props = {}
    if os.bootmenu is not None and os.bootmenu.enable is not None:
        options |= {"menu": os.bootmenu.enable, "splash-time": os.bootmenu.timeout if os.bootmenu.enable else None}
    if os.bios is not None and os.bios.reboot_timeout is not None:
        options["reboot-timeout"] = os.bios.reboot_timeout
    if not context.is_microvm:
        options["strict"] = True
    return ["-boot", keyval("", options)] if options else []


def power_actions(domain: Domain) -> list[str]:
    """What QEMU does by itself; where the manager has to decide, QEMU only stops and tells."""
    off = "poweroff" if domain.on_poweroff in (None, "destroy") else "pause"
    reboot = "reset" if domain.on_reboot in (None, "restart") else "shutdown"
    panic = "shutdown" if domain.on_crash in (None, "destroy") else "pause"
    return ["-action", f"shutdown={off},reboot={reboot},panic={panic}"]


# -- clock


def clock(domain: Domain, now: float) -> list[str]:
    """-rtc and the timers that are options of their own. `now` (seconds since the epoch) is what an adjusted clock
    counts from; a time zone is QEMU's own local time, by TZ in its environment."""
    options: Props = {"base": "utc"}
    described = domain.clock
    if described is not None:
        if described.offset in ("localtime", "timezone"):
            options["base"] = "localtime"
        elif described.offset == "variable":
            options["base"] = _adjusted(now, int(described.adjustment or 0), described.basis)
        elif described.offset == "absolute" and described.start is not None:
            options["base"] = _date(described.start)
        for timer in described.timers:
            if timer.name == "rtc":
                options["clock"] = {"guest": "vm", "wall": "host", "boot": "host", "realtime": "rt"}.get(
                    timer.track or ""
                )
                options["driftfix"] = {"catchup": "slew", "delay": "none"}.get(timer.tickpolicy or "")
    argv = ["-rtc", keyval("", options)]
    for timer in described.timers if described else []:
        if timer.name == "pit" and timer.tickpolicy in ("delay", "discard") and domain.type == "kvm":
            argv += ["-global", f"kvm-pit.lost_tick_policy={timer.tickpolicy}"]
    pm = domain.pm
    if pm is not None:
        bridge = "ICH9-LPC" if (domain.os.type.machine or "").startswith(("pc-q35", "q35")) else "PIIX4_PM"
        if pm.suspend_to_mem is not None and pm.suspend_to_mem.enabled is not None:
            argv += ["-global", f"{bridge}.disable_s3={int(not pm.suspend_to_mem.enabled)}"]
        if pm.suspend_to_disk is not None and pm.suspend_to_disk.enabled is not None:
            argv += ["-global", f"{bridge}.disable_s4={int(not pm.suspend_to_disk.enabled)}"]
    return argv


def clock_environment(domain: Domain) -> dict[str, str]:
    described = domain.clock
    if described is None or described.offset != "timezone" or not described.timezone:
        return {}
    return {"TZ": described.timezone}


def _adjusted(now: float, adjustment: int, basis: str | None) -> str:
    local = datetime.fromtimestamp(now).astimezone().utcoffset() if basis == "localtime" else None
    return _date(int(now) + adjustment + (int(local.total_seconds()) if local else 0))


def _date(seconds: int) -> str:
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")
    except (ValueError, OverflowError, OSError) as error:
        raise ConfigUnsupported(f"clock start {seconds} is no date", path="/domain/clock") from error


# -- SMBIOS, fw_cfg

_SYSTEM = {"uuid": None, "manufacturer": "manufacturer", "product": "product", "version": "version",
           "serial": "serial", "sku": "sku", "family": "family"}  # fmt: skip


def smbios(domain: Domain) -> list[str]:
    argv: list[str] = []
    mode = domain.os.smbios.mode if domain.os.smbios else None
    if mode == "host":
        raise ConfigUnsupported("<smbios mode='host'> is not supported; copy the strings into <sysinfo>")
    for info in domain.sysinfos:
        if info.type == "fwcfg":
            argv += _firmware_config(info)
        elif mode == "sysinfo":
            argv += _tables(info)
    return argv


def _tables(info: Sysinfo) -> list[str]:
    argv: list[str] = []
    rows = [(0, info.bios), (1, info.system), *((2, board) for board in info.base_boards), (3, info.chassis)]
    for number, block in rows:
        if block is None:
            continue
        options: Props = {"type": number}
        for entry in block.entries:
            if entry.name and (number != 1 or entry.name in _SYSTEM):
                options[entry.name] = entry.value
        options.pop("uuid", None)  # -uuid sets it
        argv += ["-smbios", keyval("", options)]
    if info.oem_strings is not None:
        argv += ["-smbios", keyval("", {"type": 11, "value": [entry.value for entry in info.oem_strings.entries]})]
    return argv


def _firmware_config(info: Sysinfo) -> list[str]:
    argv = []
    for entry in info.entries:
        if entry.name:
            argv += ["-fw_cfg", keyval("", {"name": entry.name, "file": entry.file, "string": entry.value})]
    return argv
