"""domjobinfo and domjobabort."""

from __future__ import annotations

from kvik.cli.common import ACTIVE, DOMAIN, exclusive, pretty_size
from kvik.cli.options import FLAG, Option, Verb

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvik.cli.context import Context
    from kvik.cli.options import Options

# virDomainJobType, virDomainJobOperation
TYPES = ("None", "Bounded", "Unbounded", "Completed", "Failed", "Cancelled")
OPERATIONS = (
    "Unknown",
    "Start",
    "Save",
    "Restore",
    "Incoming migration",
    "Outgoing migration",
    "Snapshot",
    "Snapshot revert",
    "Dump",
    "Backup",
    "Snapshot delete",
)
STATS_COMPLETED, STATS_KEEP_COMPLETED = 1, 2  # virDomainGetJobStatsFlags
ABORT_POSTCOPY = 1

# figure: (virsh's words, how it is shown)
FIGURES = {
    "time_elapsed": ("Time elapsed", "ms"),
    "time_remaining": ("Time remaining", "ms"),
    "data_processed": ("Data processed", "size"),
    "data_remaining": ("Data remaining", "size"),
    "data_total": ("Data total", "size"),
    "memory_processed": ("Memory processed", "size"),
    "memory_remaining": ("Memory remaining", "size"),
    "memory_total": ("Memory total", "size"),
    "memory_bps": ("Memory bandwidth", "rate"),
    "memory_dirty_rate": ("Dirty rate", "pages"),
    "memory_iteration": ("Iteration", ""),
    "disk_processed": ("File processed", "size"),
    "disk_remaining": ("File remaining", "size"),
    "disk_total": ("File total", "size"),
    "downtime": ("Total downtime", "ms"),
    "setup_time": ("Setup time", "ms"),
}


def name_in(names: tuple[str, ...], number: int) -> str:
    return names[number] if 0 <= number < len(names) else "Unknown"


def shown(value: int, how: str) -> str:
    if how == "size":
        return pretty_size(value)
    if how == "rate":
        return f"{pretty_size(value)}/s"
    return f"{value:<12} {how}".rstrip() if how else str(value)


def domjobinfo(ctx: Context, options: Options) -> int:
    completed, keep = options.flag("completed"), options.flag("keep-completed")
    exclusive(options, ("anystats", "rawstats"))
    domain = ctx.domain(options.data("domain"))
    bits = (STATS_COMPLETED if completed or keep else 0) | (STATS_KEEP_COMPLETED if keep else 0)
    kind, figures = domain.job_stats(bits)
    if ctx.put({"type": name_in(TYPES, kind).lower(), **figures}):
        return 0
    if options.flag("rawstats"):
        ctx.line(f"Job type: {kind}")
        for name, value in figures.items():
            ctx.line(f"{name}: {value}")
        return 0
    ctx.line(f"{'Job type:':<17} {name_in(TYPES, kind):<12}")
    if kind in (0, 4, 5) and not options.flag("anystats"):  # none, failed, cancelled
        _put_error(ctx, figures)
        return 0
    if "operation" in figures:
        ctx.line(f"{'Operation:':<17} {name_in(OPERATIONS, int(figures['operation'])):<12}")
    for name, (words, how) in FIGURES.items():
        if name in figures:
            ctx.line(f"{words + ':':<17} {shown(int(figures[name]), how)}")
    _put_error(ctx, figures)
    return 0


def _put_error(ctx: Context, figures: Mapping[str, object]) -> None:
    if figures.get("errmsg"):
        ctx.line(f"{'Error message:':<17} {figures['errmsg']}")


def domjobabort(ctx: Context, options: Options) -> int:
    domain = ctx.domain(options.data("domain"))
    if options.flag("postcopy"):
        ctx.connection.call("DOMAIN_ABORT_JOB_FLAGS", domain.ref, ABORT_POSTCOPY)
    else:
        domain.abort_job()
    return 0


COMMANDS = {
    "domjobinfo": Verb(
        domjobinfo,
        "Returns information about jobs running on a domain.",
        DOMAIN,
        Option("completed", FLAG, "return statistics of a recently completed job"),
        Option("keep-completed", FLAG, "don't destroy statistics of a recently completed job when reading"),
        Option("anystats", FLAG, "print statistics for any kind of job (even failed ones)"),
        Option("rawstats", FLAG, "print the raw data returned by the daemon"),
    ),
    "domjobabort": Verb(
        domjobabort,
        "Aborts the currently running domain job",
        ACTIVE,
        Option("postcopy", FLAG, "interrupt post-copy migration"),
    ),
}
