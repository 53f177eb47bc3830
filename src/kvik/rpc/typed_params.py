"""Typed parameters as Python dictionaries, and the fast way to send many of them.

    encode(stats)           dict -> xdr.Encoded, ready to stand where a list of typed parameters is wanted
    from_dict(values)       dict -> list[TypedParam], the same for an ordinary encoder
    to_dict(params)         list[TypedParam] -> dict (booleans as bool; a name that occurs again gives a list)

libvirt gives every figure a C type that clients of its C interface check. `parameter_type()` knows those of domain
statistics; anything else is by value: bool, int (64 bits, unsigned unless negative), float, str.

`encode()` remembers the layout of each set of names: names and types become constants of one `struct` format, and a
set seen before costs one pack() call (about 3 us for 40 figures).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from typing import Any, Final

from kvik.errors import RpcError
from kvik.rpc.xdr_types import STRING_MAX, Encoded, TypedParam

INT, UINT, LLONG, ULLONG, DOUBLE, BOOLEAN, STRING = 1, 2, 3, 4, 5, 6, 7

Value = int | float | str | bool

# Statistics that are not unsigned 64-bit, by name with every number replaced by "*".
# Source: libvirt's documentation of virConnectGetAllDomainStats.
_KNOWN: Final[dict[str, int]] = {
    "operation": INT,  # of a job: virDomainGetJobStats
    "state.state": INT,
    "state.reason": INT,
    "vcpu.current": UINT,
    "vcpu.maximum": UINT,
    "vcpu.*.state": INT,
    "vcpu.*.halted": BOOLEAN,
    "net.count": UINT,
    "block.count": UINT,
    "block.*.backingIndex": UINT,
    "iothread.count": UINT,
    "iothread.*.poll-grow": UINT,
    "iothread.*.poll-shrink": UINT,
    "cpu.cache.monitor.count": UINT,
    "memory.bandwidth.monitor.count": UINT,
    "dirtyrate.calc_status": INT,
    "dirtyrate.calc_start_time": LLONG,
    "dirtyrate.calc_period": INT,
    "dirtyrate.megabytes_per_second": LLONG,
}
_PYTHON_TYPES: Final[dict[type, int]] = {bool: BOOLEAN, float: DOUBLE, str: STRING}
_FORMATS: Final = {INT: "i", UINT: "I", LLONG: "q", ULLONG: "Q", DOUBLE: "d", BOOLEAN: "i"}
_LAYOUTS_MAX: Final = 4096  # sets of names remembered; beyond that, start afresh


def parameter_type(name: str, value: Value) -> int:
    """virTypedParameterType of a figure."""
    kind = _PYTHON_TYPES.get(type(value))
    if kind is not None:
        return kind
    known = _KNOWN.get(name)
    if known is None and "." in name:
        known = _KNOWN.get(".".join("*" if part.isdigit() else part for part in name.split(".")))
    if known is not None:
        return known
    return ULLONG if value >= 0 else LLONG  # type: ignore[operator]  # text went above


def from_dict(values: Mapping[str, Value]) -> list[TypedParam]:
    return [TypedParam(name, parameter_type(name, value), value) for name, value in values.items()]


def to_dict(params: Iterable[TypedParam]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, kind, value in params:
        decoded: Any = bool(value) if kind == BOOLEAN else value
        if name in result:
            before = result[name]
            result[name] = [*before, decoded] if isinstance(before, list) else [before, decoded]
        else:
            result[name] = decoded
    return result


class _Layout:
    """The constant parts of one set of (name, type): a format string and the argument list's fixed elements."""

    __slots__ = ("arguments", "pack", "plan", "strings")

    def __init__(self, names: tuple[str, ...], kinds: tuple[int, ...]) -> None:
        # Fields of the format alternate: constant bytes before each value, then the value. Strings vary in length,
        # so a layout with strings is completed by their lengths: `strings` holds their positions.
        self.strings = [index for index, kind in enumerate(kinds) if kind == STRING]
        self.plan: list[tuple[bytes, str]] = []
        head = struct.pack(">I", len(names))
        for name, kind in zip(names, kinds, strict=True):
            raw = name.encode()
            head += struct.pack(f">I{len(raw) + 3 & ~3}sI", len(raw), raw, kind)
            self.plan.append((head, _FORMATS.get(kind, "")))
            head = b""
        self.arguments: list[Any] = []
        for constant, _ in self.plan:
            self.arguments += [constant, 0]
        self.pack = None if self.strings else self.packer(())

    def packer(self, lengths: tuple[int, ...]) -> Any:
        remaining = iter(lengths)
        parts = [">"]
        for constant, fmt in self.plan:
            parts.append(f"{len(constant)}s{fmt or f'{next(remaining)}s'}")
        return struct.Struct("".join(parts)).pack


_layouts: dict[tuple[Any, ...], _Layout] = {}
_string_packers: dict[tuple[Any, ...], Any] = {}


def _counted(text: Value) -> bytes:
    raw = str(text).encode()
    if len(raw) > STRING_MAX:
        raise RpcError(f"a string of {len(raw)} bytes exceeds the protocol's limit of {STRING_MAX}")
    return struct.pack(f">I{len(raw) + 3 & ~3}s", len(raw), raw)


def encode(values: Mapping[str, Value]) -> Encoded:
    """A dictionary as an encoded list of typed parameters (count included)."""
    if not values:
        return Encoded(b"\0\0\0\0")
    names = tuple(values)
    fields: list[Any] = list(values.values())
    key = (names, *map(type, fields))
    layout = _layouts.get(key)
    if layout is None:
        if len(_layouts) >= _LAYOUTS_MAX:
            _layouts.clear()
            _string_packers.clear()
        # A layout's types depend on names only, not on the value that happened to come first: what then does not
        # fit (a negative one, say) takes the slow way below.
        samples = [0 if type(value) is int else value for value in fields]
        layout = _Layout(names, tuple(map(parameter_type, names, samples)))
        _layouts[key] = layout
    pack = layout.pack
    if pack is None:
        lengths = []
        for index in layout.strings:
            fields[index] = raw = _counted(fields[index])
            lengths.append(len(raw))
        string_key = (key, *lengths)
        pack = _string_packers.get(string_key)
        if pack is None:
            if len(_string_packers) >= _LAYOUTS_MAX:
                _string_packers.clear()
            pack = _string_packers[string_key] = layout.packer(tuple(lengths))
    arguments = layout.arguments.copy()
    arguments[1::2] = fields
    try:
        return Encoded(pack(*arguments))
    except struct.error:
        # A figure outside its type's range, say a negative one where the first was not: the slow way sorts it out.
        return _encode_slowly(values)


def _encode_slowly(values: Mapping[str, Value]) -> Encoded:
    from kvik.rpc.xdr_types import encode_typed_param

    params = []
    for name, value in values.items():
        kind = parameter_type(name, value)
        if kind in (INT, UINT, LLONG, ULLONG) and isinstance(value, int) and not _fits(kind, value):
            kind = LLONG if value < 2**63 else ULLONG
        try:
            params.append(encode_typed_param((name, kind, value)))
        except struct.error as error:
            raise RpcError(f"typed parameter {name}: {value!r} does not fit: {error}") from error
    return Encoded(struct.pack(">I", len(params)) + b"".join(params))


def _fits(kind: int, value: int) -> bool:
    low, high = {
        INT: (-(2**31), 2**31),
        UINT: (0, 2**32),
        LLONG: (-(2**63), 2**63),
        ULLONG: (0, 2**64),
    }[kind]
    return low <= value < high
