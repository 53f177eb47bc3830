"""I/O threads added, deleted, changed and bound to CPUs: live, in the definition, or both.

Both means: the new definition is worked out and checked first, then the VMM is asked, then the definition is written.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from kvik.conf import iothreads as documents
from kvik.conf.cpuset import format_cpuset, parse_cpuset
from kvik.conf.domain import Domain
from kvik.errors import InvalidArgument
from kvik.hypervisor.driver import IoThreads

if TYPE_CHECKING:
    from kvik.manager.domain import DomainObject

__all__ = ["add", "affinities", "change", "delete", "pin"]

LIVE, CONFIG = 1, 2
# As QEMU has them; libvirt's types of the parameters bound them too.
_LIMITS = {
    "poll_max_ns": (1 << 63) - 1,
    "poll_grow": (1 << 32) - 1,
    "poll_shrink": (1 << 32) - 1,
    "thread_pool_min": (1 << 31) - 1,
    "thread_pool_max": (1 << 31) - 1,
}


async def affinities(domain: DomainObject, flags: int) -> dict[int, frozenset[int] | None]:
    """Number -> host CPUs that it may run on; None: all. `flags` are virDomainModificationImpact."""
    if domain.impact(flags) & LIVE:
        return {**await domain.require_machine().iothreads.running()}
    document = domain.document(flags)
    pins = documents.pins(document)
    everywhere = document.vcpu.cpuset if document.vcpu is not None else None
    found: dict[int, frozenset[int] | None] = {}
    for thread in documents.iothreads(document):
        cpuset = pins.get(thread.id, everywhere)
        found[thread.id] = parse_cpuset(cpuset) if cpuset else None
    return found


async def add(domain: DomainObject, number: int, flags: int) -> None:
    def edit(document: Domain) -> None:
        documents.add(document, number)

    async def live(threads: IoThreads, trial: Domain) -> None:
        await threads.add(documents.find(trial, number))

    await _both(domain, flags, edit, live)


async def delete(domain: DomainObject, number: int, flags: int) -> None:
    def edit(document: Domain) -> None:
        documents.delete(document, number)

    async def live(threads: IoThreads, trial: Domain) -> None:
        await threads.delete(number)

    await _both(domain, flags, edit, live)


async def change(domain: DomainObject, number: int, values: Mapping[str, int], flags: int) -> None:
    """`values` by libvirt's names."""
    for name, value in values.items():
        if name in _LIMITS and not 0 <= value <= _LIMITS[name]:
            raise InvalidArgument(f"{name} {value} is not between 0 and {_LIMITS[name]}")

    def edit(document: Domain) -> None:
        documents.change(document, number, values)

    async def live(threads: IoThreads, trial: Domain) -> None:
        await threads.change(number, values)

    await _both(domain, flags, edit, live)


async def pin(domain: DomainObject, number: int, cpus: Iterable[int], flags: int) -> None:
    chosen = frozenset(cpus)
    if not chosen:
        raise InvalidArgument("Empty iothread cpumap list for pinning")

    def edit(document: Domain) -> None:
        documents.pin(document, number, format_cpuset(chosen))

    async def live(threads: IoThreads, trial: Domain) -> None:
        await threads.pin(number, chosen)
        domain.emit("tunable", params={f"cputune.iothreadpin{number}": format_cpuset(chosen)})

    await _both(domain, flags, edit, live)


async def _both(
    domain: DomainObject,
    flags: int,
    edit: Callable[[Domain], None],
    live: Callable[[IoThreads, Domain], Awaitable[None]],
) -> None:
    impact = domain.impact(flags)

    async def now() -> None:
        threads = domain.require_machine().iothreads
        assert domain.run is not None
        trial = domain.run.live.copy()
        edit(trial)
        await live(threads, trial)
        run = domain.run
        if run is None:
            return  # it ended meanwhile
        edit(run.live)
        domain.live_changed()
        await domain.save_status()

    if not impact & CONFIG:
        await now()
        return
    async with domain.manager.editing(domain) as document:
        edit(document)
        if impact & LIVE:
            await now()
