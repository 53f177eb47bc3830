"""The host's configuration files, as the formats see them: read through what is staged, changed by replacing whole.

Paths are the host's own ("/etc/network/interfaces"), wherever the tree's root lies. A format reads a tree and returns
`Changes`; nobody but `apply` writes. So each format is a function of text, and a change that is staged is seen by the
next one before anything is on disk.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from kvik.errors import HostError
from kvik.host.files import atomic_write, ensure_directory, remove_file, try_read_file

Changes = dict[str, bytes | None]  # path -> new content; None: removed
Command = tuple[str, ...]
LIMIT = 1 << 20  # bytes of one file
FILES_MAX = 1000  # of one directory


class Move(NamedTuple):
    """What was done live: `port` went into `bridge`, or out of it."""

    bridge: str
    port: str
    into: bool


class Tree:
    """`staged` lies over what is on disk below `root`."""

    def __init__(self, root: Path, staged: Mapping[str, bytes | None] | None = None) -> None:
        self.root = root
        self.staged: Changes = dict(staged or {})

    def disk(self, path: str) -> Path:
        return self.root / path.lstrip("/")

    def read(self, path: str) -> str | None:
        """The file's text, None if there is none. What is not UTF-8 survives (surrogateescape), `HostError` else."""
        data = self.staged[path] if path in self.staged else self.read_disk(path)
        return None if data is None else data.decode("utf-8", "surrogateescape")

    def read_disk(self, path: str) -> bytes | None:
        place = self.disk(path)
        if place.is_symlink():  # resolved within the root only: /etc/netplan/x -> elsewhere is the host's own affair
            place = place.resolve()
            if not place.is_relative_to(self.root.resolve()):
                raise HostError(f"will not follow {path}: it leads out of {self.root}")
        return try_read_file(place, limit=LIMIT)

    def list(self, directory: str, pattern: str) -> list[str]:
        """Paths of the files of a directory, sorted by name, that match a pattern; staged ones among them."""
        found = {path for path in self.staged if path.rpartition("/")[0] == directory}
        try:
            names = os.listdir(self.disk(directory))  # noqa: PTH208 - names are all that is wanted
        except (FileNotFoundError, NotADirectoryError):
            names = []
        except OSError as error:
            raise HostError(f"cannot list {directory}: {error.strerror}", errno=error.errno or 0) from error
        found |= {f"{directory}/{name}" for name in names[:FILES_MAX]}
        return sorted(
            path
            for path in found
            if self.staged.get(path, b"") is not None and fnmatch.fnmatchcase(path.rpartition("/")[2], pattern)
        )

    def exists(self, directory: str) -> bool:
        return self.disk(directory).is_dir() or any(path.startswith(f"{directory}/") for path in self.staged)

    def stage(self, changes: Mapping[str, bytes | None]) -> None:
        self.staged.update(changes)


def encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


# Both may hold passwords (802.1X, Wi-Fi); NetworkManager refuses profiles that others can read.
PRIVATE = ("/etc/NetworkManager/", "/etc/netplan/")


def apply(root: Path, changes: Mapping[str, bytes | None], keep: Path) -> list[str]:
    """Write `changes`; the first original of each file is kept below `keep`, for ever. Returns their paths.

    A file keeps its mode; a new one is readable for all (networkd is not root), but for those that are `PRIVATE`.
    """
    tree = Tree(root)
    kept: list[str] = []
    for path, data in changes.items():
        place = tree.disk(path)
        before = tree.read_disk(path)
        if before == data:
            continue
        mode = 0o600 if path.startswith(PRIVATE) else 0o644
        if before is not None:
            mode = place.stat().st_mode & 0o777
            original = keep / path.lstrip("/")
            if not original.exists():
                ensure_directory(original.parent)
                atomic_write(original, before)
                kept.append(str(original))
        if data is None:
            remove_file(place)
            continue
        ensure_directory(place.parent, 0o755)
        atomic_write(place.resolve() if place.is_symlink() else place, data, mode=mode, exact=True)
    return kept
