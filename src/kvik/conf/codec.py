"""The declarative codec: an element is declared once, as a Struct, and can be parsed and formatted.

    class Target(Element):
        dev: str | None = None                                # attribute dev=
        bus: Annotated[Literal["ide", "virtio"] | None, "bus"] = None   # closed set; a string renames
        tray: OpenClosed ...

    class Disk(Element):
        target: Target | None = None                          # child element <target>
        hosts: Annotated[list[Host], "host"] = field(default_factory=list)   # repeated child <host>
        serial: Annotated[str | None, CHILD] = None           # text of a child element
        readonly: Annotated[bool, PRESENT] = False            # an empty child element that is there or not

A plain scalar is an attribute, a Struct a child, a list repeated children; the markers below say otherwise. Fields
that nobody declared are kept in `unknown`, as text and serialised bytes (never lxml nodes, which would pin their
tree), and written back. Elements that set `__xml_strict__` refuse them instead, and so does the name list
`ISOLATING` everywhere: ignoring a restriction that somebody wrote down would weaken isolation silently.

A Struct's plan is worked out once, when it is first met. Types: https://libvirt.org/formatdomain.html
"""

from __future__ import annotations

import copy
import re
import types
import typing
from collections.abc import Callable, Iterator
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args, get_origin

import msgspec
from lxml import etree

from kvik.conf.units import parse_bytes, parse_kib
from kvik.errors import ConfigError

U64_MAX = (1 << 64) - 1


class Marker(str):
    """How a field is written, where that is not an attribute with the obvious text."""

    __slots__ = ()


CHILD = Marker("child")  # the text of a child element
VALUE = Marker("value")  # the text of the element itself
PRESENT = Marker("present")  # an empty child element: True when it is there
RAW = Marker("raw")  # list[bytes]: the serialised children of a child element
KIB = Marker("kib")  # a size with a `unit` attribute beside it; KiB in the Struct
BYTES = Marker("bytes")  # the same; bytes in the Struct and without a unit
ON_OFF = Marker("on/off")
YES_NO = Marker("yes/no")
UUID = Marker("uuid")
SIGNED = Marker("signed")
SECRET = Marker("secret")  # written only when asked for secrets
LIVE = Marker("live")  # true of a running machine only; left out of inactive documents


class Hex(int):
    """An int written as 0x with this many digits."""


class Of(str):
    """An attribute of the text child with this name."""


YesNo = Annotated[bool | None, YES_NO]
OnOff = Annotated[bool | None, ON_OFF]
Present = Annotated[bool, PRESENT]
Text = Annotated[str | None, CHILD]

# Names which, unknown to us, must not be ignored wherever they stand: each takes something away from the guest.
ISOLATING = frozenset(
    {
        "auth", "encryption", "filterref", "isolated", "isolation", "keywrap", "launchSecurity", "readonly", "restricted",
        "sandbox", "seclabel", "secure", "tls", "verifyPeer",
    }
)  # fmt: skip


class Unknown(msgspec.Struct, kw_only=True, gc=False):
    """What a document says that the declarations do not know; kept so that it survives a round trip."""

    attributes: list[tuple[str, str]] = []
    elements: list[bytes] = []


class Element(msgspec.Struct, kw_only=True, gc=False):
    """Base of every declared element."""

    __xml_strict__: ClassVar[bool] = False
    __xml_last__: ClassVar[tuple[str, ...]] = ()  # children written after all others, in this order
    __xml_custom__: ClassVar[bool] = False  # has parse_attributes() and format_attributes() of its own

    unknown: Unknown | None = None

    @classmethod
    def parse_attributes(cls, items: list[tuple[str, str]]) -> tuple[dict[str, Any], list[tuple[str, str]]]:
        """(fields, attributes nobody knows)."""
        raise NotImplementedError

    def format_attributes(self) -> str:
        raise NotImplementedError


E = TypeVar("E", bound=Element)
Converter = Callable[[str], Any]
Writer = Callable[[Any], str]

QEMU_NS = "http://libvirt.org/schemas/domain/qemu/1.0"
_PREFIXES = {QEMU_NS: "qemu"}

# Kinds of child
_STRUCT, _TEXT, _PRESENT, _SIZE, _RAW = range(5)


class _Child:
    """One declared child element; `attributes` are those of a text child that have fields of their own (`Of`)."""

    __slots__ = ("attributes", "field", "kind", "many", "model", "name", "parse", "tag", "write")

    def __init__(self, field: str, name: str, kind: int, many: bool) -> None:
        self.field, self.kind, self.many = field, kind, many
        self.name = _display(name)
        space = etree.QName(name).namespace if name.startswith("{") else None
        self.tag = f"{_PREFIXES[space]}:{self.name}" if space else name
        self.parse: Converter | None = None
        self.write: Writer | None = None
        self.model: type[Element] = Element
        self.attributes: dict[str, tuple[str, Converter | None, Writer | None]] = {}


# (field, text before the value, writer or None for plain text)
_AttributeOut = tuple[str, str, Writer | None]


class Plan:
    """How one Struct is read and written, precomputed."""

    __slots__ = (
        "attributes",
        "children",
        "cls",
        "custom",
        "namespaces",
        "out",
        "required",
        "size",
        "strict",
        "value",
        "value_write",
    )

    def __init__(self, cls: type[Element]) -> None:
        self.cls = cls
        self.strict = cls.__xml_strict__
        self.custom = cls.__xml_custom__
        self.attributes: dict[str, tuple[str, Converter | None]] = {}
        self.children: dict[str, _Child] = {}
        self.value: tuple[str, Converter | None] | None = None
        self.value_write: Writer | None = None
        self.size: tuple[str, bool] | None = None  # the attribute or value that `unit` belongs to; True if the value
        attributes: list[tuple[frozenset[Marker], _AttributeOut]] = []
        children: list[tuple[frozenset[Marker], _Child]] = []
        hints = typing.get_type_hints(cls, include_extras=True)
        for field in cls.__struct_fields__:
            if field != "unknown":
                self._declare(field, hints[field], attributes, children)
        last = cls.__xml_last__
        children.sort(key=lambda item: last.index(item[1].tag) if item[1].tag in last else -1)
        fields, defaults = cls.__struct_fields__, cls.__struct_defaults__
        bare = len(fields) - len(defaults)
        self.required = [field for i, field in enumerate(fields) if i < bare or defaults[i - bare] is msgspec.NODEFAULT]
        self.namespaces = [
            (child.field, f" xmlns:{prefix}='{space}'")
            for _, child in children
            for space, prefix in _PREFIXES.items()
            if child.tag.startswith(f"{prefix}:")
        ]
        # What is written depends on (secure, inactive): four lists, so that writing tests nothing.
        self.out = {
            (secure, inactive): (
                [out for markers, out in attributes if _shown(markers, secure, inactive)],
                [child for markers, child in children if _shown(markers, secure, inactive)],
            )
            for secure in (False, True)
            for inactive in (False, True)
        }

    def _declare(
        self,
        field: str,
        hint: Any,
        attributes: list[tuple[frozenset[Marker], _AttributeOut]],
        children: list[tuple[frozenset[Marker], _Child]],
    ) -> None:
        kind, markers, name, hex_digits, of = _split(hint)
        name = name or field
        many = get_origin(kind) is list
        item = get_args(kind)[0] if many else kind
        if many:
            item, more, _, _, _ = _split(item)
            markers |= more
        if isinstance(item, type) and issubclass(item, Element):
            child = _Child(field, name, _STRUCT, many)
            child.model = item
        elif RAW in markers:
            child = _Child(field, name, _RAW, False)
        elif PRESENT in markers:
            child = _Child(field, name, _PRESENT, False)
        else:
            parse, write = _scalar(item, markers, hex_digits)
            if of:
                self.children[of].attributes[name] = (field, parse, write)
                return
            if CHILD not in markers and not many:
                if self.custom:
                    return
                if VALUE in markers:
                    self.value, self.value_write = (field, parse), write
                else:
                    self.attributes[name] = (field, parse)
                    attributes.append((markers, (field, f" {name}='", write)))
                if KIB in markers:
                    self.size = (field, VALUE in markers)
                return
            child = _Child(field, name, _SIZE if KIB in markers else _TEXT, many)
            child.parse, child.write = parse, write
        self.children[name] = child
        children.append((markers, child))


def _shown(markers: frozenset[Marker], secure: bool, inactive: bool) -> bool:
    return not ((SECRET in markers and not secure) or (LIVE in markers and inactive))


_plans: dict[type[Element], Plan] = {}


def plan_of(cls: type[Element]) -> Plan:
    plan = _plans.get(cls)
    if plan is None:
        plan = _plans[cls] = Plan(cls)
    return plan


def _split(hint: Any) -> tuple[Any, frozenset[Marker], str, int, str]:
    """(type without None, markers, XML name, hex digits, owning child) of an annotation."""
    markers: set[Marker] = set()
    name, digits, of = "", 0, ""
    while True:
        if get_origin(hint) is Annotated:
            for item in hint.__metadata__:
                if isinstance(item, Marker):
                    markers.add(item)
                elif isinstance(item, Of):
                    of = str(item)
                elif isinstance(item, Hex):
                    digits = int(item)
                else:
                    name = item
            hint = hint.__origin__
        elif get_origin(hint) in (types.UnionType, typing.Union):
            options = [option for option in get_args(hint) if option is not type(None)]
            if len(options) != 1:
                raise TypeError(f"a field has one type, not {hint}")
            hint = options[0]
        else:
            return hint, frozenset(markers), name, digits, of


# ---------------------------------------------------------------------------------------------------- scalars


def unsigned(text: str) -> int:
    value = int(text, 16) if text[:2] in ("0x", "0X") else int(text) if text.strip().isdecimal() else -1
    if not 0 <= value <= U64_MAX:
        raise ValueError(f"{text!r} is not an unsigned number of at most 64 bits")
    return value


def _signed(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 1 << 64
    if abs(value) >> 63:
        raise ValueError(f"{text!r} is not a number of at most 64 bits")
    return value


def _choice(values: tuple[str, ...]) -> Converter:
    table = {value: value for value in values}

    def parse(text: str) -> str:
        value = table.get(text) or table.get(text.strip())
        if value is None:
            raise ValueError(f"{text!r} is not one of {', '.join(values)}")
        return value

    return parse


def _boolean(yes: str, no: str) -> tuple[Converter, Writer]:
    def parse(text: str) -> bool:
        if text != yes and text != no:
            raise ValueError(f"{text!r} is neither {yes!r} nor {no!r}")
        return text == yes

    return parse, lambda value: yes if value else no


_UUID = re.compile(r"[0-9a-f]{8}-?[0-9a-f]{4}-?[0-9a-f]{4}-?[0-9a-f]{4}-?[0-9a-f]{12}")
on_off = _boolean("on", "off")[0]
_BOOLEANS = {YES_NO: _boolean("yes", "no"), ON_OFF: _boolean("on", "off")}


def _uuid(text: str) -> str:
    text = text.strip().lower()
    if not _UUID.fullmatch(text):
        raise ValueError(f"{text!r} is not a UUID")
    digits = text.replace("-", "")
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


def _scalar(kind: Any, markers: frozenset[Marker], hex_digits: int) -> tuple[Converter | None, Writer | None]:
    if kind is str:
        return (_uuid if UUID in markers else None), None
    if kind is int:
        if hex_digits:
            return unsigned, lambda value: f"0x{value:0{hex_digits}x}"
        if BYTES in markers:
            return parse_bytes, str
        return (_signed if SIGNED in markers else unsigned), str
    if kind is bool:
        return _BOOLEANS[ON_OFF if ON_OFF in markers else YES_NO]
    if get_origin(kind) is Literal:
        return _choice(get_args(kind)), None
    raise TypeError(f"no codec for {kind}")


# ---------------------------------------------------------------------------------------------------- parsing


def _display(tag: str) -> str:
    return etree.QName(tag).localname if tag.startswith("{") else tag


def locate(element: etree._Element) -> str:
    """`/domain/devices/disk[2]` for an element: the address a user can find in the document."""
    steps = []
    node: etree._Element | None = element
    while node is not None:
        parent = node.getparent()
        same = [item for item in parent if item.tag == node.tag] if parent is not None else [node]
        steps.append(_display(str(node.tag)) + (f"[{same.index(node) + 1}]" if len(same) > 1 else ""))
        node = parent
    return "/" + "/".join(reversed(steps))


def fail(element: etree._Element, reason: str, attribute: str = "") -> ConfigError:
    path = locate(element) + (f"/@{attribute}" if attribute else "")
    line: Any = element.sourceline
    return ConfigError(reason, line=line or 0, path=path)


def parse_element(element: etree._Element, cls: type[E]) -> E:
    """The Struct that `element` describes. Raises ConfigError with line, path and reason."""
    return _parse(element, plan_of(cls))  # type: ignore[return-value]


def _parse(element: etree._Element, plan: Plan) -> Element:
    values: dict[str, Any] = {}
    unknown: Unknown | None = None
    attributes, children = plan.attributes, plan.children
    name, raw = "", ""
    try:
        unit: str | None = None
        items = element.items()
        if plan.custom:
            values, items = plan.cls.parse_attributes(items)  # type: ignore[arg-type]
        for name, raw in items:  # type: ignore[assignment]
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
            if text is not None:
                values[field] = text if convert is None else convert(text.strip())
        if plan.size is not None and plan.size[0] in values:
            values[plan.size[0]] = parse_kib(values[plan.size[0]], unit)
    except ValueError as error:
        raise fail(element, str(error), name) from None
    for node in element:
        tag = node.tag
        child = children.get(tag)  # type: ignore[call-overload]
        if child is None:
            if isinstance(tag, str):
                unknown = _keep_element(node, tag, plan, unknown)
            continue
        field = child.field
        if child.kind == _STRUCT:
            value: Any = _parse(node, _plans.get(child.model) or plan_of(child.model))
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


def _parse_leaf(node: etree._Element, child: _Child, values: dict[str, Any]) -> Any:
    if child.kind == _RAW:
        return [_serialise(item) for item in node if isinstance(item.tag, str)]
    if len(node) and any(isinstance(item.tag, str) for item in node):
        raise fail(node, f"<{child.name}> holds text, not elements")
    if child.kind == _PRESENT:
        return True
    text = "".join(map(str, node.itertext())) if len(node) else node.text or ""
    unit: str | None = None
    name = ""
    try:
        for name, raw in node.items():  # type: ignore[assignment]
            extra = child.attributes.get(name)
            if extra is not None:
                values[extra[0]] = raw if extra[1] is None else extra[1](raw)
            elif name == "unit" and child.kind == _SIZE:
                unit = raw
            # An attribute nobody knows on a plain text element has nowhere to live; libvirt drops it as well.
            elif name in ISOLATING:
                raise ValueError("is not understood, and ignoring it would weaken isolation")
        name = ""
        value: Any = text if child.parse is None else child.parse(text.strip())
        return parse_kib(value, unit) if child.kind == _SIZE else value
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
    name = _display(tag)
    if plan.strict or (name in ISOLATING and name == tag):
        raise fail(node, f"<{name}> is not understood, and ignoring it would weaken isolation")
    unknown = unknown or Unknown(attributes=[], elements=[])
    unknown.elements.append(_serialise(node))
    return unknown


def _serialise(node: etree._Element) -> bytes:
    node = copy.deepcopy(node)  # alone, it carries no declarations but those it uses
    etree.cleanup_namespaces(node)
    return etree.tostring(node, with_tail=False, encoding="utf-8")


# ---------------------------------------------------------------------------------------------------- formatting

_SPECIAL = re.compile(r"[&<>'\"\x00-\x1f\ufffe\uffff\ud800-\udfff]")
_ILLEGAL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff\ud800-\udfff]")
_ESCAPES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "'": "&apos;", '"': "&quot;"}
_ATTRIBUTE_ESCAPES = str.maketrans({**_ESCAPES, "\n": "&#10;", "\t": "&#9;", "\r": "&#13;"})
_TEXT_ESCAPES = str.maketrans({**_ESCAPES, "\r": "&#13;"})


def escape(text: str, table: dict[int, str] = _ATTRIBUTE_ESCAPES) -> str:
    """`text` as it may stand in XML. Raises ConfigError for characters that XML cannot hold at all."""
    if not _SPECIAL.search(text):
        return text
    if _ILLEGAL.search(text):
        raise ConfigError(f"{text!r} holds a control character, which XML cannot")
    return text.translate(table)


def format_element(element: Element, tag: str, *, secure: bool = False, inactive: bool = False) -> str:
    """XML text with libvirt's indentation and quotes; ends with a newline."""
    out: list[str] = []
    _write(out, element, tag, "", (secure, inactive))
    return "".join(out)


def _write(out: list[str], element: Element, tag: str, indent: str, mode: tuple[bool, bool]) -> None:
    cls = type(element)
    plan = _plans.get(cls) or plan_of(cls)
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
        if value is not None:
            write = plan.value_write
            out.append(f">{escape(value, _TEXT_ESCAPES) if write is None else write(value)}</{tag}>\n")
            return
    start = len(out)
    inner = indent + "  "
    for child in children:
        value = getattr(element, child.field)
        if value is None or value is False:
            continue
        if child.many:
            for item in value:
                if child.kind == _STRUCT:
                    _write(out, item, child.tag, inner, mode)
                else:
                    _write_leaf(out, element, item, child, inner)
        elif child.kind == _STRUCT:
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


def _write_leaf(out: list[str], element: Element, value: Any, child: _Child, indent: str) -> None:
    tag = child.tag
    if child.kind == _PRESENT:
        out.append(f"{indent}<{tag}/>\n")
    elif child.kind == _RAW:
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
        if child.kind == _SIZE:
            head += " unit='KiB'"
        text = escape(value, _TEXT_ESCAPES) if child.write is None else child.write(value)
        out.append(f"{head}>{text}</{tag}>\n" if text else f"{head}/>\n")


def _unknown_attribute(name: str, raw: str) -> str:
    if name.startswith("{"):
        qname = etree.QName(name)
        return f" xmlns:ns='{escape(qname.namespace or '')}' ns:{qname.localname}='{escape(raw)}'"
    return f" {name}='{escape(raw)}'"


# ---------------------------------------------------------------------------------------------------- walking


def walk(element: Element, path: str) -> Iterator[tuple[Element, str]]:
    """Every element below and including `element`, with its path as `locate` would write it."""
    yield element, path
    for child in plan_of(type(element)).children.values():
        if child.kind != _STRUCT:
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
                name = _display(str(etree.fromstring(data).tag))
                found.append(f"{where}/{name}: unknown element, kept but without effect")
    return found


def clone(element: E) -> E:
    """A copy that shares nothing that can change."""
    values = {}
    for field in element.__struct_fields__:
        value = getattr(element, field)
        if isinstance(value, Element):
            value = clone(value)
        elif isinstance(value, list):
            value = [clone(item) if isinstance(item, Element) else item for item in value]
        values[field] = value
    return type(element)(**values)
