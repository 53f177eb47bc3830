"""The types of arguments and replies: each checks a value from outside and describes itself in QEMU's schema form.

    Struct({"device": Str(), "*speed": Int(0)})      # a leading * marks a member that may be missing, as in QAPI

A check gives the value back or raises `QmpError` in QEMU's words. Strings, numbers and lists are bounded.

Reference: QEMU's docs/devel/qapi-code-gen ("Client JSON Protocol introspection").
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from kvik.vmm.monitor.errors import QmpError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MAX_STRING = 4096  # a path, an id, a key=value list
MAX_ITEMS = 1024

Entry = dict[str, "Any"]


class Type:
    """One type. `word` is what QEMU's "Invalid parameter type" says was expected."""

    word = "any"

    def check(self, value: Any, name: str) -> Any:
        raise NotImplementedError

    def describe(self, schema: Introspection) -> str:
        """The name under which the schema has this type."""
        raise NotImplementedError

    def wrong(self, name: str) -> QmpError:
        return QmpError(f"Invalid parameter type for '{name}', expected: {self.word}")


class Anything(Type):
    """QAPI's `any`: nesting and size are bounded by the line."""

    def check(self, value: Any, name: str) -> Any:
        return value

    def describe(self, schema: Introspection) -> str:
        return schema.builtin("any", "value")


class Str(Type):
    word = "string"

    def __init__(self, limit: int = MAX_STRING) -> None:
        self.limit = limit  # characters

    def check(self, value: Any, name: str) -> str:
        if not isinstance(value, str):
            raise self.wrong(name)
        if len(value) > self.limit or "\0" in value:
            raise QmpError(f"Parameter '{name}' is longer than {self.limit} characters or has a NUL in it")
        return value

    def describe(self, schema: Introspection) -> str:
        return schema.builtin("str", "string")


class Bool(Type):
    word = "boolean"

    def check(self, value: Any, name: str) -> bool:
        if not isinstance(value, bool):
            raise self.wrong(name)
        return value

    def describe(self, schema: Introspection) -> str:
        return schema.builtin("bool", "boolean")


class Int(Type):
    """`low`..`high`, inclusive; by default what 63 bits hold."""

    word = "integer"

    def __init__(self, low: int = -(2**63), high: int = 2**63 - 1) -> None:
        self.low = low
        self.high = high

    def check(self, value: Any, name: str) -> int:
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.wrong(name)
        if not self.low <= value <= self.high:
            raise QmpError(f"Parameter '{name}' expects a value from {self.low} to {self.high}")
        return value

    def describe(self, schema: Introspection) -> str:
        return schema.builtin("int", "int")


class Enum(Type):
    word = "string"

    def __init__(self, *values: str) -> None:
        self.values = values

    def check(self, value: Any, name: str) -> str:
        if not isinstance(value, str):
            raise self.wrong(name)
        if value not in self.values:
            raise QmpError(f"Parameter '{name}' does not accept value '{value[:80]}'")
        return value

    def describe(self, schema: Introspection) -> str:
        def entry() -> Entry:
            members = [{"name": value} for value in self.values]
            return {"meta-type": "enum", "members": members, "values": list(self.values)}

        return schema.define(("enum", self.values), entry)


class List(Type):
    word = "array"

    def __init__(self, item: Type, limit: int = MAX_ITEMS) -> None:
        self.item = item
        self.limit = limit

    def check(self, value: Any, name: str) -> list[Any]:
        if not isinstance(value, list):
            raise self.wrong(name)
        if len(value) > self.limit:
            raise QmpError(f"Parameter '{name}' has more than {self.limit} items")
        return [self.item.check(item, f"{name}[{number}]") for number, item in enumerate(value)]

    def describe(self, schema: Introspection) -> str:
        return schema.array(self.item.describe(schema))


class Struct(Type):
    """Named members. With `others` members that are not named are let through unchecked (QEMU's `gen: false`)."""

    word = "object"

    def __init__(self, members: Mapping[str, Type] | None = None, *, others: bool = False) -> None:
        self.members = {name.removeprefix("*"): kind for name, kind in (members or {}).items()}
        self.optional = frozenset(name[1:] for name in members or {} if name.startswith("*"))
        self.others = others

    def check(self, value: Any, name: str = "") -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self.wrong(name)
        prefix = f"{name}." if name else ""
        checked = {}
        for member, kind in self.members.items():
            if member in value:
                checked[member] = kind.check(value[member], prefix + member)
            elif member not in self.optional:
                raise QmpError(f"Parameter '{prefix}{member}' is missing")
        for member in value:
            if member not in self.members:
                if not self.others:
                    raise QmpError(f"Parameter '{prefix}{member[:80]}' is unexpected")
                checked[member] = value[member]
        return checked

    def describe(self, schema: Introspection) -> str:
        if not self.members:
            return schema.define(("empty",), lambda: {"meta-type": "object", "members": []})

        def entry() -> Entry:
            members = []
            for name, kind in self.members.items():
                member: Entry = {"name": name, "type": kind.describe(schema)}
                if name in self.optional:
                    member["default"] = None
                members.append(member)
            return {"meta-type": "object", "members": members}

        return schema.define(("object", id(self)), entry)


class Introspection:
    """Collects SchemaInfo entries. Like QEMU, types get numbers for names: clients must not rely on type names."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self._names: dict[Any, str] = {}

    def builtin(self, name: str, json_type: str) -> str:
        if name not in self._names:
            self._names[name] = name
            self.entries.append({"name": name, "meta-type": "builtin", "json-type": json_type})
        return name

    def array(self, item: str) -> str:
        name = f"[{item}]"
        if name not in self._names:
            self._names[name] = name
            self.entries.append({"name": name, "meta-type": "array", "element-type": item})
        return name

    def define(self, key: Any, entry: Callable[[], Entry]) -> str:
        name = self._names.get(key)
        if name is None:
            name = self._names[key] = str(len(self._names))
            self.entries.append({"name": name, **entry()})
        return name

    def command(self, name: str, arguments: Type, returns: Type, *, out_of_band: bool) -> None:
        entry: Entry = {
            "name": name,
            "meta-type": "command",
            "arg-type": arguments.describe(self),
            "ret-type": returns.describe(self),
        }
        if out_of_band:
            entry["allow-oob"] = True
        self.entries.append(entry)

    def event(self, name: str, data: Type) -> None:
        self.entries.append({"name": name, "meta-type": "event", "arg-type": data.describe(self)})


NOTHING = Struct()
ANYTHING = Anything()
TEXT = Str()
ID = Str(255)
