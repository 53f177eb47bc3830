"""net-port-list, -create, -dumpxml, -delete: what machines' interfaces hold of a network."""

from __future__ import annotations

from kvik.cli import xml_verbs
from kvik.cli.common import NETWORK
from kvik.cli.options import DATA, FLAG, Option, UsageError, Verb
from kvik.cli.table import Table
from kvik.errors import InvalidArgument

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.cli.context import Context
    from kvik.cli.options import Options
    from kvik.client.network import NetworkPort

VALIDATE = 2  # virNetworkPortCreateFlags
PORT = Option("port", DATA, "port UUID", complete="network-port")


def find(ctx: Context, options: Options) -> NetworkPort:
    from kvik.client.handle import uuid_bytes

    network, key = ctx.network(options.data("network")), options.data("port")
    raw = uuid_bytes(key)
    ctx.doing = f"failed to get network port '{key}'"
    if raw is None:
        raise InvalidArgument(f"'{key}' is not a UUID", remedy=f"'kvik net-port-list {network.name}' shows them")
    return network.port(raw)


def port_list(ctx: Context, options: Options) -> int:
    network = ctx.network(options.data("network"))
    if options.flag("table") and options.flag("uuid"):
        raise UsageError("Only one argument from --table and --uuid may be specified.")
    ctx.doing = "Failed to list network ports"
    ports = sorted(port.uuid for port in network.ports())
    if options.flag("uuid") and not ctx.json:
        for uuid in ports:
            ctx.line(uuid)
        return 0
    table = Table("UUID")
    for uuid in ports:
        table.add(uuid)
    ctx.table(table)
    return 0


def port_create(ctx: Context, options: Options) -> int:
    network, path = ctx.network(options.data("network")), options.data("file")
    text = ctx.read_file(path)
    ctx.doing = f"Failed to create network port from {path}"
    port = network.create_port(text, VALIDATE if options.flag("validate") else 0)
    ctx.say(f"Network port {port.uuid} created from {path}")
    return 0


def port_dumpxml(ctx: Context, options: Options) -> int:
    port = find(ctx, options)
    ctx.doing = ""
    return xml_verbs.show(ctx, options, port.xml())


def port_delete(ctx: Context, options: Options) -> int:
    port = find(ctx, options)
    ctx.doing = f"Failed to delete network port {port.uuid}"
    port.delete()
    ctx.say(f"Network port {port.uuid} deleted")
    return 0


COMMANDS = {
    "net-port-list": Verb(
        port_list,
        "Returns list of network ports.",
        NETWORK,
        Option("uuid", FLAG, "list uuid's only"),
        Option("table", FLAG, "list table (default)"),
    ),
    "net-port-create": Verb(
        port_create,
        "Create a network port.",
        NETWORK,
        Option("file", DATA, "file containing an XML network port description", complete="file"),
        Option("validate", FLAG, "validate the XML against the schema"),
    ),
    "net-port-dumpxml": Verb(
        port_dumpxml,
        "Output the network port information as an XML dump to stdout.",
        NETWORK,
        PORT,
        *xml_verbs.XPATH,
    ),
    "net-port-delete": Verb(port_delete, "Delete the specified network port.", NETWORK, PORT),
}
