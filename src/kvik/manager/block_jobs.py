"""Block jobs on the disks of a running machine: copy (`block_copy`), pull, commit, in libvirt's terms.

    asked for --> written into the status --> started in the VMM --> followed --> (ready, told how to end) --> over
    --> live document --> definition --> its result in the status --> the VMM forgets it --> images let go --> files
    --> status without it

The daemon may be killed at any arrow. The next one goes on with every job that is in the status: one that the VMM does
not know never began or is over; one that is over waits there with its result; what follows is done (again). Which
images the guest has now is asked of the VMM, never concluded from what was asked of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, Any, NamedTuple

from kvik.conf.devices.disk import BackingStore, Disk, Format, Mirror
from kvik.conf.enums import (
    DomainBlockCommitFlags,
    DomainBlockJobAbortFlags,
    DomainBlockJobType,
)
from kvik.conf.tree import clone
from kvik.errors import (
    InvalidArgument,
    OperationInvalid,
    OperationUnsupported,
    ResourceBusy,
)
from kvik.host.reach import reach
from kvik.hypervisor import new_image
from kvik.hypervisor.driver import DiskJobs
from kvik.hypervisor.layers import Layer, has_medium, layers
from kvik.manager import block_chain, disks, pivots
from kvik.manager.block_following import TWO_PHASE, BlockJob, follow, unknown
from kvik.manager.checkpoints import merges
from kvik.manager.snapshots.files import snapshot_in

if TYPE_CHECKING:
    from kvik.manager.domain import DomainObject
    from kvik.manager.run import Run

logger = logging.getLogger(__name__)

__all__ = [
    "JobInfo",
    "abort",
    "begun",
    "commit",
    "disk_for_job",
    "info",
    "pull",
    "resize",
    "set_speed",
    "set_threshold",
    "speed_of",
]

MIB = 1 << 20
SPEED_MAX = (1 << 63) - 1


class JobInfo(NamedTuple):
    """As virDomainBlockJobInfo: `bandwidth` in bytes a second; `cur` equals `end` when a copy is ready."""

    type: int
    bandwidth: int
    cur: int
    end: int


# -- asked for by users


async def disk_for_job(domain: DomainObject, name: str) -> tuple[Disk, DiskJobs]:
    """A disk that a job may begin on. Raises `OperationInvalid`, `OperationUnsupported`, `NoDevice`, `ResourceBusy`."""
    machine = domain.require_machine()
    jobs = machine.disk_jobs
    assert domain.run is not None
    disk = block_chain.find_disk(domain.run.live, name)
    target = disk.target.dev or ""
    if not has_medium(disk):
        raise OperationInvalid(f"disk '{target}' has no source file to be copied or merged")
    if disk.readonly or disk.device != "disk":
        raise OperationUnsupported(f"read-only disk '{target}' cannot be copied or merged")
    if disk.transient is not None:
        raise OperationUnsupported(
            f"transient disk '{target}' cannot be copied or merged: what was written to it is thrown away",
            remedy="leave <transient/> out of the definition and start the machine anew",
        )
    job = domain.run.block_jobs.get(target)
    if job is not None and job.result is not None:  # over for all who ask; what is left of it goes in a moment
        await job.over.wait()
        job = domain.run.block_jobs.get(target) if domain.run is not None else None
    if job is not None:
        raise ResourceBusy(
            f"disk '{target}' already in active block job", remedy=f"kvik blockjob {domain.name} {target} --info"
        )
    return disk, jobs


def speed_of(bandwidth: int, in_bytes: bool) -> int:
    speed = bandwidth if in_bytes else bandwidth * MIB
    if speed > SPEED_MAX:
        raise InvalidArgument(f"bandwidth must be less than {SPEED_MAX // MIB} MiB/s")
    return speed


async def pull(domain: DomainObject, name: str, base: str | None, speed: int, *, relative: bool = False) -> None:
    disk, jobs = await disk_for_job(domain, name)
    run = domain.run
    assert run is not None
    chain = list(layers(disk))
    below = block_chain.find_image(disk, chain, base) if base else None
    if relative and below is None:
        raise InvalidArgument("flag VIR_DOMAIN_BLOCK_REBASE_RELATIVE is valid only with non-null base")
    if len(chain) < 2:
        raise OperationInvalid(f"disk '{disk.target.dev}' has no backing file: there is nothing to pull")
    if below is not None and below.number == 0:
        raise InvalidArgument(f"base '{base}' is the image that the guest writes to")
    target = disk.target.dev or ""
    job = BlockJob(
        f"pull-{target}-{chain[0].key}",
        DomainBlockJobType.PULL,
        target,
        above=chain[0].key,
        base=below.key if below is not None else None,
    )
    text = block_chain.reference(chain[0], below, relative=relative) if below is not None else None
    await merges.carry(
        domain, disk, [layer.key for layer in chain[1 : below.number if below else None]], chain[0].key, new=False
    )
    async with begun(domain, run, job, disk):
        await jobs.pull(job.id, disk, job.base, text, speed=speed)


async def commit(
    domain: DomainObject, name: str, base: str | None, top: str | None, *, bandwidth: int = 0, flags: int = 0
) -> None:
    """virDomainBlockCommit. Without `base` into the lowest image, without `top` from the one the guest writes to."""
    known = DomainBlockCommitFlags
    disk, jobs = await disk_for_job(domain, name)
    run = domain.run
    assert run is not None
    chain = list(layers(disk))
    target = disk.target.dev or ""
    upper = block_chain.find_image(disk, chain, top) if top else chain[0]
    if not flags & known.ACTIVE and upper.number == 0:
        raise InvalidArgument(f"commit of '{target}' active layer requires active flag", remedy="--active, or --pivot")
    if flags & known.ACTIVE and upper.number:
        raise InvalidArgument(f"active commit requested but '{upper.source.location}' is not active")
    if upper.number + 1 >= len(chain):
        raise InvalidArgument(f"top '{upper.source.location}' in chain for '{target}' has no backing file")
    if base:
        lower = block_chain.find_image(disk, chain, base)
    else:
        lower = chain[upper.number + 1] if flags & known.SHALLOW else chain[-1]
    if lower.number <= upper.number:
        raise InvalidArgument(
            f"base '{lower.source.location}' is not below '{upper.source.location}' in chain for '{target}'"
        )
    if base and flags & known.SHALLOW and lower.number != upper.number + 1:
        raise InvalidArgument(
            f"base '{lower.source.location}' is not immediately below '{upper.source.location}' in chain for '{target}'"
        )
    await _check_written(domain, chain[upper.number + 1 : lower.number + 1])
    active = upper.number == 0
    above = chain[0] if active else chain[upper.number - 1]
    kind = DomainBlockJobType.ACTIVE_COMMIT if active else DomainBlockJobType.COMMIT
    job = BlockJob(
        f"commit-{target}-{upper.key}",
        kind,
        target,
        above=above.key,
        base=lower.key,
        delete=bool(flags & known.DELETE),
    )
    text = None if active else block_chain.reference(above, lower, relative=bool(flags & known.RELATIVE))
    if active:
        source = clone(lower.source)
        source.index = lower.key
        disk.mirror = Mirror(
            type=lower.type,  # type: ignore[arg-type]  # a layer's type is a source's
            job="active-commit",
            format=Format(type=lower.format),
            source=source,
            backing_store=BackingStore(),
        )
    if not active:
        gone = [layer.key for layer in chain[upper.number : lower.number]]
        await merges.carry(domain, disk, gone, lower.key)
    async with begun(domain, run, job, disk):
        speed = speed_of(bandwidth, bool(flags & known.BANDWIDTH_BYTES))
        await jobs.commit(job.id, disk, upper.key, lower.key, text, speed=speed)


async def _check_written(domain: DomainObject, images: list[Layer]) -> None:
    """Images that others read from cannot be written to under their feet, nor those that a snapshot is kept in."""
    for layer in images:
        kept = await snapshot_in(domain.manager, layer.source.location or "")
        if kept is not None:
            raise ResourceBusy(
                f"{layer.source.location} keeps {kept}, which would not be what it was",
                remedy="delete that snapshot: its data is merged then",
            )
    uses = [use for layer in images if (use := await reach(disks.image_use, layer.source)) is not None]
    disks.check_unused(uses, domain.manager.disk_uses(domain))


@contextlib.asynccontextmanager
async def begun(domain: DomainObject, run: Run, job: BlockJob, disk: Disk) -> Any:
    """The job is in the status before the VMM hears of it; if that refuses, nothing of it stays."""
    run.block_jobs[job.disk] = job
    domain.live_changed()
    try:
        await domain.save_status()
        yield
    except BaseException as error:
        if domain.run is run and unknown(error):  # it may have begun: whoever follows it finds out
            domain.spawn(follow(domain, run, job))
        elif domain.run is run:
            run.block_jobs.pop(job.disk, None)
            disk.mirror = None
            await disks.renew_uses(run)
            domain.live_changed()
            await asyncio.shield(domain.save_quietly())
        raise
    domain.log.note(f"block job {job.id} began")
    domain.live_changed()
    await domain.save_quietly()
    domain.spawn(follow(domain, run, job))


async def abort(domain: DomainObject, name: str, flags: int) -> None:
    """virDomainBlockJobAbort: end a job; with PIVOT the machine changes over to its copy. Of a machine that is off, and
    was told to change over when it ended: which image it goes on with (`pivots`)."""
    known = DomainBlockJobAbortFlags
    if await pivots.decide(domain, name, new=bool(flags & known.PIVOT)):
        return
    disk, jobs, job = _active(domain, name)
    if job.type == DomainBlockJobType.BACKUP:
        raise OperationUnsupported(
            f"disk '{job.disk}' is being backed up", remedy=f"end the whole backup: kvik domjobabort {domain.name}"
        )
    pivot = bool(flags & known.PIVOT)
    if pivot and job.type not in TWO_PHASE:
        raise OperationInvalid(f"job type of disk '{job.disk}' does not support pivot")
    if pivot and not job.ready:
        raise ResourceBusy(
            f"block copy still active: disk '{job.disk}' not ready for pivot yet", remedy="wait, or blockcopy --wait"
        )
    if disk.mirror is not None:
        disk.mirror.ready = "pivot" if pivot else "abort"
        domain.live_changed()
    job.aborted = not pivot
    await domain.save_quietly()
    if pivot:
        earlier = domain.manager.pivots.get(domain, job.disk)
        try:
            await merges.carry_to_mirror(domain, disk)
            await domain.manager.pivots.intend(domain, *_changed_over(disk, job))
            await jobs.complete(job.id)
        except BaseException as error:
            intended = domain.manager.pivots.get(domain, job.disk)
            if intended is not None and earlier is None and not unknown(error):  # refused, and never asked before
                await domain.manager.pivots.forget(intended)
            if disk.mirror is not None:
                disk.mirror.ready = "yes"
                domain.live_changed()
            raise
    else:
        # A copy that is ready ends as one that is whole as of now.
        await jobs.cancel(job.id, force=not job.ready or job.type != DomainBlockJobType.COPY)
    if not flags & known.ASYNC:
        await job.over.wait()
        if pivot and job.failure:
            raise OperationInvalid(f"disk '{job.disk}' did not change over to its copy: {job.failure}")


def _changed_over(disk: Disk, job: BlockJob) -> tuple[Disk, Disk]:
    """The disk as it is, and as it will be."""
    before, after = clone(disk), clone(disk)
    before.mirror = None
    if job.type == DomainBlockJobType.ACTIVE_COMMIT and job.base is not None:
        block_chain.active_is_base(after, job.base)
    elif after.mirror is not None:
        block_chain.copied(after, after.mirror)
    return before, after


def _active(domain: DomainObject, name: str) -> tuple[Disk, DiskJobs, BlockJob]:
    machine = domain.require_machine()
    assert domain.run is not None
    disk = block_chain.find_disk(domain.run.live, name)
    job = domain.run.block_jobs.get(disk.target.dev or "")
    if job is None or job.result is not None:
        raise OperationInvalid(f"disk '{disk.target.dev}' does not have an active block job")
    return disk, machine.disk_jobs, job


async def info(domain: DomainObject, name: str) -> JobInfo | None:
    """None if there is no job."""
    machine = domain.require_machine()
    assert domain.run is not None
    disk = block_chain.find_disk(domain.run.live, name)
    job = domain.run.block_jobs.get(disk.target.dev or "")
    if job is None:
        return None
    if job.type == DomainBlockJobType.BACKUP:  # which a VMM may have that has no other jobs
        copied = (await machine.backups.states()).get(job.id)
        return JobInfo(job.type, 0, *((copied.current, copied.total) if copied is not None else (1, 1)))
    jobs = machine.disk_jobs
    state = (await jobs.states()).get(job.id)
    if job.result is not None or state is None:  # over in the VMM; it ends here when nothing is left of it
        waits = job.type in TWO_PHASE and not job.ready  # equal numbers would say that it can be pivoted
        return None if job.over.is_set() else JobInfo(job.type, 0, 0 if waits else 1, 1)
    cur, end = state.current, state.total
    if job.type in TWO_PHASE and not job.ready:
        # Clients take equal numbers for "ready".
        cur, end = (0, 1) if end == 0 else (min(cur, end - 1), end)
    elif job.type in TWO_PHASE and end == 0:
        cur, end = 1, 1
    return JobInfo(job.type, await jobs.speed(job.id), cur, end)


async def set_speed(domain: DomainObject, name: str, bandwidth: int, in_bytes: bool) -> None:
    speed = speed_of(bandwidth, in_bytes)
    _, jobs, job = _active(domain, name)
    await jobs.set_speed(job.id, speed)


async def resize(domain: DomainObject, name: str, size: int, *, to_capacity: bool) -> None:
    """A larger disk, which the guest is told of; `size` in bytes, or all that the device below has."""
    machine = domain.require_machine()
    assert domain.run is not None
    disk = block_chain.find_disk(domain.run.live, name)
    if not has_medium(disk) or disk.readonly or disk.device == "cdrom":
        raise OperationInvalid(f"disk '{name}' is read-only or empty and cannot be resized")
    raw = disk.driver is None or disk.driver.type in (None, "raw")
    if to_capacity:
        if size:
            raise InvalidArgument("block resize to full capacity requires size of 0")
        if disk.type != "block" or not raw or disk.source is None:
            raise InvalidArgument("block resize to full capacity supported only with 'raw' local block devices")
        size = await reach(new_image.device_size, disk.source.location or "")
    if not 0 < size < 1 << 63:
        raise InvalidArgument(f"a disk of {size} bytes cannot be")
    size = -(-size // 512) * 512
    now = await machine.disk_size(disk)
    if size < now:
        raise OperationInvalid(
            f"disk '{name}' has {now} bytes: {size} would cut off the end of what the guest has on it",
            remedy="shut the machine down, shrink the guest's file system, then kvik img resize --shrink",
        )
    await machine.resize_disk(disk, size)


async def set_threshold(domain: DomainObject, name: str, threshold: int) -> None:
    """One event when an image (`vda`, `vda[2]`) grows beyond this many bytes; 0: none."""
    jobs = domain.require_machine().disk_jobs
    assert domain.run is not None
    target, index = block_chain.split_target(name)
    disk = block_chain.find_disk(domain.run.live, target)
    chain = list(layers(disk))
    if not chain:
        raise OperationInvalid(f"disk '{target}' has no source file whose growth could be watched")
    image = block_chain.find_image(disk, chain, name) if index is not None else chain[0]
    await jobs.set_threshold(disk, image.key, threshold)
