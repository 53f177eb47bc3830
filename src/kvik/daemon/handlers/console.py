"""Consoles, channels, graphics and screenshots: what opens a stream or a descriptor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvik.conf.enums import DomainConsoleFlags
from kvik.daemon.dispatch import Files
from kvik.daemon.handlers.common import check_flags, require_active
from kvik.daemon.streams import DescriptorStream, DownloadStream, Stream
from kvik.errors import NoDevice, ResourceBusy

if TYPE_CHECKING:
    from kvik.daemon.connection import Connection
    from kvik.manager.domain import DomainObject

FORCE = DomainConsoleFlags.FORCE
CHANNEL_FORCE = 1
SKIP_AUTH = 1  # VIR_DOMAIN_OPEN_GRAPHICS_SKIPAUTH


def _open(connection: Connection, domain: DomainObject, device: str | None, force: bool, call: Any) -> None:
    """Attach a stream to a console or channel. One client at a time; `force` takes it from whoever has it."""
    require_active(domain)
    consoles = connection.server.consoles
    key = (domain.uuid, _line(domain, device))
    holder = consoles.get(key)
    if holder is not None:
        if not force:
            raise ResourceBusy(
                f"the console of machine '{domain.name}' is in use by another client", remedy="use --force to take it"
            )
        holder.connection.abort_stream(holder.key, ResourceBusy("another client took this console"))
    # Only now: a hypervisor's socket may take one peer at a time.
    fd = domain.open_console(device)

    def released() -> None:
        if consoles.get(key) is stream:
            del consoles[key]

    stream: Stream = DescriptorStream(connection, call.key, fd, released)
    try:
        connection.add_stream(call, stream)
    except BaseException:
        stream.close()
        raise
    consoles[key] = stream


def _line(domain: DomainObject, device: str | None) -> str:
    """One name for one line: no name means the first console, and a serial line's console is that serial line."""
    live = domain.live
    if live is None:
        return device or ""
    for console in live.devices.consoles:
        name = console.alias.name if console.alias is not None else None
        if device is None or name == device:
            target = console.target
            if target is not None and target.type == "serial":
                return f"serial{target.port or 0}"
            return name or ""
    if device is None:
        return next((serial.alias.name or "" for serial in live.devices.serials if serial.alias is not None), "")
    return device


def open_console(connection: Connection, args: Any, call: Any) -> None:
    reference, device, flags = args
    check_flags(flags, DomainConsoleFlags.mask(), "console")
    # SAFE asks that a second client be refused; that is so here without asking.
    _open(connection, connection.domain(reference), device, bool(flags & FORCE), call)


def open_channel(connection: Connection, args: Any, call: Any) -> None:
    reference, name, flags = args
    check_flags(flags, CHANNEL_FORCE, "channel")
    domain = connection.domain(reference)
    if name is None:
        channels = domain.live.devices.channels if domain.live is not None else []
        first = next((channel.alias.name for channel in channels if channel.alias is not None), None)
        if first is None:
            raise NoDevice(f"machine '{domain.name}' has no channel")
        name = first
    _open(connection, domain, name, bool(flags & CHANNEL_FORCE), call)


async def screenshot(connection: Connection, args: Any, call: Any) -> tuple[str]:
    reference, screen, flags = args
    check_flags(flags, 0, "screenshot")
    mime, image = await connection.domain(reference).screenshot(screen)
    if not connection.closed:
        connection.add_stream(call, DownloadStream(connection, call.key, image))
    return (mime,)


async def open_graphics_fd(connection: Connection, args: Any) -> Files:
    """A connected socket to the machine's display, for a viewer on this host."""
    reference, index, flags = args
    check_flags(flags, SKIP_AUTH, "graphics")
    domain = connection.domain(reference)
    require_active(domain)
    return Files(None, (await domain.open_graphics(index, skip_auth=bool(flags & SKIP_AUTH)),))
