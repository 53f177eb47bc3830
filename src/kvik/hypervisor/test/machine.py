"""A machine that exists only in this process's memory. Time makes its figures move; its owner makes it fail."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import time
import zlib
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any

from kvik.conf.devices.disk import Disk
from kvik.conf.domain import Domain
from kvik.errors import (
    AgentError,
    HypervisorError,
    MonitorError,
    NoDevice,
    OperationFailed,
    OperationTimeout,
    OperationUnsupported,
)
from kvik.hypervisor.driver import DiskBackups, DiskJobs, EventKind, EventSink, IoThreads, MachineEvent
from kvik.hypervisor.state import StateTarget
from kvik.hypervisor.test.behaviour import Behaviour, GuestAgent
from kvik.hypervisor.test.live_save import TestLiveSave
from kvik.image.opening import Opener
from kvik.image.qcow2.snapshots import find_by_name
from kvik.image.qcow2.snapshotting import create_snapshot, delete_snapshot
from kvik.image.qcow2.writer import Qcow2Writer

AGENT_CHANNEL = "org.qemu.guest_agent.0"


class TestMachine:
    """One machine of the in-memory driver. The methods below "for tests" play the guest's and the host's part."""

    __test__ = False  # not a test case, whatever pytest thinks of the name

    accelerator = "test"

    def __init__(self, pid: int, definition: Domain, directory: str, behaviour: Behaviour, sink: EventSink) -> None:
        self.pid = pid
        self.definition = definition
        self.directory = directory
        self.behaviour = behaviour
        self.sink = sink
        self.output_tail = b""
        self.ended = asyncio.Event()
        self.keys: list[tuple[list[int], int]] = []  # what send_key got
        self.actions: dict[str, str] = {}  # what set_action got
        self.commands: list[str] = []  # every command, in order
        self.agent_connected = False
        self.nmis = 0
        self.balloon_period = 0
        self.failed_disks: dict[str, int] = {}
        self.last_image = 100
        self.images: set[str] = set()  # that were put on top of its disks
        self.inside: dict[str, bytes] = {}  # memory that was put into its images
        self.memory = b"booted"  # what the guest knows: saved and restored
        self._state = "paused"
        self._go = asyncio.Event()  # set while the guest's CPUs run
        self._free = asyncio.Event()  # cleared while the VMM is hung
        self._free.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._boot_task: asyncio.Task[None] | None = None
        self._born = time.monotonic()
        self._balloon = (definition.current_memory or definition.memory or 0) * 1024
        self._vcpus = definition.vcpu.current or definition.vcpu.value if definition.vcpu else 1
        interfaces = definition.devices.interfaces if definition.devices else []
        mac = interfaces[0].mac.address if interfaces and interfaces[0].mac else "52:54:00:00:00:01"
        self._agent = GuestAgent(behaviour, mac or "", self._guest_shutdown)
        self._consoles: set[socket.socket] = set()

    def handle(self) -> dict[str, Any]:
        return {"pid": self.pid, "directory": self.directory}

    def detach(self) -> None:
        self.sink = lambda event: None

    # plumbing

    def _emit(self, kind: EventKind, detail: str = "", **data: Any) -> None:
        self.sink(MachineEvent(kind, detail, data, time.time()))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _command(self, name: str) -> None:
        """What every command goes through: a VMM that is gone, hung or slow."""
        self.commands.append(name)
        if self.behaviour.command_delay:
            await asyncio.sleep(self.behaviour.command_delay)
        if not self._free.is_set():
            try:
                async with asyncio.timeout(self.behaviour.command_deadline):
                    await self._free.wait()
            except TimeoutError:
                raise OperationTimeout(f"the VMM of {self.definition.name!r} does not answer to {name}") from None
        if self.ended.is_set():
            raise HypervisorError(f"the VMM of {self.definition.name!r} is gone")

    def power_on(self, paused: bool) -> None:
        """Begin to run; called once by the driver."""
        self._boot_task = self._spawn(self._boot())
        if self.behaviour.dies_after is not None:
            self._spawn(self._die_later(self.behaviour.dies_after))
        if not paused:
            self._run()

    def _run(self) -> None:
        self._state = "running"
        self._go.set()

    async def _boot(self) -> None:
        await self._go.wait()
        self._emit(EventKind.STARTED)
        await asyncio.sleep(self.behaviour.output_delay)
        await self._go.wait()
        devices = self.definition.devices
        if devices and (devices.serials or devices.consoles):
            self._emit(EventKind.GUEST_OUTPUT)
        if self.behaviour.panics_after is not None:
            await asyncio.sleep(self.behaviour.panics_after)
            self.panic()
            return
        if self.behaviour.has_agent and self._has_agent_channel():
            await asyncio.sleep(self.behaviour.agent_delay)
            await self._go.wait()
            self.agent_connected = True
            self._emit(EventKind.AGENT, "connected")

    def _has_agent_channel(self) -> bool:
        channels = self.definition.devices.channels if self.definition.devices else []
        return any(channel.target and channel.target.name == AGENT_CHANNEL for channel in channels)

    async def _die_later(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        self.die()

    def _end(self, detail: str) -> None:
        if self.ended.is_set():
            return
        self.ended.set()
        self._free.set()
        self._state = "shutdown"
        for task in self._tasks - {asyncio.current_task()}:
            task.cancel()
        self._drop_consoles()
        self._emit(EventKind.ENDED, detail)

    # for tests: the guest and the host at work

    def hang(self) -> None:
        """As if the VMM got SIGSTOP: no command is answered until `release`."""
        self._free.clear()

    def release(self) -> None:
        self._free.set()

    def die(self, detail: str = "") -> None:
        """The VMM ends, unasked."""
        self._end(detail or self.behaviour.death_text)

    def panic(self, detail: str = "Kernel panic - not syncing: test") -> None:
        self._go.clear()
        self._state = "crashed"
        self._emit(EventKind.CRASHED, detail)

    def guest_poweroff(self) -> None:
        if self.ended.is_set():
            return
        self._go.clear()
        self._state = "shutdown"
        self._emit(EventKind.SHUTDOWN, "guest")

    def guest_reboot(self) -> None:
        self._restart_guest()
        self._emit(EventKind.RESET, "guest")

    def io_error(self, alias: str, reason: str = "enospc", action: str = "stop") -> None:
        self.failed_disks[alias] = 2 if reason == "enospc" else 1
        self._emit(EventKind.IO_ERROR, alias, reason=reason, action=action)
        if action == "stop":
            self._go.clear()
            self._state = "paused"
            self._emit(EventKind.PAUSED, "io-error")

    def tell(self, kind: EventKind, detail: str = "", **data: Any) -> None:
        """Any event at all."""
        self._emit(kind, detail, **data)

    def _guest_shutdown(self, mode: str) -> None:
        self._spawn(self._obey(reboot=mode == "reboot"))

    async def _obey(self, *, reboot: bool = False) -> None:
        await asyncio.sleep(self.behaviour.poweroff_delay)
        await self._go.wait()
        if reboot:
            self.guest_reboot()
        else:
            self.guest_poweroff()

    def _restart_guest(self) -> None:
        if self.agent_connected:
            self.agent_connected = False
            self._emit(EventKind.AGENT, "disconnected")
        if self._boot_task:
            self._boot_task.cancel()
        self._boot_task = self._spawn(self._boot())

    # snapshots

    async def next_image(self) -> int:
        await self._command("next-image")
        self.last_image += 1
        return self.last_image

    def check_on_top(self, disks: Sequence[Disk]) -> None:
        """All can."""

    async def put_on_top(
        self,
        new: Sequence[Disk],
        old: Mapping[str, Disk],
        secrets: Mapping[str, int],
        within: Callable[[], Awaitable[None]] | None = None,
    ) -> int:
        await self._command("put-on-top")
        if self.behaviour.refuses_snapshot:
            raise MonitorError(self.behaviour.refuses_snapshot)
        if within is not None:
            await within()
        self.images.update({(disk.source.file if disk.source else None) or "" for disk in new})
        return 1000

    async def has_on_top(self, new: Sequence[Disk]) -> bool:
        await self._command("has-on-top")
        return all(disk.source is not None and disk.source.file in self.images for disk in new)

    async def clear_image(self, new: Sequence[Disk]) -> None:
        await self._command("clear-image")

    async def save_inside(self, tag: str, disks: Sequence[Disk]) -> None:
        """The disks' images are real ones; the memory is kept here."""
        await self._command("save-inside")
        if self.behaviour.refuses_save:
            raise MonitorError(self.behaviour.refuses_save)
        self.inside[tag] = self.memory
        for disk in disks:
            await asyncio.to_thread(_change_inside, disk, "create", tag)

    async def delete_inside(self, tag: str, disks: Sequence[Disk]) -> None:
        await self._command("delete-inside")
        for disk in disks:
            await asyncio.to_thread(_change_inside, disk, "delete", tag)

    # run state

    async def state(self) -> str:
        await self._command("state")
        return self._state

    async def pause(self) -> None:
        await self._command("pause")
        if self._state == "running":
            self._go.clear()
            self._state = "paused"
            self._emit(EventKind.PAUSED, "user")

    async def resume(self) -> None:
        await self._command("resume")
        if self._state != "running":
            self._run()
            self._emit(EventKind.RESUMED)

    async def save_state(self, target: StateTarget) -> None:
        await self._command("save-state")
        target.total = len(self.memory)
        for at in range(0, len(self.memory), 4096):
            if target.cancelled:
                raise OperationFailed("it was cancelled")
            if self.behaviour.refuses_save:
                raise MonitorError(self.behaviour.refuses_save)
            await asyncio.to_thread(target.write, memoryview(self.memory)[at : at + 4096])
        await asyncio.to_thread(target.finish)
        self._go.clear()
        self._state = "paused"

    async def save_live(self, target: StateTarget) -> TestLiveSave:
        await self._command("save-live")
        if self.behaviour.stands_still:
            raise OperationUnsupported(self.behaviour.stands_still)
        return TestLiveSave(target, self.behaviour, self._command, lambda: self.memory)

    async def powerdown(self) -> None:
        await self._command("powerdown")
        if not self.behaviour.ignores_acpi:
            self._spawn(self._obey())

    async def reset(self) -> None:
        await self._command("reset")
        self._restart_guest()
        if self._state in ("crashed", "shutdown"):
            self._state = "paused"  # as QEMU: a machine that had ended waits for "cont" after a reset
        self._emit(EventKind.RESET, "host")

    async def quit(self, grace: float = 1.0) -> None:
        self.commands.append("quit")
        if not self._free.is_set():
            await asyncio.sleep(min(grace, 0.05))
        self._end("ended by request")

    async def inject_nmi(self) -> None:
        await self._command("inject-nmi")
        self.nmis += 1

    async def set_action(self, event: str, action: str) -> None:
        await self._command("set-action")
        self.actions[event] = action

    # resources

    async def vcpus(self) -> list[Mapping[str, Any]]:
        await self._command("vcpus")
        return [{"id": number, "thread": self.pid + number, "online": True} for number in range(self._vcpus)]

    async def set_vcpus(self, count: int) -> None:
        await self._command("set-vcpus")
        self._vcpus = count

    async def set_balloon(self, bytes_: int) -> None:
        await self._command("set-balloon")
        self._balloon = bytes_
        self._emit(EventKind.BALLOON_CHANGE, actual=bytes_)

    async def balloon(self) -> Mapping[str, int]:
        await self._command("balloon")
        return {"current": self._balloon, "available": self._balloon * 95 // 100, "unused": self._balloon // 2}

    async def set_balloon_period(self, seconds: int) -> None:
        await self._command("set-balloon-period")
        self.balloon_period = seconds

    # devices

    async def attach_device(self, device: Any, files: Mapping[str, int]) -> None:
        await self._command("attach-device")

    async def detach_device(self, device: Any) -> None:
        await self._command("detach-device")
        if not self.behaviour.refuses_unplug:
            self._spawn(self._unplug(device.alias.name if device.alias else ""))

    async def _unplug(self, alias: str) -> None:
        self._emit(EventKind.DEVICE_REMOVED, alias)

    async def devices(self) -> frozenset[str] | None:
        return None

    async def clear_remains(self, device: Any) -> None:
        pass

    async def update_device(self, old: Any, new: Any) -> None:
        await self._command("update-device")

    async def set_limits(self, disk: Any) -> None:
        await self._command("set-limits")

    # interaction

    async def screenshot(self, screen: int) -> tuple[str, bytes]:
        await self._command("screenshot")
        if screen:
            raise MonitorError(f"there is no screen {screen}")
        return "image/png", _grey_png(64, 48)

    async def send_key(self, keycodes: Sequence[int], hold_ms: int) -> None:
        await self._command("send-key")
        self.keys.append((list(keycodes), hold_ms))

    def open_console(self, alias: str) -> int:
        """Echoes what it gets, after the banner."""
        if self.ended.is_set():
            raise NoDevice(f"{alias} of {self.definition.name!r} is gone")
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            end.setblocking(False)
        self._consoles.add(ours)
        ours.send(self.behaviour.banner)
        asyncio.get_running_loop().add_reader(ours, self._echo, ours)
        return theirs.detach()

    def _echo(self, console: socket.socket) -> None:
        try:
            data = console.recv(4096)
            if data:
                console.send(data.replace(b"\r", b"\r\n"))
                return
        except BlockingIOError:
            return
        except OSError:
            pass
        self._drop(console)

    def _drop(self, console: socket.socket) -> None:
        with contextlib.suppress(RuntimeError):
            asyncio.get_running_loop().remove_reader(console)
        self._consoles.discard(console)
        console.close()

    def _drop_consoles(self) -> None:
        for console in list(self._consoles):
            self._drop(console)

    async def open_graphics(self, index: int, skip_auth: bool) -> int:
        """Speaks no display's protocol: says which display it is."""
        await self._command("open-graphics")
        if not 0 <= index < len(self.definition.devices.graphics):
            raise NoDevice(f"machine {self.definition.name!r} has no display number {index}")
        ours, theirs = socket.socketpair()
        with ours:
            ours.send(f"display {index}{' without password' if skip_auth else ''}".encode())
        return theirs.detach()

    @property
    def disk_jobs(self) -> DiskJobs:
        raise OperationUnsupported("the test driver's machines have no block jobs")

    @property
    def backups(self) -> DiskBackups:
        raise OperationUnsupported("the test driver's machines have no bitmaps")

    @property
    def iothreads(self) -> IoThreads:
        raise OperationUnsupported("the test driver's machines have no I/O threads")

    async def disk_size(self, disk: Disk) -> int:
        await self._command("disk-size")
        return 1 << 30

    async def resize_disk(self, disk: Disk, size: int) -> None:
        await self._command("resize-disk")

    async def disk_errors(self) -> Mapping[str, int]:
        await self._command("disk-errors")
        return dict(self.failed_disks)

    async def agent(self, command: str, arguments: Mapping[str, Any] | None = None, timeout: float = 5.0) -> Any:
        self.commands.append(f"agent:{command}")
        if self.ended.is_set() or not self.agent_connected:
            raise AgentError(f"the guest agent of {self.definition.name!r} is not connected")
        if not self._free.is_set() or not self._go.is_set():
            await asyncio.sleep(timeout)
            raise AgentError(f"the guest agent of {self.definition.name!r} did not answer within {timeout:g} s")
        return self._agent.answer(command, arguments or {})

    async def monitor(self, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
        await self._command(f"monitor:{command}")
        if command == "query-status":
            return {"status": self._state, "running": self._state == "running"}
        raise MonitorError(f"The command {command} has not been found", qmp_class="CommandNotFound")

    async def human_monitor(self, line: str) -> str:
        await self._command(f"human:{line}")
        return f"VM status: {self._state}\r\n" if line.strip() == "info status" else f"unknown command: '{line}'\r\n"

    # figures

    async def stats(self, groups: frozenset[str]) -> dict[str, int | str]:
        await self._command("stats")
        age = time.monotonic() - self._born
        ticks = int(age * 1000) + 1
        found: dict[str, int | str] = {
            "cpu.time": ticks * 1_000_000,
            "cpu.user": ticks * 600_000,
            "cpu.system": ticks * 400_000,
            "balloon.current": self._balloon // 1024,
            "balloon.maximum": self.definition.memory or 0,
            "balloon.rss": self._balloon // 4096,
            "vcpu.current": self._vcpus,
            "vcpu.maximum": self.definition.vcpu.value if self.definition.vcpu else 1,
        }
        for number in range(self._vcpus):
            found[f"vcpu.{number}.state"] = 1
            found[f"vcpu.{number}.time"] = ticks * 1_000_000 // self._vcpus
        devices = self.definition.devices
        disks = devices.disks if devices else []
        found["block.count"] = len(disks)
        for number, disk in enumerate(disks):
            found[f"block.{number}.name"] = disk.target.dev if disk.target and disk.target.dev else f"disk{number}"
            for name in ("rd.reqs", "wr.reqs"):
                found[f"block.{number}.{name}"] = ticks
            for name in ("rd.bytes", "wr.bytes"):
                found[f"block.{number}.{name}"] = ticks * 4096
        interfaces = devices.interfaces if devices else []
        found["net.count"] = len(interfaces)
        for number in range(len(interfaces)):
            found[f"net.{number}.name"] = f"test{number}"
            for direction in ("rx", "tx"):
                found[f"net.{number}.{direction}.bytes"] = ticks * 100
                found[f"net.{number}.{direction}.pkts"] = ticks
        return found if not groups else {key: value for key, value in found.items() if key.split(".")[0] in groups}


def _change_inside(disk: Disk, what: str, tag: str) -> None:
    assert disk.source is not None and disk.source.location
    with Opener().open(disk.source.location, "qcow2", writable=True, chain=False) as image:
        assert isinstance(image, Qcow2Writer)
        if what == "create":
            create_snapshot(image, tag)
        elif any(one.name == tag for one in image.snapshots):  # QEMU does not mind that there is none
            delete_snapshot(image, find_by_name(image.snapshots, tag, image.path))


def _grey_png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = (b"\0" + b"\x80" * width) * height
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
