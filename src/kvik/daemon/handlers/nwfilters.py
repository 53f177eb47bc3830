"""Network filters and their bindings to interfaces: finding, looking, changing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from uuid import UUID

from kvik.conf.nwfilter import FilterBinding, NetworkFilter, format_binding, format_filter, parse_binding
from kvik.daemon.handlers.common import LIST_MAX, check_flags
from kvik.errors import InvalidArgument, OperationUnsupported

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvik.daemon.connection import Connection

VALIDATE = 1  # virNWFilterDefineFlags, virNWFilterBindingCreateFlags: documents are always checked

Reference = tuple[str, bytes]
BindingReference = tuple[str, str]


def reference(found: NetworkFilter) -> Reference:
    """How the wire names a filter."""
    return (found.name, UUID(found.uuid).bytes)


def binding_reference(found: FilterBinding) -> BindingReference:
    """How the wire names a binding: by the interface; the filter is told for convenience."""
    return (found.portdev, found.reference.filter)


def num_of(connection: Connection, args: Any) -> tuple[int]:
    return (len(connection.manager.filters.all()),)


def list_names(connection: Connection, args: Any) -> tuple[list[str]]:
    (wanted,) = args
    if not 0 <= wanted <= LIST_MAX:
        raise InvalidArgument(f"a list of {wanted} names is not possible (0 to {LIST_MAX})")
    return ([one.name for one in connection.manager.filters.all()][:wanted],)


def list_all(connection: Connection, args: Any) -> tuple[list[Reference], int]:
    need_results, flags = args
    check_flags(flags, 0, "list network filters")
    return _listed([reference(one) for one in connection.manager.filters.all()], need_results)


def _listed(found: Sequence[Any], need_results: int) -> tuple[list[Any], int]:
    if not need_results:
        return ([], len(found))
    if len(found) > LIST_MAX:
        raise OperationUnsupported(f"{len(found)} names do not fit into one answer (at most {LIST_MAX})")
    return ([*found], len(found))


def lookup_by_name(connection: Connection, args: Any) -> tuple[Reference]:
    return (reference(connection.manager.filters.lookup_name(args[0])),)


def lookup_by_uuid(connection: Connection, args: Any) -> tuple[Reference]:
    return (reference(connection.manager.filters.lookup_uuid(args[0])),)


def get_xml(connection: Connection, args: Any) -> tuple[str]:
    (_, uuid), flags = args
    check_flags(flags, 0, "get a network filter's XML")
    return (format_filter(connection.manager.filters.lookup_uuid(uuid)),)


async def define_xml(connection: Connection, args: Any) -> tuple[Reference]:
    manager = connection.manager
    return (reference(await manager.store.run(manager.filters.define, args[0])),)


async def define_xml_flags(connection: Connection, args: Any) -> tuple[Reference]:
    check_flags(args[1], VALIDATE, "define a network filter")
    return await define_xml(connection, args[:1])


async def undefine(connection: Connection, args: Any) -> None:
    manager = connection.manager
    found = manager.filters.lookup_uuid(args[0][1])
    await manager.store.run(manager.filters.undefine, found.name)


def list_all_bindings(connection: Connection, args: Any) -> tuple[list[BindingReference], int]:
    need_results, flags = args
    check_flags(flags, 0, "list network filter bindings")
    return _listed([binding_reference(one) for one in connection.manager.filters.bindings()], need_results)


def lookup_binding(connection: Connection, args: Any) -> tuple[BindingReference]:
    return (binding_reference(connection.manager.filters.lookup_binding(args[0])),)


def get_binding_xml(connection: Connection, args: Any) -> tuple[str]:
    (device, _), flags = args
    check_flags(flags, 0, "get a network filter binding's XML")
    return (format_binding(connection.manager.filters.lookup_binding(device)),)


async def create_binding(connection: Connection, args: Any) -> tuple[BindingReference]:
    xml, flags = args
    check_flags(flags, VALIDATE, "create a network filter binding")
    manager, binding = connection.manager, parse_binding(xml)
    await manager.store.run(manager.filters.create_binding, binding)
    return (binding_reference(binding),)


async def delete_binding(connection: Connection, args: Any) -> None:
    manager = connection.manager
    await manager.store.run(manager.filters.unbind, args[0][0])
