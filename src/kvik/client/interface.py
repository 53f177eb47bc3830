"""The host's interfaces: `Interfaces(connection)`; libvirt's calls, and ours for bridges with a way back."""

from __future__ import annotations

from kvik.named import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.client.connection import Connection

INACTIVE, ACTIVE = 1, 2  # virConnectListAllInterfacesFlags
XML_INACTIVE = 1  # virInterfaceXMLFlags
DEFINE_VALIDATE = 1  # virInterfaceDefineFlags


class Pending(NamedTuple):
    """A change that waits for commit. `state`: "" (there is none), "open", "kept" (its configuration could not be
    written: commit again) or "reverted"; `seconds` left, 0 where nothing runs."""

    state: str
    what: str
    seconds: float
    outcome: str


class Interface:
    """One interface of the host; `mac` is empty where it is only defined."""

    def __init__(self, connection: Connection, name: str, mac: str) -> None:
        self.connection = connection
        self.name = name
        self.mac = mac

    @property
    def ref(self) -> tuple[str, str]:
        return (self.name, self.mac)

    def xml(self, flags: int = 0) -> str:
        return str(self.connection.call("INTERFACE_GET_XML_DESC", self.ref, flags)[0])

    def is_active(self) -> bool:
        return bool(self.connection.call("INTERFACE_IS_ACTIVE", self.ref)[0])

    def create(self) -> None:
        self.connection.call("INTERFACE_CREATE", self.ref, 0)

    def destroy(self) -> None:
        self.connection.call("INTERFACE_DESTROY", self.ref, 0)

    def undefine(self) -> None:
        self.connection.call("INTERFACE_UNDEFINE", self.ref)


class Interfaces:
    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def all(self, flags: int = 0) -> list[Interface]:
        """All, or those that virConnectListAllInterfacesFlags select."""
        rows = self.connection.call("CONNECT_LIST_ALL_INTERFACES", 1, flags)[0]
        return [Interface(self.connection, *row) for row in rows]

    def find(self, key: str) -> Interface:
        """By name or MAC address. NoInterface if there is none."""
        procedure = "INTERFACE_LOOKUP_BY_MAC_STRING" if key.count(":") == 5 else "INTERFACE_LOOKUP_BY_NAME"
        return Interface(self.connection, *self.connection.call(procedure, key)[0])

    def define(self, xml: str, flags: int = 0) -> Interface:
        return Interface(self.connection, *self.connection.call("INTERFACE_DEFINE_XML", xml, flags)[0])

    def bridge(
        self, interface: str, bridge: str, *, stp: bool = False, delay: float = 0, start: bool = True, seconds: int = 0
    ) -> list[str]:
        """Make a bridge over an interface; its address moves there. Undone after `seconds` unless committed (0: for
        good at once). Returns what the daemon has to say."""
        result = self.connection.call_kvik("INTERFACE_BRIDGE", interface, bridge, int(stp), delay, int(start), seconds)
        return list(result[0])

    def unbridge(self, bridge: str, *, start: bool = True, seconds: int = 0) -> list[str]:
        return list(self.connection.call_kvik("INTERFACE_UNBRIDGE", bridge, int(start), seconds)[0])

    def begin(self, seconds: int = 0) -> None:
        """Open a change: what comes is undone after `seconds` (0: only by rollback) unless committed."""
        if seconds:
            self.connection.call_kvik("INTERFACE_BEGIN", seconds)
        else:
            self.connection.call("INTERFACE_CHANGE_BEGIN", 0)

    def commit(self) -> None:
        self.connection.call("INTERFACE_CHANGE_COMMIT", 0)

    def rollback(self) -> None:
        self.connection.call("INTERFACE_CHANGE_ROLLBACK", 0)

    def pending(self) -> Pending:
        return Pending(*self.connection.call_kvik("INTERFACE_PENDING"))
