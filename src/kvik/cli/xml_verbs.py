"""What all verbs that show or edit an XML document do alike: --xpath and --wrap, and the editor's loop."""

from __future__ import annotations

from kvik.cli.options import FLAG, TEXT, Option, Options, UsageError
from kvik.errors import KvikError, OperationFailed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from kvik.cli.context import Context

XPATH = (
    Option("xpath", TEXT, "xpath expression to filter the XML document", named_only=True),
    Option("wrap", FLAG, "wrap xpath results in an common root element"),
)


def show(ctx: Context, options: Options, text: str) -> int:
    """Print a document, or what --xpath finds in it."""
    expression, wrap = options.text("xpath"), options.flag("wrap")
    if expression is None:
        if not ctx.put({"xml": text}):
            ctx.document(text)
        return 0
    found = select(text, expression)
    if ctx.put({"nodes": found}):
        return 0
    if wrap:
        indented = "".join("  " + "\n  ".join(node.splitlines()) + "\n" for node in found)
        ctx.document(f"<nodes>\n{indented}</nodes>\n")
    else:
        ctx.document("\n".join(found) + "\n" if found else "")
    return 0


def select(text: str, expression: str) -> list[str]:
    """The nodes of `text` that an XPath expression finds, each as XML or text."""
    from lxml import etree

    try:
        found = etree.fromstring(text.encode("utf-8")).xpath(expression)
    except etree.XPathError as error:
        raise UsageError(f"invalid XPath expression '{expression}': {error}") from error
    if not isinstance(found, list):
        return [str(found)]
    nodes = []
    for node in found:
        if isinstance(node, etree._Element):
            nodes.append(etree.tostring(node, encoding="unicode", with_tail=False))
        elif getattr(node, "is_attribute", False):
            nodes.append(f' {getattr(node, "attrname", "")}="{node!s}"')
        else:
            nodes.append(f"{node!s}")
    return nodes


AGAIN = (
    "y - yes, start editor again\n"
    "n - no, throw away my changes\n"
    "i - turn off validation and try to redefine again\n"
    "f - force, try to redefine again\n"
    "? - print this help\n"
)


def edit(
    ctx: Context,
    what: str,
    read: Callable[[], str],
    define: Callable[[str, bool], str],
    *,
    validate: bool = True,
    edited: str = "XML configuration edited.",
) -> int:
    """Edit, validate, define; on an error the person chooses what next, and no keystroke is lost.

    `what` names the object ("domain 'web'"), `read` gives its document as it is now, `define` takes (text, validate)
    and gives the object as it is then called.
    """
    from kvik.cli.editor import TextFile

    ctx.doing = f"Failed to edit {what}"
    before = read()
    with TextFile(before, ".xml") as file:
        open_editor, forced = True, False
        while True:
            if open_editor:
                file.edit()
            text = file.read()
            if text == before:
                ctx.say(f"{what[0].upper()}{what[1:]} XML configuration not changed.")
                return 0
            try:
                if not forced and read() != before:
                    raise OperationFailed("The XML configuration was changed by another user.")
                now = define(text, validate)
            except KvikError as error:
                ctx.error(error)
            else:
                ctx.say(f"{now[0].upper()}{now[1:]} {edited}")
                return 0
            answer = again(ctx, validate=validate)
            if answer == "n":
                ctx.doing = ""
                raise OperationFailed(f"the changes to {what} were not saved")
            open_editor = answer == "y"
            if answer == "i":
                validate = False
            if answer == "f":
                forced = True


def again(ctx: Context, *, validate: bool) -> str:
    """What to do after a document was refused: y, n, i or f."""
    keys = "ynif?" if validate else "ynf?"
    while True:
        answer = ctx.ask(f"Failed. Try again? [{','.join(keys)}]: ").lower()[:1]
        if answer == "?":
            ctx.stderr.write("".join(line for line in AGAIN.splitlines(keepends=True) if line[0] in keys))
        elif not answer:
            return "n"  # end of file, or nobody there
        elif answer in keys:
            return answer
