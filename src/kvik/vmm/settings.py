"""Dataclasses without their import, which costs a starting machine as much time as its kernel's first page.

To the type checker `settings` is `dataclasses.dataclass(kw_only=True)`; at run time it makes the same `__init__`,
`__repr__` and `__eq__` in a few lines. `to_dict` and `from_dict` carry such objects into snapshots and back.
"""

from __future__ import annotations

from kvik.errors import InvalidArgument

TYPE_CHECKING = False
if TYPE_CHECKING:
    from dataclasses import dataclass, field
    from typing import Any, TypeVar, dataclass_transform

    T = TypeVar("T")

    @dataclass_transform(kw_only_default=True, field_specifiers=(field,))
    def settings(cls: type[T]) -> type[T]: ...

    del dataclass
else:

    class _Factory:
        __slots__ = ("make",)

        def __init__(self, default_factory):
            self.make = default_factory

    field = _Factory

    def settings(cls):
        """Give a class with annotated defaults its `__init__`, `__repr__` and `__eq__`."""
        fields = {}
        for base in reversed(cls.__mro__):
            fields |= {key: None for key in vars(base).get("__annotations__", {}) if "ClassVar" not in key}
        defaults = {key: getattr(cls, key) for key in fields}

        def __init__(self, **values):
            for key, default in defaults.items():
                if key in values:
                    setattr(self, key, values.pop(key))
                else:
                    setattr(self, key, default.make() if isinstance(default, _Factory) else default)
            if values:
                raise TypeError(f"{cls.__name__} has no {', '.join(values)}")

        def __repr__(self):
            return f"{cls.__name__}({', '.join(f'{key}={getattr(self, key)!r}' for key in defaults)})"

        def __eq__(self, other):
            return type(self) is type(other) and vars(self) == vars(other)

        cls.__init__, cls.__repr__, cls.__eq__, cls.__hash__ = __init__, __repr__, __eq__, None
        cls.FIELDS = tuple(fields)
        return cls


__all__ = ["annotation", "field", "fields_of", "from_dict", "settings", "to_dict"]


def fields_of(cls: type) -> tuple[str, ...]:
    """The names of a settings class's fields, in order."""
    return tuple(getattr(cls, "FIELDS", ()))


def annotation(cls: type, name: str) -> str:
    """The written type of a field."""
    for base in cls.__mro__:
        if name in vars(base).get("__annotations__", {}):
            return str(vars(base)["__annotations__"][name])
    raise KeyError(name)


def to_dict(value: Any) -> Any:
    """A settings object as dictionaries and lists, all the way down."""
    if names := fields_of(type(value)):
        return {name: to_dict(getattr(value, name)) for name in names}
    if isinstance(value, (list, tuple)):
        return [to_dict(item) for item in value]
    return value


def from_dict(cls: type[T], data: Any, classes: dict[str, type]) -> T:
    """The object that `to_dict` made `data` of. `classes`: the settings classes that annotations may name."""
    if not isinstance(data, dict):
        raise InvalidArgument(f"{cls.__name__} cannot be read from {type(data).__name__}")
    values = {}
    for name in fields_of(cls):
        if name not in data:
            continue  # written by an older kvik: the default holds
        value, written = data[name], annotation(cls, name)
        inner = written.removeprefix("list[").removesuffix("]").removesuffix(" | None")
        if inner in classes and value is not None:
            if written.startswith("list["):
                value = [from_dict(classes[inner], item, classes) for item in value]
            else:
                value = from_dict(classes[inner], value, classes)
        elif written.startswith("tuple["):
            value = tuple(value)
        values[name] = value
    return cls(**values)
