"""The qemu program: a machine's monitor and its guest agent, by hand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvik.daemon.handlers.common import check_flags, require_active
from kvik.errors import InvalidArgument

if TYPE_CHECKING:
    from kvik.daemon.connection import Connection

HUMAN = 1  # VIR_DOMAIN_QEMU_MONITOR_COMMAND_HMP
# virDomainQemuAgentCommandTimeoutValues
TIMEOUT_BLOCK, TIMEOUT_DEFAULT, TIMEOUT_NOWAIT = -2, -1, 0
AGENT_TIMEOUT = 5.0
AGENT_TIMEOUT_MAX = 3600.0  # even a caller who asks to block gets an end


async def monitor_command(connection: Connection, args: Any) -> tuple[str]:
    reference, command, flags = args
    check_flags(flags, HUMAN, "monitor command")
    domain = connection.domain(reference)
    require_active(domain)
    return (await domain.monitor_command(command, hmp=bool(flags & HUMAN)),)


async def agent_command(connection: Connection, args: Any) -> tuple[str]:
    reference, command, timeout, flags = args
    check_flags(flags, 0, "agent command")
    if timeout < TIMEOUT_BLOCK:
        raise InvalidArgument(f"a timeout of {timeout} s means nothing")
    seconds = {TIMEOUT_BLOCK: AGENT_TIMEOUT_MAX, TIMEOUT_DEFAULT: AGENT_TIMEOUT, TIMEOUT_NOWAIT: 0.1}.get(
        timeout, min(float(timeout), AGENT_TIMEOUT_MAX)
    )
    domain = connection.domain(reference)
    require_active(domain)
    return (await domain.agent_command(command, timeout=seconds),)
