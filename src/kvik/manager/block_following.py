"""A block job's course: followed until it is over, what its end changes, and found again by the next daemon.

How it came to be is in `block_jobs.py`, which also draws the whole.

    followed --> settled: what it did is in the documents, its result and the files to remove are in the status
             --> cleared: the VMM forgets it and lets go of images, files go --> out of the status

A job without its place in the status has nothing left anywhere.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kvik.conf.devices.disk import Disk
from kvik.conf.enums import (
    ConnectDomainEventBlockJobStatus,
    DomainBlockJobType,
)
from kvik.conf.tree import clone
from kvik.errors import (
    HypervisorError,
    KvikError,
    MonitorError,
    OperationFailed,
    OperationTimeout,
    OperationUnsupported,
)
from kvik.host.threads import in_thread
from kvik.hypervisor import new_image
from kvik.hypervisor.driver import DiskJobs, JobState
from kvik.hypervisor.layers import Layer
from kvik.manager import block_chain, disks, pivots
from kvik.manager.checkpoints import merges
from kvik.manager.pivots import Pivot

if TYPE_CHECKING:
    from kvik.manager.domain import DomainObject
    from kvik.manager.run import Run

logger = logging.getLogger(__name__)

__all__ = ["TWO_PHASE", "BlockJob", "disk_of", "follow", "remember", "take_up", "tell", "unknown"]

_Status = ConnectDomainEventBlockJobStatus
_NAMES = {
    DomainBlockJobType.COPY: "copy",
    DomainBlockJobType.PULL: "pull",
    DomainBlockJobType.COMMIT: "commit",
    DomainBlockJobType.ACTIVE_COMMIT: "commit",
}
TWO_PHASE = (DomainBlockJobType.COPY, DomainBlockJobType.ACTIVE_COMMIT)
_PREFIXES = ("copy-", "pull-", "commit-")
_RETRY_FIRST, _RETRY_LAST = 0.2, 10.0  # seconds between questions to a VMM that does not answer


class BlockJob:
    """One job; all but `over` and `failure` are in the status file."""

    __slots__ = (
        "aborted", "above", "base", "created", "delete", "disk", "failure", "id", "over", "ready", "remove", "result",
        "type",
    )  # fmt: skip

    def __init__(
        self,
        id: str,
        type: int,
        disk: str,
        *,
        above: int = 0,
        base: int | None = None,
        delete: bool = False,
        created: str = "",
        ready: bool = False,
        aborted: bool = False,
        result: int | None = None,
        remove: Sequence[str] = (),
    ) -> None:
        self.id = id
        self.type = type  # virDomainBlockJobType
        self.disk = disk  # its target
        self.above = above  # number of the image that stays on top of what is merged
        self.base = base  # number of the image that stays below (pull), or that takes everything (commit)
        self.delete = delete  # remove the files of images that were merged
        self.created = created  # the file that was made for a copy: goes if that comes to nothing
        self.ready = ready
        self.aborted = aborted
        self.result = result  # virConnectDomainEventBlockJobStatus, once the documents tell what it did
        self.remove = list(remove)  # files that nothing needs then
        self.over = asyncio.Event()
        self.failure = ""

    def facts(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__ if name not in ("over", "failure")}

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> BlockJob:
        """Raises `TypeError` for what `facts` would not have written."""
        return cls(**facts)


def unknown(error: BaseException) -> bool:
    """Whether the VMM may have done what it was asked although an error came back."""
    if isinstance(error, KvikError):
        return isinstance(error, OperationTimeout | HypervisorError) and not isinstance(error, MonitorError)
    return True


# -- while it runs, and when it is over


async def follow(domain: DomainObject, run: Run, job: BlockJob) -> None:
    """Until nothing is left of it. A VMM that does not answer is asked again."""
    pause = _RETRY_FIRST
    try:
        while domain.run is run and run.machine is not None:
            try:
                await _to_its_end(domain, run, job, run.machine.disk_jobs)
                return
            except KvikError as error:
                if domain.run is not run:
                    return
                logger.warning("block job %s of machine %s: %s", job.id, domain.name, error)
                if not unknown(error):
                    domain.log.note(f"block job {job.id} was not followed to its end: {error}")
                    job.failure = str(error)
                    return
            await asyncio.sleep(pause)
            pause = min(pause * 2, _RETRY_LAST)
    finally:
        job.over.set()


async def _to_its_end(domain: DomainObject, run: Run, job: BlockJob, jobs: DiskJobs) -> None:
    if job.result is None:
        last: JobState | None = None
        async for state in jobs.follow(job.id):
            last = state
            if state.ready and not job.ready and domain.run is run:
                _ready(domain, run, job)
            if state.concluded and not state.error and not job.aborted:
                _pivot(domain, job, switched=True)  # the VMM may be gone before it can be asked
        if domain.run is not run:
            return
        await _settle(domain, run, job, jobs, last)
    await _clear(domain, run, job, jobs)


def _ready(domain: DomainObject, run: Run, job: BlockJob) -> None:
    job.ready = True
    disk = disk_of(run, job)
    if disk is not None and disk.mirror is not None:
        disk.mirror.ready = disk.mirror.ready or "yes"
    domain.live_changed()
    domain.spawn(domain.save_quietly())
    tell(domain, disk, job, _Status.READY)


def disk_of(run: Run, job: BlockJob) -> Disk | None:
    return next((disk for disk in run.live.devices.disks if disk.target.dev == job.disk), None)


def tell(domain: DomainObject, disk: Disk | None, job: BlockJob, status: int) -> None:
    path = (disk.source.location or "") if disk is not None and disk.source is not None else ""
    domain.emit("block-job", path=path, type=job.type, status=status)
    domain.emit("block-job-2", disk=job.disk, type=job.type, status=status)


async def _settle(domain: DomainObject, run: Run, job: BlockJob, jobs: DiskJobs, state: JobState | None) -> None:
    """The documents tell what it did. Done again if the daemon is killed before the status says so."""
    disk = disk_of(run, job)
    if disk is None:  # detached, and its job with it
        job.result = _Status.CANCELED
        return
    before = clone(disk)
    failed = state is not None and bool(state.error)
    done = await _did(disk, job, jobs, failed=failed)
    gone: list[Layer] = []
    if done:
        if job.type == DomainBlockJobType.COPY and disk.mirror is not None:
            block_chain.copied(disk, disk.mirror)
        elif job.type == DomainBlockJobType.ACTIVE_COMMIT and job.base is not None:
            gone = block_chain.active_is_base(disk, job.base)
        else:
            gone = block_chain.merged(disk, job.above, job.base)
        pivot = _pivot(domain, job, switched=True)
        await merges.moved(domain, before, disk, job.base if job.type == DomainBlockJobType.COMMIT else None)
        written = await _save_definition(domain, before, disk)
        if pivot is not None and written:
            await domain.manager.pivots.forget(pivot)
    elif (pivot := _pivot(domain, job, switched=False)) is not None:
        await domain.manager.pivots.forget(pivot)
    if not done and not job.aborted:
        job.failure = (state.error if state is not None else "") or "it did not come to its end"
    whole = job.aborted and job.ready and not failed  # a copy that was told to be the one of that moment
    if done and job.delete:
        job.remove = [layer.source.location for layer in gone if layer.type == "file" and layer.source.location]
    elif not done and job.created and not whole:
        job.remove = [job.created]
    if done or (whole and state is not None and job.type == DomainBlockJobType.COPY):
        job.result = _Status.COMPLETED
    else:
        job.result = _Status.CANCELED if job.aborted else _Status.FAILED
    disk.mirror = None
    await disks.renew_uses(run)
    domain.live_changed()
    await domain.save_quietly()
    how = "done" if done else "aborted" if job.aborted else f"failed: {job.failure}"
    domain.log.note(f"block job {job.id}: {how}")


def _pivot(domain: DomainObject, job: BlockJob, *, switched: bool) -> Pivot | None:
    """What was written down of a change to another image, now that it is known what became of that."""
    pivot = domain.manager.pivots.get(domain, job.disk) if job.type in TWO_PHASE else None
    if pivot is not None:
        pivot.switched = switched
    return pivot


async def _did(disk: Disk, job: BlockJob, jobs: DiskJobs, *, failed: bool) -> bool:
    """Whether it did what it was to do, by the images that the VMM has now."""
    there = await jobs.chain(disk)
    if not there:
        raise OperationFailed(f"the VMM does not say which images disk {job.disk} has")
    if job.type in TWO_PHASE:
        mirror = disk.mirror
        wanted = mirror.source.index if mirror is not None and mirror.source is not None else job.base
        return there[0] == wanted
    gone = {layer.key for layer in block_chain.merged(clone(disk), job.above, job.base)}
    return gone.isdisjoint(there) if gone else not failed


async def _clear(domain: DomainObject, run: Run, job: BlockJob, jobs: DiskJobs) -> None:
    """Nothing is left of it anywhere."""
    disk = disk_of(run, job)
    await jobs.dismiss(job.id)  # first: until then it holds the images that were merged
    if disk is not None:
        await jobs.tidy(disk)
    for path in job.remove:
        await in_thread(new_image.remove, path)
        domain.log.note(f"removed {path}, which nothing needs any more")
    run.block_jobs.pop(job.disk, None)
    domain.live_changed()
    await domain.save_quietly()
    assert job.result is not None
    tell(domain, disk, job, job.result)


async def _save_definition(domain: DomainObject, before: Disk, after: Disk) -> bool:
    """The next start has the same disk; False if that could not be written."""
    try:
        await pivots.save_definition(domain, before, after)
    except KvikError as error:
        domain.log.note(f"the definition still has the old images of disk {before.target.dev}: {error}")
        logger.warning("the definition of machine %s was not changed after a block job: %s", domain.name, error)
        return False
    return True


# -- a daemon that comes back


def remember(domain: DomainObject, run: Run, facts: Sequence[Mapping[str, Any]]) -> None:
    """The jobs of the status have their place in the next one, whatever the VMM says of them, and when."""
    for item in facts:
        try:
            job = BlockJob.from_facts(item)
        except TypeError:
            domain.log.note("a block job of the last daemon is not understood")
            continue
        run.block_jobs[job.disk] = job


async def take_up(domain: DomainObject, run: Run) -> None:
    """Goes on with what was remembered; a job that never began ends at once. What is left of others goes."""
    if run.machine is None:
        return
    try:
        jobs = run.machine.disk_jobs
    except OperationUnsupported:
        return
    ours = {job.id for job in run.block_jobs.values()}
    for job in list(run.block_jobs.values()):
        domain.spawn(follow(domain, run, job))
    for name, state in (await jobs.states()).items():
        if name not in ours and state.concluded and name.startswith(_PREFIXES):
            await jobs.dismiss(name)
