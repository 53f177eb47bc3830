"""nwfilter-*: network filters and their bindings, in virsh's words."""

from __future__ import annotations

from kvik.cli import xml_verbs
from kvik.cli.options import DATA, FLAG, Option, Verb
from kvik.cli.table import Table
from kvik.client import nwfilter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.cli.context import Context
    from kvik.cli.options import Options

FILTER = Option("nwfilter", DATA, "network filter name or uuid", complete="nwfilter")
VALIDATE = Option("validate", FLAG, "validate the XML against the schema")


def _find(ctx: Context, options: Options) -> nwfilter.NetworkFilter:
    from kvik.errors import NoFilter

    key = options.data("nwfilter")
    try:
        return nwfilter.lookup_filter(ctx.connection, key)
    except NoFilter as error:
        from kvik.cli.suggest import nearest

        near = nearest(key, [one.name for one in nwfilter.filters(ctx.connection)])
        remedy = f"did you mean '{near}'?" if near else "'kvik nwfilter-list' shows every filter"
        ctx.doing = f"failed to get nwfilter '{key}'"
        raise NoFilter(error.message, remedy=remedy) from error


def nwfilter_list(ctx: Context, options: Options) -> int:
    table = Table("UUID", "Name")
    for one in nwfilter.filters(ctx.connection):
        table.add(one.uuid, one.name)
    ctx.table(table)
    return 0


def nwfilter_dumpxml(ctx: Context, options: Options) -> int:
    return xml_verbs.show(ctx, options, _find(ctx, options).xml())


def nwfilter_define(ctx: Context, options: Options) -> int:
    path, _ = options.data("file"), options.flag("validate")  # documents are always checked
    text = ctx.read_file(path)
    ctx.doing = f"Failed to define network filter from {path}"
    name = nwfilter.define_filter(ctx.connection, text).name
    ctx.say(f"Network filter {name} defined from {path}")
    return 0


def nwfilter_undefine(ctx: Context, options: Options) -> int:
    found = _find(ctx, options)
    ctx.doing = f"Failed to undefine network filter {found.name}"
    found.undefine()
    ctx.say(f"Network filter {found.name} undefined")
    return 0


def nwfilter_edit(ctx: Context, options: Options) -> int:
    found = _find(ctx, options)

    def define(text: str, validate: bool) -> str:
        return f"network filter {nwfilter.define_filter(ctx.connection, text).name}"

    return xml_verbs.edit(ctx, f"network filter {found.name}", found.xml, define, validate=False)


def binding_list(ctx: Context, options: Options) -> int:
    table = Table("Port Dev", "Filter")
    for one in nwfilter.filter_bindings(ctx.connection):
        table.add(one.portdev, one.filter)
    ctx.table(table)
    return 0


def binding_dumpxml(ctx: Context, options: Options) -> int:
    ctx.doing = f"failed to get nwfilter binding '{options.data('binding')}'"
    return xml_verbs.show(ctx, options, nwfilter.lookup_binding(ctx.connection, options.data("binding")).xml())


def binding_create(ctx: Context, options: Options) -> int:
    path, _ = options.data("file"), options.flag("validate")
    text = ctx.read_file(path)
    ctx.doing = f"Failed to create network filter from {path}"
    made = nwfilter.create_binding(ctx.connection, text)
    ctx.say(f"Network filter binding on {made.portdev} created from {path}")
    return 0


def binding_delete(ctx: Context, options: Options) -> int:
    name = options.data("binding")
    ctx.doing = f"failed to get nwfilter binding '{name}'"
    found = nwfilter.lookup_binding(ctx.connection, name)
    ctx.doing = f"Failed to delete network filter binding on {name}"
    found.delete()
    ctx.say(f"Network filter binding on {name} deleted")
    return 0


COMMANDS: dict[str, Verb] = {
    "nwfilter-binding-create": Verb(
        binding_create,
        "Create a new network filter binding.",
        Option("file", DATA, "file containing an XML network filter binding description", complete="file"),
        VALIDATE,
    ),
    "nwfilter-binding-delete": Verb(
        binding_delete,
        "Delete a given network filter binding.",
        Option("binding", DATA, "network filter binding port dev", complete="nwfilter-binding"),
    ),
    "nwfilter-binding-dumpxml": Verb(
        binding_dumpxml,
        "Output the network filter information as an XML dump to stdout.",
        Option("binding", DATA, "network filter binding portdev", complete="nwfilter-binding"),
        *xml_verbs.XPATH,
    ),
    "nwfilter-binding-list": Verb(binding_list, "Returns list of network filter bindings."),
    "nwfilter-define": Verb(
        nwfilter_define,
        "Define a new network filter or update an existing one.",
        Option("file", DATA, "file containing an XML network filter description", complete="file"),
        VALIDATE,
    ),
    "nwfilter-dumpxml": Verb(
        nwfilter_dumpxml,
        "Output the network filter information as an XML dump to stdout.",
        FILTER,
        *xml_verbs.XPATH,
    ),
    "nwfilter-edit": Verb(nwfilter_edit, "Edit the XML configuration for a network filter.", FILTER),
    "nwfilter-list": Verb(nwfilter_list, "Returns list of network filters."),
    "nwfilter-undefine": Verb(nwfilter_undefine, "Undefine a given network filter.", FILTER),
}
