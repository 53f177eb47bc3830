"""dominfo, domstate, domcontrol, domid, domname, domuuid."""

from __future__ import annotations

from kvik.cli import flags, term
from kvik.cli.common import DOMAIN
from kvik.cli.domain_list import acceleration
from kvik.cli.options import FLAG, Option, Verb
from kvik.errors import OperationUnsupported

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.cli.context import Context
    from kvik.cli.options import Options
    from kvik.client import Domain


def accelerator(ctx: Context, domain: Domain) -> str:
    """How a running machine is accelerated ("kvm", "emulation"), or "" where the daemon does not say."""
    if domain.id <= 0:
        return ""
    rows = ctx.connection.overview(flags.LIST_ACTIVE)
    found = next((row.accelerator for row in rows if row.uuid == domain.uuid), "")
    return acceleration(found) if found else ""


def security(ctx: Context, domain: Domain) -> list[tuple[str, object]]:
    """The confinement's model and this machine's label; nothing where the daemon has none."""
    try:
        model, doi = (text_of(chars) for chars in ctx.connection.call("NODE_GET_SECURITY_MODEL"))
        if not model:
            return []
        found: list[tuple[str, object]] = [("Security model", model), ("Security DOI", doi)]
        if domain.id > 0:
            label, enforcing = ctx.connection.call("DOMAIN_GET_SECURITY_LABEL", domain.ref)
            if text_of(label):
                mode = "enforcing" if enforcing else "permissive"
                found.append(("Security label", f"{text_of(label)} ({mode})"))
        return found
    except OperationUnsupported:
        return []


def text_of(chars: object) -> str:
    """A fixed array of C chars, as the protocol has some, up to its NUL."""
    assert isinstance(chars, list | tuple)
    return bytes(char & 0xFF for char in chars).split(b"\0")[0].decode(errors="replace")


def dominfo(ctx: Context, options: Options) -> int:
    domain = ctx.domain(options.data("domain"))
    info = domain.info()
    pairs: list[tuple[str, object]] = [
        ("Id", str(domain.id) if domain.id > 0 else "-"),
        ("Name", domain.name),
        ("UUID", domain.uuid),
        ("OS Type", domain.os_type()),
        ("State", flags.state_name(info.state)),
        ("CPU(s)", info.vcpus),
    ]
    if info.cpu_time:
        pairs.append(("CPU time", f"{info.cpu_time / 1e9:.1f}s"))
    pairs.append(("Max memory", f"{info.max_memory} KiB"))
    pairs.append(("Used memory", f"{info.memory} KiB"))
    pairs.append(("Persistent", "yes" if domain.is_persistent() else "no"))
    pairs.append(("Autostart", "enable" if domain.autostart() else "disable"))
    pairs.append(("Managed save", "yes" if domain.has_managed_save() else "no"))
    pairs += security(ctx, domain)
    how = accelerator(ctx, domain)
    if how:
        pairs.append(("Acceleration", how))
    ctx.pairs(pairs)
    return 0


def domstate(ctx: Context, options: Options) -> int:
    domain = ctx.domain(options.data("domain"))
    state, reason = domain.state()
    name, why = flags.state_name(state), flags.reason_name(state, reason)
    if ctx.put({"state": name, "reason": why}):
        return 0
    text = term.paint(name, term.STATE_COLOURS.get(name)) if ctx.colour else name
    ctx.write(f"{text} ({why})\n" if options.flag("reason") else f"{text}\n")
    return 0


CONTROL_STATES = ("ok", "background job", "occupied", "error")


def domcontrol(ctx: Context, options: Options) -> int:
    domain = ctx.domain(options.data("domain"))
    state, _, milliseconds = domain.control_info()
    seconds = milliseconds / 1000
    name = CONTROL_STATES[state] if 0 <= state < len(CONTROL_STATES) else "unknown"
    if not ctx.put({"control": name, "seconds": seconds}):
        ctx.line(name if state in (0, 3) else f"{name} ({seconds:.3f}s)")
    return 0


def domid(ctx: Context, options: Options) -> int:
    domain = ctx.domain(options.data("domain"))
    if not ctx.put({"id": domain.id if domain.id > 0 else None}):
        ctx.line(str(domain.id) if domain.id > 0 else "-")
    return 0


def domname(ctx: Context, options: Options) -> int:
    domain = ctx.domain(options.data("domain"))
    if not ctx.put({"name": domain.name}):
        ctx.line(domain.name)
    return 0


def domuuid(ctx: Context, options: Options) -> int:
    domain = ctx.domain(options.data("domain"))
    if not ctx.put({"uuid": domain.uuid}):
        ctx.line(domain.uuid)
    return 0


COMMANDS = {
    "dominfo": Verb(dominfo, "Returns basic information about the domain.", DOMAIN),
    "domstate": Verb(
        domstate,
        "Returns state about a domain.",
        DOMAIN,
        Option("reason", FLAG, "also print reason for the state"),
    ),
    "domcontrol": Verb(domcontrol, "Returns state of a control interface to the domain.", DOMAIN),
    "domid": Verb(domid, "Convert a domain name or UUID to domain id.", DOMAIN),
    "domname": Verb(domname, "Convert a domain id or UUID to domain name.", DOMAIN),
    "domuuid": Verb(domuuid, "Convert a domain name or id to domain UUID.", DOMAIN),
}
