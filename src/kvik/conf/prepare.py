"""All passes over a domain document in one, and the line number for errors of the later passes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kvik.conf.domain import Domain, parse_domain
from kvik.conf.machine import MachineDefaults
from kvik.conf.postparse import postparse
from kvik.conf.reader import read_xml
from kvik.conf.validate import validate
from kvik.errors import ConfigError

_STEP = re.compile(r"[A-Za-z_][\w.-]*(\[[0-9]+\])?")


def find_line(xml: str | bytes, path: str) -> int:
    """The line of the element at `path`, or of the nearest one above it that the text has; 0 if there is none.

    Costs a second parse, which is why only errors pay for it: Structs do not carry line numbers.
    """
    try:
        node = read_xml(xml)
    except ConfigError:
        return 0
    line: Any = node.sourceline or 0  # Any: the stubs of lxml do not know that it is a number
    for step in path.split("/")[2:]:
        if not _STEP.fullmatch(step):
            break
        name, _, index = step.rstrip("]").partition("[")
        same = [child for child in node if child.tag == name]
        if len(same) < int(index or 1):
            break
        node = same[int(index or 1) - 1]
        line = node.sourceline or line
    return int(line)


@contextmanager
def located(xml: str | bytes) -> Iterator[None]:
    """Adds the line in `xml` to a ConfigError raised inside that knows only its path."""
    try:
        yield
    except ConfigError as error:
        if error.path and not error.line:
            error.line = find_line(xml, error.path)
        raise


def load_domain(xml: str | bytes, caps: MachineDefaults | None = None) -> Domain:
    """Parse, complete, validate. Raises ConfigError with line, path and reason."""
    domain = parse_domain(xml)
    with located(xml):
        postparse(domain, caps)
        validate(domain)
    return domain
