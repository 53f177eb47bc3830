"""When a machine's threads enter the sandbox, and what is made ready before.

    main thread     opens everything, starts the vCPUs, imports the control plane ... enters, runs its loop
    vCPU threads    enter first of all, with the narrow list of calls, and run the guest
    I/O threads     enter first of all, with the main thread's list

A confined thread opens no file, so it cannot import: what is imported inside functions is imported here, on the main
thread, while the guest already runs. `docs/internals/vmm-security.md` says what each list is good for.
"""

from __future__ import annotations

import os
import sys

from kvik.errors import HostError, InvalidArgument
from kvik.vmm.settings import fields_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from kvik.vmm.config import MachineConfig
    from kvik.vmm.machine import Machine

__all__ = ["AT_START", "LATE", "LATE_CONTROL", "OVERLAYS", "Confinement", "descriptors", "import_all"]

# Imported inside functions that run while the guest does.
LATE = (
    "encodings.ascii",
    "encodings.latin_1",
    "json",  # `_json` raises what is in there, too
    "kvik.kvm.decode",
    "kvik.kvm.dirty_ring",
    "kvik.kvm.exits",
    "kvik.vmm.cpu.state",
    "kvik.vmm.sandbox.privileges",
    "kvik.vmm.virtio.packed",
    "linecache",
    "resource",
    "termios",
    "traceback",
)  # fmt: skip
# The same for a machine with a monitor or a debugger: hot-plug, dumps, what commands need.
LATE_CONTROL = (
    "fcntl",
    "kvik.vmm.backends.block",
    "kvik.vmm.backends.char",
    "kvik.vmm.backends.io_uring",
    "kvik.vmm.backends.net",
    "kvik.vmm.backends.netsocket",
    "kvik.vmm.backends.tap",
    "kvik.vmm.cpu.models",
    "kvik.vmm.devices.debugcon",
    "kvik.vmm.devices.serial",
    "kvik.vmm.devices.watchdog",
    "kvik.vmm.dump",
    "kvik.vmm.memory",
    "kvik.vmm.monitor.commands",
    "kvik.vmm.monitor.hotplug",
    "kvik.vmm.nets",
    "kvik.vmm.options",
    "kvik.vmm.parts",
    "kvik.vmm.ratelimit",
    "kvik.vmm.settings",
    "kvik.vmm.state.background",
    "kvik.vmm.state.migration",
    "kvik.vmm.state.qmp",
    "kvik.vmm.state.rewind",
    "kvik.vmm.state.saved_stream",
    "kvik.vmm.state.saving",
    "kvik.vmm.state.snapshot",
    "kvik.vmm.vhost",
    "kvik.vmm.virtio.balloon",
    "kvik.vmm.virtio.blk",
    "kvik.vmm.virtio.console",
    "kvik.vmm.virtio.fs",
    "kvik.vmm.virtio.mem",
    "kvik.vmm.virtio.net",
    "kvik.vmm.virtio.queue",
    "kvik.vmm.virtio.rng",
    "kvik.vmm.virtio.transport",
    "kvik.vmm.virtio.vhost_user_blk",
    "kvik.vmm.virtio.vsock",
    "kvik.vmm.virtio.vsock_vhost",
    "socket",
    "zlib",
)
# The same for a new image on top of a disk that the machine reads and writes itself, and for block jobs: only where
# there is such a disk, for it is 0.9 MiB of code. No zstd: the images are kvik's own.
OVERLAYS = (
    "kvik.image.create",
    "kvik.image.fallocate",
    "kvik.image.layers",
    "kvik.image.qcow2.bitmaps",
    "kvik.image.qcow2.preallocate",
    "kvik.image.qcow2.reader",
    "kvik.image.qcow2.refcount",
    "kvik.image.qcow2.resize",
    "kvik.image.qcow2.snapshots",
    "kvik.image.qcow2.tracking",
    "kvik.image.qcow2.writer",
    "kvik.image.raw",
    "kvik.image.rebase",
    "kvik.image.resize",
    "kvik.vmm.blk.active_commit",
    "kvik.vmm.blk.block_copy",
    "kvik.vmm.blk.block_jobs",
    "kvik.vmm.blk.commit",
    "kvik.vmm.blk.overlay",
    "kvik.vmm.blk.pull",
)
# Imported inside functions that only run before the main thread enters.
AT_START = (
    "ctypes",
    "kvik",
    "kvik.host.tap",  # inside, nobody can make a tap
    "kvik.image.kernel",
    "kvik.image.kernel_index",
    "kvik.kvm.system",
    "kvik.vmm.boot.firmware",
    "kvik.vmm.build",
    "kvik.vmm.config",
    "kvik.vmm.cpu.listing",
    "kvik.vmm.cpu.models",
    "kvik.vmm.confinement",
    "kvik.vmm.gdb",
    "kvik.vmm.gdb_breakpoints",
    "kvik.vmm.gdb_server",
    "kvik.vmm.metrics",
    "kvik.vmm.rehearsal",
    "kvik.vmm.monitor.server",
    "kvik.vmm.pci.chipset",
    "kvik.vmm.sandbox",
    "kvik.vmm.state",
    "kvik.vmm.state.incoming",  # only where --incoming was given, and imported then
    "kvik.vmm.state.migration",
    "kvik.vmm.state.postcopy",
    "kvik.vmm.trace",
    "signal",
)

MODES = {"on": "errno", "log": "log"}


def import_all(names: Iterable[str]) -> None:
    """Those that are missing. To import one that is there writes to it, which in a zygote's fork is a page of its own;
    and `importlib` need not be there at all."""
    for name in names:
        if name not in sys.modules:
            __import__(name)


class Confinement:
    """One machine's. `mode`: on (a forbidden call answers EPERM) or log (all are allowed, and the audit log tells)."""

    def __init__(self, config: MachineConfig) -> None:
        from kvik.vmm import sandbox

        if config.sandbox not in MODES:
            raise InvalidArgument(f"there is no sandbox {config.sandbox!r}", remedy="use on, log or off")
        self._sandbox = sandbox
        self.inside = False  # the main thread is: threads that it starts inherit what it has
        self.policy = sandbox.Policy(
            MODES[config.sandbox],
            writable=(config.snapshots,) if config.snapshots else (),
            removable=_directories(config),
            # The back ends of these are spoken to by vCPU threads, when the guest resets a device. With memory that
            # another process can share, one may be plugged at any time.
            sockets=bool(config.fs or config.vhost_user_blk or (config.memory.shared and config.qmp)),
            forks=config.migratable,
            unix_connect=any(vsock.uds for vsock in config.vsock),
        )

    @classmethod
    def of(cls, config: MachineConfig) -> Confinement | None:
        """None where the configuration has it off."""
        return None if config.sandbox == "off" else cls(config)

    def close_stray(self, keep: set[int]) -> None:
        """Close all descriptors but `keep` and the standard ones."""
        self._sandbox.close_stray(keep)

    def enter_vcpu(self) -> None:
        self._sandbox.enter("vcpu", self.policy, inherited=self.inside)

    def enter_io(self) -> None:
        if not self.inside:
            self._sandbox.enter("io", self.policy)

    def enter_main(self, machine: Machine) -> None:
        """Import what is still missing, and enter. HostError where the kernel refuses."""
        config = machine.config
        import_all(LATE + (LATE_CONTROL if config.qmp or config.gdb else ()))
        if config.qmp and config.disks:
            import_all(OVERLAYS)
        if config.migratable or config.qmp:  # who saves RAM reads it through that, and it cannot be opened inside
            try:
                machine.self_memory = os.open("/proc/self/mem", os.O_RDONLY | os.O_CLOEXEC)
                machine.on_close.append(lambda: os.close(machine.self_memory))
            except OSError:
                if config.migratable:
                    raise  # else it stands still for its snapshots
        try:
            self._sandbox.enter("main", self.policy)
            self.inside = True
        except OSError as error:
            raise HostError(
                f"the sandbox cannot be entered: {error.strerror}",
                errno=error.errno or 0,
                remedy="this kernel lacks seccomp, or forbids it: use --sandbox off if you trust the guest",
            ) from error


def _directories(config: MachineConfig) -> tuple[str, ...]:
    """Where sockets are that the machine makes, and removes when it ends: nothing else may be removed there."""
    places = [item.backend for item in config.serials + config.consoles] + [item.backend for item in config.channels]
    places += [config.gdb, config.metrics, *(vsock.uds and f"unix:{vsock.uds}" for vsock in config.vsock)]
    places += [f"unix:{place.removeprefix('unix:')}" for place in config.qmp if not place.startswith("fd=")]
    paths = (place[5:].partition(",")[0] for place in places if place.startswith("unix:"))
    return tuple(sorted({os.path.dirname(path) or "." for path in paths}))  # noqa: PTH120 - pathlib is not imported


def descriptors(value: Any) -> set[int]:
    """All descriptors that a configuration names, wherever: fields called fd, fds or something_fd, texts like fd=7
    and /dev/fd/7."""
    found: set[int] = set()
    if isinstance(value, str):
        for prefix in ("fd=", "fd:", "/dev/fd/", "/proc/self/fd/"):
            number = value.rpartition(prefix)[2] if prefix in value else ""
            found.update({int(number)} if number.isdecimal() and len(number) < 10 else ())
    elif isinstance(value, (list, tuple)):
        for item in value:
            found |= descriptors(item)
    else:
        for name in fields_of(type(value)):
            item = getattr(value, name)
            if name in ("fd", "fds") or name.endswith(("_fd", "_fds")):
                found.update(number for number in (item if isinstance(item, (list, tuple)) else [item]) if number >= 0)
            else:
                found |= descriptors(item)
    return found
