"""Trees of Structs: walk them, copy them, name what in them is not understood."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from typing import TypeVar

from lxml import etree

from kvik.conf.codec import STRUCT, Element, display_name, plan_of

E = TypeVar("E", bound=Element)


def walk(element: Element, path: str) -> Iterator[tuple[Element, str]]:
    """Every element below and including `element`, with its path as `locate` would write it."""
    yield element, path
    for child in plan_of(type(element)).children.values():
        if child.kind != STRUCT:
            continue
        value = getattr(element, child.field)
        items = value if child.many else [value] if value is not None else []
        for index, item in enumerate(items, 1):
            yield from walk(item, f"{path}/{child.name}" + (f"[{index}]" if len(items) > 1 else ""))


def warnings(element: Element, path: str) -> list[str]:
    """One line for each thing that the document says and nobody here understands."""
    found = []
    for item, where in walk(element, path):
        if item.unknown is not None:
            found += [
                f"{where}/@{name}: unknown attribute, kept but without effect" for name, _ in item.unknown.attributes
            ]
            for data in item.unknown.elements:
                name = display_name(str(etree.fromstring(data).tag))
                found.append(f"{where}/{name}: unknown element, kept but without effect")
    return found


def clone(element: E) -> E:
    """A copy that shares nothing that can change."""
    made = copy(element)
    for child in plan_of(type(element)).nested:
        value = getattr(element, child.field)
        if value is None:
            continue
        if child.kind != STRUCT:
            setattr(made, child.field, list(value))
        elif child.many:
            setattr(made, child.field, [clone(item) for item in value])
        else:
            setattr(made, child.field, clone(value))
    return made
