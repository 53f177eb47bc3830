"""One running kvik-vmm: `QmpMachine` with its own way to plug a device. It has no screen and no keyboard."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from kvik.conf.devices.disk import Disk
from kvik.conf.domain import Domain
from kvik.errors import KvikError, OperationUnsupported
from kvik.host.process import ProcessHandle
from kvik.hypervisor.driver import EventSink
from kvik.hypervisor.kvik import changes, hotplug
from kvik.hypervisor.machine import QmpMachine
from kvik.hypervisor.names import alias_of
from kvik.hypervisor.sidecars import storage_daemon
from kvik.hypervisor.sidecars.group import Sidecars

__all__ = ["KvikMachine"]


_STORAGE_DEADLINE = 2.0


def _counted(number: int) -> tuple[str, ...]:
    """Figures of requests, which go past this VMM, and which the daemon does not count."""
    return tuple(f"block.{number}.{kind}." for kind in ("rd", "wr", "fl"))


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

    async def ask_storage(self, disk: Disk, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
        """A command for the daemon that serves `disk`, on its own monitor. Raises `HypervisorError`."""
        path = storage_daemon.monitor_path(self.directory, alias_of(disk))
        label = f"{storage_daemon.KIND} of {alias_of(disk)}"
        connection = await storage_daemon.connect(path, label, _STORAGE_DEADLINE)
        try:
            return await connection.execute(command, arguments, deadline=_STORAGE_DEADLINE)
        finally:
            connection.close()

    async def stats(self, groups: frozenset[str]) -> dict[str, int | str]:
        figures = await super().stats(groups)
        if not groups or "block" in groups:
            for number, disk in enumerate(self.domain.devices.disks):
                if storage_daemon.by_vhost_user(disk):
                    figures = {key: figures[key] for key in figures if not key.startswith(_counted(number))}
                if storage_daemon.served(disk):
                    with contextlib.suppress(KvikError):  # it has ended: the machine goes on without its figures
                        figures |= await self._storage_figures(disk, f"block.{number}")
        return figures

    async def _storage_figures(self, disk: Disk, prefix: str) -> dict[str, int]:
        """Sizes in bytes: what the guest sees, what the image takes on the host, and where its last written byte is."""
        nodes = await self.ask_storage(disk, "query-named-block-nodes", {"flat": True})
        found: dict[str, int] = {}
        for item in nodes if isinstance(nodes, list) else []:
            image = item.get("image") if isinstance(item, dict) else None
            if item.get("node-name") == storage_daemon.top_node(disk) and isinstance(image, dict):
                for name, key in (("capacity", "virtual-size"), ("physical", "actual-size")):
                    if isinstance(image.get(key), int):
                        found[f"{prefix}.{name}"] = image[key]
        counted = await self.ask_storage(disk, "query-blockstats", {"query-nodes": True})
        for item in counted if isinstance(counted, list) else []:
            stats = item.get("stats") if isinstance(item, dict) else None
            highest = stats.get("wr_highest_offset") if isinstance(stats, dict) else None
            if isinstance(highest, int) and item.get("node-name") == storage_daemon.bottom_node(disk):
                found[f"{prefix}.allocation"] = highest
        return found

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
