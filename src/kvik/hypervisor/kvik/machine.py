"""One running kvik-vmm: `QmpMachine` with its own way to plug a device. It has no screen and no keyboard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from kvik.conf.devices.disk import Disk
from kvik.conf.domain import Domain
from kvik.errors import OperationUnsupported
from kvik.host.process import ProcessHandle
from kvik.hypervisor.driver import EventSink
from kvik.hypervisor.kvik import changes, hotplug
from kvik.hypervisor.machine import QmpMachine
from kvik.hypervisor.names import alias_of
from kvik.hypervisor.sidecars.group import Sidecars

__all__ = ["KvikMachine"]


class KvikMachine(QmpMachine):
    """`log` is the machine's log file: the side processes of devices that come later write there as well."""

    product = "kvik-vmm"

    def __init__(
        self,
        domain: Domain,
        directory: Path,
        process: ProcessHandle,
        *,
        emulator: str,
        version: int,
        sink: EventSink,
        sidecars: Sidecars,
        log: Path,
    ) -> None:
        super().__init__(domain, directory, process, emulator=emulator, version=version, sink=sink, sidecars=sidecars)
        self.log = log

    def top_node(self, disk: Disk) -> str:
        return hotplug.node_name(alias_of(disk))

    async def attach_device(self, device: Any, files: Mapping[str, int]) -> None:
        await hotplug.attach(self, device, files)

    async def clear_remains(self, device: Any) -> None:
        await hotplug.finish_detach(self, device)

    async def update_device(self, old: Any, new: Any) -> None:
        await changes.update(self, old, new)

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
