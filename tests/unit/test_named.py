"""Named tuples of our own are those of the standard library."""

from __future__ import annotations

import copy
import pickle
from collections import namedtuple
from typing import Any

import pytest

from kvik.named import NamedTuple


class Point(NamedTuple):
    """A place."""

    x: int
    y: int = 2
    name: str = "p"

    @property
    def sum(self) -> int:
        return self.x + self.y

    def moved(self) -> Point:
        return self._replace(x=self.x + 1)


Standard: Any = namedtuple("Point", ("x", "y", "name"), defaults=(2, "p"))


@pytest.mark.parametrize("arguments", [(1,), (1, 3), (1, 3, "q")])
def test_it_is_made_and_read_like_any(arguments: tuple[Any, ...]) -> None:
    ours, other = Point(*arguments), Standard(*arguments)
    assert ours == other == tuple(other)
    assert repr(ours) == repr(other)
    assert (ours.x, ours.y, ours.name) == (other.x, other.y, other.name)
    assert ours._asdict() == other._asdict()
    assert hash(ours) == hash(other)
    assert Point._make(other) == ours
    assert (Point._fields, Point._field_defaults) == (Standard._fields, Standard._field_defaults)
    assert Point.__match_args__ == Standard.__match_args__


def test_keywords_methods_and_patterns() -> None:
    point = Point(x=5, name="k")
    assert point.sum == 7
    assert point.moved() == (6, 2, "k")
    match point:
        case Point(x, y):
            assert (x, y) == (5, 2)
    assert Point.__doc__ == "A place."
    assert Point.__module__ == __name__


@pytest.mark.parametrize("bad", [{}, {"x": 1, "z": 2}, {"y": 1}])
def test_what_does_not_fit_is_refused(bad: dict[str, int]) -> None:
    with pytest.raises(TypeError):
        Point(**bad)
    with pytest.raises(ValueError, match="has no z"):
        Point(1)._replace(z=1)
    with pytest.raises(AttributeError):
        Point(1).x = 3
    with pytest.raises(AttributeError):
        Point(1).other = 3


def test_it_is_copied_and_pickled() -> None:
    point = Point(1, 2, "z")
    assert copy.deepcopy(point) == copy.copy(point) == pickle.loads(pickle.dumps(point)) == point
    assert type(pickle.loads(pickle.dumps(point))) is Point
