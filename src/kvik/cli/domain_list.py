"""list: one call for everything it shows."""

from __future__ import annotations

from kvik.cli import flags, term
from kvik.cli.options import FLAG, Option, UsageError, Verb
from kvik.cli.table import Table

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from kvik.cli.context import Context
    from kvik.cli.options import Options

FILTERS = {
    "persistent": flags.LIST_PERSISTENT,
    "transient": flags.LIST_TRANSIENT,
    "with-snapshot": flags.LIST_HAS_SNAPSHOT,
    "without-snapshot": flags.LIST_NO_SNAPSHOT,
    "with-checkpoint": flags.LIST_HAS_CHECKPOINT,
    "without-checkpoint": flags.LIST_NO_CHECKPOINT,
    "state-running": flags.LIST_RUNNING,
    "state-paused": flags.LIST_PAUSED,
    "state-shutoff": flags.LIST_SHUTOFF,
    "state-other": flags.LIST_OTHER,
    "autostart": flags.LIST_AUTOSTART,
    "no-autostart": flags.LIST_NO_AUTOSTART,
    "with-managed-save": flags.LIST_MANAGEDSAVE,
    "without-managed-save": flags.LIST_NO_MANAGEDSAVE,
}
ACCELERATIONS = {"kvm": "kvm", "tcg": "emulation", "": "-"}


def selection(options: Options) -> int:
    """virConnectListAllDomainsFlags of the command line."""
    bits = flags.LIST_ACTIVE
    if options.flag("inactive") or options.flag("state-shutoff"):
        bits = flags.LIST_INACTIVE
    if options.flag("all"):
        bits = flags.LIST_ACTIVE | flags.LIST_INACTIVE
    for name, bit in FILTERS.items():
        if options.flag(name):
            bits |= bit
    return bits


def order(row: Any) -> tuple[bool, int, str]:
    """Active machines by id, then the others by name: virsh's order."""
    return (row.id <= 0, row.id if row.id > 0 else 0, row.name.lower())


def acceleration(accelerator: str) -> str:
    return ACCELERATIONS.get(accelerator, accelerator)


def list_domains(ctx: Context, options: Options) -> int:
    only = [name for name in ("uuid", "name", "id") if options.flag(name)]
    if options.flag("table") and only:
        raise UsageError("Only one argument from --table and --name, --uuid, --id may be specified.")
    ctx.doing = "Failed to list domains"
    rows = sorted(ctx.connection.overview(selection(options)), key=order)
    saved: frozenset[str] = frozenset()
    if options.flag("managed-save") and any(row.id <= 0 for row in rows):
        held = ctx.connection.domains(flags.LIST_INACTIVE | flags.LIST_MANAGEDSAVE)
        saved = frozenset(domain.uuid for domain in held)
    if ctx.json:
        ctx.put([facts(row, saved) for row in rows])
        return 0
    if only:
        for row in rows:
            values = {"uuid": row.uuid, "name": row.name, "id": str(row.id) if row.id > 0 else "-"}
            ctx.line(" ".join(values[name] for name in only))
        return 0
    headers = ["Id", "Name", "State"]
    if options.flag("title"):
        headers.append("Title")
    # virsh's columns, and one more only where somebody has to know: a machine that runs without hardware's help.
    emulated = any(row.id > 0 and row.accelerator == "tcg" for row in rows)
    if emulated:
        headers.append("Acceleration")
    table = Table(*headers)
    for row in rows:
        state = "saved" if row.uuid in saved else flags.state_name(row.state)
        cells = [str(row.id) if row.id > 0 else "-", row.name, state]
        if options.flag("title"):
            cells.append(row.title or "")
        if emulated:
            cells.append(acceleration(row.accelerator if row.id > 0 else ""))
        table.add(*cells)
    ctx.table(table, colour=lambda column, text: term.STATE_COLOURS.get(text) if column == 2 else None)
    return 0


def facts(row: Any, saved: frozenset[str] = frozenset()) -> dict[str, object]:
    """One machine for `--json`."""
    return {
        "id": row.id if row.id > 0 else None,
        "name": row.name,
        "uuid": row.uuid,
        "state": "saved" if row.uuid in saved else flags.state_name(row.state),
        "reason": flags.reason_name(row.state, row.reason),
        "title": row.title or None,
        "persistent": bool(row.persistent),
        "autostart": bool(row.autostart),
        "acceleration": acceleration(row.accelerator) if row.id > 0 and row.accelerator else None,
        "vcpus": row.vcpus,
        "memory_kib": row.mem_kib,
        "cpu_time_ns": row.cpu_time,
        "address": row.address or None,
        "ready": bool(row.ready),
    }


COMMANDS = {
    "list": Verb(
        list_domains,
        "Returns list of domains.",
        Option("inactive", FLAG, "list inactive domains"),
        Option("all", FLAG, "list inactive & active domains"),
        Option("transient", FLAG, "list transient domains"),
        Option("persistent", FLAG, "list persistent domains"),
        Option("with-snapshot", FLAG, "list domains with existing snapshot"),
        Option("without-snapshot", FLAG, "list domains without a snapshot"),
        Option("with-checkpoint", FLAG, "list domains with existing checkpoint"),
        Option("without-checkpoint", FLAG, "list domains without a checkpoint"),
        Option("state-running", FLAG, "list domains in running state"),
        Option("state-paused", FLAG, "list domains in paused state"),
        Option("state-shutoff", FLAG, "list domains in shutoff state"),
        Option("state-other", FLAG, "list domains in other states"),
        Option("autostart", FLAG, "list domains with autostart enabled"),
        Option("no-autostart", FLAG, "list domains with autostart disabled"),
        Option("with-managed-save", FLAG, "list domains with managed save state"),
        Option("without-managed-save", FLAG, "list domains without managed save"),
        Option("uuid", FLAG, "list uuid's only"),
        Option("name", FLAG, "list domain names only"),
        Option("id", FLAG, "list domain IDs only"),
        Option("table", FLAG, "list table (default)"),
        Option("managed-save", FLAG, "mark inactive domains with managed save state"),
        Option("title", FLAG, "show domain title"),
    )
}
