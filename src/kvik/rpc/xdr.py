"""XDR (RFC 4506) as libvirt's protocol uses it: types written as text, compiled to encoders and decoders.

The notation of a structure is its fields, `name:type`, separated by spaces; a type is

    int uint hyper uhyper char uchar ushort double     numbers; hyper is 8 bytes, everything else but double is 4
    string                                             UTF-8, at most 4 MiB; Python `str`
    opaque<N>  opaque[N]                               bytes, at most or exactly N
    T<N>  T[N]                                         list of at most or exactly N elements
    T?                                                 optional: None or a T
    typed_param                                        TypedParam(name, type, value): libvirt's union of seven types
    NAME                                               another structure of the same table

Values of structures are tuples; decoders return `Record` subclasses, which are tuples with named fields. `Codec`
generates the source of one Python function per structure and direction, on first use: nested structures are inlined,
neighbouring fixed-size fields (with one string) become one `struct` call. That is why 20 domains take a few
microseconds, and why a command that makes three calls compiles only three codecs.

Whatever comes from outside is bounded before it is allocated: counts are checked against the protocol's limit and
against the bytes that are left. Anything wrong is an `RpcError` that names the field and the offset.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from kvik.errors import RpcError
from kvik.rpc.xdr_types import (
    STRING_MAX,
    Encoded,
    Type,
    bad,
    decode_typed_param,
    encode_typed_param,
    minimum_size,
    parse_struct,
    record_type,
    short,
    too_long,
    trailing,
    wrong_length,
    zero,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any, Final

_CACHED_LENGTHS: Final = 256  # packers of longer strings are made anew each time: they would only fill the cache

Encoder = Callable[["Any"], bytes]
Decoder = Callable[[bytes, int, int], "Any"]


class Codec:
    """Encoder and decoder of one structure, compiled when first called.

    `encode(values) -> bytes` takes the fields in order. `decode(data, start, end) -> Record` reads exactly the bytes
    `start:end` of `data`; trailing bytes are refused.
    """

    __slots__ = ("_structs", "_text", "decode", "encode", "name")

    encode: Encoder
    decode: Decoder

    def __init__(self, name: str, text: str, structs: Mapping[str, str]) -> None:
        self.name = name
        self._text = text
        self._structs = structs
        self.encode = self._compile_encode
        self.decode = self._compile_decode

    def _compile_encode(self, values: Any) -> bytes:
        if not self._text:
            self.encode = _encode_nothing
        else:
            self.encode = EncoderSource().compile(self.name, parse_struct(self.name, self._text, self._structs))
        return self.encode(values)

    def _compile_decode(self, data: bytes, start: int, end: int) -> Any:
        self.decode = DecoderSource().compile(self.name, parse_struct(self.name, self._text, self._structs))
        return self.decode(data, start, end)


def _encode_nothing(values: Any) -> bytes:
    if values:
        raise RpcError(f"cannot encode {values!r}: no arguments are expected")
    return b""


class _Source:
    """Lines of a function under construction, with its namespace and unique names."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.indent = 1
        self.counter = 0
        self.namespace: dict[str, Any] = {
            "struct_error": struct.error,
            "too_long": too_long,
            "wrong_length": wrong_length,
            "short": short,
            "trailing": trailing,
            "bad": bad,
            "zero": zero,
            "Encoded": Encoded,
            "RpcError": RpcError,
            "encode_typed_param": encode_typed_param,
            "decode_typed_param": decode_typed_param,
            "new": tuple.__new__,
            "pack": struct.pack,
            "unpack_from": struct.unpack_from,
        }

    def emit(self, line: str) -> None:
        self.lines.append("    " * self.indent + line)

    def name(self, prefix: str) -> str:
        self.counter += 1
        return f"{prefix}{self.counter}"

    def constant(self, prefix: str, value: Any) -> str:
        name = self.name(prefix)
        self.namespace[name] = value
        return name

    def finish(self, what: str, function: str) -> Any:
        source = "\n".join(self.lines) + "\n"
        exec(compile(source, f"<xdr {what}>", "exec"), self.namespace)
        return self.namespace[function]


class _PackerCache(dict[int, Callable[..., bytes]]):
    """Length of the one string in a segment -> bound pack() of the whole segment."""

    def __init__(self, before: str, after: str) -> None:
        super().__init__()
        self.before = before
        self.after = after

    def __missing__(self, length: int) -> Callable[..., bytes]:
        pack = struct.Struct(f">{self.before}{length + 3 & ~3}s{self.after}").pack
        if length < _CACHED_LENGTHS:
            self[length] = pack
        return pack


class EncoderSource(_Source):
    """Writes `encode(v)`: appends packed segments to a list and joins it."""

    def __init__(self) -> None:
        super().__init__()
        self.segment: list[tuple[str, str]] = []  # (format, expression); "*" stands for the padded string
        self.string_length = ""

    def compile(self, what: str, kind: Type) -> Encoder:
        self.lines.append("def encode(v):")
        self.emit("parts = []")
        self.emit("add = parts.append")
        self.emit("try:")
        self.indent += 1
        self.emit("pass")
        self.value(kind, "v", what)
        self.flush()
        self.indent -= 1
        self.emit("except RpcError:")
        self.emit("    raise")
        self.emit(f"except Exception as error: bad({'cannot encode ' + what!r}, error)")
        self.emit("return b''.join(parts)")
        encode: Encoder = self.finish(what, "encode")
        return encode

    def flush(self) -> None:
        if not self.segment:
            return
        formats = "".join(fmt for fmt, _ in self.segment)
        values = ", ".join(expression for _, expression in self.segment)
        if self.string_length:
            before, _, after = formats.partition("*")
            cache = self.constant("packers", _PackerCache(before, after))
            self.emit(f"add({cache}[{self.string_length}]({values}))")
        else:
            packer = self.constant("pack", struct.Struct(">" + formats).pack)
            self.emit(f"add({packer}({values}))")
        self.segment = []
        self.string_length = ""

    def fixed(self, fmt: str, expression: str) -> None:
        self.segment.append((fmt, expression))

    def padded(self, raw: str, length: str, limit: int, what: str) -> None:
        """A counted byte string in variable `raw`: ends the segment if that already holds one."""
        self.emit(f"{length} = len({raw})")
        self.emit(f"if {length} > {limit}: too_long({what!r}, {length}, {limit})")
        if self.string_length:
            self.flush()
        self.fixed("I", length)
        self.fixed("*", raw)
        self.string_length = length

    def value(self, kind: Type, expression: str, what: str) -> None:
        match kind:
            case ("prim", fmt):
                self.fixed(fmt, expression)
            case ("string",):
                raw, length = self.name("b"), self.name("n")
                self.emit(f"{raw} = {expression}.encode()")
                self.padded(raw, length, STRING_MAX, what)
            case ("opaque", limit):
                raw, length = self.name("b"), self.name("n")
                self.emit(f"{raw} = {expression}")
                self.padded(raw, length, limit, what)
            case ("bytes", count):
                self.emit(f"if len({expression}) != {count}: wrong_length({what!r}, len({expression}), {count})")
                self.fixed(f"{count + 3 & ~3}s", expression)
            case ("struct", name, fields):
                names = [self.name("f") for _ in fields]
                if names:
                    self.emit(f"{', '.join(names)}, = {expression}")
                for variable, (field, inner) in zip(names, fields, strict=True):
                    self.value(inner, variable, f"{what}.{field}" if what else name)
            case ("optional", inner):
                self.flush()
                self.emit(f"if {expression} is None: add(b'\\0\\0\\0\\0')")
                self.emit("else:")
                self.indent += 1
                self.fixed("I", "1")
                self.value(inner, expression, what)
                self.flush()
                self.indent -= 1
            case ("list", element, limit):
                self.list(element, limit, expression, what)
            case ("vector", element, count):
                self.emit(f"if len({expression}) != {count}: wrong_length({what!r}, len({expression}), {count})")
                self.elements(element, expression, what)
            case ("typed_param",):
                self.flush()
                self.emit(f"add(encode_typed_param({expression}))")

    def list(self, element: Type, limit: int, expression: str, what: str) -> None:
        self.flush()
        count = self.name("n")
        self.emit(f"if {expression}.__class__ is Encoded: add({expression})")
        self.emit("else:")
        self.indent += 1
        self.emit(f"{count} = len({expression})")
        self.emit(f"if {count} > {limit}: too_long({what!r}, {count}, {limit})")
        self.fixed("I", count)
        self.elements(element, expression, what)
        self.indent -= 1

    def elements(self, element: Type, expression: str, what: str) -> None:
        self.flush()
        if element[0] == "prim":
            self.emit(f"add(pack(f'>{{len({expression})}}{element[1]}', *{expression}))")
            return
        item = self.name("e")
        self.emit(f"for {item} in {expression}:")
        self.indent += 1
        self.value(element, item, what + "[]")
        self.flush()
        self.indent -= 1


class DecoderSource(_Source):
    """Writes `decode(data, pos, end)`. Pending fixed-size fields are read together with the next length."""

    def __init__(self) -> None:
        super().__init__()
        self.segment: list[tuple[str, str]] = []  # (format, target variable)

    def compile(self, what: str, kind: Type) -> Decoder:
        self.lines.append("def decode(data, pos, end):")
        self.emit("try:")
        self.indent += 1
        self.emit("pass")
        result = self.value(kind, what)
        self.flush()
        self.indent -= 1
        self.emit(f"except struct_error: short({what!r}, pos, end)")
        self.emit(f"except UnicodeDecodeError as error: bad({what + ': not UTF-8'!r}, error)")
        self.emit(f"if pos != end: trailing({what!r}, pos, end)")
        self.emit(f"return {result}")
        decode: Decoder = self.finish(what, "decode")
        return decode

    def flush(self) -> None:
        if not self.segment:
            return
        layout = struct.Struct(">" + "".join(fmt for fmt, _ in self.segment))
        unpack = self.constant("unpack", layout.unpack_from)
        self.emit(f"{', '.join(target for _, target in self.segment)}, = {unpack}(data, pos)")
        self.emit(f"pos += {layout.size}")
        self.segment = []

    def fixed(self, fmt: str) -> str:
        target = self.name("v")
        self.segment.append((fmt, target))
        return target

    def counted(self, limit: int, what: str) -> tuple[str, str]:
        """A counted byte string: (variable with its bytes, its length)."""
        length = self.fixed("I")
        self.flush()
        raw = self.name("b")
        self.emit(f"if {length} > {limit}: too_long({what!r}, {length}, {limit})")
        self.emit(f"if pos + {length} > end: short({what!r}, pos, end)")
        self.emit(f"{raw} = data[pos:pos + {length}]")
        self.emit(f"pos += {length} + 3 & ~3")
        return raw, length

    def value(self, kind: Type, what: str) -> str:
        """Emit the reading of one value; returns the expression that holds it once the segment is flushed."""
        match kind:
            case ("prim", fmt):
                return self.fixed(fmt)
            case ("string",):
                raw, _ = self.counted(STRING_MAX, what)
                text = self.name("s")
                self.emit(f"{text} = {raw}.decode()")
                self.emit(f"if '\\0' in {text}: zero({what!r})")
                return text
            case ("opaque", limit):
                return self.counted(limit, what)[0]
            case ("bytes", count):
                padded = count + 3 & ~3
                target = self.fixed(f"{count}s{padded - count}x" if padded != count else f"{count}s")
                return target
            case ("struct", name, fields):
                cls = self.constant("C", record_type(name, (field for field, _ in fields)))
                values = [self.value(inner, f"{what}.{field}" if what else name) for field, inner in fields]
                return f"new({cls}, ({', '.join(values)}{',' if values else ''}))"
            case ("optional", inner):
                present = self.fixed("I")
                self.flush()
                target = self.name("o")
                self.emit(f"if {present}:")  # any non-zero: some clients write the flag in the wrong byte order
                self.indent += 1
                result = self.value(inner, what)
                self.flush()
                self.emit(f"{target} = {result}")
                self.indent -= 1
                self.emit(f"else: {target} = None")
                return target
            case ("list", element, limit):
                count = self.fixed("I")
                self.flush()
                self.emit(f"if {count} > {limit}: too_long({what!r}, {count}, {limit})")
                self.emit(f"if {count} * {minimum_size(element)} > end - pos: short({what!r}, pos, end)")
                return self.elements(element, count, what)
            case ("vector", element, count):
                self.flush()
                return self.elements(element, str(count), what)
            case _:  # typed_param
                self.flush()
                target = self.name("p")
                self.emit(f"{target}, pos = decode_typed_param(data, pos, end)")
                return target

    def elements(self, element: Type, count: str, what: str) -> str:
        target = self.name("a")
        if element[0] == "prim":
            size = struct.calcsize(">" + element[1])
            self.emit(f"{target} = list(unpack_from(f'>{{{count}}}{element[1]}', data, pos))")
            self.emit(f"pos += {count} * {size}")
            return target
        add = self.name("add")
        self.emit(f"{target} = []")
        self.emit(f"{add} = {target}.append")
        self.emit(f"for _ in range({count}):")
        self.indent += 1
        result = self.value(element, what + "[]")
        self.flush()
        self.emit(f"{add}({result})")
        self.indent -= 1
        return target
