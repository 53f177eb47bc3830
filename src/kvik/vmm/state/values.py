"""State values as JSON: readable in a file, bounded when read back.

A state is made of int, str, bool, None, bytes, list and dict (`device.State`). JSON has no bytes: they are written as
`{"$base64": "..."}`, a key that no state uses.
"""

from __future__ import annotations

import binascii
from _json import make_scanner  # what is behind `json`, which imports `re`: a restored machine waits for this

from kvik.errors import OperationFailed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["MAX_STATE", "Fields", "decode", "encode"]

MAX_STATE = 64 << 20  # bytes; 1024 vCPUs with 8 KiB of XSAVE area each take a quarter of it
_BYTES = "$base64"


def _bytes(value: object) -> dict[str, str]:
    if isinstance(value, (bytes, bytearray, memoryview)):
        return {_BYTES: binascii.b2a_base64(value, newline=False).decode()}
    if isinstance(value, (set, frozenset)):
        raise TypeError("a set has no order: a state carries a sorted list")
    raise TypeError(f"{type(value).__name__} is nothing that a state can carry")


def encode(value: Any, *, indent: int | None = None) -> bytes:
    import json

    return json.dumps(value, default=_bytes, indent=indent).encode()


def _object(found: dict[str, Any]) -> Any:
    if len(found) == 1 and _BYTES in found:
        return binascii.a2b_base64(found[_BYTES], strict_mode=True)
    return found


class _Decoding:
    """What `make_scanner` asks of a `json.JSONDecoder`."""

    strict, object_pairs_hook = True, None
    parse_float, parse_int = float, int
    object_hook = staticmethod(_object)

    @staticmethod
    def parse_constant(text: str) -> Any:
        raise ValueError(f"{text} is no number of JSON")


def _loads(text: str) -> Any:
    """As `json.loads`."""
    text = text.strip(" \t\n\r")
    try:
        value, end = make_scanner(_Decoding)(text, 0)  # type: ignore[arg-type]  # typeshed has the result here
    except StopIteration as error:
        raise ValueError(f"a value is missing at character {error.value}") from None
    if end != len(text):
        raise ValueError(f"there is more behind it, at character {end}")
    return value


def decode(data: bytes, where: str) -> Any:
    """What `encode` wrote. `where` names the source in the error: OperationFailed for anything else."""
    if len(data) > MAX_STATE:
        raise OperationFailed(f"{where}: {len(data)} bytes are more than a machine's state can have ({MAX_STATE})")
    try:
        return _loads(data.decode())
    except (ValueError, TypeError, RecursionError, binascii.Error) as error:
        raise OperationFailed(
            f"{where} is damaged: {error}", remedy="it was cut off or altered: take the state anew"
        ) from error


class Fields:
    """Reads members of a decoded object, and names the one that is wrong: `state.json: memory.regions[1].size ...`."""

    def __init__(self, value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise OperationFailed(f"{where} is damaged: an object was expected, not {type(value).__name__}")
        self._value, self._where = value, where

    def _get(self, name: str, kind: type) -> Any:
        value = self._value.get(name)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            found = "nothing" if name not in self._value else f"{type(value).__name__} {str(value)[:40]!r}"
            raise OperationFailed(f"{self._where}: {name} is damaged: {kind.__name__} was expected, not {found}")
        return value

    def number(self, name: str, low: int = 0, high: int = (1 << 64) - 1) -> int:
        value: int = self._get(name, int)
        if not low <= value <= high:
            raise OperationFailed(f"{self._where}: {name} is damaged: {value} is not within {low} and {high}")
        return value

    def text(self, name: str) -> str:
        value: str = self._get(name, str)
        return value

    def blob(self, name: str) -> bytes:
        value: bytes = self._get(name, bytes)
        return value

    def object(self, name: str) -> dict[str, Any]:
        value: dict[str, Any] = self._get(name, dict)
        return value

    def items(self, name: str) -> list[Any]:
        value: list[Any] = self._get(name, list)
        return value

    @property
    def members(self) -> dict[str, Any]:
        return self._value

    def fields(self, name: str) -> Fields:
        return Fields(self.object(name), f"{self._where}: {name}")

    def each(self, name: str) -> list[Fields]:
        """The members of a list of objects."""
        return [Fields(item, f"{self._where}: {name}[{i}]") for i, item in enumerate(self.items(name))]
