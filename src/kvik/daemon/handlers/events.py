"""Subscribing to events. Delivery is in `kvik.daemon.eventing`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvik.daemon.handlers.common import check_flags
from kvik.errors import InvalidArgument, OperationUnsupported

if TYPE_CHECKING:
    from kvik.daemon.connection import Connection

LIFECYCLE = 0
REGEX, NO_CASE = 1, 2  # virConnectDomainQemuMonitorEventRegisterFlags


def register_legacy(connection: Connection, args: Any) -> tuple[int]:
    """CONNECT_DOMAIN_EVENT_REGISTER: life cycle only, the oldest form."""
    connection.server.events.add_legacy(connection, LIFECYCLE)
    return (1,)


def deregister_legacy(connection: Connection, args: Any) -> tuple[int]:
    connection.server.events.remove_legacy(connection, LIFECYCLE)
    return (0,)


def register_any_legacy(connection: Connection, args: Any) -> None:
    """CONNECT_DOMAIN_EVENT_REGISTER_ANY: one registration for each kind, events without a callback id."""
    connection.server.events.add_legacy(connection, args[0])


def deregister_any_legacy(connection: Connection, args: Any) -> None:
    connection.server.events.remove_legacy(connection, args[0])


def register(connection: Connection, args: Any) -> tuple[int]:
    """CONNECT_DOMAIN_EVENT_CALLBACK_REGISTER_ANY: any number of them, for all machines or one."""
    number, domain = args
    uuid = connection.domain(domain).uuid if domain is not None else None
    return (connection.server.events.add(connection, number, uuid),)


def deregister(connection: Connection, args: Any) -> None:
    connection.server.events.remove(connection, args[0])


def register_monitor(connection: Connection, args: Any) -> tuple[int]:
    """The qemu program's: raw monitor events, all or those of one name."""
    domain, event, flags = args
    check_flags(flags, REGEX | NO_CASE, "monitor event")
    if flags & REGEX:
        # A client's pattern would run in the daemon's only thread, for as long as it likes.
        raise OperationUnsupported("patterns of monitor events are not supported", remedy="name one event, or none")
    uuid = connection.domain(domain).uuid if domain is not None else None
    if event is not None and len(event) > 256:
        raise InvalidArgument("the event's name is too long")
    return (connection.server.events.add_monitor(connection, uuid, event, bool(flags & NO_CASE)),)


def deregister_monitor(connection: Connection, args: Any) -> None:
    connection.server.events.remove(connection, args[0])
