"""vcpucount, vcpuinfo, setvcpus, setmem, setmaxmem, dommemstat, schedinfo."""

from __future__ import annotations

from kvik.cli import flags
from kvik.cli.common import ACTIVE, CONFIG, CURRENT, DOMAIN, LIVE, exclusive, impact, scaled
from kvik.cli.options import COUNT, DATA, FLAG, NUMBER, WORDS, Option, UsageError, Verb
from kvik.errors import OperationInvalid, OperationUnsupported

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.cli.context import Context
    from kvik.cli.options import Options


def vcpucount(ctx: Context, options: Options) -> int:
    names = ("maximum", "active", "live", "config", "current", "guest")
    maximum, active, live, config, current, guest = (options.flag(name) for name in names)
    exclusive(
        options, ("live", "config"), ("current", "live"), ("current", "config"), ("active", "maximum"),
        ("guest", "config"),
    )  # fmt: skip
    domain = ctx.domain(options.data("domain"))
    if any((maximum, active, live, config, current, guest)):
        bits = (flags.AFFECT_LIVE if live else 0) | (flags.AFFECT_CONFIG if config else 0)
        bits |= (flags.VCPU_MAXIMUM if maximum else 0) | (flags.VCPU_GUEST if guest else 0)
        count = domain.vcpus(bits)
        if not ctx.put({"vcpus": count}):
            ctx.line(str(count))
        return 0
    rows = []
    for what, extra in (("maximum", flags.VCPU_MAXIMUM), ("current", 0)):
        for where, bit in (("config", flags.AFFECT_CONFIG), ("live", flags.AFFECT_LIVE)):
            if (where == "live" and domain.id <= 0) or (where == "config" and not domain.is_persistent()):
                continue
            rows.append((what, where, domain.vcpus(bit | extra)))
    if ctx.put([{"kind": what, "of": where, "vcpus": count} for what, where, count in rows]):
        return 0
    for what, where, count in rows:
        ctx.line(f"{what:<12} {where:<12} {count:>3}")
    return 0


VCPU_STATES = ("offline", "running", "blocked")


def vcpuinfo(ctx: Context, options: Options) -> int:
    pretty = options.flag("pretty")
    domain = ctx.domain(options.data("domain"))
    host_cpus = host_cpu_count(ctx)
    vcpus: list[dict[str, object]]
    if domain.id <= 0:
        every = list(range(host_cpus))
        count = domain.vcpus(flags.AFFECT_CONFIG)
        vcpus = [{"vcpu": n, "cpu": None, "state": "no state", "affinity": every} for n in range(count)]
    else:
        vcpus = [
            {
                "vcpu": vcpu.number,
                "cpu": vcpu.cpu if vcpu.cpu >= 0 else None,
                "state": VCPU_STATES[vcpu.state] if 0 <= vcpu.state < len(VCPU_STATES) else "no state",
                "cpu_time_ns": vcpu.cpu_time,
                "affinity": [
                    n
                    for n in range(host_cpus)
                    if vcpu.affinity[n // 8 : n // 8 + 1] and vcpu.affinity[n // 8] >> n % 8 & 1
                ],
            }
            for vcpu in domain.vcpu_info(host_cpus)
        ]
    if ctx.put(vcpus):
        return 0
    for index, vcpu in enumerate(vcpus):
        if index:
            ctx.line()
        allowed = vcpu["affinity"]
        assert isinstance(allowed, list)
        cpu = vcpu["cpu"]
        ctx.line(f"{'VCPU:':<15} {vcpu['vcpu']}")
        ctx.line(f"{'CPU:':<15} {'N/A' if cpu is None else cpu}")
        ctx.line(f"{'State:':<15} {vcpu['state']}")
        nanoseconds = vcpu.get("cpu_time_ns")
        if isinstance(nanoseconds, int):
            ctx.line(f"{'CPU time:':<15} {nanoseconds / 1e9:.1f}s")
        if pretty:
            ctx.line(f"{'CPU Affinity:':<15} {ranges(allowed)} (out of {host_cpus})")
        else:
            letters = "".join("y" if n in allowed else "-" for n in range(host_cpus))
            ctx.line(f"{'CPU Affinity:':<15} {letters}")
    return 0


def host_cpu_count(ctx: Context) -> int:
    """CPUs that the host could have, online or not: the length of an affinity map."""
    try:
        return int(ctx.connection.call("NODE_GET_CPU_MAP", 0, 0, 0)[2])
    except OperationUnsupported:
        return ctx.connection.node_info().cpus


def ranges(numbers: list[int]) -> str:
    """`0-3,7` for [0, 1, 2, 3, 7]."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] + 1 == number:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    return ",".join("-".join(str(number) for number in part) for part in parts)


def setvcpus(ctx: Context, options: Options) -> int:
    count = options.count("count")
    exclusive(options, ("guest", "config"), ("maximum", "guest"), ("maximum", "live"))
    bits = impact(options)
    if options.flag("maximum"):
        if not options.flag("config"):
            raise UsageError("--maximum must be used with --config only")
        bits |= flags.VCPU_MAXIMUM
    if options.flag("guest"):
        bits |= flags.VCPU_GUEST
    if options.flag("hotpluggable"):
        bits |= flags.VCPU_HOTPLUGGABLE
    if count <= 0:
        raise UsageError(f"Can't set {count} processors for a VM")
    domain = ctx.domain(options.data("domain"))
    domain.set_vcpus(count, bits)
    return 0


def setmem(ctx: Context, options: Options) -> int:
    return set_memory(ctx, options, 0)


def setmaxmem(ctx: Context, options: Options) -> int:
    ctx.doing = "Unable to change MaxMemorySize"
    return set_memory(ctx, options, flags.MEM_MAXIMUM)


def set_memory(ctx: Context, options: Options, extra: int) -> int:
    kib = scaled(options.data("size"), "size", 1024) >> 10
    bits = impact(options) | extra
    ctx.domain(options.data("domain")).set_memory(kib, bits)
    return 0


def dommemstat(ctx: Context, options: Options) -> int:
    period = options.number("period")
    bits = impact(options)
    domain = ctx.domain(options.data("domain"))
    if period is not None:
        if period < 0:
            raise UsageError(f"Invalid collection period value '{period}'")
        ctx.doing = "Unable to change balloon collection period."
        ctx.connection.call("DOMAIN_SET_MEMORY_STATS_PERIOD", domain.ref, period, bits)
        return 0
    if domain.id <= 0:
        ctx.doing = f"Failed to get memory statistics for domain '{domain.name}'"
        raise OperationInvalid("Requested operation is not valid: domain is not running")
    figures = domain.memory_stats()
    if ctx.put(figures):
        return 0
    for label, value in figures.items():
        ctx.line(f"{label} {value}")
    return 0


def schedinfo(ctx: Context, options: Options) -> int:
    bits = impact(options)
    changes: dict[str, int] = {}
    for text in options.words("set"):
        name, _, value = text.partition("=")
        try:
            changes[name] = int(value, 0)
        except ValueError:
            raise UsageError(f"invalid scheduler option: '{text}'", remedy="write parameter=number") from None
    for name in ("weight", "cap"):
        number = options.number(name)
        if number is not None:
            changes[name] = number
    domain = ctx.domain(options.data("domain"))
    if changes:
        domain.set_scheduler_parameters(changes, bits)
    kind = str(ctx.connection.call("DOMAIN_GET_SCHEDULER_TYPE", domain.ref)[0])
    figures: dict[str, object] = {"Scheduler": kind, **domain.scheduler_parameters(bits)}
    if ctx.put({label.lower(): figure for label, figure in figures.items()}):
        return 0
    for label, figure in figures.items():
        ctx.line(f"{label:<15}: {figure}")
    return 0


SIZE = Option("size", DATA, "new memory size, as scaled integer (default KiB)", metavar="number")

COMMANDS = {
    "vcpucount": Verb(
        vcpucount,
        "Returns the number of virtual CPUs used by the domain.",
        DOMAIN,
        Option("maximum", FLAG, "get maximum count of vcpus"),
        Option("active", FLAG, "get number of currently active vcpus"),
        Option("live", FLAG, "get value from running domain"),
        Option("config", FLAG, "get value to be used on next boot"),
        Option("current", FLAG, "get value according to current domain state"),
        Option("guest", FLAG, "retrieve vcpu count from the guest instead of the hypervisor"),
    ),
    "vcpuinfo": Verb(
        vcpuinfo,
        "Returns basic information about the domain virtual CPUs.",
        DOMAIN,
        Option("pretty", FLAG, "return human readable output"),
    ),
    "setvcpus": Verb(
        setvcpus,
        "Change the number of virtual CPUs in the guest domain.",
        DOMAIN,
        Option("count", COUNT, "number of virtual CPUs"),
        Option("maximum", FLAG, "set maximum limit on next boot"),
        CONFIG,
        LIVE,
        CURRENT,
        Option("guest", FLAG, "modify cpu state in the guest"),
        Option("hotpluggable", FLAG, "make added vcpus hot(un)pluggable"),
    ),
    "setmem": Verb(
        setmem, "Change the current memory allocation in the guest domain.", DOMAIN, SIZE, CONFIG, LIVE, CURRENT
    ),
    "setmaxmem": Verb(
        setmaxmem,
        "Change the maximum memory allocation limit in the guest domain.",
        DOMAIN,
        SIZE,
        CONFIG,
        LIVE,
        CURRENT,
    ),
    "dommemstat": Verb(
        dommemstat,
        "Get memory statistics for a running domain.",
        ACTIVE,
        Option("period", NUMBER, "period in seconds to set collection"),
        CONFIG,
        LIVE,
        CURRENT,
    ),
    "schedinfo": Verb(
        schedinfo,
        "Show/Set scheduler parameters.",
        DOMAIN,
        Option("weight", NUMBER, "weight for XEN_CREDIT", named_only=True),
        Option("cap", NUMBER, "cap for XEN_CREDIT", named_only=True),
        Option("current", FLAG, "get/set current scheduler info"),
        Option("config", FLAG, "get/set value to be used on next boot"),
        Option("live", FLAG, "get/set value from running domain"),
        Option("set", WORDS, "parameter=value"),
    ),
}
