"""All commands: the groups, put together."""

from __future__ import annotations

from kvik.vmm.monitor import (
    back_ends,
    block,
    block_jobs,
    char,
    cpus,
    devices,
    dump,
    fds,
    human,
    introspect,
    memory,
    migration,
    net,
    overlays,
    qom,
    run_state,
    stats,
)
from kvik.vmm.monitor.table import Command

GROUPS = {
    "Run state": run_state,
    "vCPUs": cpus,
    "Memory": memory,
    "Devices": devices,
    "Block": block,
    "Back ends": back_ends,
    "New images on disks": overlays,
    "Block jobs": block_jobs,
    "Network": net,
    "Character devices": char,
    "Descriptors": fds,
    "Objects and properties": qom,
    "Figures": stats,
    "Dump": dump,
    "Migration and snapshots": migration,
    "Introspection": introspect,
    "Human monitor": human,
}

COMMANDS: dict[str, Command] = {command.name: command for group in GROUPS.values() for command in group.COMMANDS}
