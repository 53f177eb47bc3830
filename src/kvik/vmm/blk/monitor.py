"""kvik-blk's own monitor: of kvik-vmm's commands those that are about its one disk."""

from __future__ import annotations

from kvik.vmm.monitor import block, introspect, run_state

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.vmm.monitor.table import Command

__all__ = ["COMMANDS"]

_NAMES = {
    "block_resize",
    "block_set_io_throttle",
    "query-block",
    "query-blockstats",
    "query-commands",
    "query-named-block-nodes",
    "query-version",
    "quit",
}
COMMANDS: dict[str, Command] = {
    command.name: command
    for group in (block, introspect, run_state)
    for command in group.COMMANDS
    if command.name in _NAMES
}
