"""Filters and bindings on disk: one document a file, its name the file's name.

<config>/nwfilter/NAME.xml            filters that somebody defined; fsynced
<run>/nwfilter-binding/DEVICE.xml     what is on which interface; need not outlive the host
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from kvik.conf.nwfilter import (
    FilterBinding,
    NetworkFilter,
    format_binding,
    format_filter,
    parse_binding,
    parse_filter,
)
from kvik.errors import ConfigError, HostError, KvikError
from kvik.host import documents, files
from kvik.paths import Paths

__all__ = ["FilterStore"]

logger = logging.getLogger(__name__)

Document = TypeVar("Document", NetworkFilter, FilterBinding)


class FilterStore:
    def __init__(self, paths: Paths) -> None:
        self.filters = paths.nwfilters
        self.bindings = paths.nwfilter_bindings

    def open(self) -> None:
        for directory in (self.filters, self.bindings):
            files.ensure_directory(directory)
            files.remove_temporaries(directory)

    def load_filters(self) -> list[NetworkFilter]:
        return self._load(self.filters, parse_filter, lambda one: one.name, "name")

    def load_bindings(self) -> list[FilterBinding]:
        return self._load(self.bindings, parse_binding, lambda one: one.portdev, "interface")

    def save_filter(self, one: NetworkFilter) -> None:
        """On an error the old content is there, or no file if there was none."""
        documents.replace(self.filters / f"{one.name}.xml", format_filter(one).encode())

    def remove_filter(self, name: str) -> None:
        files.remove_file(self.filters / f"{name}.xml")

    def save_binding(self, one: FilterBinding) -> None:
        files.atomic_write(self.bindings / f"{one.portdev}.xml", format_binding(one).encode(), durable=False)

    def remove_binding(self, device: str) -> None:
        files.remove_file(self.bindings / f"{device}.xml", durable=False)

    @staticmethod
    def _load(
        directory: Path, parse: Callable[[bytes], Document], named: Callable[[Document], str], what: str
    ) -> list[Document]:
        """All that can be read. One that is not called as its file is, or is none, is set aside."""
        found = []
        for path in sorted(directory.glob("*.xml")):
            try:
                data = files.read_file(path, limit=documents.DOCUMENT_LIMIT)
            except HostError as error:
                logger.warning("%s is ignored: %s", path, error)
                continue
            try:
                one = parse(data)
                if named(one) != path.stem:
                    raise ConfigError(f"its {what} is {named(one)!r}")
                found.append(one)
            except KvikError as error:
                documents.set_aside(path, str(error))
        return found
