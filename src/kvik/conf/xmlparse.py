"""Elements to Structs. The path of an error is worked out only when there is one."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from lxml import etree

from kvik.conf.codec import (
    EMPTY,
    ISOLATING,
    PLANS,
    RAW_LIST,
    SIZE,
    STRUCT,
    Child,
    Element,
    Plan,
    Unknown,
    display_name,
    plan_of,
)
from kvik.conf.units import parse_kib
from kvik.errors import ConfigError

E = TypeVar("E", bound=Element)


def locate(element: etree._Element) -> str:
    """`/domain/devices/disk[2]` for an element: the address a user can find in the document."""
    steps = []
    node: etree._Element | None = element
    while node is not None:
        parent = node.getparent()
        same = [item for item in parent if item.tag == node.tag] if parent is not None else [node]
        steps.append(display_name(str(node.tag)) + (f"[{same.index(node) + 1}]" if len(same) > 1 else ""))
        node = parent
    return "/" + "/".join(reversed(steps))


def fail(element: etree._Element, reason: str, attribute: str = "") -> ConfigError:
    path = locate(element) + (f"/@{attribute}" if attribute else "")
    line: Any = element.sourceline
    return ConfigError(reason, line=line or 0, path=path)


def parse_element(element: etree._Element, cls: type[E]) -> E:
    """The Struct that `element` describes. Raises ConfigError with line, path and reason."""
    return _parse(element, plan_of(cls))  # type: ignore[return-value]  # a plan makes its own class


def _parse(element: etree._Element, plan: Plan) -> Element:
    values: dict[str, Any] = {}
    unknown: Unknown | None = None
    attributes, children = plan.attributes, plan.children
    name, raw = "", ""
    try:
        unit: str | None = None
        items: Any = element.items()
        if plan.custom:
            values, items = plan.cls.parse_attributes(items)
        for name, raw in items:
            declared = attributes.get(name)
            if declared is not None:
                field, convert = declared
                values[field] = raw if convert is None else convert(raw)
            elif name == "unit" and plan.size is not None:
                unit = raw
            else:
                unknown = _keep_attribute(element, name, raw, plan, unknown)
        if plan.value is not None:
            name = ""
            field, convert = plan.value
            text = element.text
            if len(element):
                text = _no_text_between(element)
            if text is not None:
                values[field] = text if convert is None else convert(text.strip())
        if plan.size is not None and plan.size[0] in values:
            values[plan.size[0]] = parse_kib(values[plan.size[0]], unit)
    except ValueError as error:
        raise fail(element, str(error), name) from None
    for node in element:
        tag = node.tag
        child = children.get(tag)
        if child is None:
            if isinstance(tag, str):
                unknown = _keep_element(node, tag, plan, unknown)
            continue
        field = child.field
        if child.kind == STRUCT:
            value: Any = _parse(node, PLANS.get(child.model) or plan_of(child.model))
        else:
            value = _parse_leaf(node, child, values)
        if child.many:
            if field in values:
                values[field].append(value)
            else:
                values[field] = [value]
        elif field in values:
            raise fail(node, f"<{child.name}> appears more than once")
        else:
            values[field] = value
    for field in plan.required:
        if field not in values:
            raise fail(element, f"{_missing(plan, field)} is missing")
    return plan.cls(unknown=unknown, **values) if unknown else plan.cls(**values)


def _no_text_between(element: etree._Element) -> str | None:
    """An element that may hold text or elements holds elements; white space then is layout."""
    text = "".join([element.text or "", *(child.tail or "" for child in element)])
    if not any(isinstance(child.tag, str) for child in element):
        return text
    if text.strip():
        raise ValueError("text and elements are mixed")
    return None


def _parse_leaf(node: etree._Element, child: Child, values: dict[str, Any]) -> Any:
    if child.kind == RAW_LIST:
        return [_serialise(item) for item in node if isinstance(item.tag, str)]
    if len(node) and any(isinstance(item.tag, str) for item in node):
        raise fail(node, f"<{child.name}> holds text, not elements")
    if child.kind == EMPTY:
        return True
    text = "".join(map(str, node.itertext())) if len(node) else node.text or ""
    unit: str | None = None
    name = ""
    try:
        pairs: Any = node.items()
        for name, raw in pairs:
            extra = child.attributes.get(name)
            if extra is not None:
                values[extra[0]] = raw if extra[1] is None else extra[1](raw)
            elif name == "unit" and child.kind == SIZE:
                unit = raw
            # An attribute nobody knows on a plain text element has nowhere to live; libvirt drops it as well.
            elif name in ISOLATING:
                raise ValueError("is not understood, and ignoring it would weaken isolation")
        name = ""
        value: Any = text if child.parse is None else child.parse(text.strip())
        return parse_kib(value, unit) if child.kind == SIZE else value
    except ValueError as error:
        raise fail(node, str(error), name) from None


def _missing(plan: Plan, field: str) -> str:
    for name, (declared, _) in plan.attributes.items():
        if declared == field:
            return f"attribute {name!r}"
    for name, child in plan.children.items():
        if child.field == field:
            return f"<{name}>"
    return "the text"


def _keep_attribute(node: etree._Element, name: str, raw: str, plan: Plan, unknown: Unknown | None) -> Unknown:
    if plan.strict or name in ISOLATING:
        raise fail(node, f"attribute {name!r} is not understood, and ignoring it would weaken isolation", name)
    unknown = unknown or Unknown(attributes=[], elements=[])
    unknown.attributes.append((name, raw))
    return unknown


def _keep_element(node: etree._Element, tag: str, plan: Plan, unknown: Unknown | None) -> Unknown:
    name = display_name(tag)
    if plan.strict or (name in ISOLATING and name == tag):
        raise fail(node, f"<{name}> is not understood, and ignoring it would weaken isolation")
    unknown = unknown or Unknown(attributes=[], elements=[])
    unknown.elements.append(_serialise(node))
    return unknown


def _serialise(node: etree._Element) -> bytes:
    node = copy.deepcopy(node)  # alone, it carries no declarations but those it uses
    etree.cleanup_namespaces(node)
    return etree.tostring(node, with_tail=False, encoding="utf-8")
