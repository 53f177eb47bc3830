"""What netlink messages are made of: attributes, names of interfaces, addresses of cards (netlink(7), rtnetlink(7))."""

from __future__ import annotations

import errno
import struct
import sys
from collections.abc import Iterator
from typing import Any

from kvik.errors import HostError

_ATTRIBUTE = struct.Struct("=HH")
MAX_NAME = 15  # IFNAMSIZ less the terminating zero
Attributes = dict[int, bytes]


def check_name(name: str) -> str:
    """An interface name that the kernel accepts (dev_valid_name in net/core/dev.c), or `HostError`."""
    good = 0 < len(name.encode()) <= MAX_NAME and name not in (".", "..") and name.isascii() and name.isprintable()
    if not good or any(letter in name for letter in "/: "):
        raise HostError(f"{name!r} is no name for a network interface", errno=errno.EINVAL)
    return name


def attribute(kind: int, payload: bytes) -> bytes:
    """One attribute (struct nlattr), padded to 4 bytes. A nest is an attribute whose payload is attributes."""
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(payload), kind) + payload + bytes(-len(payload) % 4)


def iterate_attributes(data: bytes, start: int = 0) -> Iterator[tuple[int, bytes]]:
    """Kind and payload of each attribute from `start` on, up to the first that does not fit."""
    while start + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, start)
        if not _ATTRIBUTE.size <= length <= len(data) - start:
            return
        yield kind & 0x3FFF, data[start + _ATTRIBUTE.size : start + length]  # less the flags of nests and byte order
        start += (length + 3) & ~3


def attributes(data: bytes, start: int = 0) -> Attributes:
    """The same as a dictionary; of a repeated kind the last counts. Written out: it is most of a long list's time."""
    found: Attributes = {}
    end = len(data)
    while start + 4 <= end:
        length, kind = _ATTRIBUTE.unpack_from(data, start)
        if length < 4 or start + length > end:
            break
        found[kind & 0x3FFF] = data[start + 4 : start + length]
        start += (length + 3) & ~3
    return found


def unpack_head(head: struct.Struct, data: bytes) -> tuple[Any, ...]:
    """The fixed part that an answer begins with."""
    if len(data) < head.size:
        raise HostError("the kernel's answer is cut short", errno=errno.EBADMSG)
    return head.unpack_from(data)


def text(data: bytes) -> str:
    return data.partition(b"\0")[0].decode("utf-8", "replace")


def u32(data: bytes) -> int:
    return int.from_bytes(data[:4], sys.byteorder) if len(data) >= 4 else 0


def name_attribute(kind: int, name: str) -> bytes:
    return attribute(kind, check_name(name).encode() + b"\0")


def u32_attribute(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack("=I", value))


def parse_mac(mac: str) -> bytes:
    try:
        octets = bytes(int(part, 16) for part in mac.split(":"))
    except ValueError:
        octets = b""
    if len(octets) != 6:
        raise HostError(f"{mac!r} is no MAC address", errno=errno.EINVAL)
    return octets
