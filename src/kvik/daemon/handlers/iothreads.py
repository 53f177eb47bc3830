"""I/O threads: which there are and where they run, and the four calls that change them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvik.daemon.handlers.common import INT, UINT, ULLONG, bitmap, check_flags
from kvik.errors import InvalidArgument

if TYPE_CHECKING:
    from kvik.daemon.connection import Connection

LIVE, CONFIG = 1, 2
INFO_MAX = 16384  # REMOTE_IOTHREAD_INFO_MAX
CPUMAP_MAX = 2048  # bytes: REMOTE_CPUMAP_MAX
_TYPES = {
    "poll_max_ns": ULLONG,
    "poll_grow": UINT,
    "poll_shrink": UINT,
    "thread_pool_min": INT,
    "thread_pool_max": INT,
}


async def get_iothread_info(connection: Connection, args: Any) -> tuple[list[Any], int]:
    reference, flags = args
    check_flags(flags, LIVE | CONFIG, "I/O threads")
    found = await connection.domain(reference).iothread_affinities(flags)
    online = list(connection.server.node.cpu_map().online)
    size = (max((*online, *(cpu for cpus in found.values() for cpu in cpus or ())), default=0) + 8) // 8
    rows = [(number, bitmap(cpus if cpus is not None else online, size)) for number, cpus in found.items()][:INFO_MAX]
    return (rows, len(rows))


async def pin_iothread(connection: Connection, args: Any) -> None:
    reference, number, cpumap, flags = args
    check_flags(flags, LIVE | CONFIG, "I/O thread pinning")
    bits = int.from_bytes(cpumap, "little")
    cpus = [cpu for cpu in range(len(cpumap) * 8) if bits >> cpu & 1]
    await connection.domain(reference).pin_iothread(number, cpus, flags)


async def add_iothread(connection: Connection, args: Any) -> None:
    reference, number, flags = args
    check_flags(flags, LIVE | CONFIG, "adding an I/O thread")
    await connection.domain(reference).add_iothread(number, flags)


async def del_iothread(connection: Connection, args: Any) -> None:
    reference, number, flags = args
    check_flags(flags, LIVE | CONFIG, "deleting an I/O thread")
    await connection.domain(reference).delete_iothread(number, flags)


async def set_iothread_params(connection: Connection, args: Any) -> None:
    reference, number, given, flags = args
    check_flags(flags, LIVE | CONFIG, "I/O thread parameters")
    values: dict[str, int] = {}
    for name, kind, value in given:
        if name not in _TYPES:
            raise InvalidArgument(f"an I/O thread has no parameter {name!r}", remedy=", ".join(_TYPES))
        # Clients before libvirt 9.4 and after differ in which unsigned type poll_grow and poll_shrink have.
        allowed = {_TYPES[name]} | ({ULLONG} if name.startswith("poll") else set())
        if kind not in allowed or name in values:
            raise InvalidArgument(f"parameter {name!r} is given once, in libvirt's own type")
        values[name] = value
    if not values:
        raise InvalidArgument("no parameter of the I/O thread is given", remedy=", ".join(_TYPES))
    await connection.domain(reference).set_iothread(number, values, flags)
