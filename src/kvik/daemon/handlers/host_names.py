"""Names of machines on the host: our own procedures, since libvirt has none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvik.manager import host_names

if TYPE_CHECKING:
    from kvik.daemon.connection import Connection

ZONES_MAX, SERVERS_MAX = 16384, 1024  # see rpc/kvik_program.py


async def status(connection: Connection, args: Any) -> tuple[int, str, str, list[Any]]:
    told = await host_names.status(connection.manager)
    zones = [(one.network, one.domain, [*one.servers][:SERVERS_MAX], one.why) for one in told.zones[:ZONES_MAX]]
    return (int(told.enabled), told.resolver, told.file, zones)


async def enable(connection: Connection, args: Any) -> tuple[str]:
    return (await host_names.enable(connection.manager),)


async def disable(connection: Connection, args: Any) -> tuple[int]:
    return (int(await host_names.disable(connection.manager)),)
