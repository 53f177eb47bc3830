"""XML text from outside, turned into an element tree under bounds; nothing is loaded, expanded or fetched.

A document type declaration is refused, so no entity beyond XML's own five can exist. The bounds hold before memory
is spent: the size and the number of tags are known before the parser runs, and libxml2's own depth limit (256) stops
it before ours is looked at.
"""

from __future__ import annotations

import re

from lxml import etree

from kvik.errors import ConfigError

MAX_BYTES = 4 * 1024 * 1024
MAX_ELEMENTS = 20_000
MAX_DEPTH = 64

# What may stand before the root element: declaration, processing instructions, comments.
_PROLOG = re.compile(rb"(?:\xef\xbb\xbf)?(?:\s+|<\?.*?\?>|<!--.*?-->)*", re.DOTALL)
_TOO_DEEP = etree.XPath("boolean(" + "/*" * (MAX_DEPTH + 1) + ")")
_PARSER = etree.XMLParser(
    encoding="utf-8",
    resolve_entities=False,
    load_dtd=False,
    no_network=True,
    huge_tree=False,
    remove_pis=True,
    collect_ids=False,
)


def read_xml(xml: str | bytes, what: str = "document") -> etree._Element:
    """The root element of `xml` (UTF-8 if bytes). Raises ConfigError, with the line where it is known."""
    try:
        data = xml.encode() if isinstance(xml, str) else bytes(xml)
        data.decode()
    except UnicodeError as error:
        raise ConfigError(f"the {what} is not UTF-8: {error}") from error
    if len(data) > MAX_BYTES:
        raise ConfigError(f"the {what} has {len(data)} bytes; at most {MAX_BYTES} are read")
    if data.count(b"<") > 2 * MAX_ELEMENTS:  # every element has at most two tags
        raise ConfigError(f"the {what} has more than {MAX_ELEMENTS} elements")
    prolog = _PROLOG.match(data)
    start = prolog.end() if prolog else 0
    if data.startswith(b"<!", start):
        line = data.count(b"\n", 0, start) + 1
        raise ConfigError(f"a document type declaration in a {what} is refused", line=line)
    if start == len(data):
        raise ConfigError(f"the {what} is empty")
    try:
        root = etree.fromstring(data, _PARSER)
    except etree.XMLSyntaxError as error:
        reason = (error.msg or "not well formed").rsplit(", line ", 1)[0]
        if reason.startswith("Excessive depth"):  # libxml2 goes on with advice for programmers
            raise ConfigError(
                f"the {what} is nested more than {MAX_DEPTH} elements deep", line=error.lineno or 0
            ) from error
        raise ConfigError(f"the {what} is not well-formed XML: {reason}", line=error.lineno or 0) from error
    if _TOO_DEEP(root):
        raise ConfigError(f"the {what} is nested more than {MAX_DEPTH} elements deep")
    return root
