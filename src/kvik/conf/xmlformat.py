"""Structs to XML text, laid out as libvirt does: two spaces, single quotes, one element a line."""

from __future__ import annotations

from typing import Any

from lxml import etree

from kvik.conf.codec import EMPTY, PLANS, RAW_LIST, SIZE, STRUCT, TEXT_ESCAPES, Child, Element, escape, plan_of


def format_element(element: Element, tag: str, *, secure: bool = False, inactive: bool = False) -> str:
    """XML text with libvirt's indentation and quotes; ends with a newline."""
    out: list[str] = []
    _write(out, element, tag, "", (secure, inactive))
    return "".join(out)


def _write(out: list[str], element: Element, tag: str, indent: str, mode: tuple[bool, bool]) -> None:
    cls = type(element)
    plan = PLANS.get(cls) or plan_of(cls)
    attributes, children = plan.out[mode]
    out.append(f"{indent}<{tag}{element.format_attributes()}" if plan.custom else f"{indent}<{tag}")
    for field, prefix, write in attributes:
        value = getattr(element, field)
        if value is not None:
            out.append(f"{prefix}{escape(value) if write is None else write(value)}'")
    if plan.namespaces and ":" not in tag:
        out += [text for field, text in plan.namespaces if getattr(element, field) is not None]
    unknown = element.unknown
    if plan.size is not None and getattr(element, plan.size[0]) is not None:
        out.append(" unit='KiB'")
    if unknown is not None:
        for name, raw in unknown.attributes:
            out.append(_unknown_attribute(name, raw))
    if plan.value is not None:
        value = getattr(element, plan.value[0])
        if value is not None and not any(getattr(element, child.field) for child in children):
            write = plan.value_write
            out.append(f">{escape(value, TEXT_ESCAPES) if write is None else write(value)}</{tag}>\n")
            return
    start = len(out)
    inner = indent + "  "
    for child in children:
        value = getattr(element, child.field)
        if value is None or value is False:
            continue
        if child.many:
            for item in value:
                if child.kind == STRUCT:
                    _write(out, item, child.tag, inner, mode)
                else:
                    _write_leaf(out, element, item, child, inner)
        elif child.kind == STRUCT:
            _write(out, value, child.tag, inner, mode)
        else:
            _write_leaf(out, element, value, child, inner)
    if unknown is not None:
        for data in unknown.elements:
            out.append(f"{inner}{data.decode()}\n")
    if len(out) == start:
        out.append("/>\n")
    else:
        out[start - 1] += ">\n"
        out.append(f"{indent}</{tag}>\n")


def _write_leaf(out: list[str], element: Element, value: Any, child: Child, indent: str) -> None:
    tag = child.tag
    if child.kind == EMPTY:
        out.append(f"{indent}<{tag}/>\n")
    elif child.kind == RAW_LIST:
        if value:
            out.append(f"{indent}<{tag}>\n")
            out.extend(f"{indent}  {data.decode()}\n" for data in value)
            out.append(f"{indent}</{tag}>\n")
    else:
        head = f"{indent}<{tag}"
        for name, (field, _, write) in child.attributes.items():
            extra = getattr(element, field)
            if extra is not None:
                head += f" {name}='{escape(extra) if write is None else write(extra)}'"
        if child.kind == SIZE:
            head += " unit='KiB'"
        text = escape(value, TEXT_ESCAPES) if child.write is None else child.write(value)
        out.append(f"{head}>{text}</{tag}>\n" if text else f"{head}/>\n")


def _unknown_attribute(name: str, raw: str) -> str:
    if name.startswith("{"):
        qname = etree.QName(name)
        return f" xmlns:ns='{escape(qname.namespace or '')}' ns:{qname.localname}='{escape(raw)}'"
    return f" {name}='{escape(raw)}'"
