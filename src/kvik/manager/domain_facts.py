"""One machine's definition, its live state, and everything that can be asked of it and is answered from memory.

What changes a machine is `domain.DomainObject`. Attributes without an underscore that are not documented here belong to
the modules that do the work (`starting`, `power`, ...).
"""

from __future__ import annotations

import asyncio
import logging
import uuid as uuids
from collections.abc import Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from kvik.conf.devices_xml import format_device
from kvik.conf.domain import Domain, format_domain
from kvik.conf.enums import (
    DomainBlockJobType,
    DomainJobOperation,
    DomainJobType,
    DomainModificationImpact,
    DomainShutoffReason,
    DomainState,
    DomainVcpuFlags,
    DomainXMLFlags,
)
from kvik.errors import KvikError, NoDevice, OperationFailed, OperationInvalid
from kvik.hypervisor.driver import Driver, Machine
from kvik.manager import figures, interfaces, metadata, volume_disks
from kvik.manager.checkpoints.tree import Checkpoints
from kvik.manager.definition import Definition
from kvik.manager.events import DomainRef
from kvik.manager.guest import InterfaceAddress
from kvik.manager.jobs import JobSlot
from kvik.manager.log import MachineLog
from kvik.manager.run import Run
from kvik.manager.snapshots.tree import Tree
from kvik.manager.stages import Stage
from kvik.manager.states import state_text
from kvik.manager.store import Status

if TYPE_CHECKING:
    from kvik.manager.manager import Manager

logger = logging.getLogger(__name__)

LIVE, CONFIG = DomainModificationImpact.LIVE, DomainModificationImpact.CONFIG

__all__ = ["CONFIG", "LIVE", "DomainFacts", "DomainInfo"]


class DomainInfo(NamedTuple):
    state: int
    max_mem_kib: int
    mem_kib: int
    vcpus: int
    cpu_time_ns: int


class DomainFacts:
    """`state` and `reason` are virDomainState and its reason; `id` is -1 while the machine is off."""

    __slots__ = (
        "autostart",
        "checkpoints",
        "cleaning",
        "completed_job",
        "config",
        "crashes",
        "encoded",
        "has_managed_save",
        "id",
        "jobs",
        "keep_tpm",
        "manager",
        "name",
        "persistent",
        "reason",
        "reason_text",
        "run",
        "snapshots",
        "starting",
        "state",
        "updated",
        "uuid",
    )

    def __init__(self, manager: Manager, config: Definition, *, persistent: bool) -> None:
        self.manager = manager
        self.config = config  # the inactive definition; of a transient machine what it was created from
        self.name = config.name
        self.uuid = config.uuid
        self.id = -1
        self.state: int = DomainState.SHUTOFF
        self.reason: int = DomainShutoffReason.UNKNOWN
        self.reason_text = ""  # why it ended or paused, in words, if there is more to say than the reason
        self.persistent = persistent
        self.autostart = False
        self.updated = False  # the definition was changed since the machine was started
        self.has_managed_save = False
        self.keep_tpm: bool | None = None  # what undefine said while the machine ran; None: as the document says
        self.run: Run | None = None
        self.snapshots = Tree()
        self.checkpoints = Checkpoints()
        self.completed_job: tuple[int, dict[str, int | str | bool]] | None = None  # virDomainJobType, its figures
        self.starting: asyncio.Task[Machine] | None = None
        self.cleaning: asyncio.Task[None] | None = None
        self.crashes: list[float] = []
        self.encoded: tuple[str, int, bytes] | None = None  # (name, id, how the daemon's wire names them together)
        self.jobs = JobSlot(self.name)

    # reads

    @property
    def uuid_text(self) -> str:
        return str(uuids.UUID(bytes=self.uuid))

    @property
    def ref(self) -> DomainRef:
        return DomainRef(self.name, self.uuid, self.id)

    @property
    def is_active(self) -> bool:
        return self.id >= 0

    @property
    def definition(self) -> Domain:
        """The inactive document, parsed for the caller (0.3 ms)."""
        return self.config.parse()

    @property
    def live(self) -> Domain | None:
        """The live document itself: look, do not touch."""
        return self.run.live if self.run and self.is_active else None

    @property
    def driver(self) -> Driver:
        """Of the machine that runs, whose definition may be another by now; else of the definition."""
        if self.run is not None:
            return self.manager.driver_of(self.run.live)
        return self.manager.driver_for(self.config.type, self.config.emulator)

    @property
    def log(self) -> MachineLog:
        return MachineLog(self.manager.paths.domain_logs, self.name)

    @property
    def accelerator(self) -> str:
        """ "kvm", "tcg", ... while it runs, else ""."""
        return self.run.machine.accelerator if self.run and self.run.machine else ""

    @property
    def stages(self) -> list[Stage]:
        return self.run.stages.table() if self.run else []

    @property
    def ready(self) -> bool:
        return bool(self.run and self.is_active and self.run.stages.ready)

    def output_logs(self) -> list[Path]:
        """The files that keep what the guest writes on its serial lines and consoles."""
        if self.run is None:
            return []
        devices = self.run.live.devices
        logs = (device.log for device in (*devices.serials, *devices.consoles, *devices.channels))
        return [Path(path) for path in dict.fromkeys(log.file for log in logs if log and log.file)]

    @property
    def address(self) -> str:
        """The guest's first address, IPv4 before IPv6; "" if none is known."""
        known = [address for interface in self.run.interfaces for address in interface.addresses] if self.run else []
        return min(known, default=(0, "", 0))[1]

    @property
    def addresses(self) -> list[InterfaceAddress]:
        return self.run.interfaces if self.run else []

    @property
    def os_type(self) -> str:
        return self.config.os_type

    @property
    def title(self) -> str:
        return (self.live.title or "") if self.live else self.config.title

    @property
    def pid(self) -> int:
        return self.run.pid if self.run and self.is_active else 0

    @property
    def started(self) -> float:
        """Seconds since the epoch, 0.0 while it is off."""
        return self.run.started if self.run and self.is_active else 0.0

    @property
    def max_vcpus(self) -> int:
        live = self.live
        return (live.vcpu.value if live.vcpu else 1) if live else self.config.max_vcpus

    @property
    def console_path(self) -> str | None:
        """The host path of the first console or serial line, if it has one."""
        if self.live is None:
            return None
        for device in (*self.live.devices.consoles, *self.live.devices.serials):
            if device.source and device.source.path:
                return device.source.path
        return None

    def xml(self, flags: int = 0) -> str:
        run = self.run
        if run is None or not self.is_active or flags & (DomainXMLFlags.INACTIVE | DomainXMLFlags.MIGRATABLE):
            return self.config.xml(flags)
        secure = flags & DomainXMLFlags.SECURE
        text = run.live_text.get(secure)
        if text is None:
            text = run.live_text[secure] = format_domain(self._shown(run.live), secure=bool(secure))
        return text

    def _shown(self, live: Domain) -> Domain:
        return interfaces.shown(volume_disks.shown(live), self.manager.networks)

    def info(self) -> DomainInfo:
        run = self.run
        if run is None or not self.is_active:
            config = self.config
            return DomainInfo(self.state, config.memory, config.current_memory, config.vcpus, 0)
        live = run.live
        vcpus = (live.vcpu.current or live.vcpu.value) if live.vcpu else 1
        return DomainInfo(self.state, live.memory, run.balloon_kib, vcpus, figures.cpu_time(run))

    def metadata(self, type: int, uri: str | None, flags: int = 0) -> str:
        """Title, description, or the element with this namespace. `NoMetadata` if there is none."""
        return metadata.read(self.document(flags), type, uri, f"machine {self.name!r}")

    def vcpu_count(self, flags: int = 0) -> int:
        document = self.document(flags)
        vcpu = document.vcpu
        if vcpu is None:
            return 1
        return vcpu.value if flags & DomainVcpuFlags.MAXIMUM else vcpu.current or vcpu.value

    def job_info(self) -> dict[str, Any]:
        """`type` and `operation` are virDomainJobType and virDomainJobOperation."""
        job = self.jobs.current
        if self.run is not None and self.run.backup is not None:
            figures = self.run.backup.figures()
            return {"type": DomainJobType.UNBOUNDED, "elapsed_ms": figures["time_elapsed"], "name": "backup", **figures}
        if job is None:
            return {"type": DomainJobType.NONE, "operation": DomainJobOperation.UNKNOWN, "elapsed_ms": 0, "name": ""}
        operation = DomainJobOperation.START if job.name == "start" else job.operation
        done, total = job.progress() if job.progress is not None else (0, 0)
        return {
            "type": DomainJobType.UNBOUNDED,
            "operation": operation,
            "elapsed_ms": int(job.elapsed * 1000),
            "name": job.name,
            "done": done,
            "total": total,
        }

    def open_console(self, device: str | None = None) -> int:
        """A descriptor for both directions of a console, serial line or channel by alias; the first if None."""
        machine = self.require_machine()
        assert self.run is not None
        candidates = [*self.run.live.devices.consoles, *self.run.live.devices.serials]
        if device is not None:
            candidates = [
                item
                for item in (*candidates, *self.run.live.devices.parallels, *self.run.live.devices.channels)
                if item.alias and item.alias.name == device
            ]
        for item in candidates:
            if item.alias and item.alias.name:
                return machine.open_console(item.alias.name)
        what = f"device {device!r}" if device else "console"
        raise NoDevice(f"machine {self.name!r} has no {what}")

    # what the modules share

    def document(self, flags: int) -> Domain:
        """The document that `flags` (virDomainModificationImpact) names, for reading."""
        if self.impact(flags) & LIVE:
            assert self.run is not None
            return self.run.live
        return self.config.parse()

    def impact(self, flags: int) -> int:
        """`CURRENT` resolved, and refused where it cannot be: LIVE of a machine that is off, CONFIG of a transient."""
        wanted = flags & (LIVE | CONFIG)
        if not wanted:
            return LIVE if self.is_active else CONFIG
        if wanted & LIVE and not self.is_active:
            raise OperationInvalid(f"machine {self.name!r} is not running")
        if wanted & CONFIG and not self.persistent:
            raise OperationInvalid(
                f"machine {self.name!r} is transient: it has no persistent configuration", remedy="define it first"
            )
        return wanted

    def require_machine(self) -> Machine:
        if not self.is_active or self.run is None:
            raise OperationInvalid(f"machine {self.name!r} is not running", remedy="start it first")
        if self.run.machine is None:
            raise OperationFailed(
                f"the VMM of machine {self.name!r} (process {self.run.pid}) does not answer",
                remedy="it is tried again every few seconds; destroying the machine kills it",
            )
        return self.run.machine

    def require_running(self) -> Machine:
        machine = self.require_machine()
        if self.state != DomainState.RUNNING:
            raise OperationInvalid(f"machine {self.name!r} is {state_text(self.state)}, not running")
        return machine

    def live_changed(self) -> None:
        if self.run:
            self.run.live_text.clear()

    def emit(self, kind: str, **fields: Any) -> None:
        self.manager.events.emit(self.ref, kind, **fields)

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run beside everything else; ends with the run it belongs to, or with the manager."""
        return self.manager.spawn(work, self.run.tasks if self.run else None)

    def status(self) -> Status:
        """What the next daemon must know of this run."""
        run = self.run
        assert run is not None
        job = self.jobs.current
        return Status(
            name=self.name,
            id=self.id,
            state=self.state,
            reason=self.reason,
            boot=self.manager.store.boot,
            driver=self.driver.name,
            directory=str(run.directory),
            document=format_domain(run.live, secure=True),
            pid=run.pid,
            pid_start=run.pid_start,
            handle=run.machine.handle() if run.machine else {},
            persistent=self.persistent,
            started=run.started,
            job=job.name if job else "",
            stages=run.stages.reached,
            reason_text=self.reason_text,
            arriving=format_device(run.arriving, secure=True) if run.arriving is not None else "",
            block_jobs=[item.facts() for item in run.block_jobs.values() if item.type != DomainBlockJobType.BACKUP],
            unfinished=run.unfinished,
        )

    async def save_status(self) -> None:
        """`HostError` if it cannot be written."""
        if self.run and self.is_active and self.run.machine:
            await self.manager.store.save_status(self.status())

    async def save_quietly(self) -> None:
        """`save_status` for those who have nobody to tell."""
        try:
            await self.save_status()
        except KvikError as error:
            logger.warning("the status of machine %s was not written: %s", self.name, error)

    async def save_config(self, domain: Domain) -> None:
        """Make `domain` the definition, on disk first."""
        config = Definition(domain)
        if self.persistent:
            await self.manager.store.save_definition(self.name, config.text)
        self.config = config
        self.updated = self.updated or self.is_active
