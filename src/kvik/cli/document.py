"""Reading a domain document for the verbs that show or change a part of it.

The standard library's parser: it is quarter the start-up cost of lxml, and what is read here was written by our own
daemon. A document type declaration is refused all the same.
"""

from __future__ import annotations

from xml.etree import ElementTree

from kvik.errors import ConfigError

Element = ElementTree.Element
SubElement = ElementTree.SubElement


class Disk:
    """One `<disk>` or `<interface>` source line, with `-` where there is nothing."""

    __slots__ = ("device", "element", "kind", "source", "target")

    def __init__(self, element: Element) -> None:
        target = element.find("target")
        self.element = element
        self.kind = element.get("type", "file")
        self.device = element.get("device", "disk")
        self.target = target.get("dev", "") if target is not None else ""
        self.source = disk_source(element)


class Interface:
    __slots__ = ("element", "kind", "link", "mac", "model", "source", "target")

    def __init__(self, element: Element) -> None:
        self.element = element
        self.kind = element.get("type", "")
        self.mac = attribute(element, "mac", "address")
        self.target = attribute(element, "target", "dev")
        self.model = attribute(element, "model", "type")
        self.link = attribute(element, "link", "state") or "up"
        source = element.find("source")
        self.source = ""
        if source is not None:
            # As virsh: the first in the order of the document (a live interface has its network, then the bridge).
            named = [value for key, value in source.attrib.items() if key in ("bridge", "dev", "network", "name")]
            named += [source.get(name, "") for name in ("path", "mode", "address")]
            self.source = next((value for value in named if value), "")


def parse(text: str) -> Element:
    """The root element of `text`; `ConfigError` with the line if it is not well-formed."""
    if "<!DOCTYPE" in text:
        raise ConfigError("a document type declaration is not allowed", path="/")
    try:
        return ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise ConfigError(f"not well-formed XML: {error}", line=error.position[0]) from error


def text_of(element: Element) -> str:
    """`element` as XML, without what follows it in its document."""
    tail, element.tail = element.tail, None
    try:
        # Its serialiser escapes every ">" in text and attributes, so this is only ever the end of an empty element.
        return ElementTree.tostring(element, encoding="unicode").replace(" />", "/>")
    finally:
        element.tail = tail


def attribute(element: Element, child: str, name: str) -> str:
    found = element.find(child)
    return found.get(name, "") if found is not None else ""


def devices(root: Element, kind: str) -> list[Element]:
    return root.findall(f"./devices/{kind}")


def disk_source(element: Element) -> str:
    source = element.find("source")
    if source is None:
        return ""
    for name in ("file", "dev", "dir", "name", "volume", "path"):
        if source.get(name):
            return source.get(name, "")
    return ""


def disks(root: Element) -> list[Disk]:
    return [Disk(element) for element in devices(root, "disk")]


def interfaces(root: Element) -> list[Interface]:
    return [Interface(element) for element in devices(root, "interface")]


def escape(text: str) -> str:
    """`text` for an attribute in single quotes or for content."""
    return (
        text.replace("&", "&amp;")
        .replace("<", "&lt;")
        .replace(">", "&gt;")
        .replace("'", "&apos;")
        .replace('"', "&quot;")
    )


def tag(element: str, /, **attributes: str | None) -> str:
    """An empty element; attributes that are None are left out, an underscore at the end of a name is dropped."""
    parts = "".join(f" {key.rstrip('_')}='{escape(value)}'" for key, value in attributes.items() if value is not None)
    return f"<{element}{parts}/>"


def open_tag(element: str, /, **attributes: str | None) -> str:
    return tag(element, **attributes)[:-2] + ">"
