"""One virtual network, its leases and its ports: libvirt's verbs in snake_case, each one call to the daemon.

`flags` of settings are virNetworkUpdateFlags: 0 current, 1 live, 2 config, 3 both.
"""

from __future__ import annotations

from kvik.client.handle import Handle, uuid_text
from kvik.errors import InvalidArgument, NoSupport
from kvik.named import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


FEATURE_UPDATE_ORDER = 16  # VIR_DRV_FEATURE_NETWORK_UPDATE_HAS_CORRECT_ORDER
FAMILIES = ("ipv4", "ipv6")  # virIPAddrType

# virNetworkUpdateCommand and virNetworkUpdateSection, by virsh's names
UPDATE_COMMANDS = {"add": 3, "add-last": 3, "add-first": 4, "delete": 2, "modify": 1}
UPDATE_SECTIONS = {
    "bridge": 1, "domain": 2, "ip": 3, "ip-dhcp-host": 4, "ip-dhcp-range": 5, "forward": 6, "forward-interface": 7,
    "forward-pf": 8, "portgroup": 9, "dns-host": 10, "dns-txt": 11, "dns-srv": 12,
}  # fmt: skip


class DhcpLease(NamedTuple):
    """virNetworkDHCPLease: an address that the network's DHCP server gave. `expiry` in s since the epoch, 0: never."""

    interface: str
    expiry: int
    family: str  # "ipv4", "ipv6"
    mac: str | None
    iaid: str | None
    address: str
    prefix: int
    hostname: str | None
    client_id: str | None


class NetworkFacts(NamedTuple):
    """What a list of networks shows of one."""

    name: str
    uuid: str
    active: bool
    autostart: bool
    persistent: bool


class NetworkPort:
    """What a machine's interface holds of a network while it is connected; `uuid_bytes` names it."""

    __slots__ = ("network", "uuid_bytes")

    def __init__(self, network: Network, uuid: bytes) -> None:
        self.network = network
        self.uuid_bytes = uuid

    def __repr__(self) -> str:
        return f"<NetworkPort {self.uuid} of {self.network.name}>"

    @property
    def uuid(self) -> str:
        return uuid_text(self.uuid_bytes)

    @property
    def ref(self) -> tuple[tuple[str, bytes], bytes]:
        return (self.network.ref, self.uuid_bytes)

    def xml(self) -> str:
        return str(self.network.connection.call("NETWORK_PORT_GET_XML_DESC", self.ref, 0)[0])

    def delete(self) -> None:
        self.network.connection.call("NETWORK_PORT_DELETE", self.ref, 0)


class Network(Handle):
    """A handle: name and UUID. Comparing compares UUIDs."""

    __slots__ = ()

    @property
    def ref(self) -> tuple[str, bytes]:
        """How procedures name the network."""
        return (self.name, self.uuid_bytes)

    def _call(self, procedure: str, *values: Any) -> Any:
        return self.connection.call(procedure, self.ref, *values)

    # --- life cycle ---

    def start(self) -> None:
        self._call("NETWORK_CREATE")

    def destroy(self) -> None:
        """Stop it. Machines on it keep their interfaces, without a network behind them."""
        self._call("NETWORK_DESTROY")

    def undefine(self) -> None:
        """Forget the definition; an active network goes on until it is destroyed."""
        self._call("NETWORK_UNDEFINE")

    # --- what it is ---

    def xml(self, flags: int = 0) -> str:
        """virNetworkXMLFlags: 1 inactive."""
        return str(self._call("NETWORK_GET_XML_DESC", flags)[0])

    def is_active(self) -> bool:
        return bool(self._call("NETWORK_IS_ACTIVE")[0])

    def is_persistent(self) -> bool:
        return bool(self._call("NETWORK_IS_PERSISTENT")[0])

    def bridge_name(self) -> str:
        """Of its bridge. KvikError where it has none."""
        return str(self._call("NETWORK_GET_BRIDGE_NAME")[0])

    def autostart(self) -> bool:
        return bool(self._call("NETWORK_GET_AUTOSTART")[0])

    def set_autostart(self, on: bool) -> None:
        self._call("NETWORK_SET_AUTOSTART", int(on))

    def messages(self) -> list[str]:
        """What is to be said of it: what its document says that the daemon does not understand, and what was found
        since it was started. Nothing from a daemon that is not ours."""
        try:
            return list(self.connection.call_kvik("NETWORK_MESSAGES", self.ref)[0])
        except NoSupport:
            return []

    def leases(self, mac: str | None = None) -> list[DhcpLease]:
        """Addresses that its DHCP server gave, all or those of one MAC."""
        rows = self._call("NETWORK_GET_DHCP_LEASES", mac, 1, 0)[0]
        return [
            DhcpLease(row[0], row[1], FAMILIES[row[2]] if row[2] in (0, 1) else str(row[2]), *row[3:]) for row in rows
        ]

    # --- changes ---

    def update(self, command: str, section: str, xml: str, *, parent_index: int = -1, flags: int = 0) -> None:
        """Change one element in place. `command` and `section` are virsh's names for them (UPDATE_COMMANDS,
        UPDATE_SECTIONS); `parent_index` chooses among several parents (-1: the one that fits)."""
        if command not in UPDATE_COMMANDS:
            raise InvalidArgument(
                f"unknown update command {command!r}", remedy=f"there are {', '.join(UPDATE_COMMANDS)}"
            )
        if section not in UPDATE_SECTIONS:
            raise InvalidArgument(f"unknown section {section!r}", remedy=f"there are {', '.join(UPDATE_SECTIONS)}")
        numbers = (UPDATE_COMMANDS[command], UPDATE_SECTIONS[section])
        if not self.connection.supports_feature(FEATURE_UPDATE_ORDER):
            numbers = numbers[::-1]  # libvirt before 7.2 takes them the wrong way round
        self._call("NETWORK_UPDATE", *numbers, parent_index, xml, flags)

    def metadata(self, kind: int, uri: str | None = None, flags: int = 0) -> str:
        """virNetworkMetadataType: 0 description, 1 title, 2 element (its namespace in `uri`). NoMetadata if unset."""
        return str(self._call("NETWORK_GET_METADATA", kind, uri, flags)[0])

    def set_metadata(
        self, kind: int, value: str | None, key: str | None = None, uri: str | None = None, flags: int = 0
    ) -> None:
        """None removes it."""
        self._call("NETWORK_SET_METADATA", kind, value, key, uri, flags)

    # --- ports ---

    def ports(self) -> list[NetworkPort]:
        return [NetworkPort(self, ref[1]) for ref in self._call("NETWORK_LIST_ALL_PORTS", 1, 0)[0]]

    def port(self, uuid: bytes) -> NetworkPort:
        return NetworkPort(self, self._call("NETWORK_PORT_LOOKUP_BY_UUID", uuid)[0][1])

    def create_port(self, xml: str, flags: int = 0) -> NetworkPort:
        """virNetworkPortCreateFlags: 1 reclaim, 2 validate."""
        return NetworkPort(self, self._call("NETWORK_PORT_CREATE_XML", xml, flags)[0][1])
