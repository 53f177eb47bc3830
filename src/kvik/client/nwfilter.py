"""Network filters and their bindings: libvirt's verbs in snake_case, each one call to the daemon."""

from __future__ import annotations

from kvik.client.handle import uuid_bytes, uuid_text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.client.connection import Connection

__all__ = [
    "NetworkFilter",
    "NetworkFilterBinding",
    "create_binding",
    "define_filter",
    "filter_bindings",
    "filters",
    "lookup_binding",
    "lookup_filter",
]


class NetworkFilter:
    """A filter that the daemon has, defined or built in."""

    __slots__ = ("connection", "name", "ref", "uuid")

    def __init__(self, connection: Connection, name: str, uuid: bytes) -> None:
        self.connection = connection
        self.ref = (name, uuid)
        self.name = name
        self.uuid = uuid_text(uuid)

    def xml(self) -> str:
        return str(self.connection.call("NWFILTER_GET_XML_DESC", self.ref, 0)[0])

    def undefine(self) -> None:
        """Forget it; a built-in one that was redefined is the built-in one again."""
        self.connection.call("NWFILTER_UNDEFINE", self.ref)


class NetworkFilterBinding:
    """A filter on one interface, `portdev`."""

    __slots__ = ("connection", "filter", "portdev", "ref")

    def __init__(self, connection: Connection, portdev: str, filter_name: str) -> None:
        self.connection = connection
        self.ref = (portdev, filter_name)
        self.portdev = portdev
        self.filter = filter_name

    def xml(self) -> str:
        return str(self.connection.call("NWFILTER_BINDING_GET_XML_DESC", self.ref, 0)[0])

    def delete(self) -> None:
        """Take the filter off the interface."""
        self.connection.call("NWFILTER_BINDING_DELETE", self.ref)


def filters(connection: Connection) -> list[NetworkFilter]:
    found = connection.call("CONNECT_LIST_ALL_NWFILTERS", 1, 0)[0]
    return [NetworkFilter(connection, *reference) for reference in found]


def lookup_filter(connection: Connection, key: str) -> NetworkFilter:
    """By UUID or name, tried in this order as virsh does. NoFilter if there is none."""
    from kvik.errors import NoFilter

    if (raw := uuid_bytes(key)) is not None:
        try:
            return NetworkFilter(connection, *connection.call("NWFILTER_LOOKUP_BY_UUID", raw)[0])
        except NoFilter:
            pass
    return NetworkFilter(connection, *connection.call("NWFILTER_LOOKUP_BY_NAME", key)[0])


def define_filter(connection: Connection, xml: str) -> NetworkFilter:
    """Make or replace a filter; machines that run with it have the new rules when this returns."""
    return NetworkFilter(connection, *connection.call("NWFILTER_DEFINE_XML", xml)[0])


def filter_bindings(connection: Connection) -> list[NetworkFilterBinding]:
    found = connection.call("CONNECT_LIST_ALL_NWFILTER_BINDINGS", 1, 0)[0]
    return [NetworkFilterBinding(connection, *reference) for reference in found]


def lookup_binding(connection: Connection, portdev: str) -> NetworkFilterBinding:
    found = connection.call("NWFILTER_BINDING_LOOKUP_BY_PORT_DEV", portdev)[0]
    return NetworkFilterBinding(connection, *found)


def create_binding(connection: Connection, xml: str) -> NetworkFilterBinding:
    """Put an interface that exists, and has none, under a filter."""
    return NetworkFilterBinding(connection, *connection.call("NWFILTER_BINDING_CREATE_XML", xml, 0)[0])
