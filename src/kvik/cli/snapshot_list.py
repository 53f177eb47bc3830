"""snapshot-list, -info, -dumpxml, -current, -parent: what snapshots there are, and what each is."""

from __future__ import annotations

from kvik.cli import history, xml_verbs
from kvik.cli.common import DOMAIN, chosen
from kvik.cli.document import parse
from kvik.cli.history import DESCENDANTS, ROOTS
from kvik.cli.options import DATA, FLAG, TEXT, Option, UsageError, Verb
from kvik.cli.snapshot_common import (
    CREATE_CURRENT,
    CREATE_REDEFINE,
    NAME,
    XML_SECURE,
    current,
    snapshot_of,
)
from kvik.errors import NoSnapshot

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.cli.context import Context
    from kvik.cli.options import Options
    from kvik.client.snapshot import Snapshot

# virDomainSnapshotListFlags
FILTERS = {
    "metadata": 1 << 1, "leaves": 1 << 2, "no-leaves": 1 << 3, "no-metadata": 1 << 4, "inactive": 1 << 5,
    "active": 1 << 6, "disk-only": 1 << 7, "internal": 1 << 8, "external": 1 << 9, "topological": 1 << 10,
}  # fmt: skip


def _found(ctx: Context, options: Options) -> tuple[list[Snapshot], Snapshot | None]:
    """The snapshots, and the one they come from if one was named."""
    from kvik.client import snapshot

    name = options.text("from")
    history.check(options, ("roots", "current"))
    if name is not None and options.flag("current"):
        raise UsageError("--from and --current are mutually exclusive")
    if options.flag("descendants") and not (name is not None or options.flag("current")):
        raise UsageError("--descendants requires either --from or --current")
    bits = chosen(options, FILTERS) | (ROOTS if options.flag("roots") else 0)
    domain = ctx.domain(options.data("domain"))
    if name is not None:
        start = snapshot.lookup(domain, name)
    elif options.flag("current"):
        start = snapshot.current(domain)
    else:
        return snapshot.snapshots(domain, bits), None
    below = options.flag("descendants") or options.flag("tree")
    return start.children(bits | (DESCENDANTS if below else 0)), start


def snapshot_list(ctx: Context, options: Options) -> int:
    found, start = _found(ctx, options)
    return history.show(ctx, options, found, start, 0, "State")


def snapshot_info(ctx: Context, options: Options) -> int:
    domain = ctx.domain(options.data("domain"))
    found = snapshot_of(ctx, options, domain)
    root = parse(found.xml())
    disks = root.findall("disks/disk")
    memory = root.find("memory")
    outside = any(disk.get("snapshot") == "external" for disk in disks) or (
        memory is not None and memory.get("snapshot") == "external"
    )
    pairs: list[tuple[str, object]] = [
        ("Name", found.name),
        ("Domain", domain.name),
        ("Current", "yes" if found.is_current() else "no"),
        ("State", root.findtext("state") or ""),
        ("Location", "external" if outside else "internal"),
        ("Parent", root.findtext("parent/name") or "-"),
        ("Children", len(found.children())),
        ("Descendants", len(found.children(DESCENDANTS))),
        ("Metadata", "yes" if found.has_metadata() else "no"),
    ]
    pause = pause_of(root)
    if pause is not None:
        pairs.append(("Guest held up", pause))
    if (why := stood_of(root)) is not None:
        pairs.append(("Stood still", why))
    ctx.pairs(pairs)
    return 0


def pause_of(root: object) -> str | None:
    """How long the guest stood still for a snapshot, in words; None where the document does not say."""
    from kvik.cli.document import Element

    assert isinstance(root, Element)
    taken = root.find("{urn:kvik:1}taken")
    text = taken.get("pause", "") if taken is not None else ""
    return f"{int(text) / 1000:.1f} ms" if text.isdigit() and len(text) < 16 else None


def stood_of(root: object) -> str | None:
    """Why it stood still although it was to go on; None where it did not."""
    from kvik.cli.document import Element

    assert isinstance(root, Element)
    taken = root.find("{urn:kvik:1}taken")
    return taken.get("stood") if taken is not None else None


def snapshot_dumpxml(ctx: Context, options: Options) -> int:
    from kvik.client import snapshot

    found = snapshot.lookup(ctx.domain(options.data("domain")), options.data("snapshotname"))
    return xml_verbs.show(ctx, options, found.xml(XML_SECURE if options.flag("security-info") else 0))


def snapshot_current(ctx: Context, options: Options) -> int:
    from kvik.client import snapshot

    domain = ctx.domain(options.data("domain"))
    bits = XML_SECURE if options.flag("security-info") else 0
    name = options.text("snapshotname")
    if name is not None:
        if options.flag("name"):
            raise UsageError("Options --name and --snapshotname are mutually exclusive")
        found = snapshot.lookup(domain, name)
        snapshot.create(domain, found.xml(XML_SECURE), CREATE_REDEFINE | CREATE_CURRENT)
        ctx.say(f"Snapshot {name} set as current")
        ctx.blank = False
        return 0
    if not snapshot.has_current(domain):
        raise NoSnapshot(f"domain '{domain.name}' has no current snapshot")
    found = snapshot.current(domain)
    if options.flag("name"):
        if not ctx.put({"name": found.name}):
            ctx.last(found.name)
        return 0
    text = found.xml(bits)
    if not ctx.put({"xml": text}):
        ctx.document(text)
    return 0


def snapshot_parent(ctx: Context, options: Options) -> int:
    return history.show_parent(ctx, snapshot_of(ctx, options, ctx.domain(options.data("domain"))))


COMMANDS = {
    "snapshot-list": Verb(
        snapshot_list,
        "Snapshot List",
        DOMAIN,
        Option("parent", FLAG, "add a column showing parent snapshot"),
        Option("roots", FLAG, "list only snapshots without parents"),
        Option("leaves", FLAG, "list only snapshots without children"),
        Option("no-leaves", FLAG, "list only snapshots that are not leaves (with children)"),
        Option("metadata", FLAG, "list only snapshots that have metadata that would prevent undefine"),
        Option("no-metadata", FLAG, "list only snapshots that have no metadata managed by libvirt"),
        Option("inactive", FLAG, "filter by snapshots taken while inactive"),
        Option("active", FLAG, "filter by snapshots taken while active (full system snapshots)"),
        Option("disk-only", FLAG, "filter by disk-only snapshots"),
        Option("internal", FLAG, "filter by internal snapshots"),
        Option("external", FLAG, "filter by external snapshots"),
        Option("tree", FLAG, "list snapshots in a tree"),
        Option("from", TEXT, "limit list to children of given snapshot", complete="snapshot"),
        current("limit list to children of current snapshot"),
        Option("descendants", FLAG, "with --from, list all descendants"),
        Option("name", FLAG, "list snapshot names only"),
        Option("topological", FLAG, "sort list topologically rather than by name"),
    ),
    "snapshot-info": Verb(
        snapshot_info,
        "Returns basic information about a snapshot.",
        DOMAIN,
        NAME,
        current("info on current snapshot"),
    ),
    "snapshot-dumpxml": Verb(
        snapshot_dumpxml,
        "Snapshot Dump XML",
        DOMAIN,
        Option("snapshotname", DATA, "snapshot name", complete="snapshot"),
        Option("security-info", FLAG, "include security sensitive information in XML dump"),
        *xml_verbs.XPATH,
    ),
    "snapshot-current": Verb(
        snapshot_current,
        "Get or set the current snapshot",
        DOMAIN,
        Option("name", FLAG, "list the name, rather than the full xml"),
        Option("security-info", FLAG, "include security sensitive information in XML dump"),
        Option("snapshotname", TEXT, "name of existing snapshot to make current", complete="snapshot"),
    ),
    "snapshot-parent": Verb(
        snapshot_parent,
        "Extract the snapshot's parent, if any",
        DOMAIN,
        Option("snapshotname", TEXT, "find parent of snapshot name", complete="snapshot"),
        current("find parent of current snapshot"),
    ),
}
