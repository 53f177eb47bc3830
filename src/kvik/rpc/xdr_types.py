"""What XDR is made of: types, decoded structures, typed parameters, and what is said of data that is wrong.

The notation of types is told in `xdr`, which compiles them.
"""

from __future__ import annotations

import struct
from operator import itemgetter

from kvik.errors import RpcError
from kvik.named import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from typing import Any, Final, NoReturn

STRING_MAX: Final = 4194304

_FORMATS: Final = {
    "int": "i",
    "uint": "I",
    "hyper": "q",
    "uhyper": "Q",
    "char": "i",
    "uchar": "I",
    "ushort": "I",
    "double": "d",
}


class Encoded(bytes):
    """A list that is already XDR (its count included): an encoder takes it where it would take the list."""

    __slots__ = ()


class Record(tuple["Any", ...]):
    """A decoded structure: a tuple whose elements also have names."""

    __slots__ = ()
    _fields: tuple[str, ...] = ()

    def __repr__(self) -> str:
        inside = ", ".join(f"{name}={value!r}" for name, value in zip(self._fields, self, strict=True))
        return f"{type(self).__name__}({inside})"

    def __getattr__(self, name: str) -> Any:  # for the type checker; the fields are real properties
        raise AttributeError(f"{type(self).__name__} has no field {name!r}")

    def asdict(self) -> dict[str, Any]:
        return dict(zip(self._fields, self, strict=True))


def record_type(name: str, fields: Iterable[str]) -> type[Record]:
    """A Record subclass. `from` becomes `from_`. Ten times cheaper to make than a namedtuple."""
    names = tuple("from_" if field == "from" else field for field in fields)
    body: dict[str, Any] = {field: property(itemgetter(index)) for index, field in enumerate(names)}
    return type(name, (Record,), body | {"__slots__": (), "_fields": names})


class TypedParam(NamedTuple):
    """One libvirt typed parameter. `type` is virTypedParameterType, 1 to 7."""

    name: str
    type: int
    value: int | float | str


# virTypedParameterType: (struct format of the value); 7 is a string.
TYPED_FORMATS: Final = {1: ">i", 2: ">I", 3: ">q", 4: ">Q", 5: ">d", 6: ">i"}
TYPED_STRING: Final = 7

Type = tuple["Any", ...]  # ("prim", format) | ("string",) | ("opaque", max) | ("bytes", n) | ("optional", T) |
#                         ("list", T, max) | ("vector", T, n) | ("struct", name, ((field, T), ...)) | ("typed_param",)


def parse_type(text: str, structs: Mapping[str, str]) -> Type:
    if text.endswith("?"):
        return ("optional", parse_type(text[:-1], structs))
    if text[-1] in ">]":
        inner, _, size = text[:-1].rpartition("<" if text[-1] == ">" else "[")
        bounded = text[-1] == ">"
        if inner == "opaque":
            return ("opaque" if bounded else "bytes", int(size))
        return ("list" if bounded else "vector", parse_type(inner, structs), int(size))
    if text in _FORMATS:
        return ("prim", _FORMATS[text])
    if text in ("string", "typed_param"):
        return (text,)
    return parse_struct(text, structs[text], structs)


def parse_struct(name: str, text: str, structs: Mapping[str, str]) -> Type:
    fields = (field.partition(":") for field in text.split())
    return ("struct", name, tuple((field, parse_type(kind, structs)) for field, _, kind in fields))


def minimum_size(kind: Type) -> int:
    """Bytes that the smallest value of a type takes: bounds a list by the bytes that are left."""
    match kind:
        case ("prim", fmt):
            return struct.calcsize(">" + fmt)
        case ("bytes", count):
            return int(count + 3) & ~3
        case ("vector", element, count):
            return minimum_size(element) * int(count)
        case ("struct", _, fields):
            return sum(minimum_size(field) for _, field in fields)
        case ("typed_param",):
            return 12
        case _:
            return 4


def too_long(what: str, length: int, limit: int) -> NoReturn:
    raise RpcError(f"{what}: length {length} exceeds the protocol's limit of {limit}")


def wrong_length(what: str, length: int, wanted: int) -> NoReturn:
    raise RpcError(f"{what}: length {length} where exactly {wanted} is needed")


def short(what: str, pos: int, end: int) -> NoReturn:
    raise RpcError(f"{what}: data ends early (at offset {pos}, {end - pos} bytes left)")


def trailing(what: str, pos: int, end: int) -> NoReturn:
    if pos > end:
        short(what, end, end)
    raise RpcError(f"{what}: {end - pos} bytes of garbage after the last field")


def bad(what: str, error: Exception) -> NoReturn:
    raise RpcError(f"{what}: {error}") from error


def zero(what: str) -> NoReturn:
    raise RpcError(f"{what}: a string with a NUL character")


def encode_typed_param(param: tuple[str, int, int | float | str]) -> bytes:
    """TypedParam -> XDR. `value`'s range is checked against `type`."""
    name, kind, value = param
    raw = name.encode()
    head = struct.pack(f">I{len(raw) + 3 & ~3}sI", len(raw), raw, kind)
    if kind == TYPED_STRING:
        if not isinstance(value, str):
            raise RpcError(f"typed parameter {name}: {value!r} is not a string")
        text = value.encode()
        if len(text) > STRING_MAX:
            too_long(f"typed parameter {name}", len(text), STRING_MAX)
        return head + struct.pack(f">I{len(text) + 3 & ~3}s", len(text), text)
    fmt = TYPED_FORMATS.get(kind)
    if fmt is None:
        raise RpcError(f"typed parameter {name}: unknown type {kind}")
    return head + struct.pack(fmt, value)


_U32: Final = struct.Struct(">I").unpack_from


def decode_typed_param(data: bytes, pos: int, end: int) -> tuple[TypedParam, int]:
    """XDR -> (TypedParam, position after it)."""
    (size,) = _U32(data, pos)
    if size > STRING_MAX:
        too_long("typed parameter's name", size, STRING_MAX)
    pos += 4
    if pos + size > end:
        short("typed parameter's name", pos, end)
    name = data[pos : pos + size].decode()
    pos += size + 3 & ~3
    (kind,) = _U32(data, pos)
    pos += 4
    fmt = TYPED_FORMATS.get(kind)
    value: int | float | str
    if fmt is not None:
        (value,) = struct.unpack_from(fmt, data, pos)
        return TypedParam(name, kind, value), pos + (4 if fmt in (">i", ">I") else 8)
    if kind != TYPED_STRING:
        raise RpcError(f"typed parameter {name!r}: unknown type {kind} at offset {pos - 4}")
    (size,) = _U32(data, pos)
    if size > STRING_MAX:
        too_long(f"typed parameter {name!r}", size, STRING_MAX)
    pos += 4
    if pos + size > end:
        short(f"typed parameter {name!r}", pos, end)
    value = data[pos : pos + size].decode()
    if "\0" in value or "\0" in name:
        zero(f"typed parameter {name!r}")
    return TypedParam(name, kind, value), pos + (size + 3 & ~3)
