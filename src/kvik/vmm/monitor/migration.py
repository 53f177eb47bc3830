"""Migration and snapshots: the commands' types are here; what they do is `vmm`'s state part, by `HANDLERS`.

A name without a handler is refused with a clear error, never with silence.

Reference: QEMU's qapi/migration.json.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvik.vmm.monitor.errors import refused
from kvik.vmm.monitor.schema import ANYTHING, ID, NOTHING, TEXT, Bool, Enum, Int, List, Struct, Type
from kvik.vmm.monitor.table import Arguments, Command, Context, Handler

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# command -> handler(context, arguments): what `kvik.vmm.state.qmp` says, and who adds to it
HANDLERS: dict[str, Handler] = {}


def _find(name: str) -> Handler | None:
    from kvik.vmm.state.qmp import HANDLERS as OURS  # only when somebody asks: no start waits for it

    return HANDLERS.get(name) or OURS.get(name)


def query_migrate(context: Context, arguments: Arguments) -> dict[str, Any]:
    handler = _find("query-migrate")
    reply: dict[str, Any] = handler(context, arguments) if handler is not None else {}  # QEMU: {} before the first
    return reply


def _plugged(name: str) -> Callable[[Context, Arguments], Any]:
    def handler(context: Context, arguments: Arguments) -> Any:
        known = _find(name)
        if known is None:
            raise refused(f"cannot do {name}", "it has no such kind of migration or snapshot")
        return known(context, arguments)

    return handler


def _command(name: str, members: dict[str, Type] | None = None, *, oob: bool = False, summary: str = "") -> Command:
    return Command(name, _plugged(name), Struct(members), NOTHING, oob, summary)


_JOB: dict[str, Type] = {"job-id": ID, "tag": ID}
_JOBS: dict[str, Type] = {"id": ID}

COMMANDS: Sequence[Command] = (
    _command("migrate", {"uri": TEXT, "*blk": Bool(), "*inc": Bool(), "*detach": Bool(), "*resume": Bool()}),
    _command("migrate-incoming", {"uri": TEXT}),
    _command("migrate_cancel"),
    _command("migrate-continue", {"state": ID}),
    _command("migrate-start-postcopy"),
    _command("migrate-pause", oob=True),
    _command("migrate-recover", {"uri": TEXT}, oob=True),
    Command(
        "migrate-set-parameters",
        _plugged("migrate-set-parameters"),
        Struct(others=True),
        NOTHING,
    ),
    _command("migrate-set-capabilities", {"capabilities": List(Struct({"capability": ID, "state": Bool()}))}),
    Command("query-migrate", query_migrate, summary="how far a migration is; {} before the first"),
    Command("query-migrate-parameters", _plugged("query-migrate-parameters"), returns=ANYTHING),
    Command("query-migrate-capabilities", _plugged("query-migrate-capabilities"), returns=ANYTHING),
    _command("snapshot-save", _JOB | {"vmstate": ID, "devices": List(ID)}),
    _command("snapshot-load", _JOB | {"vmstate": ID, "devices": List(ID)}),
    _command("snapshot-delete", _JOB | {"devices": List(ID)}),
    _command(
        "x-kvik-snapshot-save",
        {"directory": TEXT, "*compression": Enum("none", "zlib")},
        summary="the whole machine into a new directory",
    ),
    _command("x-kvik-snapshot-load", {"directory": TEXT}, summary="the whole machine out of a directory"),
    _command("x-kvik-save-stream", {"fdname": ID}, summary="the whole machine into a descriptor that came by getfd"),
    _command(
        "x-kvik-background-begin",
        {"fdname": ID, "userfaultfd": ID, "served": List(ID)},
        summary="get ready to be saved while the guest runs",
    ),
    _command("x-kvik-background-freeze", {}, summary="what is saved is the machine as it is now; it stands still"),
    _command("x-kvik-background-cancel", {}, summary="save no more"),
    _command("x-kvik-checkpoint", {}, summary="mark this state, for x-kvik-reset-to-snapshot"),
    _command("x-kvik-reset-to-snapshot", {}, summary="back to the marked state: only what changed"),
    _command("calc-dirty-rate", {"calc-time": Int(1, 60), "*sample-pages": Int(), "*mode": ID}),
    Command(
        "query-dirty-rate",
        lambda context, arguments: (
            HANDLERS["query-dirty-rate"](context, arguments)
            if "query-dirty-rate" in HANDLERS
            else {"status": "unstarted", "start-time": 0, "calc-time": 0, "sample-pages": 0, "mode": "dirty-bitmap"}
        ),
        summary="unstarted until somebody measures",
    ),
)
