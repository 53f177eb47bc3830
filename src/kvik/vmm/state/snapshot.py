"""A whole machine in a directory, and a machine out of one.

    state.json    version, configuration, memory layout, CPUs, devices: docs/internals/vmm-state.md
    memory        RAM (`memory_file`)

The directory appears under its name when it is complete and on the disk: it is written beside it, synced, renamed. Its
files are this user's alone (0600): they hold all that the guest knows.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import kvik
from kvik.errors import AlreadyExists, HostError, InvalidArgument, NotFound, OperationFailed, OperationInvalid
from kvik.vmm.config import MachineConfig
from kvik.vmm.settings import to_dict
from kvik.vmm.state import memory_file
from kvik.vmm.state.capture import apply, capture
from kvik.vmm.state.cpucheck import arrange_processors, check_cpu, cpuid_equal
from kvik.vmm.state.settings_check import merge, read_config
from kvik.vmm.state.values import MAX_STATE, Fields, decode, encode

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvik.vmm.confinement import Confinement
    from kvik.vmm.machine import Machine

__all__ = ["FORMAT", "VERSION", "config_of", "load", "read", "restore", "save", "save_steps"]

FORMAT, VERSION = "kvik-vmm snapshot", 1
STATE, MEMORY = "state.json", "memory"
COMPRESSIONS = ("none", "zlib")


# Out -------------------------------------------------------------------------------------------------------------


def save(machine: Machine, directory: str, compression: str = "none") -> None:
    """Write the machine to a new directory; it stands still meanwhile and then goes on as before. Raises
    `AlreadyExists`, `HostError`, and what a device says that cannot be saved now. On an error nothing is left."""
    for _ in save_steps(machine, directory, compression):
        pass


def save_steps(machine: Machine, directory: str, compression: str = "none") -> Iterator[int]:
    """As `save`, in steps; yields how many bytes of RAM are done."""
    if compression not in COMPRESSIONS:
        raise InvalidArgument(f"there is no compression {compression!r}", remedy=f"use {' or '.join(COMPRESSIONS)}")
    machine.memory.require_whole("be saved")
    place = Path(directory).absolute()
    unfinished = place.with_name(f"{place.name}.{os.getpid()}.partial")
    try:
        if place.is_symlink() or place.exists():
            raise AlreadyExists(f"{place} exists already", remedy="choose another name, or remove it")
        unfinished.mkdir(0o700)
        with machine.paused():
            yield from _write(machine, unfinished, compression)
        unfinished.rename(place)
        _sync(place.parent)
    except BaseException as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if isinstance(error, OSError) and not isinstance(error, HostError):
            confined = error.errno in {errno.EACCES, errno.EPERM} and machine.config.sandbox == "on"
            remedy = "a machine that shall be saved to a path is started with --sandbox off" if confined else ""
            raise HostError(
                f"cannot save to {directory}: {error.strerror}", errno=error.errno or 0, remedy=remedy
            ) from error
        raise


def _write(machine: Machine, directory: Path, compression: str) -> Iterator[int]:
    state = capture(machine)
    regions, offset = [], 0
    for region in machine.memory.regions:
        regions.append({"start": region.start, "size": region.size, "offset": offset})
        offset += region.size
    document = {
        "format": FORMAT,
        "version": VERSION,
        "kvik": kvik.__version__,
        "created": int(time.time()),
        "config": to_dict(config_of(machine)),
        "memory": {"file": MEMORY, "compression": compression, "regions": regions},
        "state": state,
    }
    with _create(directory, STATE) as stream:
        stream.write(encode(document, indent=1))
        stream.flush()
        os.fsync(stream.fileno())
    with _create(directory, MEMORY) as stream:
        writer = memory_file.write if compression == "none" else memory_file.write_compressed
        yield from writer(machine.memory, stream.fileno())
        os.fsync(stream.fileno())
    _sync(directory)


def _create(directory: Path, name: str) -> Any:
    fd = os.open(directory / name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    return os.fdopen(fd, "wb")


def _sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def config_of(machine: Machine) -> MachineConfig:
    """The configuration that makes a machine like this one is now: with what was plugged, without what left, every
    device with its name and in its slot."""
    data = read_config(to_dict(machine.config), "the machine's own")
    kept: dict[str, list[Any]] = {}
    for name, (field, settings) in machine.made.items():
        carrier: Any = machine.devices.get(name)
        if carrier is not None:
            copy = type(settings)(**vars(settings))
            copy.id, copy.slot = name, getattr(carrier, "slot", 0) or copy.slot
            if hasattr(copy, "mac") and not copy.mac:
                copy.mac = carrier.device.mac.hex(":")
            if hasattr(copy, "queues") and not copy.queues and hasattr(carrier, "device"):
                copy.queues = len(carrier.device.queue_sizes)
            kept.setdefault(field, []).append(copy)
    from kvik.vmm.parts import KINDS

    for field in KINDS:
        setattr(data, field, kept.get(field, []))
    data.cpus.count = len(machine.vcpus) or data.cpus.count
    return data


# In --------------------------------------------------------------------------------------------------------------


class Snapshot:
    """What a directory holds, checked but for what only a machine can check."""

    def __init__(self, directory: Path) -> None:
        self.where = str(directory / STATE)
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
        self.memory = directory / MEMORY

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
            else:
                memory_file.read_compressed(machine.memory, fd, str(self.memory))
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
    return Snapshot(Path(directory).absolute())


def _open(path: str | Path) -> int:
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
