"""ttyconsole, vncdisplay, domdisplay: where a machine's screens and lines are."""

from __future__ import annotations

from kvik.cli import document, flags
from kvik.cli.common import ACTIVE
from kvik.cli.options import FLAG, TEXT, Option, Verb
from kvik.errors import NoDevice, OperationInvalid

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.cli.context import Context
    from kvik.cli.options import Options
    from kvik.client import Domain

KINDS = ("vnc", "spice", "rdp", "dbus")
ANY_ADDRESS = ("", "0.0.0.0", "::")


def running(domain: Domain) -> Domain:
    if domain.id <= 0:
        raise OperationInvalid("Domain is not running", remedy=f"'kvik start {domain.name}' starts it")
    return domain


def ttyconsole(ctx: Context, options: Options) -> int:
    root = document.parse(ctx.domain(options.data("domain")).xml())
    path = ""
    for element in (*document.devices(root, "console"), *document.devices(root, "serial")):
        path = path or element.get("tty", "") or document.attribute(element, "source", "path")
    if not path:
        raise NoDevice("the domain has no TTY console", remedy="only a running machine with a pty has one")
    if not ctx.put({"tty": path}):
        ctx.line(path)
    return 0


def vncdisplay(ctx: Context, options: Options) -> int:
    root = document.parse(running(ctx.domain(options.data("domain"))).xml())
    for element in document.devices(root, "graphics"):
        port = int(element.get("port", "-1"))
        if element.get("type") == "vnc" and port >= 0:
            address = listen_address(element)
            if address in ANY_ADDRESS:
                address = ""
            if not ctx.put({"address": address or None, "display": port - 5900, "port": port}):
                ctx.line(f"{address}:{port - 5900}")
            return 0
    raise NoDevice("Failed to get VNC port. Is this domain using VNC?")


def listen_address(element: document.Element) -> str:
    for listen in element.findall("listen"):
        if listen.get("address"):
            return listen.get("address", "")
    return element.get("listen", "")


def domdisplay(ctx: Context, options: Options) -> int:
    wanted, every, secret = options.text("type"), options.flag("all"), options.flag("include-password")
    domain = running(ctx.domain(options.data("domain")))
    root = document.parse(domain.xml(flags.XML_SECURE if secret else 0))
    found = []
    for element in document.devices(root, "graphics"):
        kind = element.get("type", "")
        if wanted not in (None, kind):
            continue
        uri = display_uri(kind, element, secret=secret)
        if uri:
            found.append(uri)
    if not found:
        raise NoDevice(f"No graphical display with type '{wanted}' found" if wanted else "No graphical display found")
    shown = found if every else found[:1]
    if not ctx.put(shown):
        for uri in shown:
            ctx.line(uri)
    return 0


def display_uri(kind: str, element: document.Element, *, secret: bool) -> str:
    """`vnc://localhost:0`, `spice://HOST:PORT?tls-port=N`, as virsh writes them; empty if it listens nowhere."""
    port, tls = int(element.get("port", "-1")), int(element.get("tlsPort", "-1"))
    sockets = [listen.get("socket", "") for listen in element.findall("listen") if listen.get("socket")]
    if port < 0 and tls < 0:
        return f"{kind}+unix://{sockets[0]}" if sockets else ""
    address = listen_address(element)
    address = "localhost" if address in ANY_ADDRESS else f"[{address}]" if ":" in address else address
    password = element.get("passwd") if secret else None
    uri = f"{kind}://" + (f":{password}@" if password and kind == "vnc" else "") + address
    if port > 0:
        uri += f":{port - 5900 if kind == 'vnc' else port}"
    query = [f"tls-port={tls}"] if tls > 0 else []
    if password and kind == "spice":
        query.append(f"password={password}")
    return uri + ("?" + "&".join(query) if query else "")


COMMANDS = {
    "ttyconsole": Verb(ttyconsole, "Output the device for the TTY console.", ACTIVE),
    "vncdisplay": Verb(vncdisplay, "Output the IP address and port number for the VNC display.", ACTIVE),
    "domdisplay": Verb(
        domdisplay,
        "Output the IP address and port number for the graphical display.",
        ACTIVE,
        Option("include-password", FLAG, "includes the password into the connection URI if available"),
        Option(
            "type",
            TEXT,
            'select particular graphical display (e.g. "vnc", "spice", "rdp", "dbus")',
            complete=KINDS,
        ),
        Option("all", FLAG, "show all possible graphical displays"),
    ),
}
