"""Virtual networks: finding, looking, changing; their leases and their events."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvik.conf.enums import (
    ConnectListAllNetworksFlags,
    NetworkCreateFlags,
    NetworkDefineFlags,
    NetworkMetadataType,
    NetworkUpdateFlags,
    NetworkXMLFlags,
)
from kvik.conf.network import normal_mac, parse_network
from kvik.daemon.handlers.common import LIST_MAX, check_flags
from kvik.errors import ConfigUnsupported, InvalidArgument, KvikError, OperationInvalid, OperationUnsupported
from kvik.manager import metadata

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvik.daemon.connection import Connection
    from kvik.manager.networks import NetworkObject

Flags = ConnectListAllNetworksFlags
Reference = tuple[str, bytes]
LEASES_MAX = 65536  # REMOTE_NETWORK_DHCP_LEASES_MAX
MESSAGES_MAX = 256  # of our own protocol
IPV4, IPV6 = 0, 1  # virIPAddrType
LIVE, CONFIG = NetworkUpdateFlags.LIVE, NetworkUpdateFlags.CONFIG


def reference(network: NetworkObject) -> Reference:
    """How the wire names a network."""
    return (network.name, network.uuid)


# --- finding ----------------------------------------------------------------------------------------------------------


def lookup_by_name(connection: Connection, args: Any) -> tuple[Reference]:
    return (reference(connection.manager.networks.lookup_name(args[0])),)


def lookup_by_uuid(connection: Connection, args: Any) -> tuple[Reference]:
    return (reference(connection.manager.networks.lookup_uuid(args[0])),)


def _names(networks: Iterable[NetworkObject], active: bool, wanted: int) -> tuple[list[str]]:
    if not 0 <= wanted <= LIST_MAX:
        raise InvalidArgument(f"a list of {wanted} names is not possible (0 to {LIST_MAX})")
    return ([network.name for network in networks if network.is_active is active][:wanted],)


def num_of_active(connection: Connection, args: Any) -> tuple[int]:
    return (sum(network.is_active for network in connection.manager.networks.list()),)


def list_active(connection: Connection, args: Any) -> tuple[list[str]]:
    return _names(connection.manager.networks.list(), True, args[0])


def num_of_inactive(connection: Connection, args: Any) -> tuple[int]:
    return (sum(not network.is_active for network in connection.manager.networks.list()),)


def list_inactive(connection: Connection, args: Any) -> tuple[list[str]]:
    return _names(connection.manager.networks.list(), False, args[0])


def list_all(connection: Connection, args: Any) -> tuple[list[Reference], int]:
    """CONNECT_LIST_ALL_NETWORKS: of each group of filters, none or both let everything through."""
    need_results, flags = args
    check_flags(flags, Flags.mask(), "list networks")
    found = [network for network in connection.manager.networks.list() if _selected(network, flags)]
    if not need_results:
        return ([], len(found))
    if len(found) > LIST_MAX:
        raise OperationUnsupported(f"{len(found)} networks do not fit into one answer (at most {LIST_MAX})")
    return ([reference(network) for network in found], len(found))


def _selected(network: NetworkObject, flags: int) -> bool:
    groups = (
        (network.is_active, Flags.ACTIVE, Flags.INACTIVE),
        (network.persistent, Flags.PERSISTENT, Flags.TRANSIENT),
        (network.autostart, Flags.AUTOSTART, Flags.NO_AUTOSTART),
    )
    return all(not flags & (yes | no) or flags & (yes if is_so else no) for is_so, yes, no in groups)


# --- looking ----------------------------------------------------------------------------------------------------------


def is_active(connection: Connection, args: Any) -> tuple[int]:
    return (int(connection.network(args[0]).is_active),)


def is_persistent(connection: Connection, args: Any) -> tuple[int]:
    return (int(connection.network(args[0]).persistent),)


def get_autostart(connection: Connection, args: Any) -> tuple[int]:
    return (int(connection.network(args[0]).autostart),)


def get_bridge_name(connection: Connection, args: Any) -> tuple[str]:
    network = connection.network(args[0])
    if not network.bridge_name:
        raise KvikError(f"network '{network.name}' does not have a bridge name.")
    return (network.bridge_name,)


def get_xml(connection: Connection, args: Any) -> tuple[str]:
    network, flags = args
    check_flags(flags, NetworkXMLFlags.mask(), "network document")
    return (connection.network(network).xml(inactive=bool(flags & NetworkXMLFlags.INACTIVE)),)


async def get_dhcp_leases(connection: Connection, args: Any) -> tuple[list[Any], int]:
    """The leases of an active network; of one that is not there are none."""
    network, mac, need_results, flags = args
    check_flags(flags, 0, "DHCP leases")
    found = connection.network(network)
    if mac is not None:
        try:
            mac = normal_mac(mac)
        except ValueError as error:
            raise InvalidArgument(f"invalid MAC address: {mac}") from error
    if not found.is_active:
        return ([], 0)
    leases = await connection.manager.networks.run(found.leases, mac)
    if not need_results:
        return ([], len(leases))
    if len(leases) > LEASES_MAX:
        raise OperationUnsupported(f"{len(leases)} leases do not fit into one answer (at most {LEASES_MAX})")
    rows = [
        (
            lease.interface,
            lease.expiry,
            IPV4 if lease.version == 4 else IPV6,
            lease.mac or None,
            lease.iaid or None,
            lease.address,
            lease.prefix,
            lease.hostname or None,
            lease.client_id or None,
        )
        for lease in leases
    ]
    return (rows, len(rows))


async def messages(connection: Connection, args: Any) -> tuple[list[str]]:
    """What its document says that nobody here understands, and what was found since it was started."""
    network = connection.network(args[0])
    found = await connection.manager.networks.run(network.messages)
    return ([*network.document.warnings(), *found][:MESSAGES_MAX],)


# --- changing ---------------------------------------------------------------------------------------------------------


def _strict(xml: str) -> None:
    """Strict validation: nothing in the document may be left unread."""
    warnings = parse_network(xml).warnings()
    if warnings:
        raise ConfigUnsupported("; ".join(warnings[:5]))


async def define_xml(connection: Connection, args: Any) -> tuple[Reference]:
    return (reference(await connection.manager.networks.define(args[0])),)


async def define_xml_flags(connection: Connection, args: Any) -> tuple[Reference]:
    xml, flags = args
    check_flags(flags, NetworkDefineFlags.mask(), "define network")
    if flags & NetworkDefineFlags.VALIDATE:
        _strict(xml)
    return (reference(await connection.manager.networks.define(xml)),)


async def create_xml(connection: Connection, args: Any) -> tuple[Reference]:
    return (reference(await connection.manager.networks.create_xml(args[0])),)


async def create_xml_flags(connection: Connection, args: Any) -> tuple[Reference]:
    xml, flags = args
    check_flags(flags, NetworkCreateFlags.mask(), "create network")
    if flags & NetworkCreateFlags.VALIDATE:
        _strict(xml)
    return (reference(await connection.manager.networks.create_xml(xml)),)


async def create(connection: Connection, args: Any) -> None:
    """NETWORK_CREATE: start it. One that is active already is left as it is, which is no error here."""
    await connection.network(args[0]).start()


async def destroy(connection: Connection, args: Any) -> None:
    await connection.network(args[0]).destroy()


async def undefine(connection: Connection, args: Any) -> None:
    await connection.manager.networks.undefine(connection.network(args[0]))


async def set_autostart(connection: Connection, args: Any) -> None:
    await connection.network(args[0]).set_autostart(bool(args[1]))


async def update(connection: Connection, args: Any) -> None:
    network, command, section, parent_index, xml, flags = args
    check_flags(flags, NetworkUpdateFlags.mask(), "update network")
    await connection.network(network).update(command, section, parent_index, xml, flags)


# --- words ------------------------------------------------------------------------------------------------------------


def get_metadata(connection: Connection, args: Any) -> tuple[str]:
    network, kind, uri, flags = args
    check_flags(flags, NetworkUpdateFlags.mask(), "metadata")
    found = connection.network(network)
    if flags & LIVE and flags & CONFIG:
        raise InvalidArgument("live and config cannot both be asked for")
    if flags & LIVE and not found.is_active:
        raise OperationInvalid(f"network '{found.name}' is not active")
    document = found.definition if flags & CONFIG else found.document
    return (metadata.read(document, kind, uri, f"network {found.name!r}"),)


async def set_metadata(connection: Connection, args: Any) -> None:
    network, kind, text, key, uri, flags = args
    check_flags(flags, NetworkUpdateFlags.mask(), "metadata")
    found = connection.network(network)
    live, config = bool(flags & LIVE), bool(flags & CONFIG)
    if not flags:
        live, config = found.is_active, not found.is_active
    await found.modify(metadata.Change(kind, text, key, uri), live=live, config=config)
    uri = uri if kind == NetworkMetadataType.ELEMENT else None
    connection.server.network_events.metadata_changed(found, kind, uri)


# --- events -----------------------------------------------------------------------------------------------------------


def register(connection: Connection, args: Any) -> tuple[int]:
    number, network = args
    uuid = connection.network(network).uuid if network is not None else None
    return (connection.server.network_events.add(connection, number, uuid),)


def deregister(connection: Connection, args: Any) -> None:
    connection.server.network_events.remove(connection, args[0])
