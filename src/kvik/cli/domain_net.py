"""domiflist, domifstat, domifaddr, domif-getlink."""

from __future__ import annotations

from kvik.cli import document, flags
from kvik.cli.common import ACTIVE, DOMAIN, choice
from kvik.cli.options import DATA, FLAG, TEXT, Option, Verb
from kvik.cli.table import Table
from kvik.errors import KvikError, NoDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.cli.context import Context
    from kvik.cli.options import Options
    from kvik.client import Domain
    from kvik.client.domain import InterfaceAddress


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
        nic for nic in document.interfaces(root) if (nic.mac.lower() == key.lower() if by_mac else nic.target == key)
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
        ctx.last(f"{key} {nic.link}")
    return 0


def domifstat(ctx: Context, options: Options) -> int:
    key = options.data("interface")
    domain = ctx.domain(options.data("domain"))
    ctx.doing = f"Failed to get interface stats {domain.name} {key}"
    figures = domain.interface_stats(key)
    if ctx.put({"interface": key, **figures._asdict()}):
        return 0
    for label, value in figures._asdict().items():
        if value >= 0:  # -1: the hypervisor does not count it
            ctx.line(f"{key} {label} {value}")
    return 0


def addresses(domain: Domain, source: str | None) -> list[InterfaceAddress]:
    """Addresses from `source`; without one, from the first of lease, agent and ARP table that knows any."""
    if source is not None:
        return domain.interface_addresses(choice(source, flags.ADDRESSES, "address source"))
    first: KvikError | None = None
    for number in flags.ADDRESSES.values():
        try:
            found = domain.interface_addresses(number)
        except KvikError as error:
            first = first or error
            continue
        if found:
            return found
    if first is not None:
        raise first
    return []


def domifaddr(ctx: Context, options: Options) -> int:
    only, full = options.text("interface"), options.flag("full")
    domain = ctx.domain(options.data("domain"))
    ctx.doing = "Failed to query for interfaces addresses"
    found = [address for address in addresses(domain, options.text("source")) if only in (None, address.interface)]
    if ctx.put([address._asdict() for address in found]):
        return 0
    ctx.extra(f" {'Name':<10} {'MAC address':<20} {'Protocol':<8}     Address")
    ctx.extra("-" * 79)
    before = ""
    for address in found:
        again = address.interface == before and not full
        name, mac = ("-", "-") if again else (address.interface, address.mac or "N/A")
        before = address.interface
        ctx.line(f" {name:<10} {mac:<17}    {address.family:<12} {address.address}/{address.prefix}")
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
