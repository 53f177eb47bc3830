"""Our own program: what libvirt has no call for."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

from kvik import __version__
from kvik.conf.enums import ConnectListAllDomainsFlags as ListFlags
from kvik.daemon.eventing import STAGE_STATES
from kvik.daemon.handlers.common import LIST_MAX, check_flags, require_active
from kvik.daemon.handlers.domain import select
from kvik.errors import InvalidArgument, OperationUnsupported

if TYPE_CHECKING:
    from kvik.daemon.connection import Connection

WAIT_DEFAULT = 60.0  # seconds
WAIT_MAX = 3600.0


def _stages(stages: Any) -> list[tuple[str, float, int, str]]:
    return [(stage.name, stage.seconds, STAGE_STATES.get(stage.state, 0), stage.hint) for stage in stages]


def _timeout(milliseconds: int) -> float:
    return min(milliseconds / 1000, WAIT_MAX) if milliseconds else WAIT_DEFAULT


async def wait_ready(connection: Connection, args: Any) -> tuple[int, list[Any]]:
    domain = connection.domain(args[0])
    require_active(domain)
    stages = await domain.wait_ready(_timeout(args[1]))
    return (int(domain.ready), _stages(stages))


async def execute(connection: Connection, args: Any) -> tuple[Any]:
    reference, argv, environment, stdin, timeout = args
    if not argv:
        raise InvalidArgument("no command was given")
    domain = connection.domain(reference)
    require_active(domain)
    result = await domain.agent_exec(argv, stdin, timeout / 1000 if timeout else None, environment)
    return ((result.code, result.signal, result.stdout, result.stderr, int(result.truncated)),)


def stages(connection: Connection, args: Any) -> tuple[int, list[Any]]:
    domain = connection.domain(args[0])
    return (int(domain.ready), _stages(domain.stages))


def status(connection: Connection, args: Any) -> tuple[Any, ...]:
    server = connection.server
    domains = connection.manager.domains()
    return (
        __version__,
        os.getpid(),
        server.paths.scope,
        time.time() - server.started,
        len(domains),
        sum(domain.id >= 0 for domain in domains),
        len(server.connections),
        sorted({driver.name for driver in connection.manager.drivers.values()})[:16],
    )


def overview(connection: Connection, args: Any) -> tuple[list[Any]]:
    check_flags(args[0], ListFlags.mask(), "overview")
    domains = select(connection.manager.domains(), args[0])
    if len(domains) > LIST_MAX:
        raise OperationUnsupported(f"{len(domains)} machines do not fit into one answer (at most {LIST_MAX})")
    rows = []
    now = time.time()
    for domain in domains:
        state, _, memory, vcpus, cpu_time = domain.info()
        rows.append(
            (
                domain.name,
                domain.uuid,
                domain.id,
                state,
                domain.reason,
                domain.accelerator,
                vcpus,
                memory,
                cpu_time,
                domain.address or None,
                int(domain.ready),
                int(domain.persistent),
                int(domain.autostart),
                domain.title or None,
                max(0.0, now - domain.started) if domain.started else 0.0,
            )
        )
    return (rows,)


def shutdown(connection: Connection, args: Any) -> None:
    """End the daemon; its machines go on."""
    server = connection.server
    server.loop.call_later(0.01, server.stop, f"asked to by pid {connection.identity.pid}")
