"""Configuration space of one PCI function: 4096 bytes with a mask of what the guest may write (PCI 3.0, 6.1)."""

from __future__ import annotations

import struct

from kvik.errors import InvalidArgument
from kvik.vmm.slots import Pages

SIZE = 4096
HEADER = 0x40  # end of the type 0 header: capabilities begin here
LEGACY = 0x100  # what the legacy mechanism reaches

VENDOR_ID, DEVICE_ID, COMMAND, STATUS = 0x00, 0x02, 0x04, 0x06
REVISION, CLASS_CODE, CACHE_LINE, HEADER_TYPE = 0x08, 0x09, 0x0C, 0x0E
BAR0, SUBSYSTEM_VENDOR, SUBSYSTEM = 0x10, 0x2C, 0x2E
CAPABILITIES, INTERRUPT_LINE, INTERRUPT_PIN = 0x34, 0x3C, 0x3D

COMMAND_IO, COMMAND_MEMORY, COMMAND_MASTER = 1 << 0, 1 << 1, 1 << 2
COMMAND_PARITY, COMMAND_SERR, COMMAND_NO_INTX = 1 << 6, 1 << 8, 1 << 10
STATUS_INTERRUPT, STATUS_CAPABILITIES = 1 << 3, 1 << 4
MULTIFUNCTION = 0x80

CAP_POWER, CAP_VENDOR, CAP_EXPRESS, CAP_MSIX = 0x01, 0x09, 0x10, 0x11


class ConfigSpace:
    """The bytes, in a page that the guest may read without an exit."""

    __slots__ = ("_capability", "_initial", "_next", "mask", "pages", "view")

    def __init__(self) -> None:
        self.pages = Pages(SIZE)
        self.view = self.pages.view
        self.mask = bytearray(SIZE)  # 1 bits: the guest may change them
        self._capability = CAPABILITIES  # where the next capability's offset goes
        self._next = HEADER
        self._initial = b""

    def set(self, offset: int, size: int, value: int, mask: int = 0) -> None:
        """The device's own value of a register, and what of it the guest may write."""
        self.view[offset : offset + size] = value.to_bytes(size, "little")
        self.mask[offset : offset + size] = mask.to_bytes(size, "little")

    def get(self, offset: int, size: int) -> int:
        return int.from_bytes(self.view[offset : offset + size], "little")

    def put(self, offset: int, size: int, value: int) -> None:
        """Change a register, whatever the mask says: the device's side."""
        self.view[offset : offset + size] = value.to_bytes(size, "little")

    def add_capability(self, kind: int, body: bytes, mask: bytes = b"") -> int:
        """Append a capability (6.7): id, next, `body`. Its offset. InvalidArgument if there is no more room."""
        offset = self._next
        size = 2 + len(body)
        if offset + size > LEGACY:
            raise InvalidArgument(f"no room for a capability of {size} bytes at {offset:#x} of a configuration space")
        self.view[offset : offset + size] = bytes((kind, 0)) + body
        self.mask[offset + 2 : offset + 2 + len(mask)] = mask
        self.view[self._capability] = offset
        self._capability = offset + 1
        self._next = offset + size + 3 & ~3
        self.view[STATUS] |= STATUS_CAPABILITIES
        return offset

    def freeze(self) -> None:
        """What is there now is how it is after a reset."""
        self._initial = bytes(self.view)

    def fix(self, offset: int, size: int, value: int) -> None:
        """Change what the device says of itself, now and after each reset."""
        self.put(offset, size, value)
        self._initial = self._initial[:offset] + value.to_bytes(size, "little") + self._initial[offset + size :]

    def reset(self) -> None:
        self.view[:] = self._initial

    def read(self, offset: int, size: int) -> int:
        """What the guest reads; all ones behind the end."""
        if offset + size > SIZE:
            return (1 << 8 * size) - 1
        return int.from_bytes(self.view[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> bool:
        """The guest writes: masked bits change. Whether there were any."""
        if offset + size > SIZE:
            return False
        mask = int.from_bytes(self.mask[offset : offset + size], "little")
        if not mask:
            return False
        old = int.from_bytes(self.view[offset : offset + size], "little")
        self.view[offset : offset + size] = (old & ~mask | value & mask).to_bytes(size, "little")
        return True

    def state(self) -> bytes:
        return bytes(self.view).rstrip(b"\0")

    def restore(self, data: bytes) -> None:
        """Take the guest's bits over from a saved space. ValueError if it is not of the same device."""
        data = data.ljust(SIZE, b"\0")
        if len(data) != SIZE:
            raise ValueError(f"a PCI configuration space of {len(data)} bytes")
        new = bytearray(self._initial)
        for offset in range(0, SIZE, 8):
            mask = int.from_bytes(self.mask[offset : offset + 8], "little")
            if mask:
                kept = int.from_bytes(new[offset : offset + 8], "little") & ~mask
                taken = int.from_bytes(data[offset : offset + 8], "little") & mask
                new[offset : offset + 8] = (kept | taken).to_bytes(8, "little")
        if new[:4] != data[:4]:
            was, now = struct.unpack("<I", data[:4])[0], struct.unpack("<I", new[:4])[0]
            raise ValueError(f"the state is that of PCI device {was:08x}, this one is {now:08x}")
        self.view[:] = new
