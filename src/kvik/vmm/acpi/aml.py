"""AML, the bytes that ACPI's methods and devices are made of (ACPI 6.5, 20.2), as functions that return bytes.

A term is `bytes`; everything that takes terms takes any number of them. Numbers become the shortest constant, strings
are names in a path (`"\\_SB_.PCI0"`) where a name is asked for; a string value is `string("...")`.

    device("PWRB", name("_HID", eisa_id("PNP0C0C")), name("_UID", 0))
"""

from __future__ import annotations

import struct

Value = "bytes | int"

LOCAL0, LOCAL1, LOCAL2 = b"\x60", b"\x61", b"\x62"
ARG0, ARG1, ARG2 = b"\x68", b"\x69", b"\x6a"
SYSTEM_MEMORY, SYSTEM_IO = 0, 1
BYTE_ACCESS, WORD_ACCESS, DWORD_ACCESS, QWORD_ACCESS = 1, 2, 3, 4


_paths: dict[str, bytes] = {}  # a table says the same few names hundreds of times


def path(text: str) -> bytes:
    """A NameString (20.2.2): segments are padded with underscores to four characters."""
    known = _paths.get(text)
    if known is None:
        known = _paths[text] = _path(text)
    return known


def _path(text: str) -> bytes:
    prefix = text[: len(text) - len(text.lstrip("\\^"))]
    segments = [segment for segment in text[len(prefix) :].split(".") if segment]
    for segment in segments:
        if not 1 <= len(segment) <= 4 or not segment.replace("_", "A").isalnum() or segment != segment.upper():
            raise ValueError(f"{text!r} is no ACPI name")
        if segment[0].isdigit():
            raise ValueError(f"{text!r} is no ACPI name")
    body = b"".join(segment.ljust(4, "_").encode() for segment in segments)
    if not segments:
        lead = b"\x00"
    elif len(segments) == 1:
        lead = b""
    elif len(segments) == 2:
        lead = b"\x2e"
    else:
        lead = bytes((0x2F, len(segments)))
    return prefix.encode() + lead + body


_CONSTANTS = ((b"\x0a", 1), (b"\x0b", 2), (b"\x0c", 4), (b"\x0e", 8))


def integer(value: int) -> bytes:
    """The shortest constant (20.2.3)."""
    if value == 0:
        return b"\x00"
    if value == 1:
        return b"\x01"
    for opcode, size in _CONSTANTS:
        if 0 <= value < 1 << 8 * size:
            return opcode + value.to_bytes(size, "little")
    raise ValueError(f"{value} does not fit in 64 bits")


def string(text: str) -> bytes:
    return b"\x0d" + text.encode("ascii") + b"\0"


def term(value: bytes | int) -> bytes:
    return integer(value) if isinstance(value, int) else value


def _terms(values: tuple[bytes | int, ...]) -> bytes:
    return b"".join(map(term, values))


def package_length(size: int) -> bytes:
    """PkgLength (20.2.4) in front of `size` bytes; it counts itself."""
    if size + 1 < 1 << 6:
        return bytes((size + 1,))
    for extra in (1, 2, 3):
        total = size + 1 + extra
        if total < 1 << 4 + 8 * extra:
            return bytes((extra << 6 | total & 15,)) + (total >> 4).to_bytes(extra, "little")
    raise ValueError(f"an AML package of {size} bytes is too long")


def _package(opcode: bytes, body: bytes) -> bytes:
    return opcode + package_length(len(body)) + body


def buffer(data: bytes) -> bytes:
    return _package(b"\x11", integer(len(data)) + data)


def package(*values: bytes | int) -> bytes:
    return _package(b"\x12", bytes((len(values),)) + _terms(values))


def eisa_id(text: str) -> bytes:
    """`PNP0A08` as a number (19.3.4): three letters of five bits, four hexadecimal digits, big-endian."""
    letters = [ord(letter) - 0x40 for letter in text[:3]]
    value = letters[0] << 26 | letters[1] << 21 | letters[2] << 16 | int(text[3:], 16)
    return b"\x0c" + struct.pack(">I", value)


def uuid(text: str) -> bytes:
    """ToUUID (19.6.142): a buffer, the first three fields little-endian."""
    raw = bytes.fromhex(text.replace("-", ""))
    return buffer(raw[3::-1] + raw[5:3:-1] + raw[7:5:-1] + raw[8:])


# Objects -------------------------------------------------------------------------------------------------------------


def name(what: str, value: bytes | int) -> bytes:
    return b"\x08" + path(what) + term(value)


def scope(where: str, *terms: bytes | int) -> bytes:
    return _package(b"\x10", path(where) + _terms(terms))


def device(what: str, *terms: bytes | int) -> bytes:
    return _package(b"\x5b\x82", path(what) + _terms(terms))


def method(what: str, arguments: int, *terms: bytes | int, serialized: bool = False) -> bytes:
    return _package(b"\x14", path(what) + bytes((arguments | serialized << 3,)) + _terms(terms))


def mutex(what: str) -> bytes:
    return b"\x5b\x01" + path(what) + b"\0"


def region(what: str, space: int, address: int, size: int) -> bytes:
    return b"\x5b\x80" + path(what) + bytes((space,)) + integer(address) + integer(size)


def field(what: str, access: int, *units: tuple[str, int], locked: bool = False) -> bytes:
    """Units are (name, bits); an empty name skips bits. What is not named is written as zeros (UpdateRule)."""
    body = path(what) + bytes((access | locked << 4 | 2 << 5,))
    for unit, bits in units:
        # The length of a unit is encoded like a package's, without counting itself.
        body += (path(unit) if unit else b"\0") + _bits(bits)
    return _package(b"\x5b\x81", body)


def _bits(bits: int) -> bytes:
    if bits < 1 << 6:
        return bytes((bits,))
    return bytes((1 << 6 | bits & 15, bits >> 4))


# Statements ----------------------------------------------------------------------------------------------------------


def store(value: bytes | int, target: bytes) -> bytes:
    return b"\x70" + term(value) + target


def return_(value: bytes | int) -> bytes:
    return b"\xa4" + term(value)


def if_(condition: bytes, *terms: bytes | int) -> bytes:
    return _package(b"\xa0", condition + _terms(terms))


def while_(condition: bytes, *terms: bytes | int) -> bytes:
    return _package(b"\xa2", condition + _terms(terms))


BREAK = b"\xa5"


def and_(left: bytes | int, right: bytes | int) -> bytes:
    return b"\x7b" + term(left) + term(right) + b"\0"


def add(left: bytes | int, right: bytes | int, target: bytes = b"\0") -> bytes:
    return b"\x72" + term(left) + term(right) + target


def equal(left: bytes | int, right: bytes | int) -> bytes:
    return b"\x93" + term(left) + term(right)


def notify(what: str, code: bytes | int) -> bytes:
    return b"\x86" + path(what) + term(code)


def acquire(what: str) -> bytes:
    """Acquire a mutex, waiting for ever."""
    return b"\x5b\x23" + path(what) + b"\xff\xff"


def release(what: str) -> bytes:
    return b"\x5b\x27" + path(what)


def call(what: str, *arguments: bytes | int) -> bytes:
    return path(what) + _terms(arguments)
