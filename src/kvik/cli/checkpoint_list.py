"""checkpoint-list, -info, -dumpxml, -parent: what checkpoints there are, and what each is."""

from __future__ import annotations

import time

from kvik.cli import xml_verbs
from kvik.cli.checkpoint_common import NAME, XML_NO_DOMAIN, XML_SECURE, XML_SIZE, checkpoint_of
from kvik.cli.common import DOMAIN, chosen
from kvik.cli.document import parse
from kvik.cli.options import FLAG, TEXT, Option, UsageError, Verb
from kvik.cli.snapshot_list import draw
from kvik.cli.table import Table
from kvik.errors import NoCheckpoint

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.cli.context import Context
    from kvik.cli.options import Options
    from kvik.client.checkpoint import Checkpoint

# virDomainCheckpointListFlags
FILTERS = {"topological": 1 << 1, "leaves": 1 << 2, "no-leaves": 1 << 3}
ROOTS = DESCENDANTS = 1 << 0
EXCLUSIVE = (("tree", "name"), ("parent", "roots"), ("parent", "tree"), ("roots", "tree"), ("roots", "from"))


class Row:
    """What is shown of one checkpoint, from its document."""

    __slots__ = ("checkpoint", "created", "name", "parent")

    def __init__(self, checkpoint: Checkpoint) -> None:
        root = parse(checkpoint.xml(XML_NO_DOMAIN))
        self.checkpoint = checkpoint
        self.name = checkpoint.name
        self.parent = root.findtext("parent/name")
        seconds = root.findtext("creationTime") or ""
        self.created = int(seconds) if seconds.isdigit() and len(seconds) < 12 else 0

    @property
    def when(self) -> str:
        return time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(self.created))


def _check(options: Options) -> None:
    def given(name: str) -> bool:
        return options.text("from") is not None if name == "from" else options.flag(name)

    for left, right in EXCLUSIVE:
        if given(left) and given(right):
            raise UsageError(f"Options --{left} and --{right} are mutually exclusive")
    for name in ("leaves", "no-leaves"):
        if options.flag(name) and options.flag("tree"):
            raise UsageError(f"--{name} and --tree are mutually exclusive")
    if options.flag("descendants") and not given("from"):
        raise UsageError("--descendants requires --from")


def _found(ctx: Context, options: Options) -> tuple[list[Checkpoint], Checkpoint | None]:
    """The checkpoints, and the one they come from if one was named."""
    from kvik.client import checkpoint

    _check(options)
    bits = chosen(options, FILTERS) | (ROOTS if options.flag("roots") else 0)
    domain = ctx.domain(options.data("domain"))
    name = options.text("from")
    start = checkpoint.lookup(domain, name) if name is not None else None
    if start is None:
        found = checkpoint.checkpoints(domain, bits)
    else:
        below = options.flag("descendants") or options.flag("tree")
        found = start.children(bits | (DESCENDANTS if below else 0))
    if not options.flag("topological"):
        found.sort(key=lambda item: item.name.lower())
    return found, start


def checkpoint_list(ctx: Context, options: Options) -> int:
    found, start = _found(ctx, options)
    if options.flag("name") and not ctx.json:
        for item in found:
            ctx.line(item.name)
        return 0
    if options.flag("tree"):
        rows = [Row(item) for item in ([start] if start is not None else []) + found]
        names = {row.name for row in rows}
        parents = {
            row.name: row.parent if row.parent in names and row.checkpoint is not start else None for row in rows
        }
        if not ctx.put([{"name": name, "parent": parent} for name, parent in parents.items()]):
            for name, parent in parents.items():
                if parent is None:
                    ctx.document("".join(f"{line}\n" for line in draw(name, parents)))
        return 0
    with_parent = options.flag("parent")
    table = Table("Name", "Creation Time", *(["Parent"] if with_parent else []))
    for row in map(Row, found):
        table.add(row.name, row.when, *([row.parent or ""] if with_parent else []))
    ctx.table(table)
    return 0


def checkpoint_info(ctx: Context, options: Options) -> int:
    domain = ctx.domain(options.data("domain"))
    found = checkpoint_of(options, domain)
    parent = found.parent()
    ctx.pairs(
        [
            ("Name", found.name),
            ("Domain", domain.name),
            ("Parent", parent.name if parent is not None else "-"),
            ("Children", len(found.children())),
            ("Descendants", len(found.children(DESCENDANTS))),
        ]
    )
    return 0


def checkpoint_dumpxml(ctx: Context, options: Options) -> int:
    found = checkpoint_of(options, ctx.domain(options.data("domain")))
    bits = chosen(options, {"security-info": XML_SECURE, "no-domain": XML_NO_DOMAIN, "size": XML_SIZE})
    return xml_verbs.show(ctx, options, found.xml(bits))


def checkpoint_parent(ctx: Context, options: Options) -> int:
    found = checkpoint_of(options, ctx.domain(options.data("domain")))
    parent = found.parent()
    if parent is None:
        raise NoCheckpoint(f"checkpoint '{found.name}' has no parent")
    if not ctx.put({"name": parent.name}):
        ctx.last(parent.name)
    return 0


COMMANDS = {
    "checkpoint-list": Verb(
        checkpoint_list,
        "Checkpoint List",
        DOMAIN,
        Option("parent", FLAG, "add a column showing parent checkpoint"),
        Option("roots", FLAG, "list only checkpoints without parents"),
        Option("leaves", FLAG, "list only checkpoints without children"),
        Option("no-leaves", FLAG, "list only checkpoints that are not leaves (with children)"),
        Option("tree", FLAG, "list checkpoints in a tree"),
        Option("from", TEXT, "limit list to children of given checkpoint", complete="checkpoint"),
        Option("descendants", FLAG, "with --from, list all descendants"),
        Option("name", FLAG, "list checkpoint names only"),
        Option("topological", FLAG, "sort list topologically rather than by name"),
    ),
    "checkpoint-info": Verb(checkpoint_info, "Returns basic information about a checkpoint.", DOMAIN, NAME),
    "checkpoint-dumpxml": Verb(
        checkpoint_dumpxml,
        "Checkpoint Dump XML",
        DOMAIN,
        NAME,
        Option("security-info", FLAG, "include security sensitive information in XML dump"),
        Option("no-domain", FLAG, "exclude <domain> from XML"),
        Option("size", FLAG, "include backup size estimate in XML dump"),
        *xml_verbs.XPATH,
    ),
    "checkpoint-parent": Verb(
        checkpoint_parent,
        "Extract the checkpoint's parent, if any",
        DOMAIN,
        Option("checkpointname", TEXT, "find parent of checkpoint name", complete="checkpoint"),
    ),
}
