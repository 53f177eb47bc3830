"""Figures of a machine, in libvirt's flat names. A VMM that is stuck delays nobody: what was known last is told."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvik.conf.enums import DomainMemoryStatTags
from kvik.errors import KvikError
from kvik.host import process

if TYPE_CHECKING:
    from kvik.manager.domain import DomainObject
    from kvik.manager.run import Run

Figures = dict[str, int | str]

DEADLINE = 1.0  # seconds that a VMM gets to answer
STUCK_DEADLINE = 0.05  # ... if it already owes us an answer
NOWAIT_DEADLINE = 0.2

OF_THE_HOST = frozenset({"cpu", "net"})  # the kernel counts them: no VMM is asked

# Names of groups: the first word of the figures; virsh's option names are understood, too.
ALIASES = {"cpu-total": "cpu", "interface": "net"}


def normalise(groups: frozenset[str]) -> frozenset[str]:
    return frozenset(ALIASES.get(group, group) for group in groups)


def known(domain: DomainObject, groups: frozenset[str]) -> Figures:
    """What memory holds, without asking anybody."""
    found: Figures = {}
    every = not groups
    if every or "state" in groups:
        found["state.state"] = domain.state
        found["state.reason"] = domain.reason
    run = domain.run
    if run is None or not domain.is_active:
        config = domain.config
        if every or "balloon" in groups:
            found["balloon.current"] = config.current_memory
            found["balloon.maximum"] = config.memory
        if every or "vcpu" in groups:
            found["vcpu.current"] = config.vcpus
            found["vcpu.maximum"] = config.max_vcpus
        if every or "block" in groups:
            found["block.count"] = len(config.disks)
            for number, (target, path) in enumerate(config.disks):
                found[f"block.{number}.name"] = target
                if path:
                    found[f"block.{number}.path"] = path
        return found
    if every or "cpu" in groups:
        found["cpu.time"] = cpu_time(run)
    if every or "balloon" in groups:
        found["balloon.current"] = run.balloon_kib
        found["balloon.maximum"] = run.live.memory
    if run.figures:
        found.update(
            run.figures if every else {key: value for key, value in run.figures.items() if key.split(".")[0] in groups}
        )
    return found


def cpu_time(run: Run) -> int:
    """ns that the VMM's process has used, from the kernel: works for a stopped process as well."""
    if run.pid_start:
        stat = process.read_stat(run.pid)
        if stat is not None and stat.start_time == run.pid_start:
            run.cpu_time = stat.user_ns + stat.system_ns
    else:
        run.cpu_time = max(run.cpu_time, int(run.figures.get("cpu.time", 0)))
    return run.cpu_time


async def stats(domain: DomainObject, groups: frozenset[str], nowait: bool) -> Figures:
    wanted = normalise(groups)
    if wanted != {"state"} and domain.run is not None:
        await refresh(domain, wanted, NOWAIT_DEADLINE if nowait else DEADLINE)
    return known(domain, wanted)


async def refresh(domain: DomainObject, wanted: frozenset[str], deadline: float) -> None:
    """Ask the VMM; give up waiting, not asking, at the deadline: the answer serves whoever asks next."""
    run = domain.run
    if run is None or run.machine is None or not domain.is_active:
        return
    if wanted and wanted <= OF_THE_HOST | {"state"}:
        wanted &= OF_THE_HOST
        with contextlib.suppress(KvikError, TimeoutError):
            async with asyncio.timeout(deadline):
                found = await run.machine.stats(wanted)
            kept = {key: value for key, value in run.figures.items() if key.split(".")[0] not in wanted}
            run.figures = kept | found
        return
    asked = run.asked
    if asked is None or asked.done():
        asked = run.asked = domain.spawn(_ask(run))
    elif asked is not None and run.overdue:
        deadline = min(deadline, STUCK_DEADLINE)
    done, _ = await asyncio.wait({asked}, timeout=deadline)
    run.overdue = not done


async def _ask(run: Run) -> None:
    if run.machine is None:
        return
    try:
        run.figures = await run.machine.stats(frozenset())
    except KvikError:
        return  # what was known last stays


async def all_stats(domains: Sequence[DomainObject], groups: frozenset[str], nowait: bool) -> list[Figures]:
    """In the order given; machines that are on are asked together, so one deadline covers all."""
    wanted = normalise(groups)
    if wanted != {"state"}:
        on = [domain for domain in domains if domain.run is not None]
        if on:
            deadline = NOWAIT_DEADLINE if nowait else DEADLINE
            await asyncio.gather(*(refresh(domain, wanted, deadline) for domain in on))
    return [known(domain, wanted) for domain in domains]


async def memory_stats(domain: DomainObject) -> dict[int, int]:
    machine = domain.require_machine()
    run = domain.run
    assert run is not None
    tags = DomainMemoryStatTags
    found: dict[int, int] = {tags.ACTUAL_BALLOON: run.balloon_kib}
    names = {
        "current": tags.ACTUAL_BALLOON,
        "available": tags.AVAILABLE,
        "unused": tags.UNUSED,
        "usable": tags.USABLE,
        "swap_in": tags.SWAP_IN,
        "swap_out": tags.SWAP_OUT,
        "disk_caches": tags.DISK_CACHES,
    }
    counts = {
        "major_fault": tags.MAJOR_FAULT,
        "minor_fault": tags.MINOR_FAULT,
        "last_update": tags.LAST_UPDATE,
        "hugetlb_pgalloc": tags.HUGETLB_PGALLOC,
        "hugetlb_pgfail": tags.HUGETLB_PGFAIL,
    }
    try:
        async with asyncio.timeout(DEADLINE):
            told = await machine.balloon()
        found |= {tag: told[name] // 1024 for name, tag in names.items() if name in told}
        found |= {tag: told[name] for name, tag in counts.items() if name in told}
    except (KvikError, TimeoutError):
        pass  # the balloon's own figures are a bonus
    if run.pid_start:
        stat = process.read_stat(run.pid)
        if stat is not None and stat.start_time == run.pid_start:
            found[tags.RSS] = stat.rss // 1024
    return found


async def disk_errors(domain: DomainObject) -> dict[str, int]:
    machine = domain.require_machine()
    assert domain.run is not None
    async with asyncio.timeout(DEADLINE):
        told = await machine.disk_errors()
    return {
        disk.target.dev: told[disk.alias.name]
        for disk in domain.run.live.devices.disks
        if disk.alias is not None and disk.target.dev and disk.alias.name in told
    }
