"""Structs to XML text, laid out as libvirt does: two spaces, single quotes, one element a line.

For each Struct one function is generated when it is first written: a document has a hundred elements of some ten
fields, most of them unset, and a definition is formatted on every change. Walking the plan field by field takes three
times as long.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lxml import etree

from kvik.conf.codec import EMPTY, RAW_LIST, SIZE, STRUCT, TEXT_ESCAPES, Child, Element, Unknown, escape, plan_of

Mode = tuple[bool, bool]  # secure, inactive
Write = Callable[[Any, str, str], str]  # Struct, tag, indentation -> XML


def format_element(element: Element, tag: str, *, secure: bool = False, inactive: bool = False) -> str:
    """XML text with libvirt's indentation and quotes; ends with a newline."""
    return _WRITERS[secure, inactive][type(element)](element, tag, "")


class _Writers(dict[type[Element], Write]):
    """The generated functions of one mode, made when first asked for."""

    def __init__(self, mode: Mode) -> None:
        super().__init__()
        self.mode = mode

    def __missing__(self, cls: type[Element]) -> Write:
        names: dict[str, Any] = {
            "escape": escape,
            "leaf": _leaf,
            "unknown_attributes": _unknown_attributes,
            "unknown_elements": _unknown_elements,
            "writers": self,
        }
        exec(compile("\n".join(_source(cls, self.mode, names)), f"<format {cls.__name__}>", "exec"), names)
        write: Write = names["write"]
        self[cls] = write
        return write


_WRITERS = {(secure, inactive): _Writers((secure, inactive)) for secure in (False, True) for inactive in (False, True)}


def _source(cls: type[Element], mode: Mode, names: dict[str, Any]) -> list[str]:
    """The lines of `write(element, tag, indent)`. What they call is put into `names`."""
    plan = plan_of(cls)
    attributes, children = plan.out[mode]
    lines = ["def write(element, tag, indent):", "    unknown = element.unknown", "    head = indent + '<' + tag"]
    if plan.custom:
        lines[-1] += " + element.format_attributes()"
    for number, (field, prefix, convert) in enumerate(attributes):
        names[f"a{number}"] = convert or escape
        lines += [
            f"    value = element.{field}",
            f'    if value is not None: head += {prefix!r} + a{number}(value) + "\'"',
        ]
    for text in dict.fromkeys(text for _, text in plan.namespaces):  # declared once, however many fields are in it
        fields = " or ".join(f"element.{field}" for field, other in plan.namespaces if other == text)
        lines.append(f"    if ({fields}) and ':' not in tag: head += {text!r}")
    if plan.size is not None:
        lines.append(f"    if element.{plan.size[0]} is not None: head += \" unit='KiB'\"")
    lines.append("    if unknown is not None: head += unknown_attributes(unknown)")
    if plan.value is not None:
        names["text"] = plan.value_write or (lambda value: escape(value, TEXT_ESCAPES))
        bare = "".join(f" and not element.{child.field}" for child in children)
        lines += [
            f"    value = element.{plan.value[0]}",
            f"    if value is not None{bare}: return head + '>' + text(value) + '</' + tag + '>\\n'",
        ]
    lines += ["    body = ''", "    inner = indent + '  '"]
    for number, child in enumerate(children):
        names[f"c{number}"] = child
        one = f"leaf(element, value, c{number}, inner)"
        if child.kind == STRUCT:
            one = f"writers[value.__class__](value, {child.tag!r}, inner)"
        if child.many:
            lines.append(f"    for value in element.{child.field}: body += {one}")
        else:
            lines.append(f"    value = element.{child.field}")
            lines.append(f"    if value is not None and value is not False: body += {one}")
    lines += [
        "    if unknown is not None: body += unknown_elements(unknown, inner)",
        f"    if body or {cls.__xml_open__}: return head + '>\\n' + body + indent + '</' + tag + '>\\n'",
        "    return head + '/>\\n'",
    ]
    return lines


def _leaf(element: Element, value: Any, child: Child, indent: str) -> str:
    """A child that is no Struct."""
    tag = child.tag
    if child.kind == EMPTY:
        return f"{indent}<{tag}/>\n"
    if child.kind == RAW_LIST:
        inside = "".join(f"{indent}  {data.decode()}\n" for data in value)
        return f"{indent}<{tag}>\n{inside}{indent}</{tag}>\n" if inside else ""
    head = f"{indent}<{tag}"
    for name, (field, _, write) in child.attributes.items():
        extra = getattr(element, field)
        if extra is not None:
            head += f" {name}='{escape(extra) if write is None else write(extra)}'"
    if child.kind == SIZE:
        head += " unit='KiB'"
    text = escape(value, TEXT_ESCAPES) if child.write is None else child.write(value)
    return f"{head}>{text}</{tag}>\n" if text else f"{head}/>\n"


def _unknown_attributes(unknown: Unknown) -> str:
    return "".join(_unknown_attribute(name, raw) for name, raw in unknown.attributes)


def _unknown_elements(unknown: Unknown, indent: str) -> str:
    return "".join(f"{indent}{data.decode()}\n" for data in unknown.elements)


def _unknown_attribute(name: str, raw: str) -> str:
    if name.startswith("{"):
        qname = etree.QName(name)
        return f" xmlns:ns='{escape(qname.namespace or '')}' ns:{qname.localname}='{escape(raw)}'"
    return f" {name}='{escape(raw)}'"
