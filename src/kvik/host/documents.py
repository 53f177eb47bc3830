"""Documents of users, one a file and its name the file's: what the stores of machines, networks and filters do alike.

All functions block. An error leaves the old content, or no file where there was none.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Protocol, TypeVar

from kvik.errors import HostError, InvalidArgument, KvikError
from kvik.host import files

__all__ = ["DOCUMENT_LIMIT", "SUFFIX", "check_document_name", "load_all", "remove", "replace", "set_aside"]

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
