"""Merging images that a running machine has open: block jobs of its VMM, which rewrite its documents as they end.

back      block-commit: the data of an image comes down into the one below; of the guest's own, it then changes over
forward   block-stream into the image that the guest writes to; into another one the VMM cannot
"""

from __future__ import annotations

import asyncio
from os.path import normpath
from typing import TYPE_CHECKING

from kvik.conf.devices.disk import Disk
from kvik.conf.enums import DomainBlockCommitFlags, DomainBlockJobAbortFlags, DomainBlockJobType
from kvik.errors import KvikError, OperationFailed, OperationUnsupported
from kvik.hypervisor.layers import layers
from kvik.manager import block_chain, block_jobs
from kvik.manager.block_following import TWO_PHASE
from kvik.manager.snapshots.plan import FORWARD, Step

if TYPE_CHECKING:
    from kvik.manager.domain import DomainObject

__all__ = ["back", "can", "chain_with", "finish", "forward"]

POLL = 0.05  # seconds between looks whether a commit of the guest's own image has caught up with it


def chain_with(domain: DomainObject, *paths: str) -> tuple[Disk, list[str]] | None:
    """The running disk whose chain has any of these files, and that chain from the top down."""
    if domain.run is None:
        return None
    for disk in domain.run.live.devices.disks:
        chain = [normpath(layer.source.location or "") for layer in layers(disk)]
        if any(path in chain for path in paths):
            return disk, chain
    return None


def can(domain: DomainObject, step: Step) -> bool:
    """Whether the machine, which has at least one of the two open, can merge them."""
    found = chain_with(domain, step.path, step.into)
    if found is None or domain.run is None or domain.run.machine is None:
        return False
    disk, chain = found
    try:
        merges = domain.run.machine.disk_jobs.merges(disk, active=chain[0] == step.path)
    except OperationUnsupported:
        return False
    if not merges or disk.target.dev in domain.run.block_jobs or step.path not in chain or step.into not in chain:
        return False  # the VMM has but one of the two open: when the machine is off both can be worked on
    return step.kind != FORWARD or chain[0] == step.into


async def forward(domain: DomainObject, step: Step, base: str | None) -> None:
    """`base`: what the image that goes rests on."""
    found = chain_with(domain, step.path, step.into)
    assert found is not None and found[0].target.dev is not None
    await block_jobs.pull(domain, found[0].target.dev, base, 0)
    await _end(domain, found[0].target.dev, pivot=False)
    _check(domain, step)


async def back(domain: DomainObject, step: Step) -> None:
    found = chain_with(domain, step.path, step.into)
    assert found is not None and found[0].target.dev is not None
    target, top = found[0].target.dev, found[1][0] == step.path
    flags = DomainBlockCommitFlags.ACTIVE if top else 0
    await block_jobs.commit(domain, target, step.into, None if top else step.path, flags=flags)
    await _end(domain, target, pivot=top)
    _check(domain, step)


async def finish(domain: DomainObject) -> None:
    """Waits for the merges that a daemon before us began. Commits of the guest's own images wait to be told to end."""
    run, tree = domain.run, domain.snapshots
    for job in list(run.block_jobs.values()) if run is not None else []:
        disk = block_chain.find_disk(run.live, job.disk) if run is not None else None
        source = disk.mirror.source if disk is not None and disk.mirror is not None else None
        ours = source is not None and normpath(source.location or "") in tree.made | tree.originals
        pivot = job.type == DomainBlockJobType.ACTIVE_COMMIT and ours
        if pivot or job.result is not None or job.type not in TWO_PHASE:
            await _end(domain, job.disk, pivot=pivot)


async def _end(domain: DomainObject, target: str, *, pivot: bool) -> None:
    run = domain.run
    job = run.block_jobs.get(target) if run is not None else None
    if run is None or job is None:
        return
    while not job.over.is_set() and not run.ended.is_set():
        if pivot and job.ready and job.result is None:
            pivot = False
            try:
                flags = DomainBlockJobAbortFlags.PIVOT | DomainBlockJobAbortFlags.ASYNC
                await block_jobs.abort(domain, target, flags)
            except KvikError:
                if await _is_ready(domain, job.id):
                    raise  # else it was told before, or is over
        await asyncio.sleep(POLL)
    if job.failure:
        raise OperationFailed(f"machine {domain.name!r}: disk {target}: {job.failure}")


async def _is_ready(domain: DomainObject, job: str) -> bool:
    state = (await domain.require_machine().disk_jobs.states()).get(job)
    return state is not None and state.ready


def _check(domain: DomainObject, step: Step) -> None:
    """Whatever became of the job: what goes must not be open any more."""
    if domain.run is None or chain_with(domain, step.path) is not None:
        raise OperationFailed(f"{step.path} could not be merged into {step.into} while machine {domain.name!r} ran")
