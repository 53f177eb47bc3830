"""snapshot-create, -create-as, -edit, -revert, -delete: taking snapshots, going back to them, taking them away."""

from __future__ import annotations

from kvik.cli import xml_verbs
from kvik.cli.common import DOMAIN, PRINT_XML, chosen, exclusive
from kvik.cli.document import escape, open_tag, parse, tag
from kvik.cli.history import comma_parts, settings
from kvik.cli.options import FLAG, TEXT, WORDS, Option, UsageError, Verb
from kvik.cli.snapshot_common import CREATE_CURRENT, CREATE_REDEFINE, NAME, XML_SECURE, current, snapshot_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.cli.context import Context
    from kvik.cli.options import Options
    from kvik.client import Domain

# virDomainSnapshotCreateFlags
CREATE = {
    "redefine": CREATE_REDEFINE, "current": CREATE_CURRENT, "no-metadata": 1 << 2, "halt": 1 << 3, "disk-only": 1 << 4,
    "reuse-external": 1 << 5, "quiesce": 1 << 6, "atomic": 1 << 7, "live": 1 << 8, "validate": 1 << 9,
}  # fmt: skip
CREATE_AS = {name: bit for name, bit in CREATE.items() if name not in ("redefine", "current")}
REVERT = {"running": 1 << 0, "paused": 1 << 1, "force": 1 << 2, "reset-nvram": 1 << 3}
CHILDREN, METADATA_ONLY, CHILDREN_ONLY = 1 << 0, 1 << 1, 1 << 2
DELETE = {"children": CHILDREN, "children-only": CHILDREN_ONLY, "metadata": METADATA_ONLY}


def snapshot_create(ctx: Context, options: Options) -> int:
    if options.flag("current") and not options.flag("redefine"):
        raise UsageError("Option --redefine is required by option --current")
    domain = ctx.domain(options.data("domain"))
    path = options.text("xmlfile")
    xml = "<domainsnapshot/>" if path is None else ctx.read_file(path)
    return _create(ctx, domain, xml, chosen(options, CREATE), path)


def _create(ctx: Context, domain: Domain, xml: str, bits: int, path: str | None) -> int:
    from kvik.client import snapshot

    made = snapshot.create(domain, xml, bits)
    ctx.say(f"Domain snapshot {made.name} created" + (f" from '{path}'" if path is not None else ""))
    if not bits & CREATE["no-metadata"] and not bits & CREATE_REDEFINE and domain.is_active():
        from kvik.cli.snapshot_list import pause_of, stood_of

        document = parse(made.xml())
        pause = pause_of(document)
        if pause is not None:
            ctx.extra(f"The guest was held up for at most {pause}")
        if (why := stood_of(document)) is not None:
            ctx.extra(f"It stood still while its memory was written, --live or not: {why}")
    ctx.blank = False
    return 0


def snapshot_create_as(ctx: Context, options: Options) -> int:
    lines = []
    for name in ("name", "description"):
        if (value := options.text(name)) is not None:
            lines.append(f"  <{name}>{escape(value)}</{name}>\n")
    if (memory := options.text("memspec")) is not None:
        lines.append(f"  {_memory(memory)}\n")
    disks = options.words("diskspec")
    if disks:
        lines += ["  <disks>\n", *(_disk(disk) for disk in disks), "  </disks>\n"]
    xml = f"<domainsnapshot>\n{''.join(lines)}</domainsnapshot>\n"
    domain = ctx.domain(options.data("domain"))
    if options.flag("print-xml"):
        if not ctx.put({"xml": xml}):
            ctx.document(xml + "\n")
        return 0
    return _create(ctx, domain, xml, chosen(options, CREATE_AS), None)


def _memory(text: str) -> str:
    parts = comma_parts(text)
    if "=" not in parts[0]:
        parts[0] = f"file={parts[0]}"
    found = settings("memspec", text, parts, ("file", "snapshot"), "[file=]name[,snapshot=type]")
    return tag("memory", snapshot=found.get("snapshot"), file=found.get("file"))


def _disk(text: str) -> str:
    name, *parts = comma_parts(text)
    form = "disk[,snapshot=type][,driver=type][,stype=type][,file=name]"
    found = settings("diskspec", text, parts, ("snapshot", "driver", "stype", "file"), form)
    kind = found.get("stype", "file" if "file" in found or "stype" in found else None)
    if kind not in (None, "file", "block"):
        raise UsageError(f"Unknown storage type: '{kind}'")
    head = {"name": name, "snapshot": found.get("snapshot"), "type": kind}
    inner = ""
    if "driver" in found:
        inner += f"      {tag('driver', type=found['driver'])}\n"
    if "file" in found:
        source = tag("source", dev=found["file"]) if kind == "block" else tag("source", file=found["file"])
        inner += f"      {source}\n"
    if not inner:
        return f"    {tag('disk', **head)}\n"
    return f"    {open_tag('disk', **head)}\n{inner}    </disk>\n"


def snapshot_edit(ctx: Context, options: Options) -> int:
    from kvik.client import snapshot

    exclusive(options, ("rename", "clone"))
    domain = ctx.domain(options.data("domain"))
    named = options.text("snapshotname") is not None
    found = snapshot_of(ctx, options, domain, both=True)
    bits = CREATE_REDEFINE | (CREATE_CURRENT if found.is_current() or (named and options.flag("current")) else 0)
    moved = []

    def define(text: str, validate: bool) -> str:
        name = parse(text).findtext("name") or ""
        if name != found.name and not (options.flag("rename") or options.flag("clone")):
            raise UsageError(f"must use --rename or --clone to change {found.name} to {name}")
        made = snapshot.create(domain, text, bits | (CREATE["validate"] if validate else 0))
        if made.name != found.name:
            moved.append(made.name)
            if options.flag("rename"):
                found.delete(METADATA_ONLY)
        return f"snapshot {made.name}"

    code = xml_verbs.edit(ctx, f"snapshot {found.name}", lambda: found.xml(XML_SECURE), define)
    if moved and options.flag("clone"):
        ctx.say(f"Snapshot {found.name} cloned to {moved[-1]}.")
    return code


def snapshot_revert(ctx: Context, options: Options) -> int:
    found = snapshot_of(ctx, options, ctx.domain(options.data("domain")))
    ctx.doing = f"Failed to revert snapshot {found.name}"
    found.revert(chosen(options, REVERT))
    ctx.say(f"Domain snapshot {found.name} reverted")
    return 0


def snapshot_delete(ctx: Context, options: Options) -> int:
    bits = chosen(options, DELETE)
    found = snapshot_of(ctx, options, ctx.domain(options.data("domain")))
    if options.flag("plan"):
        lines = found.plan(bits)
        if not ctx.put({"plan": lines}):
            for line in lines:
                ctx.line(line)
        return 0
    ctx.doing = f"Failed to delete snapshot {found.name}"
    found.delete(bits)
    ctx.say(f"Domain snapshot {found.name} {'children ' if bits & CHILDREN_ONLY else ''}deleted")
    return 0


_MAKING = (
    Option("no-metadata", FLAG, "take snapshot but create no metadata"),
    Option("halt", FLAG, "halt domain after snapshot is created"),
    Option("disk-only", FLAG, "capture disk state but not vm state"),
    Option("reuse-external", FLAG, "reuse any existing external files"),
    Option("quiesce", FLAG, "quiesce guest's file systems"),
    Option("atomic", FLAG, "require atomic operation"),
    Option("live", FLAG, "take a live snapshot"),
    Option("validate", FLAG, "validate the XML against the schema"),
)

COMMANDS = {
    "snapshot-create": Verb(
        snapshot_create,
        "Create a snapshot (disk and RAM) from XML",
        DOMAIN,
        Option("xmlfile", TEXT, "domain snapshot XML", complete="file"),
        Option("redefine", FLAG, "redefine metadata for existing snapshot"),
        current("with redefine, set current snapshot"),
        *_MAKING,
    ),
    "snapshot-create-as": Verb(
        snapshot_create_as,
        "Create a snapshot (disk and RAM) from arguments",
        DOMAIN,
        Option("name", TEXT, "name of snapshot"),
        Option("description", TEXT, "description of snapshot"),
        PRINT_XML,
        *_MAKING,
        Option("memspec", TEXT, "memory attributes: [file=]name[,snapshot=type]", named_only=True),
        Option("diskspec", WORDS, "disk attributes: disk[,snapshot=type][,driver=type] [,stype=type][,file=name]"),
    ),
    "snapshot-edit": Verb(
        snapshot_edit,
        "Edit the domain snapshot XML for a named snapshot",
        DOMAIN,
        NAME,
        current("also set edited snapshot as current"),
        Option("rename", FLAG, "allow renaming an existing snapshot"),
        Option("clone", FLAG, "allow cloning to new name"),
    ),
    "snapshot-revert": Verb(
        snapshot_revert,
        "Revert domain to snapshot",
        DOMAIN,
        NAME,
        current("revert to current snapshot"),
        Option("running", FLAG, "after reverting, change state to running"),
        Option("paused", FLAG, "after reverting, change state to paused"),
        Option("force", FLAG, "try harder on risky reverts"),
        Option("reset-nvram", FLAG, "re-initialize NVRAM from its pristine template"),
    ),
    "snapshot-delete": Verb(
        snapshot_delete,
        "Delete a domain snapshot; what still rests on its data keeps it",
        DOMAIN,
        NAME,
        current("delete current snapshot"),
        Option("children", FLAG, "delete snapshot and all children"),
        Option("children-only", FLAG, "delete children but not snapshot"),
        Option("metadata", FLAG, "delete only libvirt metadata, leaving snapshot contents behind"),
        Option("plan", FLAG, "print what would be done, and do nothing"),
    ),
}
