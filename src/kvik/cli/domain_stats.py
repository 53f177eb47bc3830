"""domstats, and the lookup in its figures that other verbs make."""

from __future__ import annotations

from kvik.cli import flags, term
from kvik.cli.common import chosen
from kvik.cli.options import FLAG, WORDS, Option, Verb

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvik.cli.context import Context
    from kvik.cli.options import Options
    from kvik.client import Domain

    Value = int | float | str | bool


def shown(value: object) -> str:
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)


def domstats(ctx: Context, options: Options) -> int:
    groups = chosen(options, flags.STATS)
    bits = chosen(
        options,
        {
            **flags.STATS_LIST,
            "enforce": flags.STATS_ENFORCE,
            "backing": flags.STATS_BACKING,
            "nowait": flags.STATS_NOWAIT,
        },
    )
    names = options.words("domain")
    domains = [ctx.domain(name) for name in names]
    raw = options.flag("raw")
    records = ctx.connection.all_stats(domains, groups, bits)
    if ctx.put([{"domain": domain.name, "uuid": domain.uuid, "stats": dict(stats)} for domain, stats in records]):
        return 0
    for number, (domain, stats) in enumerate(records):
        if number:
            ctx.line()
        ctx.line(f"Domain: '{domain.name}'")
        for name, value in stats.items():
            ctx.line(f"  {name}={value if raw else shown(value)}")
    return 0


def stats_of(domain: Domain, *groups: str) -> dict[str, Value]:
    """The named groups' figures of one machine."""
    bits = 0
    for group in groups:
        bits |= flags.STATS[group]
    return domain.stats(bits)


def device_stats(stats: Mapping[str, Value], group: str) -> dict[str, dict[str, Value]]:
    """`{"vda": {"rd.bytes": 512, ...}}` from `block.0.name=vda`, `block.0.rd.bytes=512`, ..."""
    found: dict[str, dict[str, Value]] = {}
    for index in range(int(stats.get(f"{group}.count", 0))):
        prefix = f"{group}.{index}."
        fields = {name[len(prefix) :]: value for name, value in stats.items() if name.startswith(prefix)}
        if "backingIndex" in fields and str(fields.get("name")) in found:
            continue  # a backing image of a disk that is already there
        found[term.neutralise(str(fields.pop("name", index)))] = fields
    return found


COMMANDS = {
    "domstats": Verb(
        domstats,
        "Get statistics about one or multiple domains. Without arguments this\nprints all available statistics",
        Option("state", FLAG, "report domain state"),
        Option("cpu-total", FLAG, "report domain physical cpu usage"),
        Option("balloon", FLAG, "report domain balloon statistics"),
        Option("vcpu", FLAG, "report domain virtual cpu information"),
        Option("interface", FLAG, "report domain network interface information"),
        Option("block", FLAG, "report domain block device statistics"),
        Option("perf", FLAG, "report domain perf event statistics"),
        Option("iothread", FLAG, "report domain IOThread information"),
        Option("memory", FLAG, "report domain memory usage"),
        Option("dirtyrate", FLAG, "report domain dirty rate information"),
        Option("vm", FLAG, "report hypervisor-specific statistics"),
        Option("list-active", FLAG, "list only active domains"),
        Option("list-inactive", FLAG, "list only inactive domains"),
        Option("list-persistent", FLAG, "list only persistent domains"),
        Option("list-transient", FLAG, "list only transient domains"),
        Option("list-running", FLAG, "list only running domains"),
        Option("list-paused", FLAG, "list only paused domains"),
        Option("list-shutoff", FLAG, "list only shutoff domains"),
        Option("list-other", FLAG, "list only domains in other states"),
        Option("raw", FLAG, "do not pretty-print the fields"),
        Option("enforce", FLAG, "enforce requested stats parameters"),
        Option("backing", FLAG, "add backing chain information to block stats"),
        Option("nowait", FLAG, "report only stats that are accessible instantly"),
        Option("domain", WORDS, "list of domains to get stats for", complete="domain"),
    )
}
