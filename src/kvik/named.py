"""`typing.NamedTuple` for modules that a command imports, without importing `typing`, which costs it 6 to 10 ms, or
`collections`, which costs 1 to 2.

To the type checker it is `typing.NamedTuple`; at run time `class Point(NamedTuple)` makes what `collections.namedtuple`
would make, with the class's methods, properties and defaults.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NamedTuple
else:
    from _collections import _tuplegetter  # what a named tuple's fields are in `collections`, too

    def _repr(self):
        pairs = ", ".join(f"{name}={value!r}" for name, value in zip(self._fields, self, strict=True))
        return f"{type(self).__name__}({pairs})"

    def _asdict(self):
        return dict(zip(self._fields, self, strict=True))

    def _make(cls, values):
        return cls(*values)

    def _replace(self, /, **changes):
        made = self._make(map(changes.pop, self._fields, self))
        if changes:
            raise ValueError(f"{type(self).__name__} has no {', '.join(changes)}")
        return made

    def _getnewargs(self):
        return tuple(self)

    _SHARED = {
        "__slots__": (),
        "__repr__": _repr,
        "__getnewargs__": _getnewargs,
        "_asdict": _asdict,
        "_make": classmethod(_make),
        "_replace": _replace,
    }

    _codes = {}

    class _Meta(type):
        def __new__(mcs, name, bases, body):
            if not bases:
                return super().__new__(mcs, name, bases, body)
            fields = tuple(body.pop("__annotations__", {}))
            defaults = {field: body.pop(field) for field in fields if field in body}
            # As with `collections`, code of its own makes an instance three times as fast as *values would. It is
            # compiled once for each number of fields, and gets their names: compiling takes most of a class's making.
            if (code := _codes.get(len(fields))) is None:
                names = "".join(f"_{index}, " for index in range(len(fields)))
                code = _codes[len(fields)] = eval(f"lambda _cls, {names}: _new(_cls, ({names}))").__code__
            new = type(_repr)(code.replace(co_varnames=("_cls", *fields)), {"_new": tuple.__new__, "__name__": name})
            new.__defaults__, new.__name__ = tuple(defaults.values()) or None, "__new__"
            getters = {field: _tuplegetter(index, f"field {index}") for index, field in enumerate(fields)}
            described = {"_fields": fields, "_field_defaults": defaults, "__match_args__": fields, "__new__": new}
            return type(name, (tuple,), {**_SHARED, **described, **getters, **body})

    class NamedTuple(metaclass=_Meta):
        pass


__all__ = ["NamedTuple"]
