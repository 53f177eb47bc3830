"""A whole machine into a directory; `snapshot` makes a machine of it again.

The directory appears under its name when it is complete and on the disk: it is written beside it, synced, renamed. Its
files are this user's alone (0600): they hold all that the guest knows.

A confined machine with a monitor imports this before it answers, so it does without `pathlib` and `shutil`.
"""

from __future__ import annotations

import errno
import os
import time

import kvik
from kvik.errors import AlreadyExists, HostError, InvalidArgument
from kvik.vmm.settings import to_dict
from kvik.vmm.state import memory_file
from kvik.vmm.state.capture import capture
from kvik.vmm.state.settings_check import read_config
from kvik.vmm.state.snapshot import COMPRESSIONS, FORMAT, MEMORY, STATE, VERSION, absolute
from kvik.vmm.state.values import encode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from kvik.vmm.config import MachineConfig
    from kvik.vmm.machine import Machine

__all__ = ["config_of", "save", "save_steps"]


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
    place = absolute(directory)
    unfinished = f"{place}.{os.getpid()}.partial"
    try:
        if os.path.lexists(place):
            raise AlreadyExists(f"{place} exists already", remedy="choose another name, or remove it")
        os.mkdir(unfinished, 0o700)  # noqa: PTH102
        with machine.paused():
            yield from _write(machine, unfinished, compression)
        os.rename(unfinished, place)  # noqa: PTH104
        _sync(place.rpartition("/")[0] or "/")
    except BaseException as error:
        _remove(unfinished)
        if isinstance(error, OSError) and not isinstance(error, HostError):
            confined = error.errno in {errno.EACCES, errno.EPERM} and machine.config.sandbox == "on"
            remedy = "a machine that shall be saved to a path is started with --sandbox off" if confined else ""
            raise HostError(
                f"cannot save to {directory}: {error.strerror}", errno=error.errno or 0, remedy=remedy
            ) from error
        raise


def _write(machine: Machine, directory: str, compression: str) -> Iterator[int]:
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


def _remove(directory: str) -> None:
    """What was written of a snapshot that will not be."""
    for name in (STATE, MEMORY, ""):
        try:
            (os.unlink if name else os.rmdir)(f"{directory}/{name}")
        except OSError:
            pass  # it was not there yet


def _create(directory: str, name: str) -> Any:
    fd = os.open(f"{directory}/{name}", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    return os.fdopen(fd, "wb")


def _sync(directory: str) -> None:
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
