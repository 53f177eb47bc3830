"""nodeinfo, nodecpustats, nodememstats: the host in numbers."""

from __future__ import annotations

from kvik.cli.options import FLAG, NUMBER, Option, Verb

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.cli.context import Context
    from kvik.cli.options import Options


def nodeinfo(ctx: Context, options: Options) -> int:
    ctx.doing = "failed to get node information"
    info = ctx.connection.node_info()
    if ctx.put(info._asdict()):
        return 0
    for name, value in (
        ("CPU model", info.model),
        ("CPU(s)", info.cpus),
        ("CPU frequency", f"{info.mhz} MHz"),
        ("CPU socket(s)", info.sockets),
        ("Core(s) per socket", info.cores),
        ("Thread(s) per core", info.threads),
        ("NUMA cell(s)", info.nodes),
        ("Memory size", f"{info.memory} KiB"),
    ):
        ctx.line(f"{name + ':':<20} {value}")
    return 0


# libvirt's field: virsh's word, in virsh's order
CPU_FIELDS = {"user": "user", "kernel": "system", "idle": "idle", "iowait": "iowait"}


def nodecpustats(ctx: Context, options: Options) -> int:
    cpu = options.number("cpu")
    number = -1 if cpu is None else cpu
    ctx.doing = "Unable to get node cpu stats"
    before = ctx.connection.cpu_stats(number)
    if not options.flag("percent"):
        figures = {word: before[name] for name, word in CPU_FIELDS.items() if name in before}
        if not ctx.put(figures):
            for word, value in figures.items():
                ctx.line(f"{word + ':':<15} {value:>20}")
        return 0
    from time import sleep

    sleep(1)
    after = ctx.connection.cpu_stats(number)
    percent = shares(before, after)
    if not ctx.put(percent):
        for word, share in percent.items():
            ctx.line(f"{word + ':':<15} {share:>5.1f}%")
    return 0


def shares(before: dict[str, int], after: dict[str, int]) -> dict[str, float]:
    """Percent of the time between two readings; `usage` is all that is neither idle nor waiting."""
    spent = {name: after.get(name, 0) - before.get(name, 0) for name in CPU_FIELDS}
    total = sum(spent.values()) or 1
    parts = {word: spent[name] / total * 100 for name, word in CPU_FIELDS.items()}
    return {"usage": parts["user"] + parts["system"], **parts}


def nodememstats(ctx: Context, options: Options) -> int:
    cell = options.number("cell")
    ctx.doing = "Unable to get memory stats"
    figures = ctx.connection.memory_stats(-1 if cell is None else cell)
    if ctx.put(figures):
        return 0
    for name, kib in figures.items():
        ctx.line(f"{name:<7}: {kib:>20} KiB")
    return 0


COMMANDS = {
    "nodeinfo": Verb(nodeinfo, "Returns basic information about the node."),
    "nodecpustats": Verb(
        nodecpustats,
        "Returns cpu stats of the node, in nanoseconds.",
        Option("cpu", NUMBER, "prints specified cpu statistics only."),
        Option("percent", FLAG, "prints by percentage during 1 second."),
    ),
    "nodememstats": Verb(
        nodememstats,
        "Returns memory stats of the node, in kilobytes.",
        Option("cell", NUMBER, "prints specified cell statistics only."),
    ),
}
