"""What handles of machines, networks and pools are alike: a name and a UUID on a connection."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.client.connection import Connection

__all__ = ["Handle", "uuid_bytes", "uuid_text"]


def uuid_bytes(text: str) -> bytes | None:
    """A UUID as people write it -> 16 bytes; None if it is none."""
    compact = text.replace("-", "")
    if len(compact) != 32 or not compact.isascii() or not compact.isalnum():
        return None
    try:
        return bytes.fromhex(compact)
    except ValueError:
        return None


def uuid_text(raw: bytes) -> str:
    text = raw.hex()
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


class Handle:
    """Comparing compares UUIDs."""

    __slots__ = ("connection", "name", "uuid_bytes")

    def __init__(self, connection: Connection, name: str, uuid: bytes) -> None:
        self.connection = connection
        self.name = name
        self.uuid_bytes = uuid

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name} {self.uuid}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, type(self)) and other.uuid_bytes == self.uuid_bytes

    def __hash__(self) -> int:
        return hash(self.uuid_bytes)

    @property
    def uuid(self) -> str:
        return uuid_text(self.uuid_bytes)
