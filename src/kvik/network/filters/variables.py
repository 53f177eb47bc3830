"""Variables of filters: `$IP`, one element `$PORTS[1]`, iterators `$PORTS[@1]`.

https://libvirt.org/formatnwfilter.html#usage-of-variables-in-filters: a rule that names lists becomes one rule for
each combination of their elements; lists with the same iterator go side by side, `$X` means `$X[@0]`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product

from kvik.conf.nwfilter import Condition, Parameter, Rule
from kvik.conf.nwfilter_fields import VARIABLE, check_value
from kvik.errors import ConfigError

__all__ = ["ALLOWED", "COMBINATIONS_MAX", "KEPT", "LEARNED", "Values", "collect", "expand", "set_name"]

Values = Mapping[str, Sequence[str]]

# Values that stand for a set of the interface, which changes while the machine runs.
LEARNED = "@learned"  # its own addresses
ALLOWED = {4: "@allowed4", 6: "@allowed6"}  # what the names on its allow-list resolve to
KEPT = {4: "@kept4", 6: "@kept6"}  # what they resolved to a while ago
# dnsmasq writes into ALLOWED: it knows no "/" in their names.
_SETS = {
    LEARNED: "{}/ip",
    **{ALLOWED[family]: f"allow{family}-{{}}" for family in ALLOWED},
    **{KEPT[family]: f"kept{family}-{{}}" for family in KEPT},
}
COMBINATIONS_MAX = 4096  # of one rule
_MAY_BE_SETS = {"srcipaddr": "srcipmask", "dstipaddr": "dstipmask", "arpsrcipaddr": "arpsrcipmask",
                   "arpdstipaddr": "arpdstipmask"}  # fmt: skip


def set_name(value: str, device: str) -> str:
    """Of the set that `value` stands for."""
    return _SETS[value].format(device)


def collect(parameters: Sequence[Parameter], outer: Values) -> dict[str, Sequence[str]]:
    """The variables inside a reference: its parameters, each name's in order, over those from outside."""
    inner: dict[str, list[str]] = {}
    for one in parameters:
        inner.setdefault(one.name, []).append(one.value)
    return {**outer, **inner}


def expand(rule: Rule, values: Values, where: str) -> Iterator[Rule]:
    """`rule` for each combination of its variables' elements. ConfigError, which names `where`."""
    iterators: dict[int, int] = {}
    for condition in rule.conditions:
        for text in condition.values.values():
            if reference := VARIABLE.fullmatch(text):
                name, at, index = reference.groups()
                elements = _elements(name, values, where)
                if index is not None and not at:
                    continue
                number = int(index or 0)
                if iterators.setdefault(number, len(elements)) != len(elements):
                    raise ConfigError(
                        f"filter {where!r}: variable {name} has {len(elements)} values where another of the same rule "
                        f"and iterator has {iterators[number]}",
                        remedy="give them the same number, or iterators of their own such as [@1]",
                    )
    total = 1
    for length in iterators.values():
        total *= length
        if total > COMBINATIONS_MAX:
            raise ConfigError(f"filter {where!r}: a rule has more than {COMBINATIONS_MAX} combinations of variables")
    for indexes in product(*(range(length) for length in iterators.values())):
        chosen = dict(zip(iterators, indexes, strict=True))
        conditions = [_resolve(condition, values, chosen, where) for condition in rule.conditions]
        yield Rule(
            action=rule.action,
            direction=rule.direction,
            priority=rule.priority,
            statematch=rule.statematch,
            conditions=conditions,
        )


def _elements(name: str, values: Values, where: str) -> Sequence[str]:
    elements = values.get(name)
    if not elements:
        raise ConfigError(
            f"filter {where!r} needs the variable {name}, which has no value",
            remedy=f"give <filterref> a <parameter name='{name}' value='...'/>",
        )
    return elements


def _resolve(condition: Condition, values: Values, chosen: Mapping[int, int], where: str) -> Condition:
    resolved = {}
    for attribute, text in condition.values.items():
        reference = VARIABLE.fullmatch(text)
        if reference is None:
            resolved[attribute] = text
            continue
        name, at, index = reference.groups()
        elements = _elements(name, values, where)
        place = int(index) if index is not None and not at else chosen[int(index or 0)]
        if place >= len(elements):
            raise ConfigError(f"filter {where!r}: variable {name} has {len(elements)} values, no [{place}]")
        value = elements[place]
        if value in _SETS:
            mask = _MAY_BE_SETS.get(attribute)
            if mask is None or mask in condition.values:
                raise ConfigError(
                    f"filter {where!r}: {attribute} cannot be matched with addresses that are yet to be learned",
                    remedy=f"give <filterref> a <parameter name='{name}' value='...'/>",
                )
            resolved[attribute] = value
            continue
        try:
            resolved[attribute] = check_value(condition.protocol, attribute, value)
        except ValueError as error:
            raise ConfigError(f"filter {where!r}: variable {name} for {attribute}: {error}") from None
    return Condition(protocol=condition.protocol, match=condition.match, values=resolved)
