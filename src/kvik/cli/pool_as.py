"""pool-define-as, pool-create-as, find-storage-pool-sources, -sources-as, pool-capabilities: pools from words."""

from __future__ import annotations

from kvik.cli.options import DATA, FLAG, TEXT, Option, Verb
from kvik.cli.pool_common import BUILD, building

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.cli.context import Context
    from kvik.cli.options import Options

POOL_TYPES = (
    "dir", "fs", "netfs", "logical", "disk", "iscsi", "iscsi-direct", "scsi", "mpath", "rbd", "gluster", "zfs",
)  # fmt: skip
SOURCE = (
    Option("source-host", TEXT, "source-host for underlying storage"),
    Option("source-path", TEXT, "source path for underlying storage", complete="file"),
    Option("source-dev", TEXT, "source device for underlying storage", complete="file"),
    Option("source-name", TEXT, "source name for underlying storage"),
    Option("target", TEXT, "target for underlying storage", complete="file"),
    Option("source-format", TEXT, "format for underlying storage"),
    Option("auth-type", TEXT, "auth type to be used for underlying storage"),
    Option("auth-username", TEXT, "auth username to be used for underlying storage"),
    Option("secret-usage", TEXT, "auth secret usage to be used for underlying storage"),
    Option("secret-uuid", TEXT, "auth secret UUID to be used for underlying storage"),
    Option("adapter-name", TEXT, "adapter name to be used for underlying storage"),
    Option("adapter-wwnn", TEXT, "adapter wwnn to be used for underlying storage"),
    Option("adapter-wwpn", TEXT, "adapter wwpn to be used for underlying storage"),
    Option("adapter-parent", TEXT, "adapter parent scsi_hostN to be used for underlying vHBA storage"),
    Option("adapter-parent-wwnn", TEXT, "adapter parent scsi_hostN wwnn to be used for underlying vHBA storage"),
    Option("adapter-parent-wwpn", TEXT, "adapter parent scsi_hostN wwpn to be used for underlying vHBA storage"),
    Option(
        "adapter-parent-fabric-wwn", TEXT, "adapter parent scsi_hostN fabric_wwn to be used for underlying vHBA storage"
    ),
    Option("source-protocol-ver", TEXT, "nfsvers value for NFS pool mount option"),
    Option("source-initiator", TEXT, "initiator iqn for underlying storage"),
)
NAMED = (
    Option("name", DATA, "name of the pool"),
    Option("type", DATA, "type of the pool", complete=POOL_TYPES),
    Option("print-xml", FLAG, "print XML document, but don't define/create"),
)


def escape(text: str) -> str:
    from xml.sax.saxutils import escape as escape_text

    return escape_text(text, {"'": "&apos;", '"': "&quot;"})


def document(options: Options) -> str:
    """The pool's document, laid out as virsh does."""

    def value(name: str) -> str | None:
        text = options.text(name)
        return escape(text) if text is not None else None

    lines = []
    if host := value("source-host"):
        lines.append(f"<host name='{host}'/>")
    if path := value("source-path"):
        lines.append(f"<dir path='{path}'/>")
    if device := value("source-dev"):
        lines.append(f"<device path='{device}'/>")
    lines += _adapter(value("adapter-name"), value("adapter-wwnn"), value("adapter-wwpn"), options)
    if initiator := value("source-initiator"):
        lines += ["<initiator>", f"  <iqn name='{initiator}'/>", "</initiator>"]
    if (kind := value("auth-type")) and (user := value("auth-username")):
        usage, uuid = value("secret-usage"), value("secret-uuid")
        if usage or uuid:
            secret = f"<secret usage='{usage}'/>" if usage else f"<secret uuid='{uuid}'/>"
            lines += [f"<auth type='{kind}' username='{user}'>", f"  {secret}", "</auth>"]
    if name := value("source-name"):
        lines.append(f"<name>{name}</name>")
    if form := value("source-format"):
        lines.append(f"<format type='{form}'/>")
    if version := value("source-protocol-ver"):
        lines.append(f"<protocol ver='{version}'/>")
    text = f"<pool type='{escape(options.data('type'))}'>\n  <name>{escape(options.data('name'))}</name>\n"
    if lines:
        text += "  <source>\n" + "".join(f"    {line}\n" for line in lines) + "  </source>\n"
    if target := value("target"):
        text += f"  <target>\n    <path>{target}</path>\n  </target>\n"
    return text + "</pool>\n"


def _adapter(name: str | None, wwnn: str | None, wwpn: str | None, options: Options) -> list[str]:
    if wwnn and wwpn:
        parent = ""
        if text := options.text("adapter-parent"):
            parent = f" parent='{escape(text)}'"
        elif (node := options.text("adapter-parent-wwnn")) and (port := options.text("adapter-parent-wwpn")):
            parent = f" parent_wwnn='{escape(node)}' parent_wwpn='{escape(port)}'"
        elif fabric := options.text("adapter-parent-fabric-wwn"):
            parent = f" parent_fabric_wwn='{escape(fabric)}'"
        return [f"<adapter type='fc_host'{parent} wwnn='{wwnn}' wwpn='{wwpn}'/>"]
    return [f"<adapter type='scsi_host' name='{name}'/>"] if name else []


def pool_define_as(ctx: Context, options: Options) -> int:
    from kvik.client.storage import define_pool

    text = document(options)
    if options.flag("print-xml"):
        if not ctx.put({"xml": text}):
            ctx.document(text)
        return 0
    ctx.doing = f"Failed to define pool {options.data('name')}"
    pool = define_pool(ctx.connection, text)
    ctx.say(f"Pool {pool.name} defined")
    return 0


def pool_create_as(ctx: Context, options: Options) -> int:
    from kvik.client.storage import create_pool

    bits, text = building(options), document(options)
    if options.flag("print-xml"):
        if not ctx.put({"xml": text}):
            ctx.document(text)
        return 0
    ctx.doing = f"Failed to create pool {options.data('name')}"
    pool = create_pool(ctx.connection, text, bits)
    ctx.say(f"Pool {pool.name} created")
    return 0


def find_sources(ctx: Context, options: Options) -> int:
    path = options.text("srcSpec")
    return _find(ctx, options.data("type"), ctx.read_file(path) if path else None)


def find_sources_as(ctx: Context, options: Options) -> int:
    host, port, initiator = options.text("host"), options.text("port"), options.text("initiator")
    text = None
    if host:
        port_text = f" port='{escape(port)}'" if port else ""
        text = f"<source>\n  <host name='{escape(host)}'{port_text}/>\n"
        if initiator:
            text += f"  <initiator>\n    <iqn name='{escape(initiator)}'/>\n  </initiator>\n"
        text += "</source>\n"
    return _find(ctx, options.data("type"), text)


def _find(ctx: Context, type_: str, source: str | None) -> int:
    from kvik.client import storage

    ctx.doing = f"Failed to find any {type_} pool sources"
    text = storage.find_sources(ctx.connection, type_, source)
    if not ctx.put({"xml": text}):
        ctx.document(text)
    return 0


def pool_capabilities(ctx: Context, options: Options) -> int:
    from kvik.client import storage

    ctx.doing = "failed to get storage pool capabilities"
    text = storage.capabilities(ctx.connection)
    if not ctx.put({"xml": text}):
        ctx.document(text)
    return 0


COMMANDS = {
    "pool-define-as": Verb(pool_define_as, "Define a pool.", *NAMED, *SOURCE),
    "pool-create-as": Verb(pool_create_as, "Create a pool.", *NAMED, *SOURCE, *BUILD),
    "find-storage-pool-sources": Verb(
        find_sources,
        "Returns XML <sources> document.",
        Option("type", DATA, "type of storage pool sources to discover", complete=POOL_TYPES),
        Option("srcSpec", TEXT, "optional file of source xml to query for pools", complete="file"),
    ),
    "find-storage-pool-sources-as": Verb(
        find_sources_as,
        "Returns XML <sources> document.",
        Option("type", DATA, "type of storage pool sources to find", complete=POOL_TYPES),
        Option("host", TEXT, "optional host to query"),
        Option("port", TEXT, "optional port to query"),
        Option("initiator", TEXT, "optional initiator IQN to use for query"),
    ),
    "pool-capabilities": Verb(pool_capabilities, "Returns capabilities of storage pool support."),
}
