"""Secrets: libvirt's verbs in snake_case, each one call to the daemon."""

from __future__ import annotations

from kvik.client.handle import uuid_bytes, uuid_text
from kvik.named import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.client.connection import Connection

__all__ = ["USAGE_TYPES", "Secret", "define_secret", "lookup_secret", "secrets"]

USAGE_TYPES = ("none", "volume", "ceph", "iscsi", "tls", "vtpm")  # by virSecretUsageType


class Reference(NamedTuple):
    uuid: bytes
    usage_type: int
    usage_id: str


class Secret:
    """A secret that the daemon has; `usage_type` is one of USAGE_TYPES."""

    __slots__ = ("connection", "ref", "usage_id", "usage_type", "uuid")

    def __init__(self, connection: Connection, uuid: bytes, usage_type: int, usage_id: str) -> None:
        self.connection = connection
        self.ref = Reference(uuid, usage_type, usage_id)
        self.uuid = uuid_text(uuid)
        self.usage_type = USAGE_TYPES[usage_type] if 0 <= usage_type < len(USAGE_TYPES) else f"type {usage_type}"
        self.usage_id = usage_id

    def xml(self) -> str:
        return str(self.connection.call("SECRET_GET_XML_DESC", self.ref, 0)[0])

    def value(self) -> bytes:
        """InvalidSecret for a private one; NoSecret if it has none."""
        return bytes(self.connection.call("SECRET_GET_VALUE", self.ref, 0)[0])

    def set_value(self, value: bytes) -> None:
        self.connection.call("SECRET_SET_VALUE", self.ref, value, 0)

    def undefine(self) -> None:
        self.connection.call("SECRET_UNDEFINE", self.ref)


def secrets(connection: Connection, *, ephemeral: bool | None = None, private: bool | None = None) -> list[Secret]:
    """All, or those that are, or are not, ephemeral or private."""
    flags = (0 if ephemeral is None else 1 if ephemeral else 2) | (0 if private is None else 4 if private else 8)
    found = connection.call("CONNECT_LIST_ALL_SECRETS", 1, flags)[0]
    return [Secret(connection, *reference) for reference in found]


def lookup_secret(connection: Connection, uuid: str) -> Secret:
    """NoSecret if there is none, InvalidArgument for what is no UUID."""
    from kvik.errors import InvalidArgument

    raw = uuid_bytes(uuid)
    if raw is None:
        raise InvalidArgument("uuidstr in virSecretLookupByUUIDString must be a valid UUID")
    return Secret(connection, *connection.call("SECRET_LOOKUP_BY_UUID", raw)[0])


def define_secret(connection: Connection, xml: str) -> Secret:
    return Secret(connection, *connection.call("SECRET_DEFINE_XML", xml, 0)[0])
