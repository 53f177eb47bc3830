"""One running QEMU: what it has beyond `QmpMachine`, which is screens, keys and its own way to plug a device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvik.conf.devices.disk import Disk
from kvik.conf.domain import Domain
from kvik.host.process import ProcessHandle
from kvik.hypervisor.driver import EventSink
from kvik.hypervisor.machine import QmpMachine
from kvik.hypervisor.qemu import display, hotplug, screenshot
from kvik.hypervisor.qemu.argv import disks
from kvik.hypervisor.qemu.capabilities import QemuCapabilities
from kvik.hypervisor.qemu.keys import qcodes
from kvik.hypervisor.sidecars.group import Sidecars

__all__ = ["QemuMachine"]


class QemuMachine(QmpMachine):
    def __init__(
        self,
        domain: Domain,
        directory: Path,
        process: ProcessHandle,
        capabilities: QemuCapabilities,
        sink: EventSink,
        *,
        sidecars: Sidecars | None = None,
    ) -> None:
        super().__init__(
            domain,
            directory,
            process,
            emulator=capabilities.binary,
            version=capabilities.version,
            sink=sink,
            sidecars=sidecars,
        )
        self.capabilities = capabilities

    async def query_more(self) -> None:
        await hotplug.query_graphics(self)

    def top_node(self, disk: Disk) -> str:
        return disks.top_node(disk)

    # -- devices

    async def attach_device(self, device: Any, files: Mapping[str, int]) -> None:
        await hotplug.attach(self, device, files)

    async def clear_remains(self, device: Any) -> None:
        await hotplug.finish_detach(self, device)

    async def update_device(self, old: Any, new: Any) -> None:
        await hotplug.update(self, old, new)

    # -- interaction

    async def screenshot(self, screen: int) -> tuple[str, bytes]:
        return await screenshot.screenshot(self, screen)

    async def send_key(self, keycodes: Sequence[int], hold_ms: int) -> None:
        arguments: dict[str, Any] = {"keys": qcodes(keycodes)}
        if hold_ms > 0:
            arguments["hold-time"] = hold_ms
        await self.execute("send-key", arguments)

    async def open_graphics(self, index: int, skip_auth: bool) -> int:
        return await display.open_graphics(self, index, skip_auth)
