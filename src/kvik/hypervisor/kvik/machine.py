"""One running kvik-vmm: `QmpMachine` with its own way to plug a device. It has no screen and no keyboard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from kvik.conf.devices.disk import Disk
from kvik.errors import OperationUnsupported
from kvik.hypervisor.kvik import hotplug
from kvik.hypervisor.machine import QmpMachine
from kvik.hypervisor.names import alias_of

__all__ = ["KvikMachine"]


class KvikMachine(QmpMachine):
    product = "kvik-vmm"

    def top_node(self, disk: Disk) -> str:
        return hotplug.node_name(alias_of(disk))

    async def attach_device(self, device: Any, files: Mapping[str, int]) -> None:
        await hotplug.attach(self, device, files)

    async def clear_remains(self, device: Any) -> None:
        await hotplug.finish_detach(self, device)

    async def update_device(self, old: Any, new: Any) -> None:
        await hotplug.update(self, old, new)

    # -- what it has not

    async def screenshot(self, screen: int) -> tuple[str, bytes]:
        self._no_screen()

    async def send_key(self, keycodes: Sequence[int], hold_ms: int) -> None:
        self._no_screen()

    async def open_graphics(self, index: int, skip_auth: bool) -> int:
        self._no_screen()

    def _no_screen(self) -> NoReturn:
        raise OperationUnsupported(
            f"machine {self.name} runs on kvik-vmm, which has neither screen nor keyboard",
            remedy=f"kvik console {self.name}",
        )
