"""A VMM that runs and speaks QMP: its process, its monitor, what it tells unasked, and its end.

Threads: none; everything runs in the daemon's event loop, and what waits for the VMM has a deadline. A VMM that is
stopped or stuck makes its own commands fail and nothing else. A monitor that is lost while the process lives is
connected again, with growing pauses.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any

from kvik.conf.devices.chardev import Channel
from kvik.conf.devices.disk import Disk
from kvik.conf.domain import Domain
from kvik.errors import (
    HypervisorError,
    KvikError,
    OperationInvalid,
)
from kvik.host.process import ProcessHandle, boot_id, describe_exit
from kvik.hypervisor import consoles
from kvik.hypervisor.agent import AGENT_CHANNEL, GuestAgent
from kvik.hypervisor.driver import Bases, EventKind, EventSink, MachineEvent, no_bases
from kvik.hypervisor.events import translate
from kvik.hypervisor.names import alias_of, character_devices
from kvik.hypervisor.output import Output
from kvik.hypervisor.sidecars.group import Sidecar, Sidecars
from kvik.qmp.aio import QmpConnection, connect_unix
from kvik.qmp.protocol import Event

__all__ = ["QUERY_DEADLINE", "MonitoredProcess"]

QUERY_DEADLINE = 5.0
_SIDECAR_SETTLES = 0.2  # seconds


class MonitoredProcess:
    """`emulator` is the binary, `version` major * 1_000_000 + minor * 1_000 + micro."""

    product = "QEMU"  # in messages

    def __init__(
        self,
        domain: Domain,
        directory: Path,
        process: ProcessHandle,
        *,
        emulator: str,
        version: int,
        sink: EventSink,
        sidecars: Sidecars | None = None,
    ) -> None:
        self.domain = domain
        self.sidecars = sidecars if sidecars is not None else Sidecars(domain.name)
        self.directory = directory
        self.emulator = emulator
        self.version = version
        self.process = process
        self.pid = process.pid
        self.accelerator = "kvm" if domain.type == "kvm" else "tcg"
        self.name = domain.name
        self.run_state = "prelaunch"
        self.bases: Bases = no_bases  # where images may lie that only headers name
        self.leaving: dict[str, Any] = {}  # alias -> device that the guest was asked to let go
        # What a "variable" clock was off at the start: its RTC_CHANGE counts from there.
        self.clock_base = _adjustment(domain)
        self._sink = sink
        self._held: list[MachineEvent] | None = None
        self._connection: QmpConnection | None = None
        self._agent = self._make_agent()
        self._started = False
        self._ended = asyncio.Event()
        self._reason = ""
        self._quitting = False
        self._output: Output | None = None
        self._reconnecting: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        self._stop_watching = process.on_exit(self._process_ended, self._loop)

    # -- being connected

    async def connect(self, deadline: float, sock: socket.socket | None = None) -> None:
        """A QMP session on the machine's monitor. Raises `HypervisorError`, `OperationTimeout`."""
        if sock is None:
            sock = await connect_unix(self.directory / "monitor.sock", deadline)
        self._connection = await QmpConnection.open(
            sock, name=self.name, deadline=deadline, on_event=self._on_event, on_disconnect=self._monitor_lost
        )

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        fds: Sequence[int] = (),
        deadline: float = QUERY_DEADLINE,
    ) -> Any:
        if self._ended.is_set():
            raise OperationInvalid(f"machine {self.name} is not running")
        if self._connection is None or self._connection.closed:
            raise HypervisorError(
                f"{self.name}: the VMM's monitor does not answer",
                remedy="it may be stopped or stuck; destroy ends it for certain",
            )
        return await self._connection.execute(command, arguments, fds=fds, deadline=deadline)

    async def refresh(self) -> None:
        """What only the VMM knows, into the live document: pty paths, ports, the agent's state, the run state."""
        status, chardevs = await asyncio.gather(self.execute("query-status"), self.execute("query-chardev"))
        self._set_run_state(status)
        if not isinstance(chardevs, list):
            raise HypervisorError(f"{self.name}: the reply to query-chardev is no list")
        known = {item.get("label"): item for item in chardevs if isinstance(item, dict)}
        for device in character_devices(self.domain):
            alias = device.alias.name if device.alias else ""
            item = known.get(f"char{alias}")
            if item is None:
                continue
            filename = item.get("filename")
            if device.type == "pty" and isinstance(filename, str) and filename.startswith("pty:/dev/pts/"):
                consoles.set_pty(device, filename.removeprefix("pty:"))
            if isinstance(device, Channel) and device.target is not None and device.target.name:
                is_open = item.get("frontend-open") is True
                device.target.state = "connected" if is_open else "disconnected"
                if device.target.name == AGENT_CHANNEL and self._agent is not None:
                    self._agent.set_connected(is_open)
        serials = self.domain.devices.serials
        if serials and serials[0].type == "pty":
            for console in self.domain.devices.consoles[:1]:
                if console.target is None or console.target.type in (None, "serial"):
                    consoles.mirror_console(console, serials[0])
        await self.query_more()

    def _set_run_state(self, status: Any) -> None:
        if not isinstance(status, dict) or not isinstance(status.get("status"), str):
            raise HypervisorError(f"{self.name}: the reply to query-status is malformed")
        self.run_state = status["status"]

    def _make_agent(self) -> GuestAgent | None:
        for channel in self.domain.devices.channels:
            if channel.target and channel.target.name == AGENT_CHANNEL and channel.type == "unix" and channel.source:
                path = channel.source.path
                return GuestAgent(Path(path), self.name) if path else None
        return None

    def watch_output(self, fd: int) -> None:
        """Takes over our end of the pipe that carries the first line's output."""
        self._output = Output(fd, self._loop, self._first_output)

    def _first_output(self) -> None:
        self._emit(MachineEvent(EventKind.GUEST_OUTPUT, timestamp=time.time()))

    @property
    def output_tail(self) -> bytes:
        return self._output.tail if self._output is not None else b""

    def _close_output(self) -> None:
        if self._output is not None:
            self._output.close()

    # -- what happens unasked

    def hold_events(self) -> None:
        """Keep events back: a start that fails has none."""
        self._held = []

    def release_events(self) -> None:
        held, self._held = self._held or [], None
        for event in held:
            self._sink(event)

    def _emit(self, event: MachineEvent) -> None:
        if self._held is not None:
            self._held.append(event)
        else:
            self._sink(event)

    def _on_event(self, event: Event) -> None:
        self.heard(event)
        for told in translate(event):
            adjusted = self._adjust(told)
            if adjusted is not None:
                self._emit(adjusted)

    def _adjust(self, event: MachineEvent) -> MachineEvent | None:
        """Keeps what we remember in step with the event; adds what only the document knows."""
        kind = event.kind
        if kind is EventKind.RESUMED:
            self.run_state = "running"
            if not self._started:
                self._started = True
                return MachineEvent(EventKind.STARTED, "", {}, event.timestamp)
        elif kind is EventKind.PAUSED:
            if self.run_state in ("running", "prelaunch"):
                self.run_state = "paused"
            return MachineEvent(kind, self._why_paused(), event.data, event.timestamp)
        elif kind is EventKind.SHUTDOWN:
            self.run_state = "shutdown"
            self._reason = "the guest shut down" if event.detail == "guest" else "it was told to end"
        elif kind is EventKind.CRASHED:
            self.run_state = "guest-panicked"
            self._reason = "the guest crashed"
        elif kind is EventKind.IO_ERROR:
            if event.data.get("action") == "stop":
                self.run_state = "io-error"
            return self._failed_disk(event)
        elif kind is EventKind.WATCHDOG and event.detail == "pause":
            self.run_state = "watchdog"
        elif kind is EventKind.RTC_CHANGE:
            offset = event.data["offset"] + self.clock_base
            return MachineEvent(kind, event.detail, {"offset": offset}, event.timestamp)
        elif kind is EventKind.CHANNEL:
            return self._channel_changed(event)
        elif kind is EventKind.DEVICE_REMOVED:
            device = self.leaving.pop(event.detail, None)
            if device is not None:
                self._background(self._device_gone(device, event))
                return None
        elif kind is EventKind.DEVICE_REMOVAL_FAILED:
            self.leaving.pop(event.detail, None)
        return event

    def _background(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)  # a loop keeps only weak references
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(_consume)

    def watch_sidecars(self, lost: Sequence[str] = ()) -> None:
        """From now on the end of a side process is told; `lost` are the labels of those that ended unseen."""
        for label in lost:
            self._tell_soon(label, "while nobody watched")
        self.sidecars.watch(self._sidecar_died)

    def watch_sidecar(self, member: Sidecar) -> None:
        """The same for one that came with a device."""
        self.sidecars.watch_one(member, self._sidecar_died)

    def _sidecar_died(self, member: Sidecar, how: str) -> None:
        self._tell_soon(member.label, how, member)

    def _tell_soon(self, label: str, how: str, member: Sidecar | None = None) -> None:
        # At a VMM's end, and when a device is unplugged, its side process sees the connection close a moment before
        # we see why.
        self._loop.call_later(_SIDECAR_SETTLES, self._tell_sidecar, label, how, member)

    def _tell_sidecar(self, label: str, how: str, member: Sidecar | None) -> None:
        wanted = member is None or member in list(self.sidecars)
        if wanted and self.process.alive and not self._quitting:
            self._emit(MachineEvent(EventKind.SIDECAR_ENDED, f"{label} ended: {how}", {}, time.time()))

    async def _device_gone(self, device: Any, event: MachineEvent) -> None:
        """Told only when its host side is gone as well: its alias and images are free again."""
        try:
            await self.clear_remains(device)
        finally:
            self._emit(event)

    def _why_paused(self) -> str:
        return {
            "io-error": "io-error",
            "watchdog": "watchdog",
            "guest-panicked": "crashed",
            "shutdown": "shutdown",
        }.get(self.run_state, "user")

    def _failed_disk(self, event: MachineEvent) -> MachineEvent:
        """With the disk's alias, where the VMM told its block node only."""
        node = event.data.get("node")
        if event.detail or not node:
            return event
        for disk in self.domain.devices.disks:
            if disk.alias is not None and self.top_node(disk) == node:
                return MachineEvent(event.kind, alias_of(disk), event.data, event.timestamp)
        return event

    def _channel_changed(self, event: MachineEvent) -> MachineEvent:
        is_open = event.data.get("open") is True
        for channel in self.domain.devices.channels:
            if channel.alias is None or channel.alias.name != event.detail or channel.target is None:
                continue
            channel.target.state = "connected" if is_open else "disconnected"
            if channel.target.name == AGENT_CHANNEL:
                if self._agent is not None:
                    self._agent.set_connected(is_open)
                detail = "connected" if is_open else "disconnected"
                return MachineEvent(EventKind.AGENT, detail, {"alias": event.detail}, event.timestamp)
        return event

    def _monitor_lost(self, failure: HypervisorError | None) -> None:
        if self._ended.is_set() or self._quitting:
            return
        if self._reconnecting is None or self._reconnecting.done():
            self._reconnecting = self._loop.create_task(self.reconnect())
            self._reconnecting.add_done_callback(_consume)

    async def reconnect(self) -> None:
        """Try until the monitor answers or the process ends."""
        pause = 0.05
        while not self._ended.is_set() and not self._quitting:
            await asyncio.sleep(pause)  # at its end a VMM's monitor closes just before its process ends
            if not self.process.alive:
                return
            try:
                await self.connect(2.0)
                await self.refresh()
                return
            except KvikError:
                pause = min(pause * 2, 10.0)

    def keep_reconnecting(self) -> None:
        self._monitor_lost(None)

    def _process_ended(self) -> None:
        if self._ended.is_set():
            return
        if self._connection is not None:
            self._connection.drain()  # its last words: why it ended
            self._connection.close()
        if len(self.sidecars):
            # The next run may need what they hold (a TPM's state): this one has ended when they have.
            self._background(self._sidecars_end())
        else:
            self._gone()

    async def _sidecars_end(self) -> None:
        try:
            await self.sidecars.end()
        finally:
            self._gone()

    def _gone(self) -> None:
        self._ended.set()
        code = self.process.code
        self._close_output()
        if self._agent is not None:
            self._agent.close()
        with contextlib.suppress(OSError):  # a read-only file system must not keep the end from being told
            for path in self.directory.glob("*.sock"):
                path.unlink(missing_ok=True)
        expected = self._quitting or bool(self._reason and code in (0, None))
        how = "" if code is None else f": {describe_exit(code)}"
        reason = self._reason or ("it was destroyed" if self._quitting else f"{self.product} ended unasked{how}")
        self.run_state = "ended"
        self._emit(MachineEvent(EventKind.ENDED, reason, {"code": code, "expected": expected}, time.time()))
        self.process.close()

    @property
    def ended(self) -> bool:
        return self._ended.is_set()

    def detach(self) -> None:
        """Let go of the machine, which goes on running: the daemon ends."""
        self._quitting = True
        self._stop_watching()
        if self._reconnecting is not None:
            self._reconnecting.cancel()
        if self._connection is not None:
            self._connection.close()
        if self._agent is not None:
            self._agent.close()
        self._close_output()
        self.sidecars.detach()
        self.process.close()

    def handle(self) -> dict[str, Any]:
        return {
            "pid": self.pid,
            "start_time": self.process.start_time,
            "boot": boot_id(),
            "emulator": self.emulator,
            "version": self.version,
            "started": self._started,
            "sidecars": self.sidecars.handles(),
            "clock_base": self.clock_base,
        }

    def mark_started(self) -> None:
        self._started = True

    # -- what each driver adds

    async def query_more(self) -> None:
        """After `refresh`: what else only this VMM knows."""

    def heard(self, event: Event) -> None:
        """Each event of the VMM, before anybody is told what it means."""

    def top_node(self, disk: Disk) -> str:
        """The name of the block node that a disk's device reads and writes."""
        raise NotImplementedError  # each VMM's own

    async def clear_remains(self, device: Any) -> None:
        """The device is gone: its host side goes as well."""
        raise NotImplementedError  # each VMM's own


def _adjustment(domain: Domain) -> int:
    clock = domain.clock
    return int(clock.adjustment or 0) if clock is not None and clock.offset == "variable" else 0


def _consume(task: asyncio.Task[Any]) -> None:
    """What goes wrong in the background has been told where it matters; nobody awaits these tasks."""
    if not task.cancelled():
        task.exception()
