"""domblklist, domblkinfo, domblkstat, domblkerror."""

from __future__ import annotations

from kvik.cli import document, flags
from kvik.cli.common import DOMAIN, pretty_size, scaled
from kvik.cli.domain_stats import device_stats, stats_of
from kvik.cli.options import DATA, FLAG, TEXT, Option, UsageError, Verb
from kvik.cli.table import Table
from kvik.errors import NoDevice, OperationInvalid

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.cli.context import Context
    from kvik.cli.options import Options


def domblklist(ctx: Context, options: Options) -> int:
    bits = flags.XML_INACTIVE if options.flag("inactive") else 0
    details = options.flag("details")
    root = document.parse(ctx.domain(options.data("domain")).xml(bits))
    table = Table("Type", "Device", "Target", "Source") if details else Table("Target", "Source")
    for disk in document.disks(root):
        cells = (disk.target or "-", disk.source or "-")
        table.add(disk.kind, disk.device, *cells) if details else table.add(*cells)
    ctx.table(table)
    return 0


def domblkinfo(ctx: Context, options: Options) -> int:
    human, every, device = options.flag("human"), options.flag("all"), options.text("device")
    domain = ctx.domain(options.data("domain"))
    if not every and device is None:
        raise UsageError("command 'domblkinfo' requires <device> option", remedy="or --all for every disk")
    sized = pretty_size if human else str
    if every:
        table = Table("Target", "Capacity", "Allocation", "Physical")
        for disk in document.disks(document.parse(domain.xml())):
            if not disk.source:
                table.add(disk.target, "-", "-", "-")
                continue
            info = domain.block_info(disk.target)
            table.add(disk.target, sized(info.capacity), sized(info.allocation), sized(info.physical))
        ctx.table(table)
        return 0
    info = domain.block_info(device or "")
    if ctx.put({"capacity": info.capacity, "allocation": info.allocation, "physical": info.physical}):
        return 0
    ctx.pairs(
        [
            ("Capacity", sized(info.capacity)),
            ("Allocation", sized(info.allocation)),
            ("Physical", sized(info.physical)),
        ]
    )
    return 0


# domstats' field: (virsh's name, virsh's words)
BLOCK_FIELDS = {
    "rd.reqs": ("rd_req", "number of read operations:"),
    "rd.bytes": ("rd_bytes", "number of bytes read:"),
    "wr.reqs": ("wr_req", "number of write operations:"),
    "wr.bytes": ("wr_bytes", "number of bytes written:"),
    "errors": ("errs", "error count:"),
    "fl.reqs": ("flush_operations", "number of flush operations:"),
    "rd.times": ("rd_total_times", "total duration of reads (ns):"),
    "wr.times": ("wr_total_times", "total duration of writes (ns):"),
    "fl.times": ("flush_total_times", "total duration of flushes (ns):"),
}


def domblkstat(ctx: Context, options: Options) -> int:
    device, human = options.text("device") or "", options.flag("human")
    domain = ctx.domain(options.data("domain"))
    ctx.doing = f"Failed to get block stats for domain '{domain.name}' device '{device}'"
    if domain.id <= 0:
        raise OperationInvalid("Requested operation is not valid: domain is not running")
    disks = device_stats(stats_of(domain, "block"), "block")
    paths = {str(fields.get("path")): name for name, fields in disks.items() if fields.get("path")}
    name = paths.get(device, device)
    if device and name not in disks:
        raise NoDevice(f"invalid path: {device}", remedy=f"'kvik domblklist {domain.name}' shows its disks")
    chosen = [disks[name]] if device else list(disks.values())
    figures = {
        label: sum(int(fields[field]) for fields in chosen if field in fields)
        for field, (label, _) in BLOCK_FIELDS.items()
        if any(field in fields for fields in chosen)
    }
    if ctx.put({"device": name, **figures}):
        return 0
    if human:
        ctx.line(f"Device: {name}")
    words = dict(BLOCK_FIELDS.values())
    for label, value in figures.items():
        ctx.line(f" {words[label]:<31} {value}" if human else f"{name} {label} {value}".lstrip())
    return 0


MAX_DISK_ERRORS = 256  # REMOTE_DOMAIN_DISK_ERRORS_MAX
DISK_ERRORS = ("no error", "unspecified error", "no space")


def domblkerror(ctx: Context, options: Options) -> int:
    domain = ctx.domain(options.data("domain"))
    errors = ctx.connection.call("DOMAIN_GET_DISK_ERRORS", domain.ref, MAX_DISK_ERRORS, 0)[0]
    named = {disk: DISK_ERRORS[code] if 0 <= code < len(DISK_ERRORS) else "unknown error" for disk, code in errors}
    if ctx.put(named):
        return 0
    for disk, text in named.items():
        ctx.line(f"{disk}: {text}")
    if not named:
        ctx.line("No errors found")
    return 0


def domblkthreshold(ctx: Context, options: Options) -> int:
    domain, device = ctx.domain(options.data("domain")), options.data("dev")
    threshold = scaled(options.data("threshold"), "threshold", 1)
    ctx.connection.call("DOMAIN_SET_BLOCK_THRESHOLD", domain.ref, device, threshold, 0)
    return 0


DEVICE = Option("device", TEXT, "block device", complete="disk")

COMMANDS = {
    "domblklist": Verb(
        domblklist,
        "Get the summary of block devices for a domain.",
        DOMAIN,
        Option("inactive", FLAG, "get inactive rather than running configuration"),
        Option("details", FLAG, "additionally display the type and device value"),
    ),
    "domblkinfo": Verb(
        domblkinfo,
        "Get block device size info for a domain.",
        DOMAIN,
        DEVICE,
        Option("human", FLAG, "Human readable output"),
        Option("all", FLAG, "display all block devices info"),
    ),
    "domblkstat": Verb(
        domblkstat,
        "Get device block stats for a running domain.",
        DOMAIN,
        DEVICE,
        Option("human", FLAG, "print a more human readable output"),
    ),
    "domblkthreshold": Verb(
        domblkthreshold,
        "set threshold for block-threshold event for a block device",
        DOMAIN,
        Option("dev", DATA, "device to set threshold for", complete="disk"),
        Option("threshold", DATA, "threshold as a scaled number (by default bytes)", metavar="number"),
    ),
    "domblkerror": Verb(domblkerror, "Show block device errors", DOMAIN),
}
