"""dumpxml, edit, domxml-to-native: the whole document."""

from __future__ import annotations

from kvik.cli import flags
from kvik.cli.common import DOMAIN, chosen
from kvik.cli.options import DATA, FLAG, TEXT, Option, UsageError, Verb
from kvik.errors import KvikError, OperationFailed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.cli.context import Context
    from kvik.cli.options import Options


def dumpxml(ctx: Context, options: Options) -> int:
    bits = chosen(
        options,
        {
            "inactive": flags.XML_INACTIVE,
            "security-info": flags.XML_SECURE,
            "update-cpu": flags.XML_UPDATE_CPU,
            "migratable": flags.XML_MIGRATABLE,
        },
    )
    expression = options.text("xpath")
    wrap = options.flag("wrap")
    text = ctx.domain(options.data("domain")).xml(bits)
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


def edit(ctx: Context, options: Options) -> int:
    """Edit, validate, define; on an error the person chooses what next, and no keystroke is lost."""
    from kvik.cli.editor import TextFile

    domain = ctx.domain(options.data("domain"))
    ctx.doing = f"Failed to edit domain '{domain.name}'"
    bits = flags.XML_SECURE | flags.XML_INACTIVE
    validate = not options.flag("skip-validate")
    before = domain.xml(bits)
    with TextFile(before, ".xml") as file:
        open_editor, forced = True, False
        while True:
            if open_editor:
                file.edit()
            text = file.read()
            if text == before:
                ctx.say(f"Domain '{domain.name}' XML configuration not changed.")
                return 0
            try:
                if not forced and domain.xml(bits) != before:
                    raise OperationFailed("The XML configuration was changed by another user.")
                name = ctx.connection.define(text, flags=flags.DEFINE_VALIDATE if validate else 0).name
            except KvikError as error:
                ctx.error(error)
            else:
                ctx.say(f"Domain '{name}' XML configuration edited.")
                return 0
            answer = again(ctx, validate=validate)
            if answer == "n":
                ctx.doing = ""
                raise OperationFailed(f"the changes to domain '{domain.name}' were not saved")
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


def domxml_to_native(ctx: Context, options: Options) -> int:
    kind = options.data("format")
    name, path = options.text("domain"), options.text("xml")
    if (name is None) == (path is None):
        raise UsageError("need either domain or domain XML", remedy="give --domain NAME or --xml FILE")
    text = ctx.domain(name).xml(flags.XML_SECURE) if name is not None else ctx.read_file(path or "")
    native = ctx.connection.domxml_to_native(text, kind)
    if not ctx.put({"format": kind, "native": native}):
        ctx.document(native)
    return 0


COMMANDS = {
    "dumpxml": Verb(
        dumpxml,
        "Output the domain information as an XML dump to stdout.",
        DOMAIN,
        Option("inactive", FLAG, "show inactive defined XML"),
        Option("security-info", FLAG, "include security sensitive information in XML dump"),
        Option("update-cpu", FLAG, "update guest CPU according to host CPU"),
        Option("migratable", FLAG, "provide XML suitable for migrations"),
        Option("xpath", TEXT, "xpath expression to filter the XML document", named_only=True),
        Option("wrap", FLAG, "wrap xpath results in an common root element"),
    ),
    "edit": Verb(
        edit,
        "Edit the XML configuration for a domain.",
        DOMAIN,
        Option("skip-validate", FLAG, "skip validation of the XML against the schema"),
    ),
    "domxml-to-native": Verb(
        domxml_to_native,
        "Convert domain XML config to a native guest configuration format.",
        Option("format", DATA, "target config data type format", complete=("qemu-argv",)),
        Option("domain", TEXT, "domain name, id or uuid", complete="domain", named_only=True),
        Option("xml", TEXT, "xml data file to export from", complete="file"),
    ),
}
