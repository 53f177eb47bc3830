"""net-list, net-info, net-name, net-uuid, net-dhcp-leases: what networks there are, and who is on them."""

from __future__ import annotations

import time

from kvik.cli.common import NETWORK
from kvik.cli.net_lifecycle import warn
from kvik.cli.options import DATA, FLAG, TEXT, Option, UsageError, Verb
from kvik.cli.table import Table
from kvik.errors import KvikError, NoNetwork

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.cli.context import Context
    from kvik.cli.options import Options
    from kvik.client.network import DhcpLease

# virConnectListAllNetworksFlags
INACTIVE, ACTIVE = 1 << 0, 1 << 1
FILTERS = {"persistent": 1 << 2, "transient": 1 << 3, "autostart": 1 << 4, "no-autostart": 1 << 5}


def yes(value: bool) -> str:
    return "yes" if value else "no"


def net_list(ctx: Context, options: Options) -> int:
    uuid, name = options.flag("uuid"), options.flag("name")
    if options.flag("table") + uuid + name > 1:
        raise UsageError("Only one argument from --table, --name and --uuid may be specified.")
    bits = ACTIVE
    if options.flag("inactive"):
        bits = INACTIVE
    if options.flag("all"):
        bits = ACTIVE | INACTIVE
    for option, bit in FILTERS.items():
        bits |= bit if options.flag(option) else 0
    ctx.doing = "Failed to list networks"
    if (uuid or name) and not ctx.json:
        for network in sorted(ctx.connection.networks(bits), key=lambda network: network.name.lower()):
            ctx.line(network.uuid if uuid else network.name)
        return 0
    rows = sorted(ctx.connection.network_facts(bits), key=lambda row: row.name.lower())
    if ctx.json:
        ctx.put([row._asdict() for row in rows])
        return 0
    table = Table("Name", "State", "Autostart", "Persistent")
    for row in rows:
        table.add(row.name, "active" if row.active else "inactive", yes(row.autostart), yes(row.persistent))
    shades = {"active": "green", "inactive": "dim"}
    ctx.table(table, colour=lambda column, text: shades.get(text) if column == 1 else None)
    return 0


def net_info(ctx: Context, options: Options) -> int:
    network = ctx.network(options.data("network"))
    pairs: list[tuple[str, object]] = [
        ("Name", network.name),
        ("UUID", network.uuid),
        ("Active", yes(network.is_active())),
        ("Persistent", yes(network.is_persistent())),
    ]
    try:
        pairs.append(("Autostart", yes(network.autostart())))
    except KvikError:
        pairs.append(("Autostart", "no autostart"))
    try:
        pairs.append(("Bridge", network.bridge_name()))
    except KvikError:
        pass  # a network without a bridge: macvtap, or a pool of host devices
    ctx.pairs(pairs)
    warn(ctx, network)
    return 0


def net_name(ctx: Context, options: Options) -> int:
    key = options.data("network")
    try:
        name = ctx.connection.lookup_network_uuid(key).name
    except NoNetwork as error:
        raise NoNetwork(f"failed to get network '{key}'", remedy="net-name takes a UUID") from error
    if not ctx.put({"name": name}):
        ctx.line(name)
    return 0


def net_uuid(ctx: Context, options: Options) -> int:
    uuid = ctx.network(options.data("network"), by_name=True).uuid
    if not ctx.put({"uuid": uuid}):
        ctx.line(uuid)
    return 0


def expiry(seconds: int) -> str:
    """Local time, as virsh prints it."""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds)) if seconds else "never"
    except (OverflowError, ValueError, OSError):
        return str(seconds)


def facts(lease: DhcpLease) -> dict[str, object]:
    return {key: value for key, value in lease._asdict().items() if value is not None}


def net_dhcp_leases(ctx: Context, options: Options) -> int:
    network = ctx.network(options.data("network"))
    ctx.doing = f"Failed to get leases info for {network.name}"
    leases = sorted(network.leases(options.text("mac")), key=lambda lease: ((lease.mac or "").lower(), lease.address))
    if ctx.json:
        ctx.put([facts(lease) for lease in leases])
        return 0
    table = Table("Expiry Time", "MAC address", "Protocol", "IP address", "Hostname", "Client ID or DUID")
    for lease in leases:
        address = f"{lease.address}/{lease.prefix}"
        cells = (lease.mac or "-", lease.family, address, lease.hostname or "-", lease.client_id or "-")
        table.add(expiry(lease.expiry), *cells)
    ctx.table(table)
    warn(ctx, network)
    return 0


COMMANDS = {
    "net-list": Verb(
        net_list,
        "Returns list of networks.",
        Option("inactive", FLAG, "list inactive networks"),
        Option("all", FLAG, "list inactive & active networks"),
        Option("persistent", FLAG, "list persistent networks"),
        Option("transient", FLAG, "list transient networks"),
        Option("autostart", FLAG, "list networks with autostart enabled"),
        Option("no-autostart", FLAG, "list networks with autostart disabled"),
        Option("uuid", FLAG, "list uuid's only"),
        Option("name", FLAG, "list network names only"),
        Option("table", FLAG, "list table (default)"),
    ),
    "net-info": Verb(net_info, "Returns basic information about the network", NETWORK),
    "net-name": Verb(
        net_name,
        "Convert a network UUID to network name.",
        Option("network", DATA, "network uuid", complete="network-uuid"),
    ),
    "net-uuid": Verb(
        net_uuid,
        "Convert a network name to network UUID.",
        Option("network", DATA, "network name", complete="network"),
    ),
    "net-dhcp-leases": Verb(
        net_dhcp_leases,
        "Print lease info for a given network",
        NETWORK,
        Option("mac", TEXT, "MAC address"),
    ),
}
