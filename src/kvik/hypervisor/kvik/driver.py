"""kvik-vmm as a driver: completes and checks documents, starts machines and finds them again.

A machine is ours when its document's <emulator> is `kvik-vmm` or a path that ends in it (see `program.py`). Starting
is as for QEMU: every file is opened here, the VMM gets descriptors and speaks QMP; whatever fails on the way is undone
in reverse, and if the VMM itself gave up, its own words are the error. The process is a fork of the daemon's zygote
where there is one (`zygote.py`), else it is executed.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from kvik import __version__
from kvik.conf.aliases import assign_aliases
from kvik.conf.capabilities import DomainCapabilities, format_domain_capabilities
from kvik.conf.cpu import Cpu
from kvik.conf.devices.disk import Disk
from kvik.conf.domain import Domain
from kvik.errors import ConfigUnsupported, HypervisorError
from kvik.host.process import ProcessHandle
from kvik.hypervisor import process
from kvik.hypervisor.descriptors import open_all
from kvik.hypervisor.driver import Bases, EventSink, Feature, HostVerdict, StartRequest, no_bases
from kvik.hypervisor.firmware import complete_firmware
from kvik.hypervisor.kernels import unpacked_kernel
from kvik.hypervisor.kvik import changes, program, state, support
from kvik.hypervisor.kvik.argv import CommandLine, build
from kvik.hypervisor.kvik.back_ends import written_last
from kvik.hypervisor.kvik.machine import KvikMachine
from kvik.hypervisor.kvik.models import Models, ModelSource
from kvik.hypervisor.kvik.program import EMULATOR
from kvik.hypervisor.kvik.zygote import ZygoteKeeper
from kvik.hypervisor.launch import bring_up, find_running, take_up
from kvik.hypervisor.names import alias_of
from kvik.hypervisor.sidecars import storage_daemon, virtiofsd
from kvik.hypervisor.sidecars.start import start_sidecars
from kvik.hypervisor.words import shell_text
from kvik.paths import Paths

__all__ = ["EMULATOR", "KvikDriver"]

_FEATURES = frozenset(
    {
        Feature.REBOOT_IN_PLACE,
        Feature.VCPU_HOTPLUG,
        Feature.BALLOON,
        Feature.DEVICE_HOTPLUG,
        Feature.NMI,
        Feature.AGENT,
        Feature.TAPS,
        Feature.SNAPSHOTS,
        Feature.SNAPSHOTS_STOP,
        Feature.SAVES_AT_AN_INSTANT,
    }
)


class KvikDriver:
    name = EMULATOR

    def __init__(self, paths: Paths, probe: Callable[[], HostVerdict], *, zygote: ZygoteKeeper | None = None) -> None:
        """`probe` runs the host's acceleration probe (blocking, cached). Without a `zygote` machines are executed."""
        self._paths = paths
        self.bases: Bases = no_bases
        self._zygote = zygote
        self._probe = probe
        self._verdict = probe()
        self._models = ModelSource()

    def features(self) -> frozenset[Feature]:
        return _FEATURES | ({Feature.KVM} if self._verdict.usable else set())

    def verdict(self) -> HostVerdict:
        return self._verdict

    async def version(self) -> int:
        """kvik's own: the two come in one package."""
        return _version()

    async def default_emulator(self, arch: str) -> str:
        if arch not in ("", "x86_64", "amd64"):
            raise HypervisorError(f"kvik-vmm runs x86_64 guests, not {arch}", remedy="use QEMU")
        return EMULATOR

    # -- documents

    async def complete(self, definition: Domain) -> None:
        support.check(definition)
        described = definition.os.type
        described.arch = "x86_64"
        described.machine = support.MACHINES[described.machine or "kvik"]
        definition.devices.emulator = definition.devices.emulator or EMULATOR
        if definition.cpu is None or (definition.cpu.mode is None and definition.cpu.model is None):
            definition.cpu = definition.cpu or Cpu()
            definition.cpu.mode = "host-passthrough"
        complete_firmware(definition, "x86_64", support.FIRMWARE_MACHINE, self._paths.nvram)
        support.check(definition)  # what was found may be of a format that is not ours
        for nic in definition.devices.interfaces:
            support.complete_interface(nic)

    async def validate(self, definition: Domain) -> None:
        support.check(definition)
        virtiofsd.check(definition)
        if not self._verdict.usable:
            # Perhaps a module was loaded or a permission given since; cached, so this costs a millisecond if not.
            self._verdict = await asyncio.to_thread(self._probe)
        if not self._verdict.usable:
            remedy = "<domain type='qemu'> without this <emulator> runs on QEMU's software emulation"
            if self._verdict.remedy:
                remedy = f"{self._verdict.remedy}; or {remedy}"
            raise ConfigUnsupported(
                f"kvik-vmm needs KVM, which cannot be used here: {self._verdict.reason}",
                path="/domain/devices/emulator",
                remedy=remedy,
            )
        emulator = definition.devices.emulator or EMULATOR
        program.check(emulator)
        if self._zygote is not None and emulator == EMULATOR:
            self._zygote.warm()  # a machine comes, sooner or later
        await self._models.check(definition, emulator)

    def tpm_state(self, definition: Domain) -> Path | None:
        return None

    def written_last(self, directory: Path, disk: Disk, places: Sequence[str]) -> str | None:
        return written_last(storage_daemon.redo_path(directory, alias_of(disk)), places)

    async def forget(self, definition: Domain, *, keep_tpm: bool | None = None) -> None:
        """Nothing is kept between runs: there is no TPM."""

    async def native(self, definition: Domain) -> str:
        copy = definition.copy()
        await self.complete(copy)
        assign_aliases(copy)
        await self._models.resolve(copy, copy.devices.emulator or EMULATOR)
        line = build(copy, copy.devices.emulator or EMULATOR, paused=False, now=time.time())
        return shell_text(line.argv) + "\n"

    # -- machines

    async def start(self, request: StartRequest) -> KvikMachine:
        domain = request.definition
        await self.validate(domain)
        await self._models.resolve(domain, domain.devices.emulator or EMULATOR)
        assign_aliases(domain)
        kernel = await unpacked_kernel(domain, self._paths.cache)
        with ExitStack() as undo, ExitStack() as close:
            opened = await open_all(
                domain, request.directory, request.files, kernel, bases=self.bases(), close=close, undo=undo
            )
            sidecars = await start_sidecars(
                domain,
                request.directory,
                opened,
                tpm_states=self._paths.data,
                log_fd=request.log_fd,
                undo=undo,
                disks=storage_daemon.of(domain),
            )
            incoming = state.connection(opened) if request.state is not None else None
            if incoming is not None:
                undo.callback(incoming.close)
            line = build(
                domain,
                domain.devices.emulator or EMULATOR,
                opened.fds,
                now=time.time(),
                cached_kernel=kernel is not None and Path(kernel).is_relative_to(self._paths.cache),
            )
            handle, position = await self._run(line, request)
            undo.callback(handle.close)
            undo.callback(handle.kill)
            close.close()  # the VMM has its own; ours would keep its monitor from ending with it
            machine = KvikMachine(
                domain,
                request.directory,
                handle,
                emulator=line.argv[0],
                version=_version(),
                sink=request.sink,
                sidecars=sidecars,
                log=self._log(domain),
            )
            machine.incoming, machine.bases = incoming, self.bases
            return await bring_up(
                machine,
                request,
                opened,
                undo,
                settings=changes.start_settings,
                explain=lambda error: process.died(
                    domain.name, handle, request.log_fd, position, error, product=self.name
                ),
            )

    async def _run(self, line: CommandLine, request: StartRequest) -> tuple[ProcessHandle, int]:
        """The machine's process, and where its own words begin in the log."""
        command, directory, log_fd = program.command(line.argv), request.directory, request.log_fd
        position = process.announce(command, log_fd, product=self.name)
        if self._zygote is not None and line.argv[0] == EMULATOR:
            null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
            try:
                files = {0: null, 1: log_fd, 2: log_fd, **{fd: fd for fd in line.fds}}
                environment = process.environment(directory)
                forked = await self._zygote.fork(request.definition.name, line.argv, environment, files)
            finally:
                os.close(null)
            if forked is not None:
                return forked, position
        return process.execute(command, line.fds, directory, log_fd), position

    async def attach(
        self, definition: Domain, directory: Path, handle: Mapping[str, Any], sink: EventSink
    ) -> KvikMachine | None:
        found = await find_running(definition, handle)
        if found is None:
            return None
        machine = KvikMachine(
            definition,
            directory,
            found.process,
            emulator=str(handle.get("emulator") or EMULATOR),
            version=int(handle.get("version") or _version()),
            sink=sink,
            sidecars=found.sidecars,
            log=self._log(definition),
            attached=True,
            own_disks=_own_disks(handle),
        )
        machine.bases = self.bases
        machine.overlays_in_doubt = True  # a daemon before us may have been killed amid a snapshot
        return await take_up(machine, handle, found)

    def _log(self, domain: Domain) -> Path:
        return self._paths.domain_logs / f"{domain.name}.log"

    async def close(self) -> None:
        if self._zygote is not None:
            await self._zygote.close()

    async def domain_capabilities(self, arch: str, machine: str, virttype: str, emulator: str) -> str:
        path = emulator or await self.default_emulator(arch)
        name = support.MACHINES.get(machine or "kvik")
        if name is None:
            raise ConfigUnsupported(
                f"kvik-vmm has no machine type {machine!r}",
                path="/domain/os/type/@machine",
                remedy=f"one of: {', '.join(support.MACHINES)}",
            )
        if virttype not in ("", "kvm"):
            raise ConfigUnsupported(f"kvik-vmm needs KVM and runs no domains of type {virttype!r}", remedy="use QEMU")
        if not self._verdict.usable:
            raise ConfigUnsupported(
                f"kvik-vmm needs KVM, which cannot be used here: {self._verdict.reason}",
                remedy=self._verdict.remedy or "use QEMU",
            )
        return format_domain_capabilities(_domain_capabilities(path, name, await self._models.of(path)))


def _own_disks(handle: Mapping[str, Any]) -> list[str] | None:
    """None: it was started by a kvik that put no images on top of such disks, so the document tells."""
    told = handle.get("own_disks")
    return [str(alias) for alias in told] if isinstance(told, list) else None


def _version() -> int:
    parts = [int(part) for part in __version__.split(".")[:3] if part.isdecimal()]
    major, minor, micro = (*parts, 0, 0, 0)[:3]
    return major * 1_000_000 + minor * 1_000 + micro


def _domain_capabilities(path: str, machine: str, models: Models) -> DomainCapabilities:
    return DomainCapabilities(
        path=path,
        domain="kvm",
        machine=machine,
        arch="x86_64",
        max_vcpus=support.MAX_VCPUS,
        iothreads=False,
        cpu_modes=["host-passthrough", "maximum", *(["host-model"] if models.nearest else []), "custom"],
        host_model=models.nearest,
        cpu_models=[(name, usable, "unknown") for name, usable in models.usable.items()],
        memory_sources=["anonymous", "memfd"],
        devices={
            "disk": {"diskDevice": ["disk"], "bus": ["virtio"], "model": ["virtio", "virtio-non-transitional"]},
            "rng": {"model": ["virtio"], "backendModel": ["random", "builtin"]},
            "filesystem": {"driverType": ["virtiofs"]},
            "channel": {"type": list(support.CHARDEVS)},
        },
        features={"genid": True},
    )
