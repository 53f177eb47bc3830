"""A backup under way: its facts on disk, its progress, its end, and what the next daemon does with it.

    starting --> running --> ending --> (gone)

phase      a daemon that comes back
starting   nobody was told of it: jobs, images and the checkpoint that came with it go
running    follows it on; of a VMM that is gone meanwhile the images that were not whole go
ending     goes on clearing up, with the outcome that was seen

A checkpoint that was made with a backup that is pushed goes if that comes to nothing: what changed before it would be
in no backup.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvik.conf.backup import Backup, format_backup, parse_backup
from kvik.conf.enums import (
    ConnectDomainEventBlockJobStatus,
    DomainBlockJobType,
    DomainJobOperation,
    DomainJobType,
)
from kvik.errors import KvikError, NoBackup, OperationInvalid, OperationTimeout
from kvik.host.threads import in_thread
from kvik.hypervisor import new_image
from kvik.hypervisor.driver import JobState, Machine
from kvik.manager.backup.plan import JOB, parts_of
from kvik.manager.block_following import BlockJob, disk_of, tell
from kvik.manager.checkpoints import delete as checkpoint_delete
from kvik.manager.checkpoints.resume import take_back
from kvik.manager.checkpoints.store import CheckpointStore, store_of

if TYPE_CHECKING:
    from kvik.manager.domain import DomainObject
    from kvik.manager.manager import Manager
    from kvik.manager.run import Run

logger = logging.getLogger(__name__)

__all__ = ["BackupJob", "abort", "document", "follow", "machine_gone", "sweep", "take_up", "undo"]

_Status = ConnectDomainEventBlockJobStatus
STARTING, RUNNING, ENDING = "starting", "running", "ending"
COMPLETED, FAILED, CANCELLED = "completed", "failed", "cancelled"
_TYPES = {
    COMPLETED: DomainJobType.COMPLETED,
    FAILED: DomainJobType.FAILED,
    CANCELLED: DomainJobType.CANCELLED,
}
ABORT_WAIT = 60.0  # seconds for jobs to end that were told to


class BackupJob:
    """`created`: files that were made for it. `held`: how long the disks' requests waited at its start (us)."""

    def __init__(self, backup: Backup, *, created: list[str], checkpoint: str | None, began: float) -> None:
        self.backup = backup
        self.created = created
        self.checkpoint = checkpoint
        self.began = began  # seconds since the epoch
        self.phase = STARTING
        self.outcome = ""
        self.failure = ""
        self.held = 0
        self.aborted = False
        self.states: dict[str, JobState] = {}  # job's name -> what was last seen of it
        self.over = asyncio.Event()

    @property
    def jobs(self) -> list[str]:
        return [f"{JOB}{item.name}" for item in self.backup.chosen]

    def facts(self) -> dict[str, Any]:
        names = ("created", "checkpoint", "began", "phase", "outcome", "failure", "held", "aborted")
        return {"document": format_backup(self.backup), **{name: getattr(self, name) for name in names}}

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> BackupJob:
        """`ValueError` for what `facts` would not have written."""
        created, checkpoint, began = facts.get("created"), facts.get("checkpoint"), facts.get("began")
        phase, held = facts.get("phase"), facts.get("held")
        if (
            not isinstance(created, list)
            or not all(isinstance(path, str) and path.startswith("/") for path in created)
            or not isinstance(checkpoint, str | None)
            or not isinstance(began, float | int)
            or not isinstance(held, int)
            or phase not in (STARTING, RUNNING, ENDING)
        ):
            raise ValueError("not the facts of a backup")
        try:
            backup = parse_backup(str(facts.get("document", "")))
        except KvikError as error:
            raise ValueError(str(error)) from error
        found = cls(backup, created=created, checkpoint=checkpoint, began=float(began))
        found.phase, found.held = phase, held
        found.outcome, found.failure = str(facts.get("outcome", "")), str(facts.get("failure", ""))
        found.aborted = facts.get("aborted") is True
        return found

    def figures(self) -> dict[str, int]:
        """As libvirt names them; bytes and ms."""
        total = sum(state.total for state in self.states.values())
        done = sum(min(state.current, state.total) for state in self.states.values())
        return {
            "operation": DomainJobOperation.BACKUP,
            "time_elapsed": max(int((time.time() - self.began) * 1000), 0),
            "disk_total": total,
            "disk_processed": done,
            "disk_remaining": total - done,
        }


async def save(domain: DomainObject, job: BackupJob) -> None:
    await domain.manager.store.run(store_of(domain).write_backup, job.facts())


def document(domain: DomainObject) -> str:
    """virDomainBackupGetXMLDesc."""
    if domain.run is None or domain.run.backup is None:
        raise NoBackup(f"machine {domain.name!r} has no backup under way")
    return format_backup(domain.run.backup.backup)


# -- its course


def began(domain: DomainObject, run: Run, job: BackupJob) -> None:
    """Its disks are busy from here on, and it is followed."""
    run.backup = job
    for item in job.backup.chosen:
        run.block_jobs[item.name] = BlockJob(f"{JOB}{item.name}", DomainBlockJobType.BACKUP, item.name)
    domain.spawn(follow(domain, run, job))


async def follow(domain: DomainObject, run: Run, job: BackupJob) -> None:
    machine = run.machine
    if machine is None:
        return
    try:
        if job.phase != ENDING:
            await asyncio.gather(*(_follow_one(machine, run, job, name) for name in job.jobs))
            if domain.run is not run:
                return
            job.phase, job.outcome = ENDING, _outcome(job)
            await save(domain, job)
        await _conclude(domain, run, job)
    except KvikError as error:
        if domain.run is run:  # else its end is dealt with where the machine's is
            logger.warning("the backup of machine %s: %s", domain.name, error)
            domain.log.note(f"the backup was not followed to its end: {error}")
    finally:
        job.over.set()


async def _follow_one(machine: Machine, run: Run, job: BackupJob, name: str) -> None:
    last: JobState | None = None
    async for state in machine.backups.follow(name):
        last = job.states[name] = state
    if last is not None and last.concluded and not last.error:
        return
    if not job.aborted and not run.ended.is_set():
        job.failure = job.failure or (last.error if last is not None else "") or f"job {name} is gone"
        with contextlib.suppress(KvikError):  # what goes on all the same is ended with the rest
            await _stop(machine, run, job)  # one part without the others is no backup


async def _stop(machine: Machine, run: Run, job: BackupJob) -> None:
    if job.backup.pull:  # first: without its job the scratch image does not show the disk as it was
        await machine.backups.silence(parts_of(run.live, job.backup))
    for name in job.jobs:
        state = job.states.get(name)
        if state is None or not state.concluded:
            await machine.backups.cancel(name)


def _outcome(job: BackupJob) -> str:
    if job.failure:
        return FAILED
    # Being ended is how a backup that is pulled ends well.
    return CANCELLED if job.aborted and not job.backup.pull else COMPLETED


async def abort(domain: DomainObject) -> None:
    """virDomainAbortJob: returns when nothing is left of it in the VMM."""
    run = domain.run
    job = run.backup if run is not None else None
    if run is None or job is None:
        raise OperationInvalid(f"no backup of machine {domain.name!r} is under way")
    machine = domain.require_machine()
    if job.over.is_set():  # the VMM did not answer whoever followed it
        job.over.clear()
        domain.spawn(follow(domain, run, job))
    if job.phase == RUNNING:
        job.aborted = True
        await save(domain, job)
        await _stop(machine, run, job)
    try:
        async with asyncio.timeout(ABORT_WAIT):
            await job.over.wait()
    except TimeoutError:
        raise OperationTimeout(
            f"the backup of machine {domain.name!r} has not ended after {ABORT_WAIT:g} s; it was told to",
            remedy=f"kvik domjobinfo {domain.name} shows whether it is still there",
        ) from None


async def _conclude(domain: DomainObject, run: Run, job: BackupJob) -> None:
    machine = domain.require_machine()
    states = dict(job.states)
    await machine.backups.clear(parts_of(run.live, job.backup))
    if job.outcome != COMPLETED and not job.backup.pull and job.checkpoint in domain.checkpoints.all:
        await checkpoint_delete.remove(domain, job.checkpoint)
        domain.log.note(f"checkpoint {job.checkpoint} was removed: the backup that it came with is not whole")
    await in_thread(_remove_files, job)
    await domain.manager.store.run(store_of(domain).remove_backup)
    for item in job.backup.chosen:
        block_job = run.block_jobs.pop(item.name, None)
        if block_job is not None:
            failed = states.get(block_job.id, JobState()).error
            status = _Status.FAILED if failed else _Status.CANCELED if job.outcome == CANCELLED else _Status.COMPLETED
            tell(domain, disk_of(run, block_job), block_job, status)
    run.backup = None
    domain.live_changed()
    over(domain, job)


def over(domain: DomainObject, job: BackupJob) -> None:
    """What is told of it when it has ended, however that was."""
    figures: dict[str, int | str | bool] = {**job.figures()}
    if job.failure:
        figures["errmsg"] = job.failure
    domain.completed_job = (_TYPES.get(job.outcome, DomainJobType.FAILED), figures)
    domain.log.note(f"backup {job.outcome}{': ' + job.failure if job.failure else ''}")
    domain.emit("job-completed", params={**figures, "success": job.outcome == COMPLETED})
    job.over.set()


def _remove_files(job: BackupJob) -> None:
    """Scratch images and sockets always; targets that are not whole."""
    if job.backup.pull or job.outcome != COMPLETED:
        for path in job.created:
            new_image.remove(path)
    server = job.backup.server
    if server is not None and server.socket:
        _remove_socket(server.socket)


def _remove_socket(path: str) -> None:
    with contextlib.suppress(OSError):
        if Path(path).is_socket():
            Path(path).unlink()


# -- what did not come to be, and what is left by others


async def undo(domain: DomainObject, job: BackupJob) -> None:
    """As if it had never been asked for. Raises `KvikError`; then its facts stay, and this is done again."""
    run = domain.run
    if run is not None and run.machine is not None:
        await run.machine.backups.clear(parts_of(run.live, job.backup))
    known = domain.checkpoints
    for checkpoint in (known.pending.get(job.checkpoint or ""), known.all.get(job.checkpoint or "")):
        if checkpoint is not None:
            await take_back(domain, checkpoint)
    job.outcome = job.outcome or FAILED
    await in_thread(_remove_files, job)
    await domain.manager.store.run(store_of(domain).remove_backup)


async def found(domain: DomainObject) -> BackupJob | None:
    """What a daemon before us left, or an attempt to clear up that failed."""
    store = store_of(domain)
    try:
        facts = await domain.manager.store.run(store.read_backup)
        return BackupJob.from_facts(facts) if facts is not None else None
    except (ValueError, KvikError) as error:
        domain.manager.warnings.append(await domain.manager.store.run(store.set_backup_aside, str(error)))
        return None


async def take_up(domain: DomainObject, run: Run) -> None:
    """The machine was found again. Raises `KvikError` where its VMM does not answer."""
    job = await found(domain)
    if job is None or run.machine is None:
        return
    if job.phase == STARTING:
        await undo(domain, job)
        domain.log.note("a backup that the last daemon was about to begin was taken back")
        return
    states = await run.machine.backups.states()
    job.states = {name: states[name] for name in job.jobs if name in states}
    began(domain, run, job)


async def machine_gone(domain: DomainObject, run: Run) -> None:
    """The machine is off, and the backup with it. Bitmaps are in the images: of a checkpoint whose backup is not whole
    nothing is known any more, and a later one can have its name."""
    job = run.backup
    if job is None:
        return
    run.backup = None
    if job.phase != ENDING:
        job.outcome, job.failure = FAILED, job.failure or "the machine ended"
    try:
        await _forget(domain.manager, store_of(domain), job)
    except KvikError as error:  # its facts stay, and the next daemon clears up
        logger.warning("what a backup of machine %s left behind is still there: %s", domain.name, error)
    if not job.backup.pull and job.outcome != COMPLETED:
        domain.checkpoints.all.pop(job.checkpoint or "", None)
    over(domain, job)


async def _forget(manager: Manager, store: CheckpointStore, job: BackupJob) -> None:
    job.outcome = job.outcome or FAILED
    await in_thread(_remove_files, job)
    if job.checkpoint and (job.phase == STARTING or (not job.backup.pull and job.outcome != COMPLETED)):
        await manager.store.run(store.remove, job.checkpoint)
    await manager.store.run(store.remove_backup)


async def sweep(manager: Manager) -> None:
    """After machines were found again: backups of machines that run no more, also of those that nobody knows."""
    directory = manager.paths.checkpoints
    if not await manager.store.run(directory.is_dir):
        return
    running = {domain.name for domain in manager.domains() if domain.run is not None}
    for path in await manager.store.run(lambda: sorted(directory.iterdir())):
        if path.name in running or not await manager.store.run(path.is_dir):
            continue
        store = CheckpointStore(path)
        try:
            facts = await manager.store.run(store.read_backup)
            if facts is None:
                continue
            job = BackupJob.from_facts(facts)
        except (ValueError, KvikError) as error:
            manager.warnings.append(await manager.store.run(store.set_backup_aside, str(error)))
            continue
        try:
            await _forget(manager, store, job)
        except KvikError as error:
            manager.warnings.append(f"what a backup of machine {path.name!r} left behind is still there: {error}")
