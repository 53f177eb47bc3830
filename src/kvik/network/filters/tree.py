"""A filter and all that it refers to, as one flat list of rules with their variables replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from kvik.conf.nwfilter import FilterReference, NetworkFilter, Rule
from kvik.conf.nwfilter_fields import VARIABLE
from kvik.errors import ConfigError
from kvik.network.filters.variables import Values, collect, expand

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
    """In the order of the documents. ConfigError, and what `lookup` raises for a filter that does not exist."""
    found: list[Placed] = []
    for filter_, inside, rule in _walk(reference, values, lookup):
        for one in expand(rule, inside, filter_.name) if rule is not None else ():
            found.append(Placed(filter_.chain, filter_.priority, one))
            if len(found) > RULES_MAX:
                raise ConfigError(f"filter {reference.filter!r} becomes more than {RULES_MAX} rules")
    return found


def names(reference: FilterReference, lookup: Lookup) -> set[str]:
    """Every filter of the tree."""
    return {filter_.name for filter_, _, _ in _walk(reference, {}, lookup)}


def uses(reference: FilterReference, variable: str, lookup: Lookup) -> bool:
    """Whether a rule names a variable that nobody on the way to it gave a value."""
    return any(
        named is not None and named[1] == variable
        for _, inside, rule in _walk(reference, {}, lookup)
        if rule is not None and variable not in inside
        for condition in rule.conditions
        for named in map(VARIABLE.fullmatch, condition.values.values())
    )


def _walk(
    reference: FilterReference, values: Values, lookup: Lookup
) -> Iterator[tuple[NetworkFilter, Values, Rule | None]]:
    """Each filter when it is entered (no rule), then its rules, and what it refers to where it does."""
    count = 0

    def visit(
        one: FilterReference, outer: Values, above: tuple[str, ...]
    ) -> Iterator[tuple[NetworkFilter, Values, Rule | None]]:
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
        yield filter_, inside, None
        for entry in filter_.entries:
            if isinstance(entry, FilterReference):
                yield from visit(entry, inside, (*above, one.filter))
            else:
                yield filter_, inside, entry

    yield from visit(reference, values, ())
