"""A virtio device's configuration space (virtio 1.2, 2.5), declared as fields.

FIELDS = (Field("capacity", 0, 8), Field("mac", 8, 6), Field("writeback", 32, 1, writable=True))

config = Config(FIELDS)
config["capacity"] = 4096         # 1, 2, 4, 8 bytes: little-endian integers
config["mac"] = b"\\x52\\x54..."     # other sizes: bytes, filled up with zeroes
"""

from __future__ import annotations

from kvik.errors import InvalidArgument

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

MAX_CONFIG = 4096  # one page of the BAR


class Field:
    """`size` bytes at `offset`. `writable`: by the driver. `raw`: bytes, whatever the size."""

    __slots__ = ("name", "offset", "raw", "size", "writable")

    def __init__(self, name: str, offset: int, size: int, *, writable: bool = False, raw: bool = False) -> None:
        self.name, self.offset, self.size, self.writable = name, offset, size, writable
        self.raw = raw or size not in (1, 2, 4, 8)


class Config:
    """The bytes of a configuration space. The device sets fields by name; the driver reads and writes offsets."""

    __slots__ = ("_fields", "_writable", "data", "size")

    def __init__(self, fields: Iterable[Field] = ()) -> None:
        self._fields = {field.name: field for field in fields}
        self.size = max((field.offset + field.size for field in self._fields.values()), default=0)
        if self.size > MAX_CONFIG:
            raise InvalidArgument(f"a configuration space of {self.size} bytes, where at most {MAX_CONFIG} fit")
        self.data = memoryview(bytearray(self.size))
        self._writable = bytearray(self.size)
        for field in self._fields.values():
            if field.writable:
                self._writable[field.offset : field.offset + field.size] = b"\1" * field.size

    def move(self, place: memoryview) -> None:
        """From now on the bytes live in `place`: a page that the guest reads without an exit."""
        place[: self.size] = self.data
        self.data = place[: self.size]

    def __getitem__(self, name: str) -> int:
        field = self._fields[name]
        return int.from_bytes(self.data[field.offset : field.offset + field.size], "little")

    def raw(self, name: str) -> bytes:
        field = self._fields[name]
        return bytes(self.data[field.offset : field.offset + field.size])

    def __setitem__(self, name: str, value: int | bytes) -> None:
        field = self._fields[name]
        if isinstance(value, int):
            value = value.to_bytes(field.size, "little")
        if len(value) > field.size:
            raise InvalidArgument(f"{len(value)} bytes for the configuration field {name} of {field.size} bytes")
        self.data[field.offset : field.offset + field.size] = value.ljust(field.size, b"\0")

    def __contains__(self, name: object) -> bool:
        return name in self._fields

    def read(self, offset: int, size: int) -> int:
        """What the driver reads; zeroes behind the end."""
        return int.from_bytes(self.data[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> bool:
        """The driver writes: bytes of writable fields change. Whether any was writable."""
        taken = False
        for position in range(offset, min(offset + size, self.size)):
            if self._writable[position]:
                self.data[position] = value >> 8 * (position - offset) & 0xFF
                taken = True
        return taken

    def __bytes__(self) -> bytes:
        return bytes(self.data)

    def restore(self, data: bytes) -> None:
        """What `bytes(config)` gave. ValueError if it has another size."""
        if len(data) != self.size:
            raise ValueError(f"a configuration space of {len(data)} bytes, not {self.size}")
        self.data[:] = data
