"""Figures of the host."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvik.daemon.handlers.common import UINT, ULLONG, check_flags, params, take_params
from kvik.errors import InvalidArgument, OperationUnsupported

if TYPE_CHECKING:
    from kvik.daemon.connection import Connection

ALL_CELLS = -1  # VIR_NODE_MEMORY_STATS_ALL_CELLS
MODEL_SIZE = 32  # virNodeInfo's array, its last byte zero
CELLS_MAX = 1024


def get_info(connection: Connection, args: Any) -> tuple[Any, ...]:
    info = connection.server.node.info()
    model = info.model.encode()[: MODEL_SIZE - 1]
    return (
        [*model, *bytes(MODEL_SIZE - len(model))],
        info.memory_kib,
        info.cpus,
        info.mhz,
        info.nodes,
        info.sockets,
        info.cores,
        info.threads,
    )


def get_cpu_stats(connection: Connection, args: Any) -> tuple[list[tuple[str, int]], int]:
    number, nparams, flags = args
    check_flags(flags, 0, "node CPU statistics")
    stats = connection.server.node.cpu_stats()
    if number not in stats:
        raise InvalidArgument(f"there is no CPU {number} on this host")
    one = stats[number]
    rows = [("kernel", one.kernel), ("user", one.user), ("idle", one.idle), ("iowait", one.iowait)]
    return ([], len(rows)) if nparams == 0 else (rows[: max(nparams, 0)], 0)


def get_memory_stats(connection: Connection, args: Any) -> tuple[list[tuple[str, int]], int]:
    nparams, number, flags = args
    check_flags(flags, 0, "node memory statistics")
    node = connection.server.node
    if number == ALL_CELLS:
        stats = node.memory_stats()
        rows = [
            ("total", stats.total_kib),
            ("free", stats.free_kib),
            ("buffers", stats.buffers_kib),
            ("cached", stats.cached_kib),
        ]
    else:
        cell = next((cell for cell in node.cells() if cell.id == number), None)
        if cell is None:
            raise InvalidArgument(f"there is no NUMA cell {number} on this host")
        rows = [("total", cell.memory_kib), ("free", cell.free_kib)]
    return ([], len(rows)) if nparams == 0 else (rows[: max(nparams, 0)], 0)


def get_free_memory(connection: Connection, args: Any) -> tuple[int]:
    return (connection.server.node.memory_stats().free_kib * 1024,)


def get_cells_free_memory(connection: Connection, args: Any) -> tuple[list[int]]:
    start, count = args
    cells = connection.server.node.cells()
    if start < 0 or start >= len(cells) or not 0 < count <= CELLS_MAX:
        raise InvalidArgument(
            f"NUMA cells {start} to {start + count - 1} are not those of this host (0 to {len(cells) - 1})"
        )
    return ([cell.free_kib * 1024 for cell in cells[start : start + count]],)


def get_cpu_map(connection: Connection, args: Any) -> tuple[bytes, int, int]:
    need_map, need_online, flags = args
    check_flags(flags, 0, "node CPU map")
    cpus = connection.server.node.cpu_map()
    return (
        cpus.bitmap() if need_map else b"",
        len(cpus.online) if need_online else 0,
        max(cpus.present, default=-1) + 1,
    )


def get_free_pages(connection: Connection, args: Any) -> tuple[list[int]]:
    sizes, start, count, flags = args
    check_flags(flags, 0, "free pages")
    cells = {cell.id: cell for cell in connection.server.node.cells()}
    wanted = range(start, start + count) if start >= 0 else list(cells)[:count]
    if len(sizes) * len(wanted) > CELLS_MAX:
        raise InvalidArgument(f"too many page counts asked for (at most {CELLS_MAX})")
    counts = []
    for number in wanted:
        if number not in cells:
            raise InvalidArgument(f"there is no NUMA cell {number} on this host")
        free = {pages.size_kib: pages.free for pages in cells[number].pages}
        for size in sizes:
            if size not in free:
                raise InvalidArgument(f"this host has no pages of {size} KiB")
            counts.append(free[size])
    return (counts,)


def get_security_model(connection: Connection, args: Any) -> tuple[list[int], list[int]]:
    return ([0], [0])  # none: two empty C strings


def get_memory_parameters(connection: Connection, args: Any) -> tuple[list[Any], int]:
    nparams, flags = args
    check_flags(flags, 4, "node memory parameters")
    names = {"shm_pages_to_scan": UINT, "shm_sleep_millisecs": UINT, "shm_merge_across_nodes": UINT}
    values = connection.server.node.memory_merging()
    rows = [(name, names.get(name, ULLONG), value) for name, value in values.items()]
    return take_params(params(*rows), nparams)


def get_sev_info(connection: Connection, args: Any) -> None:
    raise OperationUnsupported("this host offers no SEV to machines")


def suspend_for_duration(connection: Connection, args: Any) -> None:
    raise OperationUnsupported("suspending the host is left to the host", remedy="use systemctl suspend")
