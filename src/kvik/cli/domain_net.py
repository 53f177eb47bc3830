"""domiflist, domifstat, domifaddr, domif-getlink."""

from __future__ import annotations

from kvik.cli import document, flags
from kvik.cli.common import ACTIVE, DOMAIN, choice
from kvik.cli.domain_stats import device_stats, stats_of
from kvik.cli.options import DATA, FLAG, TEXT, Option, Verb
from kvik.cli.table import Table
from kvik.errors import InvalidArgument, KvikError, NoDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from kvik.cli.context import Context
    from kvik.cli.options import Options
    from kvik.client import Domain


def domiflist(ctx: Context, options: Options) -> int:
    bits = flags.XML_INACTIVE if options.flag("inactive") else 0
    root = document.parse(ctx.domain(options.data("domain")).xml(bits))
    table = Table("Interface", "Type", "Source", "Model", "MAC")
    for nic in document.interfaces(root):
        table.add(nic.target or "-", nic.kind, nic.source or "-", nic.model or "-", nic.mac or "-")
    ctx.table(table)
    return 0


def find_interface(root: document.Element, key: str) -> document.Interface:
    """The interface whose MAC address or target name is `key`."""
    by_mac = ":" in key
    found = [
        nic
        for nic in document.interfaces(root)
        if (nic.mac.lower() == key.lower() if by_mac else nic.target == key)
    ]
    what = "MAC" if by_mac else "dev"
    if len(found) != 1:
        problem = "not found." if not found else "is not unique"
        raise NoDevice(f"Interface ({what}: {key}) {problem}", remedy="'kvik domiflist' shows the interfaces")
    return found[0]


def domif_getlink(ctx: Context, options: Options) -> int:
    key = options.data("interface")
    bits = flags.XML_INACTIVE if options.flag("config") else 0
    nic = find_interface(document.parse(ctx.domain(options.data("domain")).xml(bits)), key)
    if not ctx.put({"interface": key, "link": nic.link}):
        ctx.line(f"{key} {nic.link}")
    return 0


# domstats' field: virsh's name
NET_FIELDS = {
    "rx.bytes": "rx_bytes",
    "rx.pkts": "rx_packets",
    "rx.errs": "rx_errs",
    "rx.drop": "rx_drop",
    "tx.bytes": "tx_bytes",
    "tx.pkts": "tx_packets",
    "tx.errs": "tx_errs",
    "tx.drop": "tx_drop",
}


def domifstat(ctx: Context, options: Options) -> int:
    key = options.data("interface")
    domain = ctx.domain(options.data("domain"))
    ctx.doing = f"Failed to get interface stats {domain.name} {key}"
    name = key
    if ":" in key:
        name = find_interface(document.parse(domain.xml()), key).target
    cards = device_stats(stats_of(ctx, domain, "interface"), "net")
    if name not in cards:
        raise InvalidArgument(
            f"invalid argument: '{key}' is not a known interface",
            remedy=f"'kvik domiflist {domain.name}' shows its interfaces; only a running machine has figures",
        )
    figures = {label: int(cards[name][field]) for field, label in NET_FIELDS.items() if field in cards[name]}
    if ctx.put({"interface": key, **figures}):
        return 0
    for label, value in figures.items():
        ctx.line(f"{key} {label} {value}")
    return 0


PROTOCOLS = ("ipv4", "ipv6")


def addresses(domain: Domain, source: str | None) -> list[Any]:
    """Interfaces with their addresses from `source`; without one, from the first that knows any."""
    if source is not None:
        return list(domain.interface_addresses(choice(source, flags.ADDRESSES, "address source")))
    first: KvikError | None = None
    for number in flags.ADDRESSES.values():
        try:
            found = list(domain.interface_addresses(number))
        except KvikError as error:
            first = first or error
            continue
        if any(nic.addrs for nic in found):
            return found
    if first is not None:
        raise first
    return []


def domifaddr(ctx: Context, options: Options) -> int:
    only, full = options.text("interface"), options.flag("full")
    domain = ctx.domain(options.data("domain"))
    ctx.doing = "Failed to query for interfaces addresses"
    found = [nic for nic in addresses(domain, options.text("source")) if only in (None, nic.name)]
    if ctx.put(
        [
            {
                "name": nic.name,
                "mac": nic.hwaddr,
                "addresses": [
                    {"protocol": PROTOCOLS[a.type] if 0 <= a.type < 2 else "?", "address": a.addr, "prefix": a.prefix}
                    for a in nic.addrs
                ],
            }
            for nic in found
        ]
    ):
        return 0
    ctx.extra(f" {'Name':<10} {'MAC address':<20} {'Protocol':<8}     Address\n".rstrip("\n"))
    ctx.extra("-" * 79)
    for nic in found:
        mac = nic.hwaddr or ""
        if not nic.addrs:
            ctx.line(f" {nic.name:<10} {mac or 'N/A':<17}    {'N/A':<12} N/A")
        for index, address in enumerate(nic.addrs):
            protocol = PROTOCOLS[address.type] if 0 <= address.type < 2 else "?"
            name, shown = (nic.name, mac) if full or index == 0 else ("-", "-")
            ctx.line(f" {name:<10} {shown:<17}    {protocol:<12} {address.addr}/{address.prefix}")
    return 0


INTERFACE = Option("interface", DATA, "interface device (MAC Address)", complete="interface")

COMMANDS = {
    "domiflist": Verb(
        domiflist,
        "Get the summary of virtual interfaces for a domain.",
        DOMAIN,
        Option("inactive", FLAG, "get inactive rather than running configuration"),
    ),
    "domifstat": Verb(
        domifstat,
        "Get network interface stats for a running domain.",
        ACTIVE,
        Option("interface", DATA, "interface device specified by name or MAC Address", complete="interface"),
    ),
    "domifaddr": Verb(
        domifaddr,
        "Get network interfaces' addresses for a running domain",
        ACTIVE,
        Option("interface", TEXT, "network interface name"),
        Option("full", FLAG, "always display names and MACs of interfaces"),
        Option("source", TEXT, "address source: 'lease', 'agent', or 'arp'", complete=tuple(flags.ADDRESSES)),
    ),
    "domif-getlink": Verb(
        domif_getlink,
        "Get link state of a domain's virtual interface.",
        DOMAIN,
        INTERFACE,
        Option("config", FLAG, "Get persistent interface state"),
    ),
}
