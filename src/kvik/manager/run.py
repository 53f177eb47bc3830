"""One machine while it is on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Hashable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvik.conf.domain import Domain
from kvik.hypervisor.driver import Machine
from kvik.manager.block_following import BlockJob
from kvik.manager.disks import Use
from kvik.manager.guest import InterfaceAddress
from kvik.manager.stages import BootStages
from kvik.manager.states import Trigger

if TYPE_CHECKING:
    from kvik.manager.backup.job import BackupJob

__all__ = ["Run"]


class Run:
    """What exists only while a machine is on; one object per start, so that nothing of an old run can leak in."""

    __slots__ = (
        "agent_error",
        "arriving",
        "asked",
        "autodestroy",
        "backup",
        "balloon_kib",
        "block_jobs",
        "cpu_time",
        "directory",
        "early",
        "ended",
        "figures",
        "interfaces",
        "live",
        "live_text",
        "machine",
        "overdue",
        "pause_cause",
        "pending",
        "pid",
        "pid_start",
        "reboot_wanted",
        "removals",
        "stages",
        "started",
        "tasks",
        "unfinished",
        "uses",
    )

    def __init__(self, live: Domain, directory: Path, stages: BootStages) -> None:
        self.live = live
        self.live_text: dict[int, str] = {}  # flags -> text
        self.directory = directory
        self.stages = stages
        self.machine: Machine | None = None  # None while starting, or while a found VMM does not answer
        self.pid = 0
        self.pid_start = 0  # clock ticks since boot; tells the process from a later one with its pid
        self.started = time.time()
        self.early: list[Any] | None = []  # events that came before the machine was ours; then None
        self.ended = asyncio.Event()
        self.arriving: Any = None  # device that the VMM is being given: in the status, should the daemon be killed
        self.pending: Trigger | None = None  # how the coming end is to be understood
        self.pause_cause = ""  # why the next pause happens
        self.reboot_wanted = False  # the coming power-off is to be a reboot
        self.autodestroy: Hashable | None = None
        self.interfaces: list[InterfaceAddress] = []
        self.agent_error = ""
        self.uses: list[Use] = []
        self.block_jobs: dict[str, BlockJob] = {}  # disk's target -> its job
        self.backup: BackupJob | None = None
        self.figures: dict[str, int | str] = {}  # the last that the VMM told
        self.cpu_time = 0  # ns
        self.asked: asyncio.Task[None] | None = None  # the question for figures under way
        self.overdue = False  # its answer did not come in time
        self.balloon_kib = live.current_memory or live.memory
        self.removals: dict[str, asyncio.Future[bool]] = {}  # alias -> removed?
        self.tasks: set[asyncio.Task[None]] = set()
        self.unfinished: dict[str, Any] = {}  # saving or restoring under way: `saved.machine.settle`
