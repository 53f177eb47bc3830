"""Secrets: finding, looking, changing. A value goes only to clients that may change things, and no private one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvik.conf.secret import USAGE_TYPES, Secret, format_secret
from kvik.daemon.handlers.common import LIST_MAX, check_flags
from kvik.daemon.secret_events import reference
from kvik.errors import InvalidArgument, OperationUnsupported

if TYPE_CHECKING:
    from kvik.daemon.connection import Connection

VALIDATE = 1  # virSecretDefineFlags: documents are always checked
EPHEMERAL, NO_EPHEMERAL, PRIVATE, NO_PRIVATE = 1, 2, 4, 8  # virConnectListAllSecretsFlags

Reference = tuple[bytes, int, str]


def _secret(connection: Connection, named: Any) -> Secret:
    return connection.manager.secrets.lookup_uuid(named[0])


def num_of(connection: Connection, args: Any) -> tuple[int]:
    return (len(connection.manager.secrets.list()),)


def list_uuids(connection: Connection, args: Any) -> tuple[list[str]]:
    (wanted,) = args
    if not 0 <= wanted <= LIST_MAX:
        raise InvalidArgument(f"a list of {wanted} secrets is not possible (0 to {LIST_MAX})")
    return ([str(one.uuid) for one in connection.manager.secrets.list()][:wanted],)


def list_all(connection: Connection, args: Any) -> tuple[list[Reference], int]:
    need_results, flags = args
    check_flags(flags, EPHEMERAL | NO_EPHEMERAL | PRIVATE | NO_PRIVATE, "list secrets")
    found = [reference(one) for one in connection.manager.secrets.list() if _listed(one, flags)]
    if not need_results:
        return ([], len(found))
    if len(found) > LIST_MAX:
        raise OperationUnsupported(f"{len(found)} secrets do not fit into one answer (at most {LIST_MAX})")
    return (found, len(found))


def _listed(secret: Secret, flags: int) -> bool:
    for yes, no, value in ((EPHEMERAL, NO_EPHEMERAL, secret.ephemeral), (PRIVATE, NO_PRIVATE, secret.private)):
        if flags & (yes | no) and not flags & (yes if value else no):
            return False
    return True


def lookup_by_uuid(connection: Connection, args: Any) -> tuple[Reference]:
    return (reference(connection.manager.secrets.lookup_uuid(args[0])),)


def lookup_by_usage(connection: Connection, args: Any) -> tuple[Reference]:
    kind, usage = args
    if not 0 <= kind < len(USAGE_TYPES):
        raise InvalidArgument(f"usage type {kind} of secrets is unknown")
    return (reference(connection.manager.secrets.lookup_usage(USAGE_TYPES[kind], usage)),)


def get_xml(connection: Connection, args: Any) -> tuple[str]:
    named, flags = args
    check_flags(flags, 0, "get a secret's XML")
    return (format_secret(_secret(connection, named)),)


async def define_xml(connection: Connection, args: Any) -> tuple[Reference]:
    xml, flags = args
    check_flags(flags, VALIDATE, "define a secret")
    return (reference(await connection.manager.secrets.define(xml)),)


async def undefine(connection: Connection, args: Any) -> None:
    await connection.manager.secrets.undefine(_secret(connection, args[0]))


async def set_value(connection: Connection, args: Any) -> None:
    named, value, flags = args
    check_flags(flags, 0, "set a secret's value")
    await connection.manager.secrets.set_value(_secret(connection, named), bytes(value))


def get_value(connection: Connection, args: Any) -> tuple[bytes]:
    named, flags = args
    check_flags(flags, 0, "get a secret's value")
    return (connection.manager.secrets.shown_value(_secret(connection, named)),)


def register(connection: Connection, args: Any) -> tuple[int]:
    number, named = args
    uuid = reference(_secret(connection, named))[0] if named is not None else None
    return (connection.server.secret_events.add(connection, number, uuid),)


def deregister(connection: Connection, args: Any) -> None:
    connection.server.secret_events.remove(connection, args[0])
