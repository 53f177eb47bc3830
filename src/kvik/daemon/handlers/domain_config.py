"""Changing machines: memory, vCPUs, devices, metadata; and what their documents say about tuning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvik.conf.enums import (
    DomainDeviceModifyFlags,
    DomainMemoryModFlags,
    DomainModificationImpact,
    DomainVcpuFlags,
    VcpuState,
)
from kvik.daemon.dispatch import Access
from kvik.daemon.errors import OperationDenied
from kvik.daemon.handlers.common import (
    INT,
    LLONG,
    STRING,
    UINT,
    ULLONG,
    bitmap,
    check_flags,
    params,
    require_active,
    take_params,
)
from kvik.errors import InvalidArgument
from kvik.manager import interface_changes

if TYPE_CHECKING:
    from kvik.conf.domain import Domain
    from kvik.daemon.connection import Connection
    from kvik.manager.domain import DomainObject

LIVE, CONFIG = DomainModificationImpact.LIVE, DomainModificationImpact.CONFIG
STRING_OKAY = 4  # VIR_TYPED_PARAM_STRING_OKAY
UNLIMITED = 9007199254740991  # VIR_DOMAIN_MEMORY_PARAM_UNLIMITED, KiB
INTERFACE_PARAMETERS = [f"{direction}.{name}" for direction, names in interface_changes.NAMES.items() for name in names]
MAPS_MAX = 8 * 1024 * 1024
VCPUS_MAX = 16384


def _document(domain: DomainObject, flags: int, what: str) -> Domain:
    """The live or the persistent document, as `flags` (virDomainModificationImpact) choose."""
    check_flags(flags, LIVE | CONFIG | STRING_OKAY, what)
    if flags & LIVE and flags & CONFIG:
        raise InvalidArgument("live and config cannot both be asked for")
    if flags & LIVE:
        require_active(domain)
    live = domain.live
    return live if live is not None and not flags & CONFIG else domain.definition


# --- memory -----------------------------------------------------------------------------------------------------------


async def set_memory(connection: Connection, args: Any) -> None:
    """The oldest call: live only."""
    domain = connection.domain(args[0])
    require_active(domain)
    await domain.set_memory(args[1], LIVE)


async def set_max_memory(connection: Connection, args: Any) -> None:
    await connection.domain(args[0]).set_memory(args[1], DomainMemoryModFlags.MAXIMUM)


async def set_memory_flags(connection: Connection, args: Any) -> None:
    reference, kib, flags = args
    check_flags(flags, DomainMemoryModFlags.mask(), "set memory")
    await connection.domain(reference).set_memory(kib, flags)


# --- vCPUs ------------------------------------------------------------------------------------------------------------


async def set_vcpus(connection: Connection, args: Any) -> None:
    domain = connection.domain(args[0])
    require_active(domain)
    await domain.set_vcpus(args[1], LIVE)


async def set_vcpus_flags(connection: Connection, args: Any) -> None:
    reference, count, flags = args
    check_flags(flags, DomainVcpuFlags.mask(), "set vCPUs")
    await connection.domain(reference).set_vcpus(count, flags)


def get_vcpus_flags(connection: Connection, args: Any) -> tuple[int]:
    reference, flags = args
    check_flags(flags, DomainVcpuFlags.mask(), "vCPU count")
    if flags & DomainVcpuFlags.GUEST and connection.access < Access.WRITE:
        raise OperationDenied("a read-only connection may not ask the guest")
    return (connection.domain(reference).vcpu_count(flags),)


def get_max_vcpus(connection: Connection, args: Any) -> tuple[int]:
    return (connection.domain(args[0]).max_vcpus,)


async def get_vcpus(connection: Connection, args: Any) -> tuple[list[Any], bytes]:
    """State and time of each vCPU, and where it may run."""
    reference, wanted, size = args
    domain = connection.domain(reference)
    require_active(domain)
    if wanted < 0 or size < 0 or wanted > VCPUS_MAX or wanted * size > MAPS_MAX:
        raise InvalidArgument("more vCPU maps were asked for than an answer can hold")
    stats = await domain.stats(frozenset({"vcpu"}))
    count = min(wanted, domain.vcpu_count(LIVE))
    info = [
        (
            number,
            int(stats.get(f"vcpu.{number}.state", VcpuState.RUNNING)),
            int(stats.get(f"vcpu.{number}.time", 0)),
            -1,  # which CPU it runs on this instant is not known
        )
        for number in range(count)
    ]
    return (info, b"".join(_pin_maps(connection, domain.live or domain.definition, count, size)))


def _online(connection: Connection) -> list[int]:
    return list(connection.server.node.cpu_map().online)


def _cpus(connection: Connection, cpuset: str | None) -> list[int]:
    """A document's CPU set ("0-3,^2") as numbers; everything online where there is none."""
    if not cpuset:
        return _online(connection)
    chosen: set[int] = set()
    for part in cpuset.split(","):
        text = part.strip()
        exclude = text.startswith("^")
        first, _, last = text.lstrip("^").partition("-")
        if not first.isdigit() or (last and not last.isdigit()):
            continue
        numbers = range(int(first), min(int(last or first), VCPUS_MAX) + 1)
        chosen = chosen - set(numbers) if exclude else chosen | set(numbers)
    return sorted(chosen)


def _pin_maps(connection: Connection, document: Domain, count: int, size: int) -> list[bytes]:
    default = bitmap(_cpus(connection, document.vcpu.cpuset if document.vcpu is not None else None), size)
    maps = [default] * count
    for pin in getattr(document.cputune, "vcpupins", None) or ():
        if pin.vcpu is not None and pin.vcpu < count:
            maps[pin.vcpu] = bitmap(_cpus(connection, pin.cpuset), size)
    return maps


def get_vcpu_pin_info(connection: Connection, args: Any) -> tuple[bytes, int]:
    reference, wanted, size, flags = args
    if wanted < 0 or size < 0 or wanted > VCPUS_MAX or wanted * size > MAPS_MAX:
        raise InvalidArgument("more vCPU maps were asked for than an answer can hold")
    domain = connection.domain(reference)
    document = _document(domain, flags, "vCPU pinning")
    count = min(wanted, domain.vcpu_count(flags & (LIVE | CONFIG) | DomainVcpuFlags.MAXIMUM))
    return (b"".join(_pin_maps(connection, document, count, size)), count)


def get_emulator_pin_info(connection: Connection, args: Any) -> tuple[bytes, int]:
    reference, size, flags = args
    if not 0 <= size <= 2048:
        raise InvalidArgument(f"a CPU map of {size} bytes is not possible")
    document = _document(connection.domain(reference), flags, "emulator pinning")
    pin = getattr(document.cputune, "emulatorpin", None)
    return (bitmap(_cpus(connection, pin.cpuset if pin is not None else None), size), 1)


# --- tuning, as the document says it ----------------------------------------------------------------------------------

SCHEDULER = {  # libvirt's parameter -> (field of <cputune>, type)
    "cpu_shares": ("shares", ULLONG),
    "vcpu_period": ("period", ULLONG),
    "vcpu_quota": ("quota", LLONG),
    "emulator_period": ("emulator_period", ULLONG),
    "emulator_quota": ("emulator_quota", LLONG),
    "global_period": ("global_period", ULLONG),
    "global_quota": ("global_quota", LLONG),
    "iothread_period": ("iothread_period", ULLONG),
    "iothread_quota": ("iothread_quota", LLONG),
}


DEFAULT_SHARES = 1024  # what the kernel gives a group nobody set; 0 elsewhere means no limit


def _scheduler(document: Domain) -> list[Any]:
    rows = []
    for name, (field, kind) in SCHEDULER.items():
        value = getattr(document.cputune, field, None)
        default = DEFAULT_SHARES if name == "cpu_shares" else 0
        rows.append((name, kind, default if value is None else int(value)))
    return params(*rows)


def get_scheduler_type(connection: Connection, args: Any) -> tuple[str, int]:
    domain = connection.domain(args[0])
    return ("posix", len(_scheduler(domain.live or domain.definition)))


def get_scheduler_parameters(connection: Connection, args: Any) -> tuple[list[Any]]:
    domain = connection.domain(args[0])
    return (_scheduler(domain.live or domain.definition)[: max(args[1], 0)],)


def get_scheduler_parameters_flags(connection: Connection, args: Any) -> tuple[list[Any]]:
    document = _document(connection.domain(args[0]), args[2], "scheduler parameters")
    return (_scheduler(document)[: max(args[1], 0)],)


def get_memory_parameters(connection: Connection, args: Any) -> tuple[list[Any], int]:
    reference, wanted, flags = args
    memtune = _document(connection.domain(reference), flags, "memory parameters").memtune
    rows = []
    for name in ("hard_limit", "soft_limit", "swap_hard_limit"):
        limit = getattr(memtune, name, None)
        value = getattr(limit, "value", limit)
        rows.append((name, ULLONG, UNLIMITED if value is None else int(value)))
    return take_params(params(*rows), wanted)


def get_blkio_parameters(connection: Connection, args: Any) -> tuple[list[Any], int]:
    reference, wanted, flags = args
    blkio = _document(connection.domain(reference), flags, "block I/O parameters").blkiotune
    weight = getattr(blkio, "weight", None)
    return take_params(params(("weight", 2, int(weight or 0))), wanted)


def get_numa_parameters(connection: Connection, args: Any) -> tuple[list[Any], int]:
    reference, wanted, flags = args
    memory = getattr(_document(connection.domain(reference), flags, "NUMA parameters").numatune, "memory", None)
    modes = {"strict": 0, "preferred": 1, "interleave": 2, "restrictive": 3}
    rows = params(
        ("numa_nodeset", STRING, getattr(memory, "nodeset", None) or ""),
        ("numa_mode", INT, modes.get(getattr(memory, "mode", None) or "strict", 0)),
    )
    return take_params(rows, wanted)


# --- devices and metadata ---------------------------------------------------------------------------------------------

DEVICE_FLAGS = DomainDeviceModifyFlags.mask()


async def attach_device(connection: Connection, args: Any) -> None:
    """The oldest call: live only."""
    domain = connection.domain(args[0])
    require_active(domain)
    await domain.attach_device(args[1], LIVE)


async def attach_device_flags(connection: Connection, args: Any) -> None:
    reference, xml, flags = args
    check_flags(flags, DEVICE_FLAGS, "attach device")
    await connection.domain(reference).attach_device(xml, flags)


async def detach_device(connection: Connection, args: Any) -> None:
    domain = connection.domain(args[0])
    require_active(domain)
    await domain.detach_device(args[1], LIVE)


async def detach_device_flags(connection: Connection, args: Any) -> None:
    reference, xml, flags = args
    check_flags(flags, DEVICE_FLAGS, "detach device")
    await connection.domain(reference).detach_device(xml, flags)


async def detach_device_alias(connection: Connection, args: Any) -> None:
    reference, alias, flags = args
    check_flags(flags, DEVICE_FLAGS, "detach device")
    await connection.domain(reference).detach_device_alias(alias, flags)


async def update_device_flags(connection: Connection, args: Any) -> None:
    reference, xml, flags = args
    check_flags(flags, DEVICE_FLAGS, "update device")
    await connection.domain(reference).update_device(xml, flags)


def get_metadata(connection: Connection, args: Any) -> tuple[str]:
    reference, kind, uri, flags = args
    check_flags(flags, LIVE | CONFIG, "metadata")
    return (connection.domain(reference).metadata(kind, uri, flags),)


async def set_metadata(connection: Connection, args: Any) -> None:
    reference, kind, text, key, uri, flags = args
    check_flags(flags, LIVE | CONFIG, "metadata")
    await connection.domain(reference).set_metadata(kind, text, key, uri, flags)


def get_interface_parameters(connection: Connection, args: Any) -> tuple[list[Any], int]:
    reference, device, wanted, flags = args
    document = _document(connection.domain(reference), flags, "interface parameters")
    if wanted == 0:  # how many there are; which interface is meant is not looked at yet, as in libvirt
        return ([], len(INTERFACE_PARAMETERS))
    rows = interface_changes.parameters(document, device)
    return take_params(params(*((name, UINT, value) for name, value in rows)), wanted)


async def set_interface_parameters(connection: Connection, args: Any) -> None:
    reference, device, given, flags = args
    check_flags(flags, LIVE | CONFIG, "interface parameters")
    values: dict[str, int] = {}
    for name, kind, value in given:
        if name not in INTERFACE_PARAMETERS:
            raise InvalidArgument(f"an interface has no parameter {name!r}", remedy=", ".join(INTERFACE_PARAMETERS))
        if kind != UINT or name in values:
            raise InvalidArgument(f"parameter {name!r} is given once, as an unsigned int")
        values[name] = value
    await connection.domain(reference).set_interface_parameters(device, values, flags)


async def set_memory_stats_period(connection: Connection, args: Any) -> None:
    reference, period, flags = args
    check_flags(flags, LIVE | CONFIG, "memory statistics period")
    await connection.domain(reference).set_memory_stats_period(period, flags)
