"""A filter and all that it refers to, as one flat list of rules with their variables replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from kvik.conf.nwfilter import FilterReference, NetworkFilter, Rule
from kvik.errors import ConfigError
from kvik.network.filters.variables import LEARNED, Values, collect, expand

__all__ = ["Placed", "flatten", "names", "uses"]

Lookup = Callable[[str], NetworkFilter]

DEPTH_MAX = 32
REFERENCES_MAX = 4096  # followed for one interface: a small document must not unfold without end
RULES_MAX = 16384


class Placed(NamedTuple):
    """A rule, and the chain of its filter."""

    chain: str
    chain_priority: int
    rule: Rule


def flatten(reference: FilterReference, values: Values, lookup: Lookup) -> list[Placed]:
    """ConfigError, and what `lookup` raises for a filter that does not exist."""
    found: list[Placed] = []
    for filter_, inside in _walk(reference, values, lookup):
        for entry in filter_.entries:
            if isinstance(entry, Rule):
                for rule in expand(entry, inside, filter_.name):
                    found.append(Placed(filter_.chain, filter_.priority, rule))
                    if len(found) > RULES_MAX:
                        raise ConfigError(f"filter {reference.filter!r} becomes more than {RULES_MAX} rules")
    return found


def names(reference: FilterReference, lookup: Lookup) -> set[str]:
    """Every filter of the tree."""
    return {filter_.name for filter_, _ in _walk(reference, {}, lookup)}


def uses(reference: FilterReference, variable: str, values: Values, lookup: Lookup) -> bool:
    """Whether a rule names a variable that nobody gave a value."""
    return any(
        text.removeprefix("$").strip().partition("[")[0].strip() == variable
        for filter_, inside in _walk(reference, values, lookup)
        if inside.get(variable, [LEARNED]) == [LEARNED]
        for entry in filter_.entries
        if isinstance(entry, Rule)
        for condition in entry.conditions
        for text in condition.values.values()
        if text.startswith("$")
    )


def _walk(reference: FilterReference, values: Values, lookup: Lookup) -> Iterator[tuple[NetworkFilter, Values]]:
    count = 0

    def visit(one: FilterReference, outer: Values, above: tuple[str, ...]) -> Iterator[tuple[NetworkFilter, Values]]:
        nonlocal count
        count += 1
        if one.filter in above:
            raise ConfigError(f"filters refer to each other in a loop: {' -> '.join((*above, one.filter))}")
        if len(above) >= DEPTH_MAX or count > REFERENCES_MAX:
            raise ConfigError(
                f"filter {reference.filter!r} is nested more than {DEPTH_MAX} deep, or refers to others more than "
                f"{REFERENCES_MAX} times"
            )
        filter_, inside = lookup(one.filter), collect(one.parameters, outer)
        yield filter_, inside
        for entry in filter_.entries:
            if isinstance(entry, FilterReference):
                yield from visit(entry, inside, (*above, one.filter))

    yield from visit(reference, values, ())
