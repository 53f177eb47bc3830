"""Title, description and custom elements of a document: words that no hypervisor reads. Of machines and networks."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from lxml import etree

from kvik.conf.enums import DomainMetadataType
from kvik.errors import InvalidArgument, NoMetadata

if TYPE_CHECKING:
    from kvik.conf.domain import Domain
    from kvik.conf.network import Network

__all__ = ["Change", "read"]

LIMIT = 1 << 20  # characters of one element
_KINDS = {  # virNetworkMetadataType has the same numbers
    DomainMetadataType.DESCRIPTION: "description",
    DomainMetadataType.TITLE: "title",
    DomainMetadataType.ELEMENT: "metadata",
}
_PARSER = etree.XMLParser(resolve_entities=False, no_network=True, load_dtd=False, remove_pis=True)


def read(document: Domain | Network, type_: int, uri: str | None, what: str) -> str:
    """Title, description, or the element with namespace `uri`; `what` names the object. `NoMetadata` if unset."""
    if type_ not in _KINDS:
        raise InvalidArgument(f"there is no metadata type {type_}")
    if type_ == DomainMetadataType.ELEMENT:
        if not uri:
            raise InvalidArgument("a metadata element is named by its namespace")
        for raw in document.metadata:
            element = etree.fromstring(raw, _PARSER)
            if etree.QName(element).namespace == uri:
                return _without_namespace(element, uri)
        raise NoMetadata(f"{what} has no metadata of {uri}")
    text = document.title if type_ == DomainMetadataType.TITLE else document.description
    if not text:
        raise NoMetadata(f"{what} has no {_KINDS[type_]}")
    return text


class Change:
    """The change to one document, checked before the first is touched."""

    def __init__(self, type_: int, text: str | None, key: str | None, uri: str | None) -> None:
        if type_ not in _KINDS:
            raise InvalidArgument(f"there is no metadata type {type_}")
        if text is not None and len(text) > LIMIT:
            raise InvalidArgument(f"metadata of {len(text)} characters is too long: at most {LIMIT}")
        if type_ == DomainMetadataType.TITLE and text and "\n" in text:
            raise InvalidArgument("a title is one line")
        if type_ == DomainMetadataType.ELEMENT and not uri:
            raise InvalidArgument("a metadata element is named by its namespace")
        self.type, self.text, self.uri = type_, text or None, uri or ""
        self.raw = _with_namespace(text, key, self.uri) if type_ == DomainMetadataType.ELEMENT and text else None

    def __call__(self, document: Domain | Network) -> None:
        if self.type == DomainMetadataType.TITLE:
            document.title = self.text
        elif self.type == DomainMetadataType.DESCRIPTION:
            document.description = self.text
        else:
            others = [
                raw for raw in document.metadata if etree.QName(etree.fromstring(raw, _PARSER)).namespace != self.uri
            ]
            document.metadata = [*others, self.raw] if self.raw is not None else others


def _with_namespace(text: str, key: str | None, uri: str) -> bytes:
    if not key:
        raise InvalidArgument("a metadata element needs a prefix (key) for its namespace")
    try:
        element = etree.fromstring(text, _PARSER)
        root = _move(element, None, uri, key)
    except (etree.XMLSyntaxError, ValueError) as error:
        raise InvalidArgument(f"the metadata is not one well-formed element: {error}") from error
    if "<!DOCTYPE" in text:
        raise InvalidArgument("a document type declaration in metadata is refused")
    return etree.tostring(root)


def _without_namespace(element: etree._Element, uri: str) -> str:
    root = _move(element, uri, None, None)
    etree.cleanup_namespaces(root)
    return etree.tostring(root, encoding="unicode").strip()


def _move(element: etree._Element, old: str | None, new: str | None, prefix: str | None) -> etree._Element:
    """A copy of the tree whose elements in namespace `old` are in `new`."""
    nsmap: Any = {name: uri for name, uri in element.nsmap.items() if uri != old}
    if prefix and new:
        nsmap[prefix] = new

    def copy_of(node: etree._Element, parent: etree._Element | None) -> etree._Element:
        if not isinstance(node.tag, str):
            fresh = copy.deepcopy(node)
            if parent is not None:
                parent.append(fresh)
            return fresh
        name = etree.QName(node)
        tag = etree.QName(new, name.localname) if name.namespace == old else name
        kept: Any = node.nsmap
        fresh = etree.Element(tag, nsmap=nsmap) if parent is None else etree.SubElement(parent, tag, nsmap=kept)
        fresh.text = node.text
        for attribute, value in node.attrib.items():
            fresh.set(attribute, value)
        for child in node:
            copy_of(child, fresh).tail = child.tail
        return fresh

    return copy_of(element, None)
