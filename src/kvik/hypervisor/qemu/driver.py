"""QEMU as a driver: completes and checks documents, starts machines and finds them again.

Starting opens every file first, then spawns QEMU with the descriptors, then speaks QMP; whatever fails on the way is
undone in reverse, and if QEMU itself gave up, its own words are the error.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
import zoneinfo
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from kvik.conf.aliases import assign_aliases
from kvik.conf.capabilities import DomainCapabilities, format_domain_capabilities
from kvik.conf.cpu import Cpu, CpuModel
from kvik.conf.devices.disk import Disk
from kvik.conf.domain import Domain
from kvik.errors import ConfigUnsupported, HypervisorError, KvikError
from kvik.host.process import find_program
from kvik.host.tsc import tsc_khz
from kvik.hypervisor import process
from kvik.hypervisor.descriptors import open_all
from kvik.hypervisor.driver import Bases, EventSink, Feature, HostVerdict, StartRequest, no_bases
from kvik.hypervisor.firmware import complete_firmware, installed_firmware
from kvik.hypervisor.kernels import unpacked_kernel
from kvik.hypervisor.launch import bring_up, find_running, take_up
from kvik.hypervisor.qemu import settings
from kvik.hypervisor.qemu.argv.build import build
from kvik.hypervisor.qemu.capabilities import QemuCapabilities, QemuProber
from kvik.hypervisor.qemu.disk_checks import check_disks
from kvik.hypervisor.qemu.host_io import by_io_uring
from kvik.hypervisor.qemu.machine import QemuMachine
from kvik.hypervisor.qemu.remedies import remedy_for
from kvik.hypervisor.sidecars import swtpm
from kvik.hypervisor.sidecars.start import check as check_sidecars
from kvik.hypervisor.sidecars.start import start_sidecars
from kvik.hypervisor.words import shell_text
from kvik.paths import Paths

__all__ = ["QemuDriver"]

_NATIVE_ARCH = os.uname().machine
_FEATURES = frozenset(Feature) - {Feature.KVM, Feature.RENAME_RUNNING, Feature.SAVES_AT_AN_INSTANT}


class QemuDriver:
    name = "QEMU"

    def __init__(self, paths: Paths, probe: Callable[[], HostVerdict], *, emulator: str = "") -> None:
        """`probe` runs the host's acceleration probe (blocking); `emulator` overrides the search for a binary."""
        self._paths = paths
        self.bases: Bases = no_bases
        self._probe = probe
        self._verdict = probe()
        self._emulator = emulator
        self._prober = QemuProber(paths.cache / "qemu")

    def features(self) -> frozenset[Feature]:
        return _FEATURES | ({Feature.KVM} if self._verdict.usable else set())

    def verdict(self) -> HostVerdict:
        return self._verdict

    async def version(self) -> int:
        return (await self.capabilities(await self.default_emulator(_NATIVE_ARCH))).version

    async def capabilities(self, emulator: str) -> QemuCapabilities:
        return await self._prober.capabilities(emulator)

    async def default_emulator(self, arch: str) -> str:
        if self._emulator:
            return self._emulator
        arch = {"amd64": "x86_64", "i686": "i386", "": _NATIVE_ARCH}.get(arch, arch)
        names = [f"qemu-system-{arch}"] + (["qemu-kvm", "kvm"] if arch == _NATIVE_ARCH else [])
        for name in names:
            found = find_program(name) or find_program(name, "/usr/libexec")
            if found is not None:
                return found
        package = "qemu-system-x86" if arch in ("x86_64", "i386") else "qemu-system"
        raise HypervisorError(
            f"no QEMU for {arch} is installed (looked for {', '.join(names)})", remedy=f"apt install {package}"
        )

    # -- documents

    async def complete(self, definition: Domain) -> None:
        described = definition.os
        described.type.arch = described.type.arch or _NATIVE_ARCH
        if not definition.devices.emulator:
            definition.devices.emulator = await self.default_emulator(described.type.arch)
        capabilities = await self.capabilities(definition.devices.emulator)
        machine = capabilities.machine(described.type.machine or "")
        if machine is None:
            raise _no_machine(capabilities, described.type.machine or "")
        described.type.machine = machine.name
        if definition.cpu is None and capabilities.arch in ("x86_64", "i386"):
            name = machine.default_cpu.removesuffix(f"-{capabilities.arch}-cpu") or "qemu64"
            model = CpuModel(value=name, fallback="forbid")
            definition.cpu = Cpu(mode="custom", match="exact", check="none", model=model)
        complete_firmware(definition, capabilities.arch, machine.name, self._paths.nvram)

    @property
    def _tpm_states(self) -> Path:
        return self._paths.data / "qemu" / "swtpm"

    def tpm_state(self, definition: Domain) -> Path | None:
        for device in swtpm.emulated(definition):
            if device.backend is not None and definition.uuid is not None:
                return swtpm.state_directory(self._tpm_states, definition, device.backend)
        return None

    def written_last(self, directory: Path, disk: Disk, places: Sequence[str]) -> str | None:
        return None  # it leaves nothing

    async def forget(self, definition: Domain, *, keep_tpm: bool | None = None) -> None:
        tpms = swtpm.emulated(definition)
        if keep_tpm is None:
            keep_tpm = any(item.backend is not None and item.backend.persistent_state for item in tpms)
        if definition.uuid is not None and not keep_tpm:
            await asyncio.to_thread(swtpm.forget_state, self._tpm_states, definition.uuid)

    async def validate(self, definition: Domain) -> None:
        if definition.type not in ("kvm", "qemu"):
            raise ConfigUnsupported(f"QEMU does not run domains of type {definition.type!r}", path="/domain/@type")
        check_sidecars(definition)
        if definition.type == "kvm" and not self._verdict.usable:
            # Perhaps a module was loaded or a permission given since; cached, so this costs a millisecond if not.
            self._verdict = await asyncio.to_thread(self._probe)
        if definition.type == "kvm" and not self._verdict.usable:
            remedy = "use <domain type='qemu'> for software emulation"
            if self._verdict.remedy:
                remedy = f"{self._verdict.remedy}, or {remedy}"
            raise ConfigUnsupported(
                f"<domain type='kvm'> cannot run on this host: {self._verdict.reason}",
                path="/domain/@type",
                remedy=remedy,
            )
        arch = definition.os.type.arch or _NATIVE_ARCH
        capabilities = await self.capabilities(definition.devices.emulator or await self.default_emulator(arch))
        if definition.type == "kvm" and not capabilities.kvm:
            raise ConfigUnsupported(f"{capabilities.binary} was built without KVM", path="/domain/devices/emulator")
        if capabilities.arch != arch and not (capabilities.arch == "x86_64" and arch in ("i686", "i386", "amd64")):
            raise ConfigUnsupported(f"{capabilities.binary} does not run {arch} guests", path="/domain/os/type/@arch")
        machine = capabilities.machine(definition.os.type.machine or "")
        if machine is None:
            raise _no_machine(capabilities, definition.os.type.machine or "")
        vcpus = definition.vcpu.value if definition.vcpu else 1
        if not 1 <= vcpus <= machine.max_cpus:
            raise ConfigUnsupported(
                f"machine type {machine.name} has 1 to {machine.max_cpus} vCPUs, not {vcpus}", path="/domain/vcpu"
            )
        _check_time_zone(definition)
        check_disks(definition, capabilities.version)
        model = definition.cpu.model.value if definition.cpu and definition.cpu.model else None
        if model and definition.cpu and definition.cpu.mode in (None, "custom"):
            known = {item.name for item in capabilities.cpus}
            if known and model not in known:
                raise ConfigUnsupported(f"{capabilities.binary} has no CPU model {model!r}", path="/domain/cpu/model")

    async def close(self) -> None:
        """There is nothing but machines."""

    async def native(self, definition: Domain) -> str:
        copy = definition.copy()
        await self.complete(copy)
        assign_aliases(copy)
        capabilities = await self.capabilities(copy.devices.emulator or "")
        line = build(copy, capabilities, paused=False, now=time.time())
        return shell_text(line.argv, line.env) + "\n"

    # -- machines

    async def start(self, request: StartRequest) -> QemuMachine:
        domain = request.definition
        await self.validate(domain)
        arch = domain.os.type.arch or _NATIVE_ARCH
        emulator = domain.devices.emulator or await self.default_emulator(arch)
        capabilities = await self.capabilities(emulator)
        assign_aliases(domain)
        kernel = await unpacked_kernel(domain, self._paths.cache)
        await _tell_tsc_rate(domain)
        _choose_spice_ports(domain)
        with ExitStack() as undo, ExitStack() as close:
            opened = await open_all(
                domain, request.directory, request.files, kernel, bases=self.bases(), close=close, undo=undo
            )
            sidecars = await start_sidecars(
                domain, request.directory, opened, tpm_states=self._tpm_states, log_fd=request.log_fd, undo=undo
            )
            line = build(
                domain,
                capabilities,
                opened.fds,
                now=time.time(),
                incoming=request.state is not None,
                by_io_uring=by_io_uring(capabilities, opened.fds),
            )
            handle, position = process.spawn(
                [*request.through, *line.argv],
                line.fds,
                request.directory,
                request.log_fd,
                product=f"QEMU {capabilities.version_text}",
                env=line.env,
            )
            undo.callback(handle.close)
            undo.callback(handle.kill)
            images = opened.paths()
            close.close()  # QEMU has its own; ours would keep its monitor from ending with it
            machine = QemuMachine(domain, request.directory, handle, capabilities, request.sink, sidecars=sidecars)
            machine.bases = self.bases
            return await bring_up(
                machine,
                request,
                opened,
                undo,
                settings=settings.start_settings,
                explain=lambda error: process.died(
                    domain.name,
                    handle,
                    request.log_fd,
                    position,
                    error,
                    product=self.name,
                    images=images,
                    remedy_for=remedy_for,
                ),
            )

    async def attach(
        self, definition: Domain, directory: Path, handle: Mapping[str, Any], sink: EventSink
    ) -> QemuMachine | None:
        found = await find_running(definition, handle)
        if found is None:
            return None
        try:
            capabilities = await self._running_capabilities(definition, handle)
        except KvikError:
            found.process.close()
            found.sidecars.detach()
            raise
        machine = QemuMachine(definition, directory, found.process, capabilities, sink, sidecars=found.sidecars)
        machine.bases = self.bases
        return await take_up(machine, handle, found)

    async def _running_capabilities(self, definition: Domain, handle: Mapping[str, Any]) -> QemuCapabilities:
        """Those of the binary under the machine's path; an upgrade meanwhile changes little that matters to it."""
        emulator = definition.devices.emulator or str(handle.get("emulator", ""))
        return await self.capabilities(emulator or await self.default_emulator(_NATIVE_ARCH))

    async def domain_capabilities(self, arch: str, machine: str, virttype: str, emulator: str) -> str:
        arch = arch or _NATIVE_ARCH
        capabilities = await self.capabilities(emulator or await self.default_emulator(arch))
        kind = capabilities.machine(machine or "pc")
        if kind is None:
            raise _no_machine(capabilities, machine)
        virttype = virttype or ("kvm" if self._verdict.usable else "qemu")
        if virttype == "kvm" and not self._verdict.usable:
            raise ConfigUnsupported(f"KVM cannot be used here: {self._verdict.reason}", remedy=self._verdict.remedy)
        return format_domain_capabilities(_domain_capabilities(capabilities, kind.name, kind.max_cpus, virttype))


def _no_machine(capabilities: QemuCapabilities, name: str) -> ConfigUnsupported:
    return ConfigUnsupported(
        f"{capabilities.binary} has no machine type {name!r}",
        path="/domain/os/type/@machine",
        remedy=f"{capabilities.binary} -machine help lists them",
    )


async def _tell_tsc_rate(domain: Domain) -> None:
    """A microvm has no timer that Linux could always calibrate the TSC by: without KVM's clock every other boot hangs.

    Told at each start and not by the definition, because the rate is this host's.
    """
    described = domain.os
    if domain.type == "kvm" or not described.kernel or not (described.type.machine or "").startswith("microvm"):
        return
    if "tsc_early_khz=" not in (described.cmdline or ""):
        rate = await asyncio.to_thread(tsc_khz)
        if rate is not None:
            described.cmdline = f"{described.cmdline or ''} tsc_early_khz={rate}".strip()


def _check_time_zone(definition: Domain) -> None:
    name = definition.clock.timezone if definition.clock and definition.clock.offset == "timezone" else None
    if not name:
        return
    try:
        zoneinfo.ZoneInfo(name)
    except (ValueError, OSError, zoneinfo.ZoneInfoNotFoundError) as error:
        raise ConfigUnsupported(
            f"this host knows no time zone {name!r}",
            path="/domain/clock/@timezone",
            remedy="a name below /usr/share/zoneinfo (apt install tzdata), such as Europe/Oslo",
        ) from error


def _choose_spice_ports(domain: Domain) -> None:
    """SPICE cannot choose a free port itself: one that is free now is likely to be so in 10 ms."""
    for device in domain.devices.graphics:
        wants_address = not device.socket and all(item.type in ("address", "network") for item in device.listens)
        if device.type == "spice" and wants_address and (device.port is None or device.port <= 0):
            for port in range(5900, 6900):
                with contextlib.suppress(OSError), socket.socket() as probe:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    probe.bind(("127.0.0.1", port))
                    device.port = port
                    break


def _domain_capabilities(capabilities: QemuCapabilities, machine: str, vcpus: int, virttype: str) -> DomainCapabilities:
    def having(table: Mapping[str, str]) -> list[str]:
        return [name for name, device in table.items() if capabilities.has(device)]

    firmware = [item for item in installed_firmware() if item.fits(capabilities.arch, machine, False)]
    video = having({"vga": "VGA", "cirrus": "cirrus-vga", "vmvga": "vmware-svga", "qxl": "qxl-vga",
                    "virtio": "virtio-vga", "bochs": "bochs-display", "ramfb": "ramfb"})  # fmt: skip
    graphics = [name for name in ("vnc", "spice") if name in capabilities.options]
    devices: dict[str, dict[str, list[str]]] = {
        "disk": {
            "diskDevice": ["disk", "cdrom", "floppy", "lun"],
            "bus": ["ide", "fdc", "scsi", "virtio", "usb", "sata", "nvme"],
            "model": ["virtio", "virtio-transitional", "virtio-non-transitional"],
        },
        "graphics": {"type": [*graphics, "egl-headless", "dbus"]},
        "video": {"modelType": [*video, "none"]},
        "hostdev": {"mode": ["subsystem"], "subsysType": ["usb", "pci"]},
        "rng": {"model": ["virtio"], "backendModel": ["random", "egd", "builtin"]},
        "filesystem": {"driverType": ["path", "virtiofs"]},
        "channel": {"type": ["pty", "unix", "spicevmc", "qemu-vdagent"]},
    }
    if capabilities.tpm_models:
        devices["tpm"] = {
            "model": sorted(capabilities.tpm_models),
            "backendModel": ["passthrough", "emulator", "external"],
        }
    if capabilities.has("usb-redir"):
        devices["redirdev"] = {"bus": ["usb"]}
    models = sorted(capabilities.cpus, key=lambda item: item.name)
    return DomainCapabilities(
        path=capabilities.binary,
        domain=virttype,
        machine=machine,
        arch=capabilities.arch,
        max_vcpus=vcpus,
        firmwares=["efi"] if firmware else [],
        loaders=[item.code for item in firmware],
        cpu_modes=["host-passthrough", "maximum", "custom"] if virttype == "kvm" else ["maximum", "custom"],
        cpu_models=[(item.name, item.usable, "unknown") for item in models if item.name not in ("host", "max", "base")],
        devices=devices,
        features={"vmcoreinfo": True, "genid": True},
    )
