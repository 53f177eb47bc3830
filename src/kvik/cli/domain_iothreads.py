"""iothreadinfo, iothreadpin, iothreadadd, iothreadset, iothreaddel: threads that serve disks, in virsh's words."""

from __future__ import annotations

from kvik.cli.common import CONFIG, CURRENT, DOMAIN, LIVE, impact
from kvik.cli.domain_resources import host_cpu_count, ranges
from kvik.cli.options import COUNT, DATA, NUMBER, Option, UsageError, Verb
from kvik.cli.table import Table

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.cli.context import Context
    from kvik.cli.options import Options

# option of iothreadset -> (libvirt's parameter, words)
PARAMETERS = {
    "poll-max-ns": ("poll_max_ns", "set the maximum IOThread polling time in ns"),
    "poll-grow": ("poll_grow", "set the value to increase the IOThread polling time"),
    "poll-shrink": ("poll_shrink", "set the value for reduction of the IOThread polling time"),
    "thread-pool-min": ("thread_pool_min", "lower boundary for worker thread pool"),
    "thread-pool-max": ("thread_pool_max", "upper boundary for worker thread pool"),
}


def iothreadinfo(ctx: Context, options: Options) -> int:
    domain = ctx.domain(options.data("domain"))
    ctx.doing = "Unable to get domain IOThreads information"
    found = domain.iothreads(impact(options))
    rows = [
        (number, [cpu for cpu in range(len(cpumap) * 8) if cpumap[cpu // 8] >> cpu % 8 & 1]) for number, cpumap in found
    ]
    if ctx.put([{"iothread": number, "affinity": cpus} for number, cpus in rows]):
        return 0
    if not rows:
        ctx.say("No IOThreads found for the domain")
        return 0
    table = Table("IOThread ID", "CPU Affinity")
    for number, cpus in rows:
        table.add(str(number), ranges(cpus))
    ctx.table(table)
    return 0


def cpu_list(text: str, most: int) -> bytes:
    """`0-3,^2` or `r` (all) as libvirt's map of `most` CPUs."""
    from kvik.conf.cpuset import format_cpuset, parse_cpuset

    try:
        cpus = parse_cpuset(text) if text != "r" else parse_cpuset(format_cpuset(range(most)))
    except ValueError:
        raise UsageError(f"Invalid cpulist '{text}'", remedy="write it as 0-3,^2, or r for all") from None
    bits = sum(1 << cpu for cpu in cpus)
    return bits.to_bytes((max(most, max(cpus, default=0) + 1) + 7) // 8, "little")


def number_of(options: Options, name: str) -> int:
    number = options.count(name)
    if number <= 0:
        raise UsageError(f"Invalid IOThread id value: '{number}'")
    return number


def iothreadpin(ctx: Context, options: Options) -> int:
    text = options.data("cpulist")
    number = options.count("iothread")
    domain = ctx.domain(options.data("domain"))
    domain.pin_iothread(number, cpu_list(text, host_cpu_count(ctx)), impact(options))
    return 0


def iothreadadd(ctx: Context, options: Options) -> int:
    number = number_of(options, "id")
    ctx.domain(options.data("domain")).add_iothread(number, impact(options))
    return 0


def iothreaddel(ctx: Context, options: Options) -> int:
    number = number_of(options, "id")
    ctx.domain(options.data("domain")).delete_iothread(number, impact(options))
    return 0


def iothreadset(ctx: Context, options: Options) -> int:
    number = number_of(options, "id")
    values: dict[str, int] = {}
    for option, (name, _) in PARAMETERS.items():
        value = options.number(option)
        if value is not None:
            if value < 0 and name.startswith("poll"):
                raise UsageError(f"Numeric value '{value}' for <{option}> option is malformed or out of range")
            values[name] = value
    if not values:
        raise UsageError("Not enough arguments passed, nothing to set")
    ctx.domain(options.data("domain")).set_iothread(number, values, impact(options))
    return 0


ID = Option("id", COUNT, "iothread_id of the IOThread", metavar="number")

COMMANDS = {
    "iothreadinfo": Verb(
        iothreadinfo, "Returns basic information about the domain IOThreads.", DOMAIN, LIVE, CONFIG, CURRENT
    ),
    "iothreadpin": Verb(
        iothreadpin,
        "Pin domain IOThreads to host physical CPUs.",
        DOMAIN,
        Option("iothread", COUNT, "IOThread ID number", metavar="number"),
        Option("cpulist", DATA, "host cpu number(s) to set"),
        CONFIG,
        LIVE,
        CURRENT,
    ),
    "iothreadadd": Verb(
        iothreadadd, "Add an IOThread to the guest domain using the given ID.", DOMAIN, ID, CONFIG, LIVE, CURRENT
    ),
    "iothreadset": Verb(
        iothreadset,
        "Modifies an existing IOThread of the guest domain using the given ID.",
        DOMAIN,
        ID,
        *(Option(name, NUMBER, words, named_only=True) for name, (_, words) in PARAMETERS.items()),
        CONFIG,
        LIVE,
        CURRENT,
    ),
    "iothreaddel": Verb(iothreaddel, "Delete an IOThread from the guest domain.", DOMAIN, ID, CONFIG, LIVE, CURRENT),
}
