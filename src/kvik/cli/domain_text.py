"""desc and metadata: words about a machine (or a network: net_text) that the hypervisor never reads."""

from __future__ import annotations

from kvik.cli import flags
from kvik.cli.common import CONFIG, CURRENT, DOMAIN, LIVE, impact
from kvik.cli.options import DATA, FLAG, TEXT, WORDS, Option, UsageError, Verb
from kvik.errors import NoMetadata

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.cli.context import Context
    from kvik.cli.options import Options
    from kvik.client import Domain, Network


def edited(text: str, suffix: str) -> str:
    from kvik.cli.editor import TextFile

    with TextFile(text, suffix) as file:
        file.edit()
        return file.read()


def desc(ctx: Context, options: Options) -> int:
    return describe(ctx, options, ctx.domain(options.data("domain")), "domain")


def describe(ctx: Context, options: Options, thing: Domain | Network, noun: str) -> int:
    title = options.flag("title")
    what, kind = ("title", flags.METADATA_TITLE) if title else ("description", flags.METADATA_DESCRIPTION)
    bits = impact(options)
    words = options.words("new-desc")
    if words or options.flag("edit"):
        new = " ".join(words)
        if options.flag("edit"):
            old = _metadata(thing, kind, bits)
            new = edited(new or old, ".txt").rstrip("\n")
            if new == old:
                ctx.say(f"{noun.capitalize()} {what} not changed")
                return 0
        ctx.doing = f"Failed to set new {noun} {what}"
        thing.set_metadata(kind, new or None, None, None, bits)
        ctx.say(f"{noun.capitalize()} {what} updated successfully")
        ctx.blank = False
        return 0
    text = _metadata(thing, kind, bits)
    if ctx.put({what: text or None}):
        return 0
    ctx.last(text or f"No {what} for {noun}: {thing.name}")
    return 0


def _metadata(thing: Domain | Network, kind: int, bits: int) -> str:
    try:
        return thing.metadata(kind, None, bits)
    except NoMetadata:
        return ""


def metadata(ctx: Context, options: Options) -> int:
    return custom(ctx, options, ctx.domain(options.data("domain")))


def custom(ctx: Context, options: Options, thing: Domain | Network) -> int:
    uri, key, new = options.data("uri"), options.text("key"), options.text("set")
    edit, remove = options.flag("edit"), options.flag("remove")
    bits = impact(options)
    if sum((new is not None, edit, remove)) > 1:
        raise UsageError("Options --set, --edit and --remove are mutually exclusive")
    if new is not None or edit:
        if not key:
            raise UsageError("namespace key is required when modifying metadata", remedy="give --key PREFIX")
        if edit:
            try:
                old = thing.metadata(flags.METADATA_ELEMENT, uri, bits)
            except NoMetadata:
                old = ""
            new = edited(old, ".xml")
            if new == old:
                ctx.say("Metadata not changed")
                return 0
        ctx.doing = "Failed to modify metadata"
        thing.set_metadata(flags.METADATA_ELEMENT, new, key, uri, bits)
        ctx.say("Metadata modified")
    elif remove:
        ctx.doing = "Failed to remove metadata"
        thing.set_metadata(flags.METADATA_ELEMENT, None, None, uri, bits)
        ctx.say("Metadata removed")
    else:
        text = thing.metadata(flags.METADATA_ELEMENT, uri, bits)
        if not ctx.put({"uri": uri, "metadata": text}):
            ctx.document(text)
    return 0


COMMANDS = {
    "desc": Verb(
        desc,
        "Allows to show or modify description or title of a domain.",
        DOMAIN,
        LIVE,
        CONFIG,
        CURRENT,
        Option("title", FLAG, "modify/get the title instead of description"),
        Option("edit", FLAG, "open an editor to modify the description"),
        Option("new-desc", WORDS, "message"),
    ),
    "metadata": Verb(
        metadata,
        "Shows or modifies the XML metadata of a domain.",
        DOMAIN,
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
