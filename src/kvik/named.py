"""`typing.NamedTuple` for modules that a command imports, without importing `typing`, which costs it 6 to 10 ms.

To the type checker it is `typing.NamedTuple`; at run time `class Point(NamedTuple)` makes a `collections.namedtuple`
with the class's methods, properties and defaults.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NamedTuple
else:
    from collections import namedtuple

    class _Meta(type):
        def __new__(mcs, name, bases, body):
            if not bases:
                return super().__new__(mcs, name, bases, body)
            fields = body.pop("__annotations__", {})
            defaults = [body.pop(field) for field in fields if field in body]
            made = namedtuple(name, fields, defaults=defaults, module=body.pop("__module__"))
            for key, value in body.items():
                if key != "__classcell__":
                    setattr(made, key, value)
            return made

    class NamedTuple(metaclass=_Meta):
        pass


__all__ = ["NamedTuple"]
