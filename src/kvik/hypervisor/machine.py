"""One running VMM that speaks QMP, with most verbs of `driver.Machine`; `monitored` has its process and monitor.

What only one VMM has (how a device is plugged in, a screen) is left to the drivers: see the end of the class.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from kvik.conf.devices.disk import Disk
from kvik.conf.devices.memory import BalloonStats, Memballoon, Memory
from kvik.errors import (
    AgentError,
    HypervisorError,
    KvikError,
    MonitorError,
    OperationInvalid,
    OperationTimeout,
    OperationUnsupported,
)
from kvik.hypervisor import consoles, cpus, stats
from kvik.hypervisor.agent import AGENT_CHANNEL
from kvik.hypervisor.driver import DiskBackups, DiskJobs, IoThreads
from kvik.hypervisor.monitored import MonitoredProcess
from kvik.hypervisor.names import alias_of
from kvik.hypervisor.state import LiveSave, StateSource, StateTarget

__all__ = ["QmpMachine"]

SLOW_DEADLINE = 60.0

# QEMU's run states -> Machine.state's words, where they differ
_STATES = {"prelaunch": "paused", "inmigrate": "paused", "postmigrate": "paused", "guest-panicked": "crashed"}
# Machine.set_action's words -> QEMU's
_ACTIONS: Mapping[tuple[str, str], tuple[str, str]] = {
    ("poweroff", "exit"): ("shutdown", "poweroff"),
    ("poweroff", "pause"): ("shutdown", "pause"),
    ("reboot", "reset"): ("reboot", "reset"),
    ("reboot", "exit"): ("reboot", "shutdown"),
    ("crash", "pause"): ("panic", "pause"),
    ("crash", "exit"): ("panic", "shutdown"),
    ("crash", "none"): ("panic", "none"),
}


class QmpMachine(MonitoredProcess):
    """See `MonitoredProcess` for what it is made with."""

    # -- run state

    async def state(self) -> str:
        if self._ended.is_set():
            return "shutdown"
        self._set_run_state(await self.execute("query-status", deadline=2.0))
        return _STATES.get(self.run_state, self.run_state)

    async def pause(self) -> None:
        await self.execute("stop")

    async def resume(self) -> None:
        try:
            await self.execute("cont")
        except MonitorError as error:
            if self.run_state in ("shutdown", "guest-panicked"):
                raise OperationInvalid(
                    f"machine {self.name} is {self.run_state} and cannot go on", remedy="reset it first"
                ) from error
            raise

    async def save_state(self, target: StateTarget) -> None:
        raise NotImplementedError  # each VMM's own

    async def save_live(self, target: StateTarget) -> LiveSave:
        raise OperationUnsupported(f"{self.product} has another way to save memory while the guest runs")

    async def load_state(self, source: StateSource) -> None:
        """Into a VMM that was started to be filled; the guest is stopped afterwards."""
        raise NotImplementedError  # each VMM's own

    async def powerdown(self) -> None:
        await self.execute("system_powerdown")

    async def reset(self) -> None:
        if self.domain.on_reboot in (None, "restart"):
            await self.execute("system_reset")
            return
        # The VMM looks at its reboot action when it gets the command: ours is no reboot of the guest's.
        await self.set_action("reboot", "reset")
        try:
            await self.execute("system_reset")
        finally:
            await self.set_action("reboot", "exit")

    async def quit(self, grace: float = 1.0) -> None:
        if self._ended.is_set():
            return
        self._quitting = True
        if grace > 0 and self._connection is not None and not self._connection.closed:
            try:
                async with asyncio.timeout(grace):
                    # The reply and the end race; either will do.
                    with contextlib.suppress(HypervisorError):
                        await self.execute("quit", deadline=grace)
                    await self._ended.wait()
                    return
            except (KvikError, TimeoutError):
                pass
        if self._ended.is_set():
            return
        # SIGTERM would wait in a stopped or stuck process: what did not obey its monitor is killed.
        self.process.kill()
        try:
            async with asyncio.timeout(10.0):
                await self._ended.wait()
        except TimeoutError:
            raise OperationTimeout(
                f"process {self.pid} of machine {self.name} does not end even when killed",
                remedy="it waits for a device or a file system of the host: look at dmesg",
            ) from None

    async def inject_nmi(self) -> None:
        await self.execute("inject-nmi")

    async def set_action(self, event: str, action: str) -> None:
        try:
            kind, word = _ACTIONS[event, action]
        except KeyError:
            raise OperationUnsupported(f"{self.product} cannot do {action!r} on {event!r} by itself") from None
        await self.execute("set-action", {kind: word})

    # -- resources

    async def vcpus(self) -> list[Mapping[str, Any]]:
        return await cpus.vcpus(self)

    async def set_vcpus(self, count: int) -> None:
        await cpus.set_vcpus(self, count)

    async def set_balloon(self, bytes_: int) -> None:
        try:
            await self.execute("balloon", {"value": bytes_})
        except MonitorError as error:
            if error.qmp_class == "DeviceNotActive":
                raise OperationInvalid(
                    f"machine {self.name} has no balloon device", remedy="add <memballoon model='virtio'/>"
                ) from error
            raise

    async def balloon(self) -> Mapping[str, int]:
        return await stats.balloon(self)

    async def set_balloon_period(self, seconds: int) -> None:
        """How often the guest is asked for its figures; 0: never. Raises `OperationInvalid` without a balloon."""
        device = self.domain.devices.memballoon
        if device is None or device.model in ("none", "xen") or device.alias is None:
            raise OperationInvalid(
                f"machine {self.name} has no balloon device", remedy="add <memballoon model='virtio'/>"
            )
        device.stats = BalloonStats(period=seconds)
        await self.tell_balloon_period(device)

    async def tell_balloon_period(self, device: Memballoon) -> None:
        place = {"path": f"/machine/peripheral/{alias_of(device)}", "property": "guest-stats-polling-interval"}
        await self.execute("qom-set", place | {"value": device.stats.period if device.stats else 0})

    async def request_memory(self, old: Memory, new: Memory) -> None:
        """How much of a virtio-mem device the guest shall use. Raises `OperationUnsupported` for any other change."""
        before, after = old.target, new.target
        if old.model != "virtio-mem" or before is None or after is None or after.requested is None:
            raise OperationUnsupported(
                f"memory of model {old.model} cannot change while machine {self.name} runs",
                remedy="virtio-mem can: <target> with another <requested>",
            )
        if (after.size, after.block, after.node) != (before.size, before.block, before.node):
            raise OperationUnsupported("of virtio-mem only <requested> can change while the machine runs")
        place = {"path": f"/machine/peripheral/{alias_of(old)}", "property": "requested-size"}
        await self.execute("qom-set", place | {"value": after.requested * 1024})

    # -- devices

    async def detach_device(self, device: Any) -> None:
        """Asks the guest to let go; `DEVICE_REMOVED` tells when it has. Raises `MonitorError`."""
        alias = alias_of(device)
        self.leaving[alias] = device
        try:
            await self.execute("device_del", {"id": alias})
        except MonitorError as error:
            if "in the process of unplug" not in error.message:  # asked a second time: still leaving
                self.leaving.pop(alias, None)
                raise
        except KvikError:
            self.leaving.pop(alias, None)
            raise

    async def devices(self) -> frozenset[str] | None:
        listed = await self.execute("qom-list", {"path": "/machine/peripheral"})
        if not isinstance(listed, list):
            raise HypervisorError(f"{self.name}: the reply to qom-list is no list")
        names = (item.get("name") for item in listed if isinstance(item, dict))
        return frozenset(name for name in names if isinstance(name, str) and name != "type")

    # -- interaction

    def open_console(self, alias: str) -> int:
        return consoles.open_console(self.domain, alias)

    async def agent(self, command: str, arguments: Mapping[str, Any] | None = None, timeout: float = 5.0) -> Any:
        if self._ended.is_set():
            raise OperationInvalid(f"machine {self.name} is not running")
        if self._agent is None:
            raise AgentError(
                f"machine {self.name} has no guest agent channel",
                remedy=f"add a <channel type='unix'> with <target type='virtio' name='{AGENT_CHANNEL}'/>",
            )
        return await self._agent.execute(command, arguments, timeout)

    @property
    def agent_connected(self) -> bool | None:
        return self._agent.connected if self._agent is not None else False

    async def monitor(self, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
        return await self.execute(command, arguments, deadline=SLOW_DEADLINE)

    async def human_monitor(self, line: str) -> str:
        answer = await self.execute("human-monitor-command", {"command-line": line}, deadline=SLOW_DEADLINE)
        if not isinstance(answer, str):
            raise HypervisorError(f"{self.name}: the human monitor's answer is no text")
        return answer

    async def disk_size(self, disk: Disk) -> int:
        """What the guest sees, in bytes."""
        reply = await self.execute("query-named-block-nodes", {"flat": True})
        wanted = self.top_node(disk)
        for item in reply if isinstance(reply, list) else ():
            image = item.get("image") if isinstance(item, dict) and item.get("node-name") == wanted else None
            size = image.get("virtual-size") if isinstance(image, dict) else None
            if isinstance(size, int):
                return size
        raise HypervisorError(f"{self.name}: {self.product} does not say how large disk {disk.target.dev} is")

    async def resize_disk(self, disk: Disk, size: int) -> None:
        """The guest is told. Raises `MonitorError` with the VMM's reason."""
        await self.execute("block_resize", {"node-name": self.top_node(disk), "size": size}, deadline=SLOW_DEADLINE)

    async def disk_errors(self) -> Mapping[str, int]:
        return await stats.disk_errors(self)

    async def stats(self, groups: frozenset[str]) -> dict[str, int | str]:
        return await stats.collect(self, groups)

    # -- snapshots: of drivers without Feature.SNAPSHOTS nobody asks for them

    async def next_image(self) -> int:
        raise OperationUnsupported(f"{self.product} cannot put images on top of running disks")

    def check_on_top(self, disks: Sequence[Disk]) -> None:
        """Those that the manager lets have snapshots all can."""

    async def put_on_top(
        self,
        new: Sequence[Disk],
        old: Mapping[str, Disk],
        secrets: Mapping[str, int],
        within: Callable[[], Awaitable[None]] | None = None,
    ) -> int:
        raise OperationUnsupported(f"{self.product} cannot put images on top of running disks")

    async def has_on_top(self, new: Sequence[Disk]) -> bool:
        return False

    async def clear_image(self, new: Sequence[Disk]) -> None:
        """There is nothing."""

    async def save_inside(self, tag: str, disks: Sequence[Disk]) -> None:
        raise OperationUnsupported(f"{self.product} cannot put a machine's memory into an image")

    async def load_inside(self, tag: str, disks: Sequence[Disk]) -> None:
        raise OperationUnsupported(f"{self.product} cannot take a machine's memory out of an image")

    async def delete_inside(self, tag: str, disks: Sequence[Disk]) -> None:
        raise OperationUnsupported(f"{self.product} cannot change snapshots inside an image")

    # -- what each driver adds

    @property
    def disk_jobs(self) -> DiskJobs:
        raise OperationUnsupported(
            f"{self.product} cannot copy, merge or watch a disk's images while machine {self.name} runs",
            remedy="shut it down and use kvik img, or run it with QEMU (<emulator>qemu-system-...</emulator>)",
        )

    @property
    def backups(self) -> DiskBackups:
        raise OperationUnsupported(
            f"{self.product} does not track what changes on the disks of machine {self.name}, and so has no "
            "checkpoints and no backups while it runs",
            remedy="take a snapshot and copy its image, or run it with QEMU (<emulator>qemu-system-...</emulator>)",
        )

    @property
    def iothreads(self) -> IoThreads:
        raise OperationUnsupported(
            f"{self.product} serves each device by a thread of its own choice: there are no I/O threads to change",
            remedy=f"run {self.name} with QEMU (<emulator>qemu-system-...</emulator>)",
        )
