"""dns: the host itself knows its machines by name: NAME.DOMAIN of networks with a <domain>."""

from __future__ import annotations

from kvik.cli.options import DATA, Option, UsageError, Verb
from kvik.cli.table import Table

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.cli.context import Context
    from kvik.cli.options import Options

ACTIONS = ("enable", "disable", "status")


def dns(ctx: Context, options: Options) -> int:
    action = options.data("action")
    if action not in ACTIONS:
        raise UsageError(f"unknown action '{action}'", remedy="one of: " + ", ".join(ACTIONS))
    if action == "enable":
        ctx.doing = "Failed to make machines' names known to this host"
        (resolver,) = ctx.connection.call_kvik("DNS_ENABLE")
        ctx.say(f"Names of machines resolve on this host, by {resolver}")
    elif action == "disable":
        ctx.doing = "Failed to take machines' names away from this host"
        (was,) = ctx.connection.call_kvik("DNS_DISABLE")
        ctx.say("Names of machines no longer resolve on this host" if was else "They were not known to this host")
    else:
        _status(ctx)
    return 0


def _status(ctx: Context) -> None:
    enabled, resolver, file, zones = ctx.connection.call_kvik("DNS_STATUS")
    rows = [{"network": row[0], "domain": row[1], "servers": [*row[2]], "why": row[3]} for row in zones]
    if ctx.put({"enabled": bool(enabled), "resolver": resolver, "file": file, "networks": rows}):
        return
    ctx.line(f"{'Enabled:':<15} {'yes' if enabled else 'no'}")
    ctx.line(f"{'Resolver:':<15} {resolver or 'none that could be told (a plain /etc/resolv.conf)'}")
    if file:
        ctx.line(f"{'File:':<15} {file}")
    ctx.line()
    table = Table("Network", "Names", "Asked at")
    for row in rows:
        names = f"*.{row['domain']}" if row["domain"] else "-"
        table.add(row["network"], names, ", ".join(row["servers"]) or row["why"])
    ctx.table(table)


COMMANDS = {
    "dns": Verb(
        dns,
        "Makes NAME.DOMAIN of machines on networks with a <domain> resolve on this host, by telling the resolver that\n"
        "the host uses (systemd-resolved, NetworkManager's or the system's dnsmasq), with no file but one of its own;\n"
        "takes all of it away again; shows what is used.",
        Option("action", DATA, "enable, disable or status", complete=ACTIONS),
    )
}
