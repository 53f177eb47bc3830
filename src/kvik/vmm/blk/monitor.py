"""kvik-blk's own monitor: of kvik-vmm's commands those that are about its one disk; those for a new image on it, for
backups and block jobs of it; those that keep it from writing to memory that is being saved."""

from __future__ import annotations

from kvik.vmm.blk import backup_commands, block_job_commands, protection_commands
from kvik.vmm.monitor import block, block_jobs, fds, introspect, overlays, run_state
from kvik.vmm.monitor.table import Command

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

_OWN = (
    *overlays.COMMANDS,
    *block_jobs.COMMANDS,
    *backup_commands.COMMANDS,
    *block_job_commands.COMMANDS,
    *protection_commands.COMMANDS,
)
COMMANDS: dict[str, Command] = {
    command.name: command
    for group in (block.COMMANDS, fds.COMMANDS, introspect.COMMANDS, run_state.COMMANDS, _OWN)
    for command in group
    if command.name in _NAMES or group is _OWN
}
