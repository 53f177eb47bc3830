"""iface-*: the host's interfaces, as virsh has them; changes that could cut the host off undo themselves."""

from __future__ import annotations

from kvik.cli import xml_verbs
from kvik.cli.common import FILE
from kvik.cli.options import DATA, FLAG, NUMBER, Option, UsageError, Verb
from kvik.cli.table import Table

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.cli.context import Context
    from kvik.cli.options import Options
    from kvik.client.interface import Interface, Interfaces

TIMEOUT = 60  # seconds in which a change must be committed
INACTIVE, ACTIVE = 1, 2
XML_INACTIVE = 1


def _interfaces(ctx: Context) -> Interfaces:
    from kvik.client.interface import Interfaces

    return Interfaces(ctx.connection)


def _find(ctx: Context, options: Options) -> Interface:
    return _interfaces(ctx).find(options.data("interface"))


def iface_list(ctx: Context, options: Options) -> int:
    bits = ACTIVE
    if options.flag("inactive"):
        bits = INACTIVE
    if options.flag("all"):
        bits = INACTIVE | ACTIVE
    interfaces = _interfaces(ctx)
    active = {one.name for one in interfaces.all(ACTIVE)} if bits & ACTIVE else set[str]()
    table = Table("Name", "State", "MAC Address")
    for one in interfaces.all(bits):
        table.add(one.name, "active" if one.name in active else "inactive", one.mac)
    ctx.table(table)
    return 0


def iface_dumpxml(ctx: Context, options: Options) -> int:
    text = _find(ctx, options).xml(XML_INACTIVE if options.flag("inactive") else 0)
    return xml_verbs.show(ctx, options, text)


def iface_define(ctx: Context, options: Options) -> int:
    path = options.data("file")
    ctx.doing = f"Failed to define interface from {path}"
    one = _interfaces(ctx).define(ctx.read_file(path), 1 if options.flag("validate") else 0)
    ctx.say(f"Interface {one.name} defined from {path}")
    return 0


def iface_edit(ctx: Context, options: Options) -> int:
    one = _find(ctx, options)

    def define(text: str, validate: bool) -> str:
        return f"interface {_interfaces(ctx).define(text).name}"

    return xml_verbs.edit(ctx, f"interface {one.name}", lambda: one.xml(XML_INACTIVE), define, validate=False)


def iface_undefine(ctx: Context, options: Options) -> int:
    one = _find(ctx, options)
    ctx.doing = f"Failed to undefine interface {one.name}"
    one.undefine()
    ctx.say(f"Interface {one.name} undefined")
    return 0


def iface_start(ctx: Context, options: Options) -> int:
    one = _find(ctx, options)
    ctx.doing = f"Failed to start interface {one.name}"
    one.create()
    ctx.say(f"Interface {one.name} started")
    return 0


def iface_destroy(ctx: Context, options: Options) -> int:
    one = _find(ctx, options)
    ctx.doing = f"Failed to destroy interface {one.name}"
    one.destroy()
    ctx.say(f"Interface {one.name} destroyed")
    return 0


def iface_name(ctx: Context, options: Options) -> int:
    one = _find(ctx, options)
    if not ctx.put({"name": one.name}):
        ctx.line(one.name)
    return 0


def iface_mac(ctx: Context, options: Options) -> int:
    one = _find(ctx, options)
    if not ctx.put({"mac": one.mac}):
        ctx.line(one.mac)
    return 0


# Changes with a way back --------------------------------------------------------------------------------------------


def iface_begin(ctx: Context, options: Options) -> int:
    seconds = options.number("timeout") or 0
    ctx.doing = "Failed to begin network config change transaction"
    _interfaces(ctx).begin(_seconds(seconds))
    if seconds:
        ctx.say(f"Changes are undone in {seconds} s unless you say: kvik iface-commit")
    return 0


def iface_commit(ctx: Context, options: Options) -> int:
    ctx.doing = "Failed to commit network config change transaction"
    interfaces = _interfaces(ctx)
    what = interfaces.pending().what
    interfaces.commit()
    ctx.say(f"Kept: {what}")
    return 0


def iface_rollback(ctx: Context, options: Options) -> int:
    ctx.doing = "Failed to rollback network config change transaction"
    interfaces = _interfaces(ctx)
    what = interfaces.pending().what
    interfaces.rollback()
    ctx.say(f"Undone: {what}")
    return 0


def iface_pending(ctx: Context, options: Options) -> int:
    pending = _interfaces(ctx).pending()
    if ctx.put(pending._asdict()):
        return 0
    if not pending.state:
        ctx.line("No change is pending.")
    elif pending.state == "open":
        left = f"undone in {pending.seconds:.0f} s" if pending.seconds else "without a time limit"
        ctx.line(f"Pending: {pending.what} ({left})")
    elif pending.state == "kept":
        ctx.line(f"Kept, but not written yet: {pending.what}")
    else:
        ctx.line(f"{pending.what}: {pending.outcome}")
    return 0


def _seconds(value: int) -> int:
    if not 0 <= value <= 3600:
        raise UsageError(f"invalid value of --timeout '{value}'", remedy="0 to 3600 seconds")
    return value


def _timeout(options: Options) -> int:
    value = options.number("timeout")
    return TIMEOUT if value is None else _seconds(value)


def _confirm(ctx: Context, interfaces: Interfaces, seconds: int) -> None:
    """Ask whoever sits there; else say how. No answer is an answer: the daemon's watchdog undoes it."""
    pending = interfaces.pending()
    if pending.state != "open" or not pending.seconds:
        return
    if ctx.stdin.isatty() and not ctx.json:
        if ctx.ask(f"Keep this? It is undone in {pending.seconds:.0f} s otherwise [y/N]: ").lower() in ("y", "yes"):
            interfaces.commit()
            ctx.say("Kept.")
        else:
            interfaces.rollback()
            ctx.say("Undone.")
        return
    ctx.say(f"Undone in {pending.seconds:.0f} s unless you say: kvik iface-commit")


def iface_bridge(ctx: Context, options: Options) -> int:
    interface, name = options.data("interface"), options.data("bridge")
    if options.flag("stp") and options.flag("no-stp"):
        raise UsageError("Options --stp and --no-stp are mutually exclusive")
    now = not options.flag("no-start")
    seconds = _timeout(options)
    ctx.doing = f"Failed to create bridge {name} over {interface}"
    interfaces = _interfaces(ctx)
    delay = options.number("delay") or 0
    for text in interfaces.bridge(interface, name, stp=options.flag("stp"), delay=delay, start=now, seconds=seconds):
        ctx.extra(text)
    ctx.say(f"Created bridge {name} with attached device {interface}")
    if now:
        ctx.say(f"Bridge interface {name} started")
        _confirm(ctx, interfaces, seconds)
    return 0


def iface_unbridge(ctx: Context, options: Options) -> int:
    name = options.data("bridge")
    now = not options.flag("no-start")
    seconds = _timeout(options)
    ctx.doing = f"Failed to dissolve bridge {name}"
    interfaces = _interfaces(ctx)
    for text in interfaces.unbridge(name, start=now, seconds=seconds):
        ctx.extra(text)
    ctx.say(f"Device un-attached from bridge {name}")
    if now:
        _confirm(ctx, interfaces, seconds)
    return 0


INTERFACE = Option("interface", DATA, "interface name or MAC address")
SECONDS = Option(
    "timeout",
    NUMBER,
    f"seconds after which it is undone unless committed; 0: it stays (default: {TIMEOUT})",
    named_only=True,
)

COMMANDS = {
    "iface-begin": Verb(
        iface_begin,
        "Create a restore point for interfaces settings",
        Option("timeout", NUMBER, "seconds after which all is undone unless committed (default: never)"),
    ),
    "iface-bridge": Verb(
        iface_bridge,
        "Bridge an existing network device: its addresses, routes and MAC move to the bridge in one go.\n"
        "Unless it is committed in time it is undone, also if the daemon is gone by then.",
        Option("interface", DATA, "existing interface name"),
        Option("bridge", DATA, "new bridge device name"),
        Option("no-stp", FLAG, "do not enable STP for this bridge (the default here)"),
        Option("stp", FLAG, "enable STP; beware of switches that shut a port on which they hear it"),
        Option("delay", NUMBER, "number of seconds to squelch traffic on newly connected ports"),
        Option("no-start", FLAG, "don't start the bridge immediately"),
        SECONDS,
    ),
    "iface-commit": Verb(iface_commit, "Commit changes and free restore point"),
    "iface-define": Verb(
        iface_define,
        "Define or modify a persistent physical host interface.",
        FILE,
        Option("validate", FLAG, "validate the XML against the schema"),
    ),
    "iface-destroy": Verb(iface_destroy, "Forcefully stop a physical host interface.", INTERFACE),
    "iface-dumpxml": Verb(
        iface_dumpxml,
        "Output the physical host interface information as an XML dump to stdout.",
        INTERFACE,
        Option("inactive", FLAG, "show inactive defined XML"),
        *xml_verbs.XPATH,
    ),
    "iface-edit": Verb(iface_edit, "Edit the XML configuration for a physical host interface.", INTERFACE),
    "iface-list": Verb(
        iface_list,
        "Returns list of physical host interfaces.",
        Option("inactive", FLAG, "list inactive interfaces"),
        Option("all", FLAG, "list inactive & active interfaces"),
    ),
    "iface-mac": Verb(
        iface_mac, "Convert an interface name to its MAC address.", Option("interface", DATA, "interface name")
    ),
    "iface-name": Verb(
        iface_name, "Convert an interface MAC address to its name.", Option("interface", DATA, "interface mac")
    ),
    "iface-pending": Verb(iface_pending, "Show the change of interfaces that waits for commit, or what became of it."),
    "iface-rollback": Verb(iface_rollback, "Rollback to previous restore point"),
    "iface-start": Verb(iface_start, "Start a physical host interface.", INTERFACE),
    "iface-unbridge": Verb(
        iface_unbridge,
        "Unbridge a network device: the bridge's addresses go to its one port, and the bridge goes once committed.",
        Option("bridge", DATA, "current bridge device name"),
        Option("no-start", FLAG, "don't start the detached interface immediately (not recommended)"),
        SECONDS,
    ),
    "iface-undefine": Verb(iface_undefine, "Undefine an interface.", INTERFACE),
}
