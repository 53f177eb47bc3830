"""Pools on disk: definitions, autostart links, live status. The daemon may be killed between any two steps.

    <config>/storage/NAME.xml            the definition; fsynced
    <config>/storage/autostart/NAME.xml  link to it
    <run>/storage/NAME.xml               live status: said before anything is done on this host

All functions block. What cannot be read is set aside under another name with a warning, and stops nothing.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from kvik.conf.storage_state import PoolState, format_state, parse_state
from kvik.errors import ConfigError, HostError, KvikError
from kvik.host import documents, files
from kvik.host.documents import DOCUMENT_LIMIT, SUFFIX, check_document_name, set_aside
from kvik.host.process import boot_id
from kvik.paths import Paths

__all__ = ["Loaded", "Store", "check_name"]

logger = logging.getLogger(__name__)


def check_name(name: str) -> str:
    """The name if a pool can have it, else `InvalidArgument`."""
    return check_document_name(name, "storage pool")


@dataclass(slots=True)
class Loaded:
    """What `load` found."""

    documents: list[tuple[str, str]] = field(default_factory=list)  # (name by the file, text)
    autostart: set[str] = field(default_factory=set)
    states: list[PoolState] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


class Store:
    def __init__(self, paths: Paths) -> None:
        self.definitions = paths.pools
        self.links = paths.pools / "autostart"
        self.status = paths.pool_status
        self.images = paths.images
        self.boot = boot_id()

    def load(self) -> Loaded:
        """Read everything. `HostError` only if the directories cannot be had."""
        loaded = Loaded()
        for directory in (self.definitions, self.links, self.status):
            files.ensure_directory(directory)
            with contextlib.suppress(HostError):
                files.remove_temporaries(directory, older_than=0)
        for name, data in self._read_all(self.definitions, loaded):
            try:
                loaded.documents.append((name, data.decode()))
            except UnicodeDecodeError as error:
                loaded.warnings.append(self.set_aside(name, f"not UTF-8: {error}"))
        for name, data in self._read_all(self.status, loaded):
            try:
                state = parse_state(data)
                if state.document.name != name:
                    raise ConfigError("it is not of this pool")
                loaded.states.append(state)
            except ConfigError as error:
                loaded.warnings.append(set_aside(self.status / f"{name}{SUFFIX}", str(error)))
        defined = {name for name, _ in loaded.documents}
        for link in self.links.glob(f"*{SUFFIX}"):
            if link.name.removesuffix(SUFFIX) in defined:
                loaded.autostart.add(link.name.removesuffix(SUFFIX))
            else:
                with contextlib.suppress(HostError):
                    files.remove_file(link, durable=False)
        return loaded

    def _read_all(self, directory: Path, loaded: Loaded) -> Iterator[tuple[str, bytes]]:
        for path in sorted(directory.glob(f"*{SUFFIX}")):
            name = path.name.removesuffix(SUFFIX)
            try:
                check_name(name)
                yield name, files.read_file(path, limit=DOCUMENT_LIMIT)
            except KvikError as error:
                loaded.warnings.append(set_aside(path, str(error)))

    def set_aside(self, name: str, why: str) -> str:
        """Give a definition that is of no use another name; return (and log) the warning."""
        return set_aside(self.definitions / f"{name}{SUFFIX}", why)

    # definitions

    def save(self, name: str, text: str) -> None:
        """On an error the old content is there, or no file if there was none."""
        path = self.definitions / f"{check_name(name)}{SUFFIX}"
        documents.replace(path, text.encode(), self.links / path.name)

    def remove(self, name: str) -> None:
        path = self.definitions / f"{check_name(name)}{SUFFIX}"
        documents.remove(path)
        with contextlib.suppress(HostError):  # the definition is gone; `load` drops a link without one
            files.remove_file(self.links / path.name)

    def set_autostart(self, name: str, on: bool) -> None:
        link = self.links / f"{check_name(name)}{SUFFIX}"
        if on:
            files.atomic_symlink(self.definitions / link.name, link)
        else:
            files.remove_file(link)

    # live status: must outlive the daemon, not the host, so nothing is fsynced

    def save_state(self, state: PoolState) -> None:
        path = self.status / f"{check_name(state.document.name)}{SUFFIX}"
        files.atomic_write(path, format_state(state), durable=False)

    def remove_state(self, name: str) -> None:
        files.remove_file(self.status / f"{check_name(name)}{SUFFIX}", durable=False)
