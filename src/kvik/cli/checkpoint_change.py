"""checkpoint-create, -create-as, -edit, -delete: from when on changes are tracked."""

from __future__ import annotations

from kvik.cli import xml_verbs
from kvik.cli.checkpoint_common import NAME, XML_SECURE, checkpoint_of
from kvik.cli.common import DOMAIN, PRINT_XML, chosen
from kvik.cli.document import escape, parse, tag
from kvik.cli.history import comma_parts, settings
from kvik.cli.options import FLAG, TEXT, WORDS, Option, UsageError, Verb

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.cli.context import Context
    from kvik.cli.options import Options
    from kvik.client import Domain

REDEFINE, QUIESCE, REDEFINE_VALIDATE = 1 << 0, 1 << 1, 1 << 2  # virDomainCheckpointCreateFlags
CREATE = {"redefine": REDEFINE, "redefine-validate": REDEFINE_VALIDATE, "quiesce": QUIESCE}
CHILDREN, METADATA_ONLY, CHILDREN_ONLY = 1 << 0, 1 << 1, 1 << 2
DELETE = {"children": CHILDREN, "children-only": CHILDREN_ONLY, "metadata": METADATA_ONLY}


def checkpoint_create(ctx: Context, options: Options) -> int:
    if options.flag("redefine-validate") and not options.flag("redefine"):
        raise UsageError("Option --redefine is required by option --redefine-validate")
    domain = ctx.domain(options.data("domain"))
    path = options.text("xmlfile")
    xml = "<domaincheckpoint/>" if path is None else ctx.read_file(path)
    return _create(ctx, domain, xml, chosen(options, CREATE), path)


def _create(ctx: Context, domain: Domain, xml: str, bits: int, path: str | None) -> int:
    from kvik.client import checkpoint

    made = checkpoint.create(domain, xml, bits)
    ctx.say(f"Domain checkpoint {made.name} created" + (f" from '{path}'" if path is not None else ""))
    ctx.blank = False
    return 0


def checkpoint_create_as(ctx: Context, options: Options) -> int:
    lines = []
    for name in ("name", "description"):
        if (value := options.text(name)) is not None:
            lines.append(f"  <{name}>{escape(value)}</{name}>\n")
    disks = options.words("diskspec")
    if disks:
        lines += ["  <disks>\n", *(_disk(disk) for disk in disks), "  </disks>\n"]
    xml = f"<domaincheckpoint>\n{''.join(lines)}</domaincheckpoint>\n"
    domain = ctx.domain(options.data("domain"))
    if options.flag("print-xml"):
        if not ctx.put({"xml": xml}):
            ctx.document(xml + "\n")
        return 0
    return _create(ctx, domain, xml, QUIESCE if options.flag("quiesce") else 0, None)


def _disk(text: str) -> str:
    name, *parts = comma_parts(text)
    found = settings("diskspec", text, parts, ("checkpoint", "bitmap"), "disk[,checkpoint=type][,bitmap=name]")
    return f"    {tag('disk', name=name, checkpoint=found.get('checkpoint'), bitmap=found.get('bitmap'))}\n"


def checkpoint_edit(ctx: Context, options: Options) -> int:
    from kvik.client import checkpoint

    domain = ctx.domain(options.data("domain"))
    found = checkpoint_of(options, domain)

    def define(text: str, validate: bool) -> str:
        name = parse(text).findtext("name") or ""
        if name != found.name:
            raise UsageError(f"cannot edit checkpoint name in XML: '{found.name}' to '{name}'")
        return f"checkpoint {checkpoint.create(domain, text, REDEFINE).name}"

    return xml_verbs.edit(ctx, f"checkpoint {found.name}", lambda: found.xml(XML_SECURE), define, validate=False)


def checkpoint_delete(ctx: Context, options: Options) -> int:
    bits = chosen(options, DELETE)
    found = checkpoint_of(options, ctx.domain(options.data("domain")))
    ctx.doing = f"Failed to delete checkpoint {found.name}"
    if bits & CHILDREN and bits & CHILDREN_ONLY:
        names = "'VIR_DOMAIN_CHECKPOINT_DELETE_CHILDREN' and 'VIR_DOMAIN_CHECKPOINT_DELETE_CHILDREN_ONLY'"
        raise UsageError(f"Flags {names} are mutually exclusive")
    found.delete(bits)
    ctx.say(f"Domain checkpoint {found.name} {'children ' if bits & CHILDREN_ONLY else ''}deleted")
    return 0


COMMANDS = {
    "checkpoint-create": Verb(
        checkpoint_create,
        "Create a checkpoint from XML for use in future incremental backups",
        DOMAIN,
        Option("xmlfile", TEXT, "domain checkpoint XML", complete="file"),
        Option("redefine", FLAG, "redefine metadata for existing checkpoint"),
        Option("redefine-validate", FLAG, "validate the redefined checkpoint"),
        Option("quiesce", FLAG, "quiesce guest's file systems"),
    ),
    "checkpoint-create-as": Verb(
        checkpoint_create_as,
        "Create a checkpoint from arguments for use in future incremental backups",
        DOMAIN,
        Option("name", TEXT, "name of checkpoint"),
        Option("description", TEXT, "description of checkpoint"),
        PRINT_XML,
        Option("quiesce", FLAG, "quiesce guest's file systems"),
        Option("diskspec", WORDS, "disk attributes: disk[,checkpoint=type][,bitmap=name]"),
    ),
    "checkpoint-edit": Verb(checkpoint_edit, "Edit the domain checkpoint XML for a named checkpoint", DOMAIN, NAME),
    "checkpoint-delete": Verb(
        checkpoint_delete,
        "Checkpoint Delete",
        DOMAIN,
        NAME,
        Option("children", FLAG, "delete checkpoint and all children"),
        Option("children-only", FLAG, "delete children but not checkpoint"),
        Option("metadata", FLAG, "delete only libvirt metadata, leaving checkpoint contents behind"),
    ),
}
