"""<filter> and <filterbinding>: what a machine may send and receive. https://libvirt.org/formatnwfilter.html

Rules and references are kept in the order they were written, and so is what a rule matches; nothing that is not
understood is kept, since a restriction without effect would be worse than an error. No I/O.
"""

from __future__ import annotations

import re
from typing import Literal, cast
from uuid import UUID

import msgspec
from lxml import etree

from kvik.conf.codec import escape
from kvik.conf.nwfilter_fields import PROTOCOLS, check_value
from kvik.conf.reader import read_xml
from kvik.errors import ConfigError

__all__ = [
    "CHAIN_PRIORITIES",
    "Condition",
    "FilterBinding",
    "FilterReference",
    "NetworkFilter",
    "Parameter",
    "Rule",
    "format_binding",
    "format_filter",
    "parse_binding",
    "parse_filter",
]

Action = Literal["accept", "drop", "reject", "return", "continue"]
Direction = Literal["in", "out", "inout"]

# Prefix of a chain's name -> its priority where the document gives none (section "Filtering chain priorities").
CHAIN_PRIORITIES = {
    "root": 0, "stp": -810, "mac": -800, "vlan": -750, "ipv4": -700, "ipv6": -600, "arp": -500, "rarp": -400,
}  # fmt: skip
RULE_PRIORITY = 500
ENTRIES_MAX = 4096  # rules and references in one filter
PARAMETERS_MAX = 1024

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.\-]{0,127}")
_CHAIN = re.compile(r"(root|(stp|mac|vlan|ipv4|ipv6|rarp|arp)[A-Za-z0-9_.:\-]{0,9})")
_PARAMETER_NAME = re.compile(r"[A-Za-z0-9_]{1,64}")
_PARAMETER_VALUE = re.compile(r"[A-Za-z0-9_.:\-]{1,256}")  # "-" beyond libvirt's schema: for names
_MAC = re.compile(r"(?:[0-9a-f]{2}:){5}[0-9a-f]{2}")
_DEVICE = re.compile(r"[^\s/\x00-\x1f]{1,15}")


class Condition(msgspec.Struct, kw_only=True, gc=False):
    """One element of a rule: all of `values` must match; each must not, if `match` is False."""

    protocol: str
    match: bool = True
    values: dict[str, str] = {}


class Rule(msgspec.Struct, kw_only=True, gc=False):
    """`direction` as the machine sees it; no conditions: any packet. Lower priorities come first, -1000 to 1000."""

    action: Action
    direction: Direction
    priority: int = RULE_PRIORITY
    statematch: bool = True
    conditions: list[Condition] = []

    @property
    def protocol(self) -> str:
        return self.conditions[0].protocol if self.conditions else ""


class Parameter(msgspec.Struct, kw_only=True, gc=False):
    name: str
    value: str


class FilterReference(msgspec.Struct, kw_only=True, gc=False):
    """Another filter, with variables for it; several parameters of one name make a list."""

    filter: str
    parameters: list[Parameter] = []


class NetworkFilter(msgspec.Struct, kw_only=True, gc=False):
    name: str
    uuid: str = ""  # dashed; "" if the document has none
    chain: str = "root"
    priority: int = 0
    entries: list[Rule | FilterReference] = []


class FilterBinding(msgspec.Struct, kw_only=True, gc=False):
    """A filter on one interface of a machine. `linkdev`: the host's device of a macvtap."""

    owner_name: str
    owner_uuid: str
    portdev: str
    mac: str
    reference: FilterReference
    linkdev: str | None = None


# Parsing ----------------------------------------------------------------------------------------------------------


def parse_filter(xml: str | bytes) -> NetworkFilter:
    """Raises ConfigError with line and path. The UUID may be missing, and then is ""."""
    root = read_xml(xml, "network filter")
    if root.tag != "filter":
        raise _fail(root, f"the document is a <{root.tag}>, not a <filter>")
    chain = _attribute(root, "chain", _CHAIN) or "root"
    prefix = next(prefix for prefix in sorted(CHAIN_PRIORITIES, key=len, reverse=True) if chain.startswith(prefix))
    found = NetworkFilter(
        name=_required(root, "name", _NAME),
        chain=chain,
        priority=_priority(root, CHAIN_PRIORITIES[prefix]),
        entries=[],
    )
    _only(root, "name", "chain", "priority")
    for node in _children(root):
        if node.tag == "uuid":
            if found.uuid:
                raise _fail(node, "<uuid> appears more than once")
            found.uuid = _uuid(node)
        elif node.tag == "filterref":
            found.entries.append(_parse_reference(node))
        elif node.tag == "rule":
            found.entries.append(_parse_rule(node))
        else:
            raise _fail(node, f"<{node.tag}> is not understood, and ignoring it would weaken isolation")
    if len(found.entries) > ENTRIES_MAX:
        raise _fail(root, f"{len(found.entries)} rules and references; at most {ENTRIES_MAX} are allowed")
    return found


def _parse_rule(node: etree._Element) -> Rule:
    direction = _required(node, "direction", re.compile("in|out|inout"))
    action = _required(node, "action", re.compile("accept|drop|reject|return|continue"))
    statematch = (node.get("statematch") or "true").lower()
    if statematch not in ("true", "false", "1", "0"):
        raise _fail(node, f"{statematch[:40]!r} is neither 'true' nor 'false'", "statematch")
    _only(node, "action", "direction", "priority", "statematch")
    rule = Rule(
        action=cast("Action", action),
        direction=cast("Direction", direction),
        priority=_priority(node, RULE_PRIORITY),
        statematch=statematch in ("true", "1"),
        conditions=[_parse_condition(child) for child in _children(node)],
    )
    if len({condition.protocol for condition in rule.conditions}) > 1:
        names = ", ".join(f"<{condition.protocol}>" for condition in rule.conditions[:8])
        raise _fail(node, f"a rule is about one protocol, not {names}")
    return rule


def _parse_condition(node: etree._Element) -> Condition:
    protocol = str(node.tag)
    known = PROTOCOLS.get(protocol)
    if known is None:
        raise _fail(node, f"<{protocol}> is no protocol that is understood, and ignoring it would weaken isolation")
    match = node.get("match", "yes")
    if match not in ("yes", "no"):
        raise _fail(node, f"{match[:40]!r} is neither 'yes' nor 'no'", "match")
    _only(node, "match", *known)
    values = {}
    for name in known:
        text = node.get(name)
        if text is not None:
            try:
                values[name] = check_value(protocol, name, text)
            except ValueError as error:
                raise _fail(node, str(error), name) from None
    for name in values:
        needed = _needed_by(name)
        if needed and needed not in values:
            raise _fail(node, f"{name} needs {needed}", name)
    return Condition(protocol=protocol, match=match == "yes", values=values)


def _needed_by(name: str) -> str:
    """The attribute without which this one says nothing."""
    if name.endswith("-mask"):
        return name.removesuffix("-mask")
    if name.endswith("mask"):
        return name.removesuffix("mask") + "addr"
    return {"srcportend": "srcportstart", "dstportend": "dstportstart", "ipsetflags": "ipset"}.get(name, "")


def _parse_reference(node: etree._Element) -> FilterReference:
    reference = FilterReference(filter=_required(node, "filter", _NAME), parameters=[])
    _only(node, "filter")
    for child in _children(node):
        if child.tag != "parameter":
            raise _fail(child, f"<{child.tag}> is not understood")
        reference.parameters.append(
            Parameter(name=_required(child, "name", _PARAMETER_NAME), value=_required(child, "value", _PARAMETER_VALUE))
        )
        _only(child, "name", "value")
    if len(reference.parameters) > PARAMETERS_MAX:
        raise _fail(node, f"{len(reference.parameters)} parameters; at most {PARAMETERS_MAX} are allowed")
    return reference


def parse_binding(xml: str | bytes) -> FilterBinding:
    """Raises ConfigError with line and path."""
    root = read_xml(xml, "filter binding")
    if root.tag != "filterbinding":
        raise _fail(root, f"the document is a <{root.tag}>, not a <filterbinding>")
    nodes: dict[str, etree._Element] = {}
    for node in _children(root):
        if node.tag not in ("owner", "portdev", "linkdev", "mac", "filterref"):
            raise _fail(node, f"<{node.tag}> is not understood")
        if nodes.setdefault(str(node.tag), node) is not node:
            raise _fail(node, f"<{node.tag}> appears more than once")
    for name in ("owner", "portdev", "mac", "filterref"):
        if name not in nodes:
            raise _fail(root, f"<{name}> is missing")
    owner = {str(node.tag): node for node in _children(nodes["owner"])}
    if set(owner) != {"name", "uuid"}:
        raise _fail(nodes["owner"], "<owner> holds <name> and <uuid>")
    mac = nodes["mac"].get("address", "").lower()
    if not _MAC.fullmatch(mac):
        raise _fail(nodes["mac"], f"{mac[:40]!r} is not a MAC address", "address")
    return FilterBinding(
        owner_name=(owner["name"].text or "").strip(),
        owner_uuid=_uuid(owner["uuid"]),
        portdev=_required(nodes["portdev"], "name", _DEVICE),
        mac=mac,
        reference=_parse_reference(nodes["filterref"]),
        linkdev=_required(nodes["linkdev"], "name", _DEVICE) if "linkdev" in nodes else None,
    )


def _children(node: etree._Element) -> list[etree._Element]:
    return [child for child in node if isinstance(child.tag, str)]


def _attribute(node: etree._Element, name: str, pattern: re.Pattern[str]) -> str:
    value = node.get(name)
    if value is None:
        return ""
    if not pattern.fullmatch(value):
        raise _fail(node, f"{value[:40]!r} is not allowed here", name)
    return value


def _required(node: etree._Element, name: str, pattern: re.Pattern[str]) -> str:
    value = _attribute(node, name, pattern)
    if not value:
        raise _fail(node, f"attribute {name!r} is missing")
    return value


def _only(node: etree._Element, *known: str) -> None:
    for name in node.keys():  # noqa: SIM118  # an element is no mapping
        if name not in known:
            raise _fail(node, f"attribute {name!r} is not understood, and ignoring it would weaken isolation")


def _priority(node: etree._Element, default: int) -> int:
    text = node.get("priority")
    if text is None:
        return default
    if not re.fullmatch(r"[+-]?[0-9]{1,4}", text) or not -1000 <= int(text) <= 1000:
        raise _fail(node, f"{text[:40]!r} is not in -1000 to 1000", "priority")
    return int(text)


def _uuid(node: etree._Element) -> str:
    try:
        return str(UUID((node.text or "").strip()))
    except ValueError:
        raise _fail(node, f"{(node.text or '')[:40]!r} is not a UUID") from None


def _fail(node: etree._Element, message: str, attribute: str = "") -> ConfigError:
    path = node.getroottree().getpath(node) + (f"/@{attribute}" if attribute else "")
    return ConfigError(message, line=cast("int", node.sourceline or 0), path=path)


# Formatting -------------------------------------------------------------------------------------------------------


def format_filter(found: NetworkFilter) -> str:
    priority = f" priority='{found.priority}'" if found.priority else ""
    lines = [
        f"<filter name='{escape(found.name)}' chain='{escape(found.chain)}'{priority}>",
        f"  <uuid>{found.uuid}</uuid>",
    ]
    for entry in found.entries:
        lines += _format_rule(entry) if isinstance(entry, Rule) else _format_reference(entry, "  ")
    return "\n".join([*lines, "</filter>", ""])


def _format_rule(rule: Rule) -> list[str]:
    head = f"  <rule action='{rule.action}' direction='{rule.direction}' priority='{rule.priority}'"
    if not rule.statematch:
        head += " statematch='false'"
    if not rule.conditions:
        return [head + "/>"]
    lines = [head + ">"]
    for condition in rule.conditions:
        line = f"    <{condition.protocol}" + ("" if condition.match else " match='no'")
        lines.append(line + "".join(f" {name}='{escape(text)}'" for name, text in condition.values.items()) + "/>")
    return [*lines, "  </rule>"]


def _format_reference(reference: FilterReference, indent: str) -> list[str]:
    head = f"{indent}<filterref filter='{escape(reference.filter)}'"
    if not reference.parameters:
        return [head + "/>"]
    inside = [
        f"{indent}  <parameter name='{escape(one.name)}' value='{escape(one.value)}'/>" for one in reference.parameters
    ]
    return [head + ">", *inside, f"{indent}</filterref>"]


def format_binding(binding: FilterBinding) -> str:
    lines = [
        "<filterbinding>",
        "  <owner>",
        f"    <name>{escape(binding.owner_name)}</name>",
        f"    <uuid>{binding.owner_uuid}</uuid>",
        "  </owner>",
        f"  <portdev name='{escape(binding.portdev)}'/>",
    ]
    if binding.linkdev:
        lines.append(f"  <linkdev name='{escape(binding.linkdev)}'/>")
    lines.append(f"  <mac address='{binding.mac}'/>")
    return "\n".join([*lines, *_format_reference(binding.reference, "  "), "</filterbinding>", ""])
