"""Tables of numbers: plain ints in plain classes, for modules that a command or a machine's start imports.

Importing one costs a third of what IntEnum and IntFlag cost, and `flags & MASK` is an int operation. What an enum
member knows about itself, the class answers: `DomainState.name_of(1) == "RUNNING"`.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator


class _Table(type):
    def __iter__(cls) -> Iterator[tuple[str, int]]:
        """(name, number) in order of declaration."""
        return ((name, value) for name, value in cls.__dict__.items() if name.isupper() and isinstance(value, int))

    def __contains__(cls, value: object) -> bool:
        return any(number == value for _, number in cls)

    def name_of(cls, value: int) -> str:
        """The name of a number, or the number as text if this table does not know it."""
        return next((name for name, number in cls if number == value), str(value))

    def mask(cls) -> int:
        """All flags of this table together."""
        mask = 0
        for _, number in cls:
            mask |= number
        return mask


class Numbers(metaclass=_Table):
    """Base of one enum: every upper-case attribute is a number."""
