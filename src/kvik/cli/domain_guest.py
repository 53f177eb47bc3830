"""domfsinfo, domhostname, guestinfo, domtime: what the guest itself says, mostly through its agent."""

from __future__ import annotations

from kvik.cli import flags
from kvik.cli.common import ACTIVE, choice, chosen, exclusive
from kvik.cli.options import FLAG, NUMBER, TEXT, Option, Verb
from kvik.cli.table import Table

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.cli.context import Context
    from kvik.cli.options import Options

SET_TIME_SYNC = 1  # VIR_DOMAIN_TIME_SYNC
# virDomainGuestInfoTypes
GUEST_INFO = {
    "user": 1 << 0,
    "os": 1 << 1,
    "timezone": 1 << 2,
    "hostname": 1 << 3,
    "filesystem": 1 << 4,
    "disk": 1 << 5,
    "interface": 1 << 6,
}


def domfsinfo(ctx: Context, options: Options) -> int:
    domain = ctx.domain(options.data("domain"))
    ctx.doing = f"Unable to get filesystem information of domain '{domain.name}'"
    found = ctx.connection.call("DOMAIN_GET_FSINFO", domain.ref, 0)[0]
    table = Table("Mountpoint", "Name", "Type", "Target")
    for mountpoint, name, kind, aliases in found:
        table.add(mountpoint, name, kind, ",".join(aliases))
    if not table.rows and not ctx.json:
        ctx.line("No filesystems are mounted in the domain")
        return 0
    ctx.table(table)
    return 0


def domhostname(ctx: Context, options: Options) -> int:
    source = options.text("source")
    bits = choice(source, flags.HOSTNAMES, "hostname source") if source is not None else 0
    domain = ctx.domain(options.data("domain"))
    ctx.doing = "failed to get hostname"
    name = domain.hostname(bits)
    if not ctx.put({"hostname": name}):
        ctx.line(name)
    return 0


def guestinfo(ctx: Context, options: Options) -> int:
    figures = ctx.domain(options.data("domain")).guest_info(chosen(options, GUEST_INFO))
    if ctx.put(figures):
        return 0
    for name, value in figures.items():
        ctx.line(f"{name:<20}: {value}")
    return 0


def domtime(ctx: Context, options: Options) -> int:
    exclusive(options, ("now", "sync"), ("pretty", "now"), ("pretty", "sync"))
    seconds, sync = options.number("time"), options.flag("sync")
    domain = ctx.domain(options.data("domain"))
    if options.flag("now"):
        from time import time

        seconds = int(time())
    if seconds is not None or sync:
        ctx.doing = "Unable to set the domain's time"
        domain.set_time(seconds or 0, 0, SET_TIME_SYNC if sync else 0)
        return 0
    ctx.doing = "Unable to get the domain's time"
    now = int(domain.time())
    if ctx.put({"seconds": now}):
        return 0
    if options.flag("pretty"):
        from time import gmtime, strftime

        ctx.last(f"Time: {strftime('%Y-%m-%d %H:%M:%S', gmtime(now))}")
    else:
        ctx.last(f"Time: {now}")
    return 0


COMMANDS = {
    "domfsinfo": Verb(domfsinfo, "Get information of mounted filesystems within the domain.", ACTIVE),
    "domhostname": Verb(
        domhostname,
        "Print the hostname of the domain",
        ACTIVE,
        Option("source", TEXT, "address source: 'lease' or 'agent'", complete=tuple(flags.HOSTNAMES)),
    ),
    "guestinfo": Verb(
        guestinfo,
        "Query information about the guest OS (via the agent)",
        ACTIVE,
        Option("user", FLAG, "report active users"),
        Option("os", FLAG, "report operating system information"),
        Option("timezone", FLAG, "report timezone information"),
        Option("hostname", FLAG, "report hostname"),
        Option("filesystem", FLAG, "report filesystem information"),
        Option("disk", FLAG, "report disk information"),
        Option("interface", FLAG, "report interface information"),
    ),
    "domtime": Verb(
        domtime,
        "Gets or sets the domain's system time",
        ACTIVE,
        Option("now", FLAG, "set to the time of the host running kvik"),
        Option("pretty", FLAG, "print domain's time in human readable form"),
        Option("sync", FLAG, "instead of setting given time, synchronize from domain's RTC"),
        Option("time", NUMBER, "time to set"),
    ),
}
