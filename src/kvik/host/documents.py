"""Documents of users, one a file and its name the file's: what the stores of machines, networks and filters do alike.

All functions block. An error leaves the old content, or no file where there was none.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from kvik.errors import HostError, InvalidArgument, KvikError
from kvik.host import files

__all__ = [
    "DOCUMENT_LIMIT",
    "SUFFIX",
    "Definitions",
    "Loaded",
    "check_document_name",
    "load_all",
    "remove",
    "replace",
    "set_aside",
]

logger = logging.getLogger(__name__)

SUFFIX = ".xml"
NAME_LIMIT = 200  # bytes in UTF-8: file systems take 255, and the name gets prefixes and suffixes
DOCUMENT_LIMIT = 4 << 20  # bytes; the wire's limit for one string


def check_document_name(name: str, what: str) -> str:
    """The name of a machine or network (`what`) if it is fit to be a file's name in our directories, else
    `InvalidArgument`."""
    if not name:
        raise InvalidArgument(f"a {what} needs a name that is not empty")
    if name[0] in "-." or "/" in name or not name.isprintable() or name != name.strip():
        raise InvalidArgument(
            f"{what} name {name!r} is not allowed",
            remedy="leave out '/', control characters, spaces at the ends, and '-' or '.' at the start",
        )
    try:
        size = len(name.encode())
    except UnicodeEncodeError as error:
        raise InvalidArgument(f"{what} name {name!r} is not valid text") from error
    if size > NAME_LIMIT:
        raise InvalidArgument(f"{what} name {name[:20]!r}... has {size} bytes: at most {NAME_LIMIT} are allowed")
    return name


class Named(Protocol):
    @property
    def name(self) -> str | None: ...


Document = TypeVar("Document", bound=Named)


def load_all(
    directory: Path, suffix: str, most: int, what: str, parse: Callable[[bytes], Document]
) -> tuple[dict[str, Document], list[str]]:
    """Those that are called as their files are, by name; and warnings of what was set aside."""
    found: dict[str, Document] = {}
    warnings: list[str] = []
    for path in sorted(directory.glob(f"*{suffix}"))[:most]:
        name = path.name.removesuffix(suffix)
        try:
            check_document_name(name, what)
            document = parse(files.read_file(path, limit=DOCUMENT_LIMIT))
            if document.name != name:
                raise InvalidArgument(f"it is called {document.name!r}")
        except KvikError as error:
            warnings.append(set_aside(path, str(error)))
            continue
        found[name] = document
    return found, warnings


def replace(path: Path, data: bytes, link: Path | None = None) -> None:
    """Write a document, durably. `link`: its autostart link; one that could not be removed with an earlier document
    must not start this one, if it is new."""
    before = files.try_read_file(path, limit=DOCUMENT_LIMIT)
    if before is None and link is not None:
        files.remove_file(link, durable=False)
    try:
        files.atomic_write(path, data)
    except HostError:
        # It may have been renamed into place already, and only not be durable.
        with suppress(HostError):
            if files.try_read_file(path, limit=DOCUMENT_LIMIT) != before:
                if before is None:
                    files.remove_file(path, durable=False)
                else:
                    files.atomic_write(path, before, durable=False)
        raise


def remove(path: Path) -> None:
    """What was removed cannot be brought back: that it is not durable yet is a warning only."""
    try:
        files.remove_file(path)
    except HostError as error:
        if path.is_symlink() or path.exists():
            raise
        logger.warning("%s", error)


def set_aside(path: Path, why: str) -> str:
    """Give a file that is of no use another name, so that nothing is lost; return (and log) the warning."""
    number = 0
    while (aside := path.with_name(f"{path.name}.corrupt-{number}")).exists():
        number += 1
    try:
        path.rename(aside)
        text = f"{path} was set aside as {aside.name}: {why}"
    except OSError as error:
        text = f"{path} is ignored: {why} (and it cannot be renamed: {error.strerror})"
    logger.warning("%s", text)
    return text


Status = TypeVar("Status")


@dataclass(slots=True)
class Loaded(Generic[Status]):
    """What `Definitions.load` found."""

    documents: list[tuple[str, str]] = field(default_factory=list)  # (name by the file, text)
    autostart: set[str] = field(default_factory=set)
    statuses: list[Status] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


class Definitions(Generic[Status]):
    """Definitions of one kind of thing (`what`), the links of those that start with the host, and the live status of
    each that is active. `parse` makes a status of a file's bytes and the name that the file has; `KvikError` where it
    is none of that name."""

    def __init__(self, definitions: Path, status: Path, what: str, parse: Callable[[bytes, str], Status]) -> None:
        self.definitions = definitions
        self.links = definitions / "autostart"
        self.status = status
        self._what, self._parse = what, parse

    def load(self) -> Loaded[Status]:
        """Read everything. `HostError` only if the directories cannot be had."""
        loaded: Loaded[Status] = Loaded()
        for directory in (self.definitions, self.links, self.status):
            files.ensure_directory(directory)
            with suppress(HostError):
                files.remove_temporaries(directory, older_than=0)
        for name, data in self._read_all(self.definitions, loaded):
            try:
                loaded.documents.append((name, data.decode()))
            except UnicodeDecodeError as error:
                loaded.warnings.append(self.set_aside(name, f"not UTF-8: {error}"))
        for name, data in self._read_all(self.status, loaded):
            try:
                loaded.statuses.append(self._parse(data, name))
            except KvikError as error:
                loaded.warnings.append(set_aside(self.status / f"{name}{SUFFIX}", str(error)))
        defined = {name for name, _ in loaded.documents}
        for link in self.links.glob(f"*{SUFFIX}"):
            if link.name.removesuffix(SUFFIX) in defined:
                loaded.autostart.add(link.name.removesuffix(SUFFIX))
            else:
                with suppress(HostError):
                    files.remove_file(link, durable=False)
        return loaded

    def _read_all(self, directory: Path, loaded: Loaded[Status]) -> Iterator[tuple[str, bytes]]:
        for path in sorted(directory.glob(f"*{SUFFIX}")):
            name = path.name.removesuffix(SUFFIX)
            try:
                check_document_name(name, self._what)
                yield name, files.read_file(path, limit=DOCUMENT_LIMIT)
            except KvikError as error:
                loaded.warnings.append(set_aside(path, str(error)))

    def set_aside(self, name: str, why: str) -> str:
        """Give a definition that is of no use another name; return (and log) the warning."""
        return set_aside(self.definitions / f"{name}{SUFFIX}", why)

    def save(self, name: str, text: str) -> None:
        """On an error the old content is there, or no file if there was none."""
        path = self._in(self.definitions, name)
        replace(path, text.encode(), self.links / path.name)

    def remove(self, name: str) -> None:
        path = self._in(self.definitions, name)
        remove(path)
        with suppress(HostError):  # the definition is gone; `load` drops a link without one
            files.remove_file(self.links / path.name)

    def set_autostart(self, name: str, on: bool) -> None:
        link = self._in(self.links, name)
        if on:
            files.atomic_symlink(self.definitions / link.name, link)
        else:
            files.remove_file(link)

    # live status: must outlive the daemon, not the host, so nothing is fsynced

    def write_status(self, name: str, data: bytes) -> None:
        files.atomic_write(self._in(self.status, name), data, durable=False)

    def remove_status(self, name: str) -> None:
        files.remove_file(self._in(self.status, name), durable=False)

    def _in(self, directory: Path, name: str) -> Path:
        """`InvalidArgument` for a name that cannot be a file's."""
        return directory / f"{check_document_name(name, self._what)}{SUFFIX}"
