"""Ports of networks, for looking. They come and go with machines' interfaces, and by no other way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from uuid import UUID

from kvik.conf.network_port import format_network_port
from kvik.daemon.handlers.common import LIST_MAX, UINT, check_flags, params, take_params
from kvik.daemon.handlers.networks import Reference, reference
from kvik.errors import OperationUnsupported
from kvik.manager import network_ports

if TYPE_CHECKING:
    from kvik.conf.network_port import NetworkPort
    from kvik.daemon.connection import Connection

PARAMETERS_MAX = 16  # REMOTE_NETWORK_PORT_PARAMETERS_MAX


def _describe(connection: Connection, port: Any) -> NetworkPort:
    network = connection.network(port[0])
    return network_ports.describe(connection.manager, network, str(UUID(bytes=port[1])))


def list_all(connection: Connection, args: Any) -> tuple[list[tuple[Reference, bytes]], int]:
    network, need_results, flags = args
    check_flags(flags, 0, "list network ports")
    found = connection.network(network)
    if not need_results:
        return ([], len(found.ports))
    if len(found.ports) > LIST_MAX:
        raise OperationUnsupported(f"{len(found.ports)} ports do not fit into one answer (at most {LIST_MAX})")
    return ([(reference(found), UUID(port).bytes) for port in found.ports], len(found.ports))


def lookup_by_uuid(connection: Connection, args: Any) -> tuple[tuple[Reference, bytes]]:
    network, uuid = args
    found = connection.network(network)
    network_ports.require(found, str(UUID(bytes=uuid)))
    return ((reference(found), uuid),)


def get_xml(connection: Connection, args: Any) -> tuple[str]:
    port, flags = args
    check_flags(flags, 0, "network port")
    return (format_network_port(_describe(connection, port)),)


def get_parameters(connection: Connection, args: Any) -> tuple[list[Any], int]:
    port, wanted, flags = args
    check_flags(flags, 0, "network port parameters")
    rows = network_ports.bandwidth(_describe(connection, port))
    return take_params(params(*((name, UINT, value) for name, value in rows))[:PARAMETERS_MAX], wanted)


def refuse(connection: Connection, args: Any) -> None:
    raise OperationUnsupported(
        "ports of networks come and go with machines' interfaces",
        remedy="attach, update or detach an interface of type 'network'",
    )
