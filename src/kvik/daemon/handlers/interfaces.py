"""The host's interfaces: libvirt's calls, and our own for bridges with a way back.

Every call goes to the interfaces' own thread: netlink and files are quick, but a lock or a watchdog may be waited for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvik.daemon.errors import MultipleInterfaces
from kvik.daemon.handlers.common import LIST_MAX, check_flags
from kvik.errors import NoInterface

if TYPE_CHECKING:
    from kvik.daemon.connection import Connection

INACTIVE, ACTIVE = 1, 2  # virConnectListAllInterfacesFlags
XML_INACTIVE = 1  # virInterfaceXMLFlags
DEFINE_VALIDATE = 1  # virInterfaceDefineFlags; ours are always validated


async def _rows(connection: Connection, active: bool | None = None) -> list[Any]:
    interfaces = connection.manager.interfaces
    rows = [row for row in await interfaces.run(interfaces.rows) if active in (None, row.active)]
    return rows[:LIST_MAX]


async def num_of(connection: Connection, args: Any) -> tuple[int]:
    return (len(await _rows(connection, True)),)


async def num_of_defined(connection: Connection, args: Any) -> tuple[int]:
    return (len(await _rows(connection, False)),)


async def list_names(connection: Connection, args: Any) -> tuple[list[str]]:
    return ([row.name for row in await _rows(connection, True)][: max(0, args[0])],)


async def list_defined_names(connection: Connection, args: Any) -> tuple[list[str]]:
    return ([row.name for row in await _rows(connection, False)][: max(0, args[0])],)


async def list_all(connection: Connection, args: Any) -> tuple[list[Any], int]:
    wanted, flags = args
    check_flags(flags, INACTIVE | ACTIVE, "list of interfaces")
    active = None if flags in (0, INACTIVE | ACTIVE) else flags == ACTIVE
    rows = await _rows(connection, active)
    return ([(row.name, row.mac) for row in rows] if wanted else [], len(rows))


async def lookup_by_name(connection: Connection, args: Any) -> tuple[Any]:
    interfaces = connection.manager.interfaces
    row = await interfaces.run(interfaces.row, args[0])
    return ((row.name, row.mac),)


async def lookup_by_mac(connection: Connection, args: Any) -> tuple[Any]:
    mac = args[0].lower()
    found = [row for row in await _rows(connection) if row.mac == mac]
    if not found:
        raise NoInterface(f"no interface with MAC address {mac!r}")
    if len(found) > 1:  # a bridge has that of its port
        raise MultipleInterfaces(
            f"several interfaces have MAC address {mac}: {', '.join(row.name for row in found)}", remedy="name one"
        )
    return ((found[0].name, found[0].mac),)


async def get_xml(connection: Connection, args: Any) -> tuple[str]:
    reference, flags = args
    check_flags(flags, XML_INACTIVE, "interface document")
    interfaces = connection.manager.interfaces
    document = await interfaces.run(interfaces.xml, reference[0], bool(flags & XML_INACTIVE))
    return (document,)


async def is_active(connection: Connection, args: Any) -> tuple[int]:
    interfaces = connection.manager.interfaces
    return (int((await interfaces.run(interfaces.row, args[0][0])).active),)


async def define_xml(connection: Connection, args: Any) -> tuple[Any]:
    xml, flags = args
    check_flags(flags, DEFINE_VALIDATE, "define interface")
    interfaces = connection.manager.interfaces
    row = await interfaces.run(interfaces.define, xml)
    return ((row.name, row.mac),)


async def undefine(connection: Connection, args: Any) -> None:
    interfaces = connection.manager.interfaces
    await interfaces.run(interfaces.undefine, args[0][0])


async def create(connection: Connection, args: Any) -> None:
    reference, flags = args
    check_flags(flags, 0, "start interface")
    interfaces = connection.manager.interfaces
    await interfaces.run(interfaces.create, reference[0])


async def destroy(connection: Connection, args: Any) -> None:
    reference, flags = args
    check_flags(flags, 0, "stop interface")
    interfaces = connection.manager.interfaces
    await interfaces.run(interfaces.destroy, reference[0])


# A change with a way back ---------------------------------------------------------------------------------------


async def change_begin(connection: Connection, args: Any) -> None:
    check_flags(args[0], 0, "begin of a change")
    interfaces = connection.manager.interfaces
    await interfaces.run(interfaces.begin, 0)


async def begin(connection: Connection, args: Any) -> None:
    interfaces = connection.manager.interfaces
    await interfaces.run(interfaces.begin, args[0])


async def change_commit(connection: Connection, args: Any) -> None:
    check_flags(args[0], 0, "commit of a change")
    interfaces = connection.manager.interfaces
    await interfaces.run(interfaces.commit)


async def change_rollback(connection: Connection, args: Any) -> None:
    check_flags(args[0], 0, "rollback of a change")
    interfaces = connection.manager.interfaces
    await interfaces.run(interfaces.rollback)


async def bridge(connection: Connection, args: Any) -> tuple[list[str]]:
    name, bridge_name, stp, delay, now, seconds = args
    interfaces = connection.manager.interfaces
    wanted = interfaces.wanted(bridge_name, bool(stp), delay)
    return (await interfaces.run(interfaces.bridge, name, wanted, bool(now), seconds),)


async def unbridge(connection: Connection, args: Any) -> tuple[list[str]]:
    interfaces = connection.manager.interfaces
    return (await interfaces.run(interfaces.unbridge, args[0], bool(args[1]), args[2]),)


async def pending(connection: Connection, args: Any) -> tuple[str, str, float, str]:
    interfaces = connection.manager.interfaces
    record = await interfaces.run(interfaces.state)
    return (record.state, record.words, record.left, record.outcome) if record else ("", "", 0.0, "")
