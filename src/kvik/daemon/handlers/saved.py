"""Machines saved with their memory. The work is in `manager/saved/`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvik.daemon.dispatch import Access
from kvik.daemon.errors import OperationDenied
from kvik.daemon.handlers.common import check_flags
from kvik.errors import InvalidArgument
from kvik.manager.saved import machine as saved

if TYPE_CHECKING:
    from kvik.daemon.connection import Connection

SECURE = 1  # virDomainSaveImageXMLFlags
_PARAMETERS = ("file", "dxml")  # virTypedParameters of save and restore; both strings


async def save(connection: Connection, args: Any) -> None:
    wire, path = args
    await saved.save(connection.domain(wire), path, None, 0)


async def save_flags(connection: Connection, args: Any) -> None:
    wire, path, xml, flags = args
    await saved.save(connection.domain(wire), path, xml, flags)


def _parameters(values: Any) -> dict[str, str]:
    found: dict[str, str] = {}
    for item in values:
        if item.name not in _PARAMETERS or not isinstance(item.value, str):
            raise InvalidArgument(f"parameter {item.name[:40]!r} is not supported for a saved machine")
        if item.name in found:
            raise InvalidArgument(f"parameter {item.name!r} was given twice")
        found[item.name] = item.value
    return found


async def save_params(connection: Connection, args: Any) -> None:
    wire, values, flags = args
    domain, given = connection.domain(wire), _parameters(values)
    if "file" in given:
        await saved.save(domain, given["file"], given.get("dxml"), flags)
    elif "dxml" in given:
        raise InvalidArgument("a managed save keeps the machine's own document")
    else:
        await saved.managed_save(domain, flags)


async def restore(connection: Connection, args: Any) -> None:
    await saved.restore(connection.manager, args[0], None, 0)


async def restore_flags(connection: Connection, args: Any) -> None:
    path, xml, flags = args
    await saved.restore(connection.manager, path, xml, flags)


async def restore_params(connection: Connection, args: Any) -> None:
    given = _parameters(args[0])
    if "file" not in given:
        raise InvalidArgument("which file to restore is not said")
    await saved.restore(connection.manager, given["file"], given.get("dxml"), args[1])


async def image_get_xml(connection: Connection, args: Any) -> tuple[str]:
    path, flags = args
    check_flags(flags, SECURE, "document of a saved machine")
    secure = bool(flags & SECURE)
    if secure and connection.access < Access.WRITE:
        raise OperationDenied("a read-only connection may not see passwords")
    return (await saved.show_document(_absolute(path), secure=secure),)


async def image_define_xml(connection: Connection, args: Any) -> None:
    path, xml, flags = args
    await saved.define_document(_absolute(path), xml, flags)


def _absolute(path: str) -> str:
    if not path.startswith("/"):
        raise InvalidArgument(f"{path!r} is no absolute path")
    return path


# the managed save


async def managed_save(connection: Connection, args: Any) -> None:
    await saved.managed_save(connection.domain(args[0]), args[1])


def has_managed_save(connection: Connection, args: Any) -> tuple[int]:
    check_flags(args[1], 0, "managed save")
    return (int(connection.domain(args[0]).has_managed_save),)


async def managed_save_remove(connection: Connection, args: Any) -> None:
    check_flags(args[1], 0, "managed save")
    await saved.remove_managed(connection.domain(args[0]))


async def managed_get_xml(connection: Connection, args: Any) -> tuple[str]:
    wire, flags = args
    check_flags(flags, SECURE, "document of a managed save")
    secure = bool(flags & SECURE)
    if secure and connection.access < Access.WRITE:
        raise OperationDenied("a read-only connection may not see passwords")
    return (await saved.show_document(saved.require_managed(connection.domain(wire)), secure=secure),)


async def managed_define_xml(connection: Connection, args: Any) -> None:
    wire, xml, flags = args
    domain = connection.domain(wire)
    async with domain.jobs.hold("managed-save-define"):
        await saved.define_document(saved.require_managed(domain), xml, flags)
