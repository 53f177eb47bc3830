"""One machine, with everything that can be done to it.

Reads are plain functions that answer from memory, whatever the VMM is doing (`domain_facts`). What changes a machine is
a coroutine that holds the machine's one job; the work is in the modules named like it: `starting`, `power`, `tuning`,
`devices`, `guest`, `figures`.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence

from kvik.conf.enums import (
    DomainInterfaceAddressesSource,
)
from kvik.errors import InvalidArgument, OperationInvalid
from kvik.manager import (
    addresses,
    block_copy,
    block_jobs,
    block_tuning,
    devices,
    exec,
    figures,
    guest,
    interface_changes,
    iothreads,
    lifecycle,
    power,
    starting,
    tuning,
)
from kvik.manager.block_jobs import JobInfo
from kvik.manager.domain_facts import DomainFacts, DomainInfo
from kvik.manager.exec import ExecResult
from kvik.manager.guest import InterfaceAddress
from kvik.manager.keycodes import to_linux
from kvik.manager.stages import Stage

__all__ = ["DomainInfo", "DomainObject", "ExecResult", "InterfaceAddress", "Stage"]


class DomainObject(DomainFacts):
    """A machine of the manager."""

    __slots__ = ()

    # life cycle

    async def start(
        self,
        paused: bool = False,
        flags: int = 0,
        files: Mapping[str, int] | None = None,
        autodestroy: Hashable | None = None,
    ) -> None:
        """`flags` are virDomainCreateFlags."""
        await starting.start(self, paused, flags, files or {}, autodestroy)

    async def shutdown(self, mode: int = 0) -> None:
        """Ask the guest to power off (virDomainShutdownFlags; 0: by its agent if connected, else by ACPI)."""
        await power.shutdown(self, mode)

    async def reboot(self, mode: int = 0) -> None:
        await power.reboot(self, mode)

    async def reset(self) -> None:
        await power.reset(self)

    async def suspend(self) -> None:
        await power.suspend(self)

    async def resume(self) -> None:
        await power.resume(self)

    async def destroy(self, graceful: bool = False) -> None:
        """End the VMM at once, whatever else is going on. Waits for no job."""
        await lifecycle.destroy(self, graceful)

    async def undefine(self, flags: int = 0) -> None:
        await self.manager.undefine(self, flags)

    async def rename(self, new: str) -> None:
        await self.manager.rename(self, new)

    async def set_autostart(self, on: bool) -> None:
        if not self.persistent:
            raise OperationInvalid(f"machine {self.name!r} is transient: it cannot be started automatically")
        async with self.jobs.hold("set-autostart"):
            if on != self.autostart:
                await self.manager.store.set_autostart(self.name, on)
                self.autostart = on

    # configuration

    async def set_metadata(
        self, type: int, text: str | None, key: str | None = None, uri: str | None = None, flags: int = 0
    ) -> None:
        """`text` None removes. `key` is the prefix for the element's namespace `uri`."""
        async with self.jobs.hold("set-metadata"):
            await tuning.set_metadata(self, type, text, key, uri, flags)

    async def set_vcpus(self, count: int, flags: int = 0) -> None:
        async with self.jobs.hold("set-vcpus"):
            await tuning.set_vcpus(self, count, flags)

    async def set_memory(self, kib: int, flags: int = 0) -> None:
        async with self.jobs.hold("set-memory"):
            await tuning.set_memory(self, kib, flags)

    async def iothread_affinities(self, flags: int = 0) -> dict[int, frozenset[int] | None]:
        """I/O thread -> host CPUs that it may run on; None: all."""
        return await iothreads.affinities(self, flags)

    async def add_iothread(self, number: int, flags: int = 0) -> None:
        async with self.jobs.hold("add-iothread"):
            await iothreads.add(self, number, flags)

    async def delete_iothread(self, number: int, flags: int = 0) -> None:
        async with self.jobs.hold("delete-iothread"):
            await iothreads.delete(self, number, flags)

    async def set_iothread(self, number: int, values: Mapping[str, int], flags: int = 0) -> None:
        """By libvirt's names, such as "poll_max_ns"."""
        async with self.jobs.hold("set-iothread"):
            await iothreads.change(self, number, values, flags)

    async def pin_iothread(self, number: int, cpus: Iterable[int], flags: int = 0) -> None:
        async with self.jobs.hold("pin-iothread"):
            await iothreads.pin(self, number, cpus, flags)

    async def set_interface_parameters(self, device: str, values: Mapping[str, int], flags: int = 0) -> None:
        """Bandwidth of an interface, by libvirt's names, such as "inbound.average"."""
        async with self.jobs.hold("set-interface-parameters"):
            await interface_changes.set_parameters(self, device, values, flags)

    async def set_block_io_tune(self, disk: str, values: Mapping[str, int | str], flags: int = 0) -> None:
        """Limits of a disk's requests, by libvirt's names, such as "total_bytes_sec"."""
        async with self.jobs.hold("set-block-io-tune"):
            await block_tuning.set_limits(self, disk, values, flags)

    async def set_memory_stats_period(self, seconds: int, flags: int = 0) -> None:
        """How often the guest reports its memory figures; 0: never."""
        async with self.jobs.hold("set-memory-stats-period"):
            await tuning.set_memory_stats_period(self, seconds, flags)

    async def attach_device(self, xml: str, flags: int = 0) -> None:
        async with self.jobs.hold("attach-device"):
            await devices.attach(self, xml, flags)

    async def detach_device(self, xml: str, flags: int = 0) -> None:
        async with self.jobs.hold("detach-device"):
            await devices.detach(self, xml, flags)

    async def detach_device_alias(self, alias: str, flags: int = 0) -> None:
        async with self.jobs.hold("detach-device"):
            await devices.detach_alias(self, alias, flags)

    async def update_device(self, xml: str, flags: int = 0) -> None:
        async with self.jobs.hold("update-device"):
            await devices.update(self, xml, flags)

    # disks

    async def block_rebase(self, disk: str, base: str | None, bandwidth: int, flags: int = 0) -> None:
        """`flags` are virDomainBlockRebaseFlags; `bandwidth` is MiB a second, unless they say bytes."""
        async with self.jobs.hold("block-rebase"):
            await block_copy.rebase(self, disk, base, bandwidth, flags)

    async def block_copy(self, disk: str, xml: str, params: Mapping[str, int], flags: int = 0) -> None:
        async with self.jobs.hold("block-copy"):
            await block_copy.copy(self, disk, xml, params, flags)

    async def block_commit(
        self, disk: str, base: str | None, top: str | None, bandwidth: int = 0, flags: int = 0
    ) -> None:
        async with self.jobs.hold("block-commit"):
            await block_jobs.commit(self, disk, base, top, bandwidth=bandwidth, flags=flags)

    async def block_job_abort(self, disk: str, flags: int = 0) -> None:
        async with self.jobs.hold("block-job-abort"):
            await block_jobs.abort(self, disk, flags)

    async def block_job_info(self, disk: str) -> JobInfo | None:
        return await block_jobs.info(self, disk)

    async def block_job_speed(self, disk: str, bandwidth: int, *, in_bytes: bool) -> None:
        async with self.jobs.hold("block-job-speed"):
            await block_jobs.set_speed(self, disk, bandwidth, in_bytes)

    async def set_block_threshold(self, device: str, threshold: int) -> None:
        async with self.jobs.hold("set-block-threshold"):
            await block_jobs.set_threshold(self, device, threshold)

    async def block_resize(self, disk: str, size: int, *, to_capacity: bool = False) -> None:
        """`size` in bytes; with `to_capacity` 0: all that the block device has."""
        async with self.jobs.hold("block-resize"):
            await block_jobs.resize(self, disk, size, to_capacity=to_capacity)

    # interaction

    async def screenshot(self, screen: int = 0) -> tuple[str, bytes]:
        """MIME type and image."""
        async with self.jobs.hold("screenshot"):
            return await self.require_machine().screenshot(screen)

    async def open_graphics(self, index: int, skip_auth: bool = False) -> int:
        """A descriptor connected to display `index` of the live document; the caller closes it."""
        async with self.jobs.hold("open-graphics"):
            return await self.require_machine().open_graphics(index, skip_auth)

    async def send_key(self, codeset: int, holdtime: int, keycodes: Sequence[int]) -> None:
        """`codeset` is a virKeycodeSet, `holdtime` in ms."""
        keys = to_linux(codeset, keycodes)
        async with self.jobs.hold("send-key"):
            await self.require_machine().send_key(keys, holdtime)

    async def inject_nmi(self) -> None:
        async with self.jobs.hold("inject-nmi"):
            await self.require_machine().inject_nmi()

    async def monitor_command(self, text: str, hmp: bool = False) -> str:
        """HMP text, or a QMP command as JSON; the answer as QMP would give it."""
        async with self.jobs.hold("monitor-command"):
            return await guest.monitor_command(self, text, hmp)

    # figures

    async def stats(self, groups: frozenset[str] = frozenset(), nowait: bool = False) -> dict[str, int | str]:
        """Flat, as libvirt's domstats. A VMM that does not answer soon is told of by what was known last."""
        return await figures.stats(self, groups, nowait)

    async def memory_stats(self) -> dict[int, int]:
        """virDomainMemoryStatTags -> KiB (counts for swap and faults)."""
        return await figures.memory_stats(self)

    async def disk_errors(self) -> dict[str, int]:
        """Target -> virDomainDiskErrorCode, of disks with an error."""
        return await figures.disk_errors(self)

    # the guest, by its agent: no job, so that a slow guest blocks nobody

    async def agent_command(self, text: str, timeout: float = 5.0) -> str:
        """`text` is {"execute": ..., "arguments": ...}; the answer is {"return": ...}, both JSON."""
        return await guest.agent_command(self, text, timeout)

    async def agent_exec(
        self, argv: Sequence[str], stdin: bytes = b"", timeout: float | None = 30.0, env: Sequence[str] = ()
    ) -> ExecResult:
        return await exec.run(self.require_machine().agent, argv, stdin, timeout, env)

    async def interface_addresses(self, source: int = 1) -> list[InterfaceAddress]:
        """`source` is a virDomainInterfaceAddressesSource."""
        if source == DomainInterfaceAddressesSource.LEASE:
            return await addresses.from_leases(self)
        if source == DomainInterfaceAddressesSource.ARP:
            return await addresses.from_arp(self)
        if source != DomainInterfaceAddressesSource.AGENT:
            raise InvalidArgument(f"there is no source of addresses {source}")
        return await guest.interface_addresses(self)

    async def wait_ready(self, timeout: float) -> list[Stage]:
        """The stages when the machine is ready, has ended, or `timeout` seconds are over; a stalled one says why."""
        return await guest.wait_ready(self, timeout)
