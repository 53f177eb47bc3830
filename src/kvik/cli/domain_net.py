"""domiflist, domifstat, domifaddr, ip, domif-getlink, domiftune."""

from __future__ import annotations

from kvik.cli import document, flags
from kvik.cli.common import ACTIVE, CONFIG, CURRENT, DOMAIN, LIVE, choice, impact
from kvik.cli.options import DATA, FLAG, TEXT, Option, UsageError, Verb
from kvik.cli.table import Table
from kvik.errors import KvikError, NoDevice, OperationFailed
from kvik.named import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.cli.context import Context
    from kvik.cli.options import Options
    from kvik.client import Domain
    from kvik.client.domain import InterfaceAddress

LOOPBACK = ("127.0.0.1", "::1")


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


class Found(NamedTuple):
    """One address of a machine, and who knows it: one or more of lease, agent and arp."""

    address: InterfaceAddress
    sources: tuple[str, ...]


ANY = "any"


def addresses(domain: Domain, source: str | None) -> list[Found]:
    """Addresses from `source`; without one, or of any, what leases, agent and what is heard tell together."""
    if source not in (None, ANY):
        number = choice(source or "", flags.ADDRESSES, "address source")
        return [Found(address, (source,)) for address in domain.interface_addresses(number)]
    merged: dict[tuple[str, str], Found] = {}
    first: KvikError | None = None
    for name, number in flags.ADDRESSES.items():
        try:
            told = domain.interface_addresses(number)
        except KvikError as error:
            first = first or error
            continue
        for address in told:
            if address.address in LOOPBACK:
                continue
            key = ((address.mac or "").lower(), address.address)
            known = merged.get(key)
            merged[key] = known._replace(sources=(*known.sources, name)) if known else Found(address, (name,))
    if first is not None and not merged:
        raise first
    order = {mac: number for number, (mac, _) in reversed([*enumerate(merged)])}
    return [merged[key] for key in sorted(merged, key=lambda key: order[key[0]])]


def domifaddr(ctx: Context, options: Options) -> int:
    only, full = options.text("interface"), options.flag("full")
    domain = ctx.domain(options.data("domain"))
    ctx.doing = "Failed to query for interfaces addresses"
    source = options.text("source")
    found = [one for one in addresses(domain, source) if only in (None, one.address.interface, one.address.mac)]
    if ctx.put([{**one.address._asdict(), "sources": [*one.sources]} for one in found]):
        return 0
    # virsh's columns, and one more where it would have shown less: it asks for the leases alone.
    several = source == ANY or (source is None and any("lease" not in one.sources for one in found))
    width = max((len(f"{one.address.address}/{one.address.prefix}") for one in found), default=0)
    ctx.extra(
        f" {'Name':<10} {'MAC address':<20} {'Protocol':<8}     "
        + (f"{'Address':<{width}}    Source" if several else "Address")
    )
    ctx.extra("-" * 79)
    before = ""
    for address, sources in found:
        again = address.interface == before and not full
        name, mac = ("-", "-") if again else (address.interface, address.mac or "N/A")
        before = address.interface
        text = f"{address.address}/{address.prefix}"
        ctx.line(
            f" {name:<10} {mac:<17}    {address.family:<12} "
            + (f"{text:<{width}}    {', '.join(sources)}" if several else text)
        )
    return 0


def rank(found: Found) -> tuple[bool, bool]:
    """What one would type first: IPv4, and what is reachable from further than the same link."""
    address = found.address
    return (address.family != "ipv4", address.address.lower().startswith("fe80:"))


def ip(ctx: Context, options: Options) -> int:
    domain = ctx.domain(options.data("domain"))
    ctx.doing = f"Failed to find an address of domain '{domain.name}'"
    found = sorted(addresses(domain, options.text("source")), key=rank)
    if not found:
        raise OperationFailed(
            "nobody knows one: there is no lease, no agent in the guest, and it was not heard on its interfaces",
            remedy="wait until it has booted, or look on its console",
        )
    if not options.flag("all"):
        del found[1:]
    if not ctx.put([{**one.address._asdict(), "sources": [*one.sources]} for one in found]):
        for one in found:
            ctx.line(one.address.address)
    return 0


RATES = ("average", "peak", "burst", "floor")


def rates(direction: str, text: str) -> dict[str, int]:
    """AVERAGE[,PEAK[,BURST[,FLOOR]]] as parameters; what is left out is not said."""
    parts = text.split(",")
    if len(parts) > len(RATES):
        raise UsageError(f"Rate string '{text}' has too many fields")
    given: dict[str, int] = {}
    for name, part in zip(RATES, parts, strict=False):
        if part and not (part.isascii() and part.isdigit() and int(part) < 1 << 32):
            raise UsageError(f"field '{name}' is malformed", remedy="AVERAGE[,PEAK[,BURST[,FLOOR]]], in kB/s and KiB")
        given[name] = int(part or 0)
    if direction == "outbound" and given.get("floor"):
        raise UsageError("outbound floor is unsupported yet")
    if not given["average"] and not given.get("floor") and any(given.values()):
        raise UsageError(
            "either inbound average or floor is mandatory"
            if direction == "inbound"
            else "outbound average is mandatory"
        )
    return {f"{direction}.{name}": value for name, value in given.items() if value or name == "average"}


def domiftune(ctx: Context, options: Options) -> int:
    key, bits = options.data("interface"), impact(options)
    values: dict[str, int] = {}
    for direction in ("inbound", "outbound"):
        text = options.text(direction)
        if text is not None:
            values |= rates(direction, text)
    domain = ctx.domain(options.data("domain"))
    if values:
        ctx.doing = "Unable to set interface parameters"
        domain.set_interface_parameters(key, values, bits)
        return 0
    ctx.doing = "Unable to get interface parameters"
    found = domain.interface_parameters(key, bits)
    if not ctx.put({"interface": key, **found}):
        for name, value in found.items():
            ctx.line(f"{name:<15}: {value}")
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
        Option("source", TEXT, "address source: 'lease', 'agent', 'arp', or 'any'", complete=(*flags.ADDRESSES, ANY)),
    ),
    "ip": Verb(
        ip,
        "Print the address of a running domain: one line that a script can use.",
        ACTIVE,
        Option("all", FLAG, "print every address, the best first"),
        Option("source", TEXT, "address source: 'lease', 'agent', 'arp', or 'any'", complete=(*flags.ADDRESSES, ANY)),
    ),
    "domiftune": Verb(
        domiftune,
        "Get/set parameters of a domain's virtual interface.",
        DOMAIN,
        INTERFACE,
        Option("inbound", TEXT, "control domain's incoming traffics"),
        Option("outbound", TEXT, "control domain's outgoing traffics"),
        CONFIG,
        LIVE,
        CURRENT,
    ),
    "domif-getlink": Verb(
        domif_getlink,
        "Get link state of a domain's virtual interface.",
        DOMAIN,
        INTERFACE,
        Option("config", FLAG, "Get persistent interface state"),
    ),
}
