"""net-dumpxml, net-edit, net-update, net-desc, net-metadata: a network's document, whole or in parts."""

from __future__ import annotations

from kvik.cli import domain_text, flags, xml_verbs
from kvik.cli.common import NETWORK, impact
from kvik.cli.options import DATA, FLAG, NUMBER, TEXT, WORDS, Option, UsageError, Verb

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.cli.context import Context
    from kvik.cli.options import Options

INACTIVE = 1  # virNetworkXMLFlags
CONFIG = Option("config", FLAG, "affect next network startup")
LIVE = Option("live", FLAG, "affect running network")
CURRENT = Option("current", FLAG, "affect current state of network")
COMMAND_NAMES = ("add", "add-first", "add-last", "delete", "modify")
SECTION_NAMES = (
    "bridge", "domain", "ip", "ip-dhcp-host", "ip-dhcp-range", "forward", "forward-interface", "forward-pf",
    "portgroup", "dns-host", "dns-txt", "dns-srv",
)  # fmt: skip


def net_dumpxml(ctx: Context, options: Options) -> int:
    network = ctx.network(options.data("network"))
    return xml_verbs.show(ctx, options, network.xml(INACTIVE if options.flag("inactive") else 0))


def net_edit(ctx: Context, options: Options) -> int:
    network = ctx.network(options.data("network"))

    def define(text: str, validate: bool) -> str:
        return f"network {ctx.connection.define_network(text, int(validate)).name}"

    return xml_verbs.edit(ctx, f"network {network.name}", lambda: network.xml(INACTIVE), define)


def net_update(ctx: Context, options: Options) -> int:
    command, section = options.data("command"), options.data("section")
    bits = impact(options)
    network = ctx.network(options.data("network"))
    if command not in COMMAND_NAMES:
        raise UsageError(f"unrecognized command name '{command}'", remedy=f"one of: {', '.join(COMMAND_NAMES)}")
    if section not in SECTION_NAMES:
        raise UsageError(f"unrecognized section name '{section}'", remedy=f"one of: {', '.join(SECTION_NAMES)}")
    xml, parent = options.data("xml"), options.number("parent-index")
    if not xml.startswith("<"):
        xml = ctx.read_file(xml)
    ctx.doing = f"Failed to update network {network.name}"
    network.update(command, section, xml, parent_index=-1 if parent is None else parent, flags=bits)
    live = bits & flags.AFFECT_LIVE or (bits == flags.AFFECT_CURRENT and network.is_active())
    if not live:
        what = "persistent config"
    elif bits & flags.AFFECT_CONFIG:
        what = "persistent config and live state"
    else:
        what = "live state"
    ctx.say(f"Updated network {network.name} {what}")
    ctx.blank = False
    return 0


def net_desc(ctx: Context, options: Options) -> int:
    return domain_text.describe(ctx, options, ctx.network(options.data("network")), "network")


def net_metadata(ctx: Context, options: Options) -> int:
    return domain_text.custom(ctx, options, ctx.network(options.data("network")))


COMMANDS = {
    "net-dumpxml": Verb(
        net_dumpxml,
        "Output the network information as an XML dump to stdout.",
        NETWORK,
        Option("inactive", FLAG, "show inactive defined XML"),
        *xml_verbs.XPATH,
    ),
    "net-edit": Verb(net_edit, "Edit the XML configuration for a network.", NETWORK),
    "net-update": Verb(
        net_update,
        "Change one element of a network's configuration in place.",
        NETWORK,
        Option(
            "command", DATA, "type of update (add-first, add-last (add), delete, or modify)", complete=COMMAND_NAMES
        ),
        Option("section", DATA, "which section of network configuration to update", complete=SECTION_NAMES),
        Option(
            "xml",
            DATA,
            "name of file containing xml (or, if it starts with '<', the complete xml element itself) to add/modify, "
            "or to be matched for search",
            complete="file",
        ),
        Option("parent-index", NUMBER, "which parent object to search through"),
        CONFIG,
        LIVE,
        CURRENT,
    ),
    "net-desc": Verb(
        net_desc,
        "Allows to show or modify description or title of a network.",
        NETWORK,
        LIVE,
        CONFIG,
        CURRENT,
        Option("title", FLAG, "modify/get the title instead of description"),
        Option("edit", FLAG, "open an editor to modify the description"),
        Option("new-desc", WORDS, "message"),
    ),
    "net-metadata": Verb(
        net_metadata,
        "Shows or modifies the XML metadata of a network.",
        NETWORK,
        Option("uri", DATA, "URI of the namespace"),
        LIVE,
        CONFIG,
        CURRENT,
        Option("edit", FLAG, "use an editor to change the metadata"),
        Option("key", TEXT, "key to be used as a namespace identifier"),
        Option("set", TEXT, "new metadata to set"),
        Option("remove", FLAG, "remove the metadata corresponding to an uri"),
    ),
}
