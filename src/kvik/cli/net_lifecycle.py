"""net-define, -create, -start, -destroy, -undefine, -autostart: what networks there are to be."""

from __future__ import annotations

import contextlib

from kvik.cli.common import NETWORK, NETWORK_ACTIVE, NETWORK_INACTIVE
from kvik.cli.options import DATA, FLAG, Option, Verb
from kvik.errors import KvikError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.cli.context import Context
    from kvik.cli.options import Options
    from kvik.client import Network

VALIDATE = 1  # virNetworkDefineFlags, virNetworkCreateFlags
FILE = Option("file", DATA, "file containing an XML network description", complete="file")
STRICT = Option("validate", FLAG, "validate the XML against the schema")


def warn(ctx: Context, network: Network) -> None:
    """What the daemon has to say of it: parts of the document without effect, another rule set in the way."""
    with contextlib.suppress(KvikError):  # the verb itself went well
        for message in network.messages():
            ctx.warn(f"warning: {message}")


def net_define(ctx: Context, options: Options) -> int:
    path = options.data("file")
    text = ctx.read_file(path)
    ctx.doing = f"Failed to define network from {path}"
    network = ctx.connection.define_network(text, VALIDATE if options.flag("validate") else 0)
    ctx.say(f"Network {network.name} defined from {path}")
    warn(ctx, network)
    return 0


def net_create(ctx: Context, options: Options) -> int:
    path = options.data("file")
    text = ctx.read_file(path)
    ctx.doing = f"Failed to create network from {path}"
    network = ctx.connection.create_network(text, VALIDATE if options.flag("validate") else 0)
    ctx.say(f"Network {network.name} created from {path}")
    warn(ctx, network)
    return 0


def net_start(ctx: Context, options: Options) -> int:
    network = ctx.network(options.data("network"))
    ctx.doing = f"Failed to start network {network.name}"
    network.start()
    ctx.say(f"Network {network.name} started")
    warn(ctx, network)
    return 0


def net_destroy(ctx: Context, options: Options) -> int:
    network = ctx.network(options.data("network"))
    ctx.doing = f"Failed to destroy network {network.name}"
    network.destroy()
    ctx.say(f"Network {network.name} destroyed")
    return 0


def net_undefine(ctx: Context, options: Options) -> int:
    network = ctx.network(options.data("network"))
    ctx.doing = f"Failed to undefine network {network.name}"
    network.undefine()
    ctx.say(f"Network {network.name} has been undefined")
    return 0


def net_autostart(ctx: Context, options: Options) -> int:
    network = ctx.network(options.data("network"))
    word = "unmark" if options.flag("disable") else "mark"
    ctx.doing = f"failed to {word} network {network.name} as autostarted"
    network.set_autostart(word == "mark")
    ctx.say(f"Network {network.name} {word}ed as autostarted")
    return 0


COMMANDS = {
    "net-define": Verb(net_define, "Define or modify a persistent virtual network.", FILE, STRICT),
    "net-create": Verb(net_create, "Create a network.", FILE, STRICT),
    "net-start": Verb(net_start, "Start a network.", NETWORK_INACTIVE),
    "net-destroy": Verb(net_destroy, "Forcefully stop a given network.", NETWORK_ACTIVE),
    "net-undefine": Verb(net_undefine, "Undefine the configuration for a persistent network.", NETWORK),
    "net-autostart": Verb(
        net_autostart,
        "Configure a network to be automatically started at boot.",
        NETWORK,
        Option("disable", FLAG, "disable autostarting"),
    ),
}
