"""A machine out of what `saving` wrote to a directory.

    state.json    version, configuration, memory layout, CPUs, devices: docs/internals/vmm-state.md
    memory        RAM (`memory_file`)

A restored machine waits for what is imported here: neither `pathlib` nor `json` (docs/adr/0011-vmm-start.md).
"""

from __future__ import annotations

import os
import stat

from kvik.errors import HostError, NotFound, OperationFailed, OperationInvalid
from kvik.vmm.state import memory_file
from kvik.vmm.state.capture import apply
from kvik.vmm.state.cpucheck import arrange_processors, check_cpu, cpuid_equal
from kvik.vmm.state.settings_check import merge, read_config
from kvik.vmm.state.values import MAX_STATE, Fields, decode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.vmm.config import MachineConfig
    from kvik.vmm.confinement import Confinement
    from kvik.vmm.machine import Machine

__all__ = ["COMPRESSIONS", "FORMAT", "MEMORY", "STATE", "VERSION", "load", "read", "restore"]

FORMAT, VERSION = "kvik-vmm snapshot", 1
STATE, MEMORY = "state.json", "memory"
COMPRESSIONS = ("none", "zlib")


class Snapshot:
    """What a directory holds, checked but for what only a machine can check."""

    def __init__(self, directory: str) -> None:
        self.where = f"{directory}/{STATE}"
        document = Fields(decode(_read(self.where), self.where), self.where)
        if document.text("format") != FORMAT:
            raise OperationFailed(f"{self.where} is no snapshot of kvik-vmm")
        version = document.number("version")
        if version != VERSION:
            raise OperationFailed(
                f"{self.where} has version {version}, this kvik reads {VERSION}",
                remedy=f"restore it with the kvik that wrote it ({document.text('kvik')[:20]})",
            )
        self.document = document
        self.state = document.object("state")
        memory = document.fields("memory")
        self.compression = memory.text("compression")
        if self.compression not in COMPRESSIONS:
            raise OperationFailed(f"{self.where}: memory: compression {self.compression[:20]!r} is not known")
        if memory.text("file") != MEMORY:
            raise OperationFailed(f"{self.where}: memory: file is damaged: it is always {MEMORY!r}")
        self.regions = [
            (region.number("start"), region.number("size"), region.number("offset"))
            for region in memory.each("regions")
        ]
        self.memory = f"{directory}/{MEMORY}"

    def config(self) -> MachineConfig:
        return read_config(self.document.object("config"), self.where)

    def fill(self, machine: Machine, *, fresh: bool) -> None:
        """RAM: mapped where it can be, read where it must."""
        regions = machine.memory.regions
        if [(region.start, region.size) for region in regions] != [(start, size) for start, size, _ in self.regions]:
            raise OperationFailed(
                f"{self.where}: memory: its regions are not this machine's", remedy="give the machine the same memory"
            )
        fd = _open(self.memory)
        try:
            if self.compression == "none":
                self._check_size(fd)
            if not fresh:
                for region in regions:
                    memory_file.clear(region)
            if self.compression == "none":
                eager = machine.config.memory.hugepages
                for region, (_, _, offset) in zip(regions, self.regions, strict=True):
                    if region.fd >= 0 or eager:
                        memory_file.load(region, fd, offset)
                    else:
                        memory_file.map_file(region, fd, offset)
                        machine.memory.mapped.append((region.start, region.size))
            else:
                memory_file.read_compressed(machine.memory, fd, self.memory)
        finally:
            os.close(fd)

    def _check_size(self, fd: int) -> None:
        need, have = max((size + offset for _, size, offset in self.regions), default=0), os.fstat(fd).st_size
        if have < need or any(offset % 4096 for _, _, offset in self.regions):
            raise OperationFailed(
                f"{self.memory} is cut off: {have} bytes, {need} belong there", remedy="take the snapshot anew"
            )


def read(directory: str) -> Snapshot:
    """Raises `NotFound`, `HostError`, or OperationFailed that names file and member."""
    return Snapshot(absolute(directory))


def absolute(path: str) -> str:
    """As `Path.absolute`: what the path means does not change with the working directory; `..` stays."""
    whole = path if path.startswith("/") else f"{os.getcwd()}/{path}"  # noqa: PTH109 - pathlib is not imported
    return whole.rstrip("/") or "/"


def _open(path: str) -> int:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        raise NotFound(f"{path} does not exist", remedy="give the directory of a snapshot") from None
    except OSError as error:
        raise HostError(f"cannot open {path}: {error.strerror}", errno=error.errno or 0) from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OperationFailed(f"{path} is no regular file")
    return fd


def _read(path: str) -> bytes:
    fd = _open(path)
    with os.fdopen(fd, "rb") as stream:
        return stream.read(MAX_STATE + 1)


def restore(given: MachineConfig, confinement: Confinement | None = None) -> Machine:
    """A machine out of `given.restore`, with the host's side of things as `given` has it. It is paused; `start` lets it
    go on. Raises as `read` and `build` do, and when this host's CPU is not up to it."""
    from kvik.vmm.build import build

    snapshot = read(given.restore)
    machine = build(merge(snapshot.config(), given), confinement, boot=False)
    try:
        fill_and_apply(machine, snapshot, fresh=True)
    except BaseException:
        machine.close()
        raise
    return machine


def load(machine: Machine, directory: str) -> None:
    """Put a machine that may be running into a saved state; it then goes on from there, if it ran."""
    machine.memory.require_whole("be replaced")
    machine.memory.require_free("be replaced")
    snapshot = read(directory)
    cpu = Fields(snapshot.state, snapshot.where).object("cpu")
    with machine.paused():  # a vCPU that runs answers no ioctl
        check_cpu(machine, Fields(cpu, f"{snapshot.where}: cpu"))
        if not cpuid_equal(machine, cpu):
            raise OperationInvalid(
                "a machine that has run cannot become another CPU", remedy="restore into a new process"
            )
        machine.forget_checkpoint()
        fill_and_apply(machine, snapshot, fresh=False)


def fill_and_apply(machine: Machine, snapshot: Snapshot, *, fresh: bool) -> None:
    where = snapshot.where
    cpu = Fields(snapshot.state, where).fields("cpu")
    check_cpu(machine, cpu, fresh=fresh)
    if fresh:
        arrange_processors(machine, cpu)
        machine.hold_devices()
    snapshot.fill(machine, fresh=fresh)
    apply(machine, snapshot.state, where, identity=fresh, catch_up=machine.config.catch_up)
    for device in machine.devices.values():
        if (announce := getattr(getattr(device, "device", device), "announce", None)) is not None:
            announce()
    if fresh and Fields(snapshot.state, where).text("status") not in ("running", "prelaunch"):
        machine.config.paused = True
