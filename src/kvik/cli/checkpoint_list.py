"""checkpoint-list, -info, -dumpxml, -parent: what checkpoints there are, and what each is."""

from __future__ import annotations

from kvik.cli import history, xml_verbs
from kvik.cli.checkpoint_common import NAME, XML_NO_DOMAIN, XML_SECURE, XML_SIZE, checkpoint_of
from kvik.cli.common import DOMAIN, chosen
from kvik.cli.history import DESCENDANTS, ROOTS
from kvik.cli.options import FLAG, TEXT, Option, UsageError, Verb

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.cli.context import Context
    from kvik.cli.options import Options
    from kvik.client.checkpoint import Checkpoint

# virDomainCheckpointListFlags
FILTERS = {"topological": 1 << 1, "leaves": 1 << 2, "no-leaves": 1 << 3}


def _found(ctx: Context, options: Options) -> tuple[list[Checkpoint], Checkpoint | None]:
    """The checkpoints, and the one they come from if one was named."""
    from kvik.client import checkpoint

    name = options.text("from")
    history.check(options)
    if options.flag("descendants") and name is None:
        raise UsageError("--descendants requires --from")
    bits = chosen(options, FILTERS) | (ROOTS if options.flag("roots") else 0)
    domain = ctx.domain(options.data("domain"))
    if name is None:
        return checkpoint.checkpoints(domain, bits), None
    start = checkpoint.lookup(domain, name)
    below = options.flag("descendants") or options.flag("tree")
    return start.children(bits | (DESCENDANTS if below else 0)), start


def checkpoint_list(ctx: Context, options: Options) -> int:
    found, start = _found(ctx, options)
    return history.show(ctx, options, found, start, XML_NO_DOMAIN)


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
    return history.show_parent(ctx, checkpoint_of(options, ctx.domain(options.data("domain"))))


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
