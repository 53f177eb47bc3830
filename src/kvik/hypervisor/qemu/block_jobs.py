"""Work that QEMU does on a machine's block nodes while the guest runs: block-commit, block-stream, blockdev-mirror, ...

    started --> running --> concluded --> dismissed        (stream, commit of a lower layer, backup)
                running --> ready --> concluded            (mirror, commit of the top: goes on until told to complete)

A job is started with auto-dismiss off, so that its result stays in QEMU until somebody has taken it: a daemon that
was killed amid a job finds it in `query-jobs` and goes on. A pull is not (see `QemuDiskJobs.pull`): whether it was done
its images tell, and why not the event of its end. auto-finalize stays on: a job that waits for its finalization keeps
the guest's I/O drained, and nobody may be there to end that.

Events only wake; what is true is asked with `query-jobs`, so that an event lost with a connection does no harm.

Reference: QEMU's qapi/job.json and docs/interop/live-block-operations.rst.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvik.errors import (
    HypervisorError,
    KvikError,
    MonitorError,
    OperationFailed,
    OperationInvalid,
    OperationTimeout,
)
from kvik.qmp.protocol import Event

if TYPE_CHECKING:
    from kvik.hypervisor.qemu.machine import QemuMachine

__all__ = [
    "Job",
    "JobWatchers",
    "cancel_job",
    "complete_job",
    "conclude",
    "dismiss_job",
    "find_job",
    "follow_job",
    "list_jobs",
    "run_job",
    "set_job_speed",
    "start_job",
]

INTERVAL = 0.5  # seconds between two looks at a job's progress
_DEADLINE = 30.0  # of one command: starting or ending a job drains the disk's requests first
_TAKES_AUTO_DISMISS = frozenset({"block-commit", "block-stream", "blockdev-mirror", "blockdev-backup"})

Progress = Callable[["Job"], None]


@dataclass(frozen=True, slots=True)
class Job:
    """One job as `query-jobs` tells of it; `current` and `total` are bytes."""

    id: str
    type: str  # "commit", "stream", "mirror", "backup", ...
    status: str  # JobStatus: "running", "ready", "pending", "concluded", ...
    current: int
    total: int
    error: str = ""

    @property
    def concluded(self) -> bool:
        return self.status == "concluded"

    @property
    def ready(self) -> bool:
        return self.status in ("ready", "standby")


class JobWatchers:
    """Who waits for which job of one machine."""

    def __init__(self) -> None:
        self._waiting: dict[str, set[asyncio.Event]] = {}
        self._ends: dict[str, str] = {}  # of jobs that are waited for: the error that they ended with, or ""

    @contextmanager
    def watch(self, job_id: str) -> Iterator[asyncio.Event]:
        event = asyncio.Event()
        waiting = self._waiting.setdefault(job_id, set())
        waiting.add(event)
        try:
            yield event
        finally:
            waiting.discard(event)
            if not waiting:
                self._waiting.pop(job_id, None)
                self._ends.pop(job_id, None)

    def end(self, job_id: str) -> str | None:
        """How a job ended that nobody could ask any more; None if that was not told."""
        return self._ends.get(job_id)

    def heard(self, event: Event) -> None:
        if event.name == "JOB_STATUS_CHANGE" or event.name.startswith("BLOCK_JOB_"):
            name = event.data.get("id") or event.data.get("device")
            if isinstance(name, str):
                if event.name == "BLOCK_JOB_COMPLETED" and name in self._waiting:
                    self._ends[name] = str(event.data.get("error", ""))
                self._wake(self._waiting.get(name, ()))

    def wake_all(self) -> None:
        """After a lost connection, and at the machine's end: everybody looks for himself."""
        for waiting in self._waiting.values():
            self._wake(waiting)

    @staticmethod
    def _wake(waiting: Any) -> None:
        for event in waiting:
            event.set()


async def list_jobs(machine: QemuMachine) -> dict[str, Job]:
    """Every job by its id. Raises `HypervisorError`."""
    reply = await machine.execute("query-jobs")
    jobs = {}
    for item in reply if isinstance(reply, list) else ():
        if isinstance(item, dict) and isinstance(item.get("id"), str):
            error = item.get("error")
            jobs[item["id"]] = Job(
                id=item["id"],
                type=str(item.get("type", "")),
                status=str(item.get("status", "")),
                current=_number(item, "current-progress"),
                total=_number(item, "total-progress"),
                error=error if isinstance(error, str) else "",
            )
    return jobs


def _number(item: Mapping[str, Any], key: str) -> int:
    value = item.get(key)
    return value if isinstance(value, int) and value > 0 else 0


async def find_job(machine: QemuMachine, job_id: str) -> Job | None:
    return (await list_jobs(machine)).get(job_id)


async def start_job(machine: QemuMachine, job_id: str, command: str, arguments: Mapping[str, Any]) -> None:
    """`arguments` without `job-id`. Raises `MonitorError` with QEMU's reason."""
    given: dict[str, Any] = {"job-id": job_id, **arguments}
    if command in _TAKES_AUTO_DISMISS:
        given.setdefault("auto-dismiss", False)
    await machine.execute(command, given, deadline=_DEADLINE)


async def follow_job(machine: QemuMachine, job_id: str) -> AsyncIterator[Job]:
    """The job at each change of its state and every `INTERVAL` seconds, up to "concluded" (for one that QEMU dismisses
    by itself made of the event of its end).

    Ends without that if QEMU does not know the job (any more). A monitor that does not answer is waited for; raises
    `OperationInvalid` when the machine is gone.
    """
    with machine.job_watchers.watch(job_id) as changed:
        while True:
            changed.clear()
            try:
                job = await find_job(machine, job_id)
            except (MonitorError, OperationInvalid):
                raise
            except (HypervisorError, OperationTimeout):
                # Its monitor is being connected again, or a QEMU that drains a slow disk is late.
                if machine.ended:
                    raise
            else:
                if job is None:
                    error = machine.job_watchers.end(job_id)
                    if error is not None:
                        yield Job(job_id, "", "concluded", 0, 0, error)
                    return
                yield job
                if job.concluded:
                    return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(INTERVAL):
                    await changed.wait()


async def complete_job(machine: QemuMachine, job_id: str) -> None:
    """A job that is ready comes to its end: a mirror's device changes over to the copy. Raises `MonitorError`."""
    await machine.execute("job-complete", {"id": job_id}, deadline=_DEADLINE)


async def cancel_job(machine: QemuMachine, job_id: str, *, force: bool = True) -> None:
    """Ends a job; one that has ended already, or is not known, is left as it is.

    Without `force` a mirror that is ready ends with a copy that is complete as of now.
    """
    with contextlib.suppress(MonitorError):
        await machine.execute("block-job-cancel", {"device": job_id, "force": force}, deadline=_DEADLINE)


async def dismiss_job(machine: QemuMachine, job_id: str) -> None:
    """QEMU may forget a job that has concluded."""
    with contextlib.suppress(MonitorError):
        await machine.execute("job-dismiss", {"id": job_id})


async def set_job_speed(machine: QemuMachine, job_id: str, speed: int) -> None:
    """Bytes a second; 0: no limit. Raises `MonitorError`."""
    await machine.execute("block-job-set-speed", {"device": job_id, "speed": speed})


async def conclude(machine: QemuMachine, job_id: str) -> Job:
    """Waits for the end of a job that nothing holds up any more; it stays known to QEMU until it is dismissed.

    Raises `OperationFailed` if it vanished before its result was seen.
    """
    async for job in follow_job(machine, job_id):
        if job.concluded:
            return job
    raise _vanished(machine, job_id)


async def run_job(
    machine: QemuMachine,
    job_id: str,
    command: str,
    arguments: Mapping[str, Any],
    *,
    progress: Progress | None = None,
    deadline: float | None = None,
) -> Job:
    """A whole job: started (or, if QEMU has one with this id already, taken up), seen through and dismissed.

    A job that becomes ready is completed. `progress` is called with each look at it. Raises `MonitorError` if QEMU
    refuses it, `OperationFailed` if it fails or is cancelled by somebody else, `OperationTimeout` after `deadline`
    seconds, and has then cancelled it. If the caller is cancelled the job goes on in QEMU: whoever ends a daemon
    wants the next one to find it; `cancel_job` stops it.
    """
    if await find_job(machine, job_id) is None:
        await start_job(machine, job_id, command, arguments)
    try:
        async with asyncio.timeout(deadline):
            job = await _see_through(machine, job_id, progress)
    except TimeoutError:
        await cancel_job(machine, job_id)
        with contextlib.suppress(KvikError):
            await conclude(machine, job_id)
            await dismiss_job(machine, job_id)
        raise OperationTimeout(
            f"{machine.name}: block job {job_id} was not done within {deadline:g} s and was cancelled",
            remedy="give it more time, or look at how fast the host's storage is",
        ) from None
    await dismiss_job(machine, job_id)
    if job.error:
        raise OperationFailed(f"{machine.name}: block job {job_id} failed: {job.error}")
    return job


async def _see_through(machine: QemuMachine, job_id: str, progress: Progress | None) -> Job:
    completing = False
    async for job in follow_job(machine, job_id):
        if progress is not None:
            progress(job)
        if job.concluded:
            return job
        if job.status == "ready" and not completing:
            completing = True
            await complete_job(machine, job_id)
    raise _vanished(machine, job_id)


def _vanished(machine: QemuMachine, job_id: str) -> OperationFailed:
    return OperationFailed(
        f"{machine.name}: block job {job_id} is gone, and how it ended is not known",
        remedy="somebody else dismissed it on the machine's monitor; look at its images before it is started again",
    )
