"""kvik-blk's own monitor: of kvik-vmm's commands those that are about its one disk; those for a new image on it, and
for backups of it."""

from __future__ import annotations

import os

from kvik.vmm.blk import backup_commands
from kvik.vmm.monitor import block, fds, introspect, run_state
from kvik.vmm.monitor.errors import QmpError
from kvik.vmm.monitor.schema import ID, NOTHING, TEXT, Struct
from kvik.vmm.monitor.table import Arguments, Command, Context

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.vmm.blk.overlay import Overlays

__all__ = ["COMMANDS"]

_NAMES = {
    "block_resize",
    "block_set_io_throttle",
    "closefd",
    "getfd",
    "query-block",
    "query-blockstats",
    "query-commands",
    "query-named-block-nodes",
    "query-version",
    "quit",
}


def _overlays(context: Context) -> Overlays:
    found: Overlays = context.machine.overlays  # type: ignore[attr-defined]  # it is a `BlkHost`
    return found


def _overlay_add(context: Context, arguments: Arguments) -> None:
    taken: dict[str, int] = {}
    named = context.server.named_fds
    for role in ("image", "below", "data"):
        if role not in arguments:
            continue
        if arguments[role] not in named:
            for fd in taken.values():
                os.close(fd)
            raise QmpError(f"File descriptor named '{arguments[role]}' not found")
        taken[role] = named.pop(arguments[role])
    _overlays(context).add(
        taken["image"],
        taken["below"],
        taken.get("data", -1),
        node=arguments["node-name"],
        group=arguments["group"],
        name=arguments["filename"],
    )


def _overlay_put(context: Context, arguments: Arguments) -> None:
    _overlays(context).put()


def _overlay_drop(context: Context, arguments: Arguments) -> None:
    _overlays(context).drop()


def _overlay_keep(context: Context, arguments: Arguments) -> None:
    _overlays(context).keep()


def _query_overlay(context: Context, arguments: Arguments) -> dict[str, str]:
    return _overlays(context).report()


_OVERLAYS = (
    Command(
        "x-kvik-overlay-add",
        _overlay_add,
        Struct({"image": ID, "below": ID, "*data": ID, "node-name": ID, "group": ID, "filename": TEXT}),
        NOTHING,
        summary="make a new image, sent by getfd, ready to be put on top",
    ),
    Command("x-kvik-overlay-put", _overlay_put, NOTHING, NOTHING, summary="put it on top"),
    Command("x-kvik-overlay-drop", _overlay_drop, NOTHING, NOTHING, summary="let go of it, if nothing was written"),
    Command("x-kvik-overlay-keep", _overlay_keep, NOTHING, NOTHING, summary="it stays; the one below is only read"),
    Command("x-kvik-query-overlay", _query_overlay, summary="what is on top, and what is under way"),
)
_OWN = (*_OVERLAYS, *backup_commands.COMMANDS)
COMMANDS: dict[str, Command] = {
    command.name: command
    for group in (block.COMMANDS, fds.COMMANDS, introspect.COMMANDS, run_state.COMMANDS, _OWN)
    for command in group
    if command.name in _NAMES or group is _OWN
}
