"""What a hypervisor driver is: the one interface between the manager and any VMM.

A `Driver` turns a domain document into a running `Machine` and finds a machine again after the daemon was
restarted. The manager knows nothing below this file: not QMP, not argv, not which VMM runs.

Everything that waits is a coroutine with a deadline of its own inside the driver; the manager adds none. Everything
else answers from memory and never blocks.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from kvik.conf.domain import Domain


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
    SIDECAR_ENDED = "sidecar-ended"  # a side process (TPM, shared directory, network) is gone; detail: which and how
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


@dataclass(frozen=True, slots=True)
class HostVerdict:
    """Whether hardware acceleration can be used here, and why (what `kvik doctor` found)."""

    usable: bool
    reason: str
    remedy: str = ""


class Machine(Protocol):
    """One running VMM process. All coroutines raise `HypervisorError`s (or `OperationTimeout`)."""

    pid: int
    accelerator: str  # "kvm" or "tcg" ("test" in the in-memory driver)

    @property
    def output_tail(self) -> bytes:
        """The last output of the first serial line or console that was seen: where a boot stalled."""

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
    async def devices(self) -> frozenset[str] | None:
        """Aliases of what is plugged in, whoever did it; None from a VMM that cannot tell."""

    async def clear_remains(self, device: Any) -> None:
        """Take away what an attach that was broken off, or a detach nobody saw, left of a device that is not there."""

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

    async def disk_errors(self) -> Mapping[str, int]: ...  # disk's alias -> virDomainDiskErrorCode, if not 0

    # figures: flat names as libvirt's domstats ("block.0.rd.bytes", "net.0.rx.pkts", "cpu.time", ...)
    async def stats(self, groups: frozenset[str]) -> dict[str, int | str]: ...


class Driver(Protocol):
    """A VMM kind. `name` is what `kvik version` prints; `emulators` are the binaries it serves."""

    name: str

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

    async def native(self, definition: Domain) -> str: ...  # the command line, for domxml-to-native
    async def domain_capabilities(self, arch: str, machine: str, virttype: str, emulator: str) -> str: ...  # XML

    async def close(self) -> None:
        """Let go of what serves no single machine. Machines go on."""
