"""dumpxml, edit, domxml-to-native: the whole document."""

from __future__ import annotations

from kvik.cli import flags
from kvik.cli.common import DOMAIN, chosen
from kvik.cli.options import DATA, FLAG, TEXT, Option, UsageError, Verb
from kvik.cli.xml_verbs import XPATH, show
from kvik.cli.xml_verbs import edit as edit_document

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
    return show(ctx, options, ctx.domain(options.data("domain")).xml(bits))


def edit(ctx: Context, options: Options) -> int:
    domain = ctx.domain(options.data("domain"))

    def define(text: str, validate: bool) -> str:
        flag = flags.DEFINE_VALIDATE if validate else 0
        return f"domain '{ctx.connection.define(text, flags=flag).name}'"

    return edit_document(
        ctx,
        f"domain '{domain.name}'",
        lambda: domain.xml(flags.XML_SECURE | flags.XML_INACTIVE),
        define,
        validate=not options.flag("skip-validate"),
    )


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
        *XPATH,
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
