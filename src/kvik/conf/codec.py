"""The declarative codec: an element is declared once, as a Struct, and can be parsed and formatted.

    class Target(Element):
        dev: str | None = None                              # attribute dev=
        bus: Literal["ide", "virtio"] | None = None         # a closed set
        rate: Annotated[int | None, "rotation_rate"] = None # a string gives the name in XML

    class Disk(Element):
        target: Target | None = None                        # child element <target>
        hosts: Annotated[list[Host], "host"] = []           # repeated child <host>
        serial: Annotated[str | None, CHILD] = None         # text of a child element
        readonly: Annotated[bool, PRESENT] = False          # an empty child element that is there or not

A plain scalar is an attribute, a Struct a child, a list repeated children; the markers below say otherwise. Fields
that nobody declared are kept in `unknown`, as text and serialised bytes (never lxml nodes, which would pin their
tree), and written back. Elements that set `__xml_strict__` refuse them instead, and so does the name list
`ISOLATING` everywhere: ignoring a restriction that somebody wrote down would weaken isolation silently.

A Struct's plan is worked out once, when it is first met. Types: https://libvirt.org/formatdomain.html
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args, get_origin

import msgspec
from lxml import etree

from kvik.conf.units import parse_bytes
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
        "auth", "encryption", "filterref", "isolated", "isolation", "keywrap", "launchSecurity", "readonly",
        "restricted", "sandbox", "seclabel", "secure", "tls", "verifyPeer",
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
    __xml_open__: ClassVar[bool] = False  # written with both tags even when it is empty, as libvirt does
    __xml_custom__: ClassVar[bool] = False  # has parse_attributes() and format_attributes() of its own

    unknown: Unknown | None = None

    @classmethod
    def parse_attributes(cls, items: list[tuple[str, str]]) -> tuple[dict[str, Any], list[tuple[str, str]]]:
        """(fields, attributes nobody knows). Called for classes with `__xml_custom__` only, which define it."""
        raise NotImplementedError

    def format_attributes(self) -> str:
        """The counterpart, for the same classes only."""
        raise NotImplementedError


E = TypeVar("E", bound=Element)
Converter = Callable[[str], Any]
Writer = Callable[[Any], str]

QEMU_NS = "http://libvirt.org/schemas/domain/qemu/1.0"
DNSMASQ_NS = "http://libvirt.org/schemas/network/dnsmasq/1.0"
FS_NS = "http://libvirt.org/schemas/storagepool/fs/1.0"
RBD_NS = "http://libvirt.org/schemas/storagepool/rbd/1.0"
KVIK_NS = "urn:kvik:1"  # elements of our own in libvirt's documents, which libvirt ignores
_PREFIXES = {QEMU_NS: "qemu", DNSMASQ_NS: "dnsmasq", FS_NS: "fs", RBD_NS: "rbd", KVIK_NS: "kvik"}

# Kinds of child
STRUCT, TEXT, EMPTY, SIZE, RAW_LIST = range(5)


class Child:
    """One declared child element; `attributes` are those of a text child that have fields of their own (`Of`)."""

    __slots__ = ("attributes", "field", "kind", "many", "model", "name", "parse", "tag", "write")

    def __init__(self, field: str, name: str, kind: int, many: bool) -> None:
        self.field, self.kind, self.many = field, kind, many
        self.name = display_name(name)
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
        "nested",
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
        self.children: dict[str, Child] = {}
        self.value: tuple[str, Converter | None] | None = None
        self.value_write: Writer | None = None
        self.size: tuple[str, bool] | None = None  # the attribute or value that `unit` belongs to; True if the value
        attributes: list[tuple[frozenset[Marker], _AttributeOut]] = []
        children: list[tuple[frozenset[Marker], Child]] = []
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
        # Fields that a copy must not share.
        self.nested = [child for _, child in children if child.kind in (STRUCT, RAW_LIST) or child.many]
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
        children: list[tuple[frozenset[Marker], Child]],
    ) -> None:
        kind, markers, name, hex_digits, of = _split(hint)
        name = name or field
        many = get_origin(kind) is list
        item = get_args(kind)[0] if many else kind
        if many:
            item, more, _, _, _ = _split(item)
            markers |= more
        if isinstance(item, type) and issubclass(item, Element):
            child = Child(field, name, STRUCT, many)
            child.model = item
        elif RAW in markers:
            child = Child(field, name, RAW_LIST, False)
        elif PRESENT in markers:
            child = Child(field, name, EMPTY, False)
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
            child = Child(field, name, SIZE if KIB in markers else TEXT, many)
            child.parse, child.write = parse, write
        self.children[name] = child
        children.append((markers, child))


def _shown(markers: frozenset[Marker], secure: bool, inactive: bool) -> bool:
    return not ((SECRET in markers and not secure) or (LIVE in markers and inactive))


PLANS: dict[type[Element], Plan] = {}


def plan_of(cls: type[Element]) -> Plan:
    plan = PLANS.get(cls)
    if plan is None:
        plan = PLANS[cls] = Plan(cls)
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
        if text not in (yes, no):
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
        return _choice(get_args(kind)), str  # a word of a closed set needs no escapes
    raise TypeError(f"no codec for {kind}")


def display_name(tag: str) -> str:
    return etree.QName(tag).localname if tag.startswith("{") else tag


_SPECIAL = re.compile(r"[&<>'\"\x00-\x1f\ufffe\uffff\ud800-\udfff]")
_ILLEGAL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff\ud800-\udfff]")
_ESCAPES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "'": "&apos;", '"': "&quot;"}
_ATTRIBUTE_ESCAPES = str.maketrans({**_ESCAPES, "\n": "&#10;", "\t": "&#9;", "\r": "&#13;"})
TEXT_ESCAPES = str.maketrans({**_ESCAPES, "\r": "&#13;"})


def escape(text: str, table: dict[int, str] = _ATTRIBUTE_ESCAPES) -> str:
    """`text` as it may stand in XML. Raises ConfigError for characters that XML cannot hold at all."""
    if not _SPECIAL.search(text):
        return text
    if _ILLEGAL.search(text):
        raise ConfigError(f"{text!r} holds a control character, which XML cannot")
    return text.translate(table)
