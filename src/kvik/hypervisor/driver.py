"""What a hypervisor driver is: the one interface between the manager and any VMM.

A `Driver` turns a domain document into a running `Machine` and finds a machine again after the daemon was
restarted. The manager knows nothing below this file: not QMP, not argv, not which VMM runs.

Everything that waits is a coroutine with a deadline of its own inside the driver; the manager adds none. Everything
else answers from memory and never blocks.
"""

from __future__ import annotations

import enum
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from kvik.conf.devices.disk import Disk, Mirror
from kvik.conf.domain import Domain
from kvik.conf.tuning import IoThread
from kvik.hypervisor.state import LiveSave, StateSource, StateTarget


class Feature(enum.StrEnum):
    """What a driver can do; the manager asks before it promises."""

    KVM = "kvm"  # hardware acceleration usable on this host (found by running code)
    EMULATION = "emulation"  # runs without it
    REBOOT_IN_PLACE = "reboot-in-place"
    VCPU_HOTPLUG = "vcpu-hotplug"
    BALLOON = "balloon"
    DEVICE_HOTPLUG = "device-hotplug"
    SCREENSHOT = "screenshot"
    SEND_KEY = "send-key"
    NMI = "nmi"
    AGENT = "agent"
    TAPS = "taps"  # takes its interfaces' taps as descriptors
    PASSTHROUGH = "passthrough"  # takes PCI devices of the host
    NET_PLUG_BY_PATH = "net-plug-by-path"  # plugged while it runs, a stream network's socket is made by the VMM
    RENAME_RUNNING = "rename-running"
    SNAPSHOTS = "snapshots"  # puts new images on top of running disks
    SNAPSHOTS_STOP = "snapshots-stop"  # and stops the guest for that
    SAVES_AT_AN_INSTANT = "saves-at-an-instant"  # memory, while the guest goes on: `save_live`
    SNAPSHOTS_INSIDE = "snapshots-inside"  # puts a machine's memory into an image, with a snapshot of its disks


class EventKind(enum.StrEnum):
    """What a machine tells its owner, unasked."""

    STARTED = "started"  # first CPU instructions run
    PAUSED = "paused"  # detail: "user", "io-error", "watchdog", "crashed", ...
    RESUMED = "resumed"
    SHUTDOWN = "shutdown"  # the guest powered off or was asked to; detail: "guest" or "host"
    RESET = "reset"  # the guest rebooted
    CRASHED = "crashed"  # guest panic; detail: what is known
    ENDED = "ended"  # the VMM process is gone; detail: the reason, as text for the user
    WATCHDOG = "watchdog"  # detail: the action
    RTC_CHANGE = "rtc-change"  # data["offset"]: seconds
    BALLOON_CHANGE = "balloon-change"  # data["actual"]: bytes
    DEVICE_REMOVED = "device-removed"  # detail: alias
    DEVICE_REMOVAL_FAILED = "device-removal-failed"  # detail: alias; the guest refused to let go
    SUSPENDED = "suspended"  # the guest sleeps (ACPI S3 or S4); detail: "memory" or "disk"
    WOKEN = "woken"  # from such a sleep
    AGENT = "agent"  # the agent's channel; detail: "connected" or "disconnected"
    CHANNEL = "channel"  # any other channel; detail: alias; data["open"]
    IO_ERROR = "io-error"  # detail: alias; data["reason"], data["action"]
    GRAPHICS = "graphics"  # detail: "connect", "initialize" or "disconnect"
    TRAY_CHANGE = "tray-change"  # detail: alias; data["open"]
    WRITE_THRESHOLD = "write-threshold"  # detail: the VMM's name of an image; data["threshold"], data["excess"]: bytes
    SIDECAR_ENDED = "sidecar-ended"  # a side process (TPM, shared directory, network) is gone; detail: which and how
    SIDECAR_STARTED = "sidecar-started"  # one that had ended serves again; detail: which
    RX_FILTER = "rx-filter"  # detail: alias; the guest listens to other addresses; told once until they are asked for
    GUEST_OUTPUT = "guest-output"  # first byte on the first serial line or console
    MONITOR = "monitor"  # any raw VMM event; detail: its name, data: its payload


@dataclass(frozen=True, slots=True)
class MachineEvent:
    kind: EventKind
    detail: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)
    timestamp: float = 0.0  # seconds since the epoch


EventSink = Callable[[MachineEvent], None]


@dataclass(slots=True)
class StartRequest:
    """All that a driver needs to start one machine.

    `definition` is complete (post-parsed, validated) and private to this machine: the driver writes what became
    true into it (aliases, pty paths, ports, addresses), and it then is the live document.
    """

    # Descriptors in `files`: "net:ALIAS:N" a tap's queue, "vhost:ALIAS:N", "fs:ALIAS", "tpm:ALIAS" connected sockets,
    # and any name that a disk's <source fdgroup=...> mentions. They stay the caller's.
    definition: Domain
    directory: Path  # the machine's runtime directory; exists, mode 0700, empty
    log_fd: int  # append-only descriptor of the machine's log; the VMM's stderr
    paused: bool = False  # stay paused after start
    files: Mapping[str, int] = field(default_factory=dict)  # descriptors the caller passed, by name
    sink: EventSink = lambda event: None
    through: tuple[str, ...] = ()  # words before the VMM's own command line, a program that executes it in its place
    inside: tuple[str, frozenset[str]] | None = None  # a snapshot inside the images of these disks to go on from
    state: StateSource | None = None  # memory and devices to go on from, instead of booting


@dataclass(frozen=True, slots=True)
class HostVerdict:
    """Whether hardware acceleration can be used here, and why (what `kvik doctor` found)."""

    usable: bool
    reason: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class JobState:
    """A block job as it is now; `current` and `total` are bytes."""

    current: int = 0
    total: int = 0
    ready: bool = False  # a copy, or a commit of the top image, that waits to be told how to end
    concluded: bool = False
    error: str = ""


@dataclass(frozen=True, slots=True)
class Bitmap:
    """A dirty bitmap of one image: what of it was written since the bitmap was added; figures in bytes."""

    granularity: int
    count: int  # what is marked
    recording: bool
    persistent: bool
    inconsistent: bool  # a VMM that died did not write it into the image: what it says is worth nothing

    @property
    def usable(self) -> bool:
        """Whether it has marked everything since it was added, through all runs of the machine."""
        return self.recording and self.persistent and not self.inconsistent


@dataclass(frozen=True, slots=True)
class BackupPart:
    """One disk of a backup. `path` is the target, or the scratch image of a pull; it exists and is empty; `secret`:
    what the VMM calls its passphrase, if it is encrypted."""

    disk: Disk
    job: str
    path: str
    block: bool
    format: str
    bitmap: str = ""  # the backup's own bitmap, if it is of changes only
    since: Sequence[tuple[int, str]] = ()  # the bitmaps that tell of them: (image's number, name)
    granularity: int = 65536
    export: str = ""
    secret: str = ""


class DiskBackups(Protocol):
    """Bitmaps and backups of a machine's disks: see `hypervisor/qemu/backup.py`."""

    async def bitmaps(self, disk: Disk) -> dict[int, dict[str, Bitmap]]: ...  # by the image's number and their names
    async def track(self, new: Sequence[tuple[Disk, str]]) -> None: ...  # persistent bitmaps, all or none
    async def forget(self, disk: Disk, name: str) -> None: ...  # a bitmap, in every image of the chain
    async def changed(self, disk: Disk, sources: Sequence[tuple[int, str]]) -> int: ...  # bytes marked in any of them
    async def carry(self, disk: Disk, images: Sequence[int], into: int, *, new: bool, written: bool = False) -> None:
        """What the bitmaps of `images` tell is told by those of `into` too, which is about to get their data. `new`:
        also by names that it does not have. `written`: a job writes to it."""

    async def begin(
        self,
        parts: Sequence[BackupPart],
        *,
        pull: bool,
        track: Sequence[tuple[Disk, str]] = (),
        secrets: Mapping[str, int] = ...,
    ) -> int:
        """`secrets`: descriptors of the passphrases, by the names of the parts' jobs."""

    async def serve(self, parts: Sequence[BackupPart], listening: int, certificates: int | None = None) -> None: ...
    async def silence(self, parts: Sequence[BackupPart]) -> None: ...
    async def clear(self, parts: Sequence[BackupPart]) -> None: ...

    # the parts' jobs, by their names
    async def states(self) -> dict[str, JobState]: ...
    def follow(self, job: str) -> AsyncIterator[JobState]: ...
    async def cancel(self, job: str) -> None: ...


class DiskJobs(Protocol):
    """Block jobs on a machine's disks: see `hypervisor/qemu/disk_jobs.py`. Images are named by their `index` in the
    live document, jobs by the caller. Of a job's end nothing is forgotten before `dismiss`."""

    def merges(self, disk: Disk, *, active: bool) -> bool: ...  # its images; `active`: the top one into one below
    async def number(self, disk: Disk, mirror: Mirror, *, fresh: bool) -> None: ...
    async def copy(
        self,
        job: str,
        disk: Disk,
        mirror: Mirror,
        *,
        shallow: bool = False,
        fresh: bool = False,
        speed: int = 0,
        granularity: int = 0,
        buffer: int = 0,
        synchronous: bool = False,
        secrets: Mapping[str, int] = ...,
    ) -> None: ...
    async def pull(self, job: str, disk: Disk, base: int | None, backing: str | None, *, speed: int = 0) -> None: ...
    async def commit(
        self, job: str, disk: Disk, top: int, base: int, backing: str | None, *, speed: int = 0
    ) -> None: ...
    async def states(self) -> dict[str, JobState]: ...
    def follow(self, job: str) -> AsyncIterator[JobState]: ...
    async def speed(self, job: str) -> int: ...
    async def set_speed(self, job: str, speed: int) -> None: ...
    async def complete(self, job: str) -> None: ...
    async def cancel(self, job: str, *, force: bool) -> None: ...
    async def dismiss(self, job: str) -> None: ...
    async def chain(self, disk: Disk) -> list[int]: ...  # what the guest has now, from the top down
    async def tidy(self, disk: Disk) -> None: ...
    def image_of(self, disk: Disk, name: str) -> int | None: ...  # by the VMM's name in a WRITE_THRESHOLD event
    async def set_threshold(self, disk: Disk, image: int, threshold: int) -> None: ...


class IoThreads(Protocol):
    """Threads that serve devices instead of the VMM's main loop, by their numbers in the document."""

    async def running(self) -> dict[int, frozenset[int]]: ...  # number -> host CPUs that it may run on
    async def add(self, thread: IoThread) -> None: ...
    async def delete(self, number: int) -> None: ...
    async def change(self, number: int, values: Mapping[str, int]) -> None: ...  # names: conf.iothreads.PARAMETERS
    async def pin(self, number: int, cpus: Iterable[int]) -> None: ...


class Machine(Protocol):
    """One running VMM process. All coroutines raise `HypervisorError`s (or `OperationTimeout`)."""

    pid: int
    accelerator: str  # "kvm" or "tcg" ("test" in the in-memory driver)

    @property
    def output_tail(self) -> bytes:
        """The last output of the first serial line or console that was seen: where a boot stalled."""

    @property
    def disk_jobs(self) -> DiskJobs:
        """Raises `OperationUnsupported` from a VMM that has none."""

    @property
    def backups(self) -> DiskBackups:
        """Raises `OperationUnsupported` from a VMM that has none."""

    @property
    def iothreads(self) -> IoThreads:
        """Raises `OperationUnsupported` from a VMM that has none."""

    def handle(self) -> dict[str, Any]:
        """JSON-able facts from which `Driver.attach` finds this machine again; goes into the status file."""

    def detach(self) -> None:
        """Let go of the machine, which goes on running; no more events. `Driver.attach` finds it again."""

    # run state
    async def state(self) -> str:
        """ "running", "paused", "shutdown", "crashed", "io-error", "watchdog", "suspended" or "internal-error"."""

    async def pause(self) -> None: ...
    async def resume(self) -> None: ...
    async def powerdown(self) -> None: ...  # ACPI power button
    async def reset(self) -> None: ...
    async def quit(self, grace: float = 1.0) -> None:
        """End the VMM: ask, after `grace` seconds (0: at once) kill. Returns when the process is gone. Idempotent.

        A VMM that is stopped or stuck costs the whole grace.
        """

    async def save_state(self, target: StateTarget) -> None:
        """Send memory and devices there; `target.finish` has returned when this does. The guest is stopped then, and
        `resume` lets it go on. On an error it is here as it was."""

    async def save_live(self, target: StateTarget) -> LiveSave:
        """Get ready to send memory and devices there as they are at one instant, while the guest goes on.
        `OperationUnsupported` with the reason why this machine cannot."""

    async def inject_nmi(self) -> None: ...
    async def set_action(self, event: str, action: str) -> None:
        """What the VMM does by itself on "poweroff", "reboot" or "crash": "exit", "pause", "reset" or "none".

        At start the driver follows the document: it exits (or resets) where that is what is asked for, and pauses
        wherever the manager has to decide.
        """

    # resources
    async def vcpus(self) -> list[Mapping[str, Any]]: ...  # {"id", "thread", "online", ...}
    async def set_vcpus(self, count: int) -> None: ...
    async def set_balloon(self, bytes_: int) -> None: ...
    async def balloon(self) -> Mapping[str, int]: ...  # bytes: "current", "available", "unused", ...
    async def set_balloon_period(self, seconds: int) -> None: ...  # how often the guest reports; 0: never

    # devices: `device` is a conf device Struct, with alias and address already assigned
    async def attach_device(self, device: Any, files: Mapping[str, int]) -> None: ...
    async def detach_device(self, device: Any) -> None: ...  # returns when asked; DEVICE_REMOVED tells the end
    async def update_device(self, old: Any, new: Any) -> None: ...
    async def set_limits(self, disk: Disk) -> None: ...  # of its <iotune>; none: no limits
    async def devices(self) -> frozenset[str] | None:
        """Aliases of what is plugged in, whoever did it; None from a VMM that cannot tell."""

    async def clear_remains(self, device: Any) -> None:
        """Take away what an attach that was broken off, or a detach nobody saw, left of a device that is not there."""

    # snapshots, with Feature.SNAPSHOTS: `new` are disks as they are to be, by `old`'s aliases as they are
    async def next_image(self) -> int:
        """A number that no image of the machine has: the `index` of a new one in the live document."""

    def check_on_top(self, disks: Sequence[Disk]) -> None: ...  # `OperationUnsupported` for one that can have none now
    async def put_on_top(
        self,
        new: Sequence[Disk],
        old: Mapping[str, Disk],
        secrets: Mapping[str, int],
        within: Callable[[], Awaitable[None]] | None = None,
    ) -> int:
        """All of them or none; for how many microseconds at most the disks' requests were held back. `within`: with
        Feature.SNAPSHOTS_STOP, called while the guest stands still; if it fails nothing has changed."""

    async def has_on_top(self, new: Sequence[Disk]) -> bool: ...  # whether the guest writes to them
    async def clear_image(self, new: Sequence[Disk]) -> None:
        """Take away what was made ready for images that were not put on top."""

    # with Feature.SNAPSHOTS_INSIDE; `disks` are live ones. The guest stands still
    async def save_inside(self, tag: str, disks: Sequence[Disk]) -> None: ...
    async def delete_inside(self, tag: str, disks: Sequence[Disk]) -> None: ...

    # interaction
    async def screenshot(self, screen: int) -> tuple[str, bytes]: ...  # MIME type, image
    async def send_key(self, keycodes: Sequence[int], hold_ms: int) -> None: ...  # Linux keycodes
    def open_console(self, alias: str) -> int:
        """A non-blocking descriptor for both directions of a serial line, console or channel; caller closes."""

    async def open_graphics(self, index: int, skip_auth: bool) -> int:
        """A blocking descriptor, connected to the document's display `index`; caller closes."""

    async def agent(self, command: str, arguments: Mapping[str, Any] | None = None, timeout: float = 5.0) -> Any: ...
    async def monitor(self, command: str, arguments: Mapping[str, Any] | None = None) -> Any: ...
    async def human_monitor(self, line: str) -> str: ...

    async def disk_size(self, disk: Disk) -> int: ...  # bytes, as the guest sees it
    async def resize_disk(self, disk: Disk, size: int) -> None: ...
    async def disk_errors(self) -> Mapping[str, int]: ...  # disk's alias -> virDomainDiskErrorCode, if not 0

    # figures: flat names as libvirt's domstats ("block.0.rd.bytes", "net.0.rx.pkts", "cpu.time", ...)
    async def stats(self, groups: frozenset[str]) -> dict[str, int | str]: ...


Bases = Callable[[], Collection[str]]


def no_bases() -> Collection[str]:
    return ()


class Driver(Protocol):
    """A VMM kind. `name` is what `kvik version` prints; `emulators` are the binaries it serves. `bases`: where images
    may lie that others rest on although no document says so; whoever composes drivers sets it."""

    name: str
    bases: Bases

    def features(self) -> frozenset[Feature]: ...
    def verdict(self) -> HostVerdict: ...
    async def version(self) -> int: ...  # major * 1_000_000 + minor * 1_000 + micro
    async def default_emulator(self, arch: str) -> str: ...
    async def complete(self, definition: Domain) -> None:
        """Fix for good what only the VMM knows: versioned machine type, emulator path, default CPU, firmware."""

    async def validate(self, definition: Domain) -> None:
        """Refuse with `ConfigUnsupported` what this VMM or host cannot run."""

    async def start(self, request: StartRequest) -> Machine:
        """Run it. On any error nothing is left behind: no process, no file, no descriptor."""

    async def attach(
        self, definition: Domain, directory: Path, handle: Mapping[str, Any], sink: EventSink
    ) -> Machine | None:
        """The machine that `handle` describes, or None if its process is gone (never another process with its pid)."""

    async def forget(self, definition: Domain, *, keep_tpm: bool | None = None) -> None:
        """Remove what the driver kept for a machine between its runs: the state of an emulated TPM.

        `keep_tpm` None: as the document says (`persistent_state`), which without a word is to remove it.
        """

    def tpm_state(self, definition: Domain) -> Path | None:
        """The directory that keeps the state of its emulated TPM; None for a machine without one."""

    def written_last(self, directory: Path, disk: Disk, places: Sequence[str]) -> str | None:
        """Which of these images a VMM that has ended wrote a disk to last, if what it left in its directory says so for
        certain (blocking: see `host/reach.py`)."""

    async def native(self, definition: Domain) -> str: ...  # the command line, for domxml-to-native
    async def domain_capabilities(self, arch: str, machine: str, virttype: str, emulator: str) -> str: ...  # XML

    async def close(self) -> None:
        """Let go of what serves no single machine. Machines go on."""
