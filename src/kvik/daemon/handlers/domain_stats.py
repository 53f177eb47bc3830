"""Figures of machines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvik.conf.enums import ConnectGetAllDomainStatsFlags as StatsFlags
from kvik.conf.enums import DomainInterfaceAddressesSource as Source
from kvik.daemon.dispatch import Access
from kvik.daemon.errors import OperationDenied
from kvik.daemon.handlers.common import LIST_MAX, LLONG, ULLONG, check_flags, params, require_active, take_params
from kvik.daemon.handlers.domain import select
from kvik.errors import InvalidArgument, NoDevice, OperationInvalid, OperationUnsupported
from kvik.rpc import typed_params

if TYPE_CHECKING:
    from kvik.daemon.connection import Connection
    from kvik.manager.domain import DomainObject

# virDomainStatsTypes -> group names of the hypervisor drivers
GROUPS = {
    1: "state",
    2: "cpu",
    4: "balloon",
    8: "vcpu",
    16: "interface",
    32: "block",
    64: "perf",
    128: "iothread",
    256: "memory",
    512: "dirtyrate",
    1024: "vm",
}
FILTER = 0xFF  # the flags shared with virConnectListAllDomainsFlags
MEMORY_STATS_MAX = 1024
DISK_ERRORS_MAX = 256  # REMOTE_DOMAIN_DISK_ERRORS_MAX


def groups(mask: int, enforce: bool) -> frozenset[str]:
    """virDomainStatsTypes -> group names; 0 means all of them."""
    unknown = mask & ~sum(GROUPS)
    if unknown and enforce:
        raise InvalidArgument(f"unknown groups of statistics (0x{unknown:x})")
    return frozenset(name for bit, name in GROUPS.items() if not mask or mask & bit)


async def get_all_domain_stats(connection: Connection, args: Any) -> tuple[list[Any]]:
    references, mask, flags = args
    flags &= 0xFFFFFFFF
    check_flags(flags, StatsFlags.mask(), "domain statistics")
    manager = connection.manager
    if references:
        domains = [connection.domain(reference) for reference in references]
    else:
        domains = select(manager.domains(), flags & FILTER)
    if len(domains) > LIST_MAX:
        raise OperationUnsupported(f"{len(domains)} machines do not fit into one answer (at most {LIST_MAX})")
    wanted = groups(mask, bool(flags & StatsFlags.ENFORCE_STATS))
    stats = await manager.all_stats(domains, wanted, nowait=bool(flags & StatsFlags.NOWAIT))
    encode = typed_params.encode
    return (
        [
            ((domain.name, domain.uuid, domain.id), encode(values))
            for domain, values in zip(domains, stats, strict=True)
        ],
    )


def _index(stats: dict[str, int | str], group: str, name: str, keys: tuple[str, ...]) -> int | None:
    """Which of a group's devices has `name` under one of `keys`."""
    for index in range(int(stats.get(f"{group}.count", 0))):
        if any(stats.get(f"{group}.{index}.{key}") == name for key in keys):
            return index
    return None


async def _block(connection: Connection, reference: Any, path: str) -> tuple[DomainObject, dict[str, int]]:
    """The figures of one disk by target or source, without their prefix."""
    domain = connection.domain(reference)
    stats = await domain.stats(frozenset({"block"}))
    index = _index(stats, "block", path, ("name", "path"))
    if index is None:
        raise NoDevice(f"machine '{domain.name}' has no disk '{path}'")
    prefix = f"block.{index}."
    return domain, {
        key[len(prefix) :]: value for key, value in stats.items() if key.startswith(prefix) and isinstance(value, int)
    }


async def _block_counters(connection: Connection, reference: Any, path: str) -> dict[str, int]:
    """Counters of one disk, or of all of them together if `path` is empty."""
    domain = connection.domain(reference)
    require_active(domain)
    if path:
        return (await _block(connection, reference, path))[1]
    total: dict[str, int] = {}
    for key, value in (await domain.stats(frozenset({"block"}))).items():
        parts = key.split(".", 2)
        if len(parts) == 3 and parts[1].isdigit() and isinstance(value, int):
            total[parts[2]] = total.get(parts[2], 0) + value
    return total


async def block_stats(connection: Connection, args: Any) -> tuple[int, int, int, int, int]:
    one = await _block_counters(connection, args[0], args[1])
    return (
        one.get("rd.reqs", -1),
        one.get("rd.bytes", -1),
        one.get("wr.reqs", -1),
        one.get("wr.bytes", -1),
        one.get("errors", -1),
    )


BLOCK_FIELDS = {  # virDomainBlockStatsFlags -> domain statistics
    "wr_bytes": "wr.bytes",
    "wr_operations": "wr.reqs",
    "rd_bytes": "rd.bytes",
    "rd_operations": "rd.reqs",
    "flush_operations": "fl.reqs",
    "wr_total_times": "wr.times",
    "rd_total_times": "rd.times",
    "flush_total_times": "fl.times",
}


async def block_stats_flags(connection: Connection, args: Any) -> tuple[list[Any], int]:
    reference, path, wanted, flags = args
    check_flags(flags, 4, "block statistics")
    one = await _block_counters(connection, reference, path)
    rows = [(name, LLONG, one[key]) for name, key in BLOCK_FIELDS.items() if key in one]
    return take_params(params(*rows), wanted)


async def get_block_info(connection: Connection, args: Any) -> tuple[int, int, int]:
    """Allocation, capacity, physical, in bytes."""
    reference, path, flags = args
    check_flags(flags, 0, "block information")
    domain, one = await _block(connection, reference, path)
    if "capacity" not in one:
        raise OperationInvalid(f"the size of disk '{path}' of machine '{domain.name}' is not known")
    physical = one.get("physical", one["capacity"])
    return (one.get("allocation") or physical, one["capacity"], physical)


async def interface_stats(connection: Connection, args: Any) -> tuple[int, ...]:
    reference, device = args
    domain = connection.domain(reference)
    require_active(domain)
    stats = await domain.stats(frozenset({"interface"}))
    index = _index(stats, "net", device, ("name", "mac", "alias"))
    if index is None:
        index = _index_by_mac(domain, device)
    if index is None:
        raise NoDevice(f"machine '{domain.name}' has no interface '{device}'")
    return tuple(
        int(stats.get(f"net.{index}.{direction}.{what}", -1))
        for direction in ("rx", "tx")
        for what in ("bytes", "pkts", "errs", "drop")
    )


def _index_by_mac(domain: DomainObject, mac: str) -> int | None:
    interfaces = domain.live.devices.interfaces if domain.live is not None else []
    for index, interface in enumerate(interfaces):
        address = getattr(interface.mac, "address", None)
        if address is not None and address.lower() == mac.lower():
            return index
    return None


async def memory_stats(connection: Connection, args: Any) -> tuple[list[tuple[int, int]]]:
    reference, wanted, flags = args
    check_flags(flags, 0, "memory statistics")
    domain = connection.domain(reference)
    require_active(domain)
    stats = await domain.memory_stats()
    return (sorted(stats.items())[: min(wanted, MEMORY_STATS_MAX)],)


async def get_cpu_stats(connection: Connection, args: Any) -> tuple[list[Any], int]:
    """Total processor time of a machine; what each host CPU spent on it nobody counts."""
    reference, nparams, start, ncpus, flags = args
    check_flags(flags, 4, "CPU statistics")
    domain = connection.domain(reference)
    require_active(domain)
    if start != -1:
        if nparams == 0 and ncpus == 0:
            return ([], max(connection.server.node.cpu_map().present, default=-1) + 1)
        raise OperationUnsupported("processor time is not counted for each host CPU", remedy="ask for the total")
    if ncpus > 1:
        raise InvalidArgument("the total is one")
    stats = await domain.stats(frozenset({"cpu"}))
    names = {"cpu_time": "cpu.time", "user_time": "cpu.user", "system_time": "cpu.system"}
    rows = params(*((name, ULLONG, int(stats[key])) for name, key in names.items() if key in stats))
    return ([], len(rows)) if nparams == 0 else (rows[:nparams], min(nparams, len(rows)))


async def get_disk_errors(connection: Connection, args: Any) -> tuple[list[Any], int]:
    reference, _, flags = args
    check_flags(flags, 0, "disk errors")
    domain = connection.domain(reference)
    require_active(domain)
    rows = list((await domain.disk_errors()).items())[:DISK_ERRORS_MAX]
    return (rows if args[1] else [], len(rows))


async def interface_addresses(connection: Connection, args: Any) -> tuple[list[Any]]:
    reference, source, flags = args
    check_flags(flags, 0, "interface addresses")
    if source == Source.AGENT and connection.access < Access.WRITE:
        raise OperationDenied("a read-only connection may not ask the guest")
    domain = connection.domain(reference)
    require_active(domain)
    interfaces = await domain.interface_addresses(source)
    return (
        [
            (interface.name, interface.hwaddr or None, [tuple(address) for address in interface.addresses])
            for interface in interfaces[:2048]
        ],
    )
