"""The I/O threads of a document: which there are, who uses them, and the changes that libvirt's calls make.

`<iothreads>` is how many; `<iothreadids>` names some or all of them, the rest get the lowest free numbers.
https://libvirt.org/formatdomain.html#iothreads-allocation
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from kvik.conf.domain import Domain
from kvik.conf.tuning import CpuTune, IoThread, IoThreadIds, IoThreadPin, IoThreadPoll
from kvik.errors import InvalidArgument, OperationInvalid

__all__ = ["PARAMETERS", "add", "change", "delete", "find", "iothreads", "pin", "pins", "used"]

# libvirt's name of a parameter -> (field, whether it is one of <poll>)
PARAMETERS: Mapping[str, tuple[str, bool]] = {
    "poll_max_ns": ("max", True),
    "poll_grow": ("grow", True),
    "poll_shrink": ("shrink", True),
    "thread_pool_min": ("thread_pool_min", False),
    "thread_pool_max": ("thread_pool_max", False),
}
_UINT_MAX = (1 << 32) - 1


def iothreads(domain: Domain) -> list[IoThread]:
    """All of them, in the order in which they are made."""
    listed = list(domain.iothreadids.iothreads) if domain.iothreadids is not None else []
    taken = {thread.id for thread in listed}
    candidate = 1
    while len(listed) < (domain.iothreads or 0):
        if candidate not in taken:
            listed.append(IoThread(id=candidate))
        candidate += 1
    return listed


def used(domain: Domain) -> Iterator[tuple[int, str]]:
    """(number, who uses it)."""
    for disk in domain.devices.disks:
        if disk.driver is None:
            continue
        if disk.driver.iothread is not None:
            yield disk.driver.iothread, f"disk '{disk.target.dev}'"
        if disk.driver.iothreads is not None:
            for entry in disk.driver.iothreads.iothreads:
                yield entry.id, f"disk '{disk.target.dev}'"
    for controller in domain.devices.controllers:
        if controller.driver is not None and controller.driver.iothread is not None:
            yield controller.driver.iothread, f"controller '{controller.index or 0}'"


def find(domain: Domain, number: int) -> IoThread:
    """Raises `InvalidArgument`."""
    for thread in iothreads(domain):
        if thread.id == number:
            return thread
    raise InvalidArgument(
        f"cannot find IOThread '{number}' in iothreadids list", remedy=f"kvik iothreadinfo {domain.name} lists them"
    )


def add(domain: Domain, number: int) -> None:
    """Raises `InvalidArgument` if the machine has it."""
    if not 0 < number <= _UINT_MAX:
        raise InvalidArgument(f"invalid argument: {number} is no number of an I/O thread: they count from 1")
    present = iothreads(domain)
    if any(thread.id == number for thread in present):
        raise InvalidArgument(f"an IOThread is already using iothread_id '{number}'")
    _write(domain, [*present, IoThread(id=number)])


def delete(domain: Domain, number: int) -> None:
    """Raises `InvalidArgument`, and `OperationInvalid` for one that a device uses."""
    thread = find(domain, number)
    for other, who in used(domain):
        if other == number:
            raise OperationInvalid(
                f"cannot remove IOThread {number} since it is being used by {who}",
                remedy="detach that, or give it another iothread first",
            )
    _write(domain, [item for item in iothreads(domain) if item.id != thread.id])
    tune = domain.cputune
    if tune is not None:
        tune.iothreadpins = [item for item in tune.iothreadpins if item.iothread != number]


def change(domain: Domain, number: int, values: Mapping[str, int]) -> None:
    """`values` by libvirt's names (`PARAMETERS`). Raises `InvalidArgument`."""
    find(domain, number)
    present = iothreads(domain)
    thread = next(item for item in present if item.id == number)
    for name, value in values.items():
        if name not in PARAMETERS:
            raise InvalidArgument(f"an I/O thread has no parameter {name!r}", remedy=", ".join(PARAMETERS))
        field, polling = PARAMETERS[name]
        if polling:
            thread.poll = thread.poll or IoThreadPoll()
            setattr(thread.poll, field, value)
        else:
            setattr(thread, field, value)
    least, most = thread.thread_pool_min, thread.thread_pool_max
    if least is not None and most is not None and least > most:
        raise InvalidArgument(f"thread_pool_min ({least}) can't be greater than thread_pool_max ({most})")
    _write(domain, present)


def pins(domain: Domain) -> dict[int, str]:
    """Number -> set of host CPUs."""
    tune = domain.cputune
    return {item.iothread: item.cpuset for item in tune.iothreadpins} if tune is not None else {}


def pin(domain: Domain, number: int, cpuset: str) -> None:
    """Raises `InvalidArgument`."""
    find(domain, number)
    tune = domain.cputune = domain.cputune or CpuTune()
    kept = [item for item in tune.iothreadpins if item.iothread != number]
    tune.iothreadpins = sorted([*kept, IoThreadPin(number, cpuset)], key=lambda item: item.iothread)


def _write(domain: Domain, threads: list[IoThread]) -> None:
    domain.iothreads = len(threads) or None
    domain.iothreadids = IoThreadIds(iothreads=threads) if threads else None
