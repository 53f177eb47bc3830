"""The `newc` cpio archive, the format of an initramfs (Documentation/driver-api/early-userspace/buffer-format.rst).

Only writing is here: the kernel is the reader. Archives are reproducible: the order of the calls, no time stamps,
owner 0:0 unless said, inode numbers counted from 1.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable
from types import TracebackType
from typing import BinaryIO

from kvik.errors import InvalidArgument

__all__ = ["CpioWriter"]

MAGIC = b"070701"
TRAILER = "TRAILER!!!"
PATH_MAX = 4096  # the kernel's unpacker skips longer names without a word (init/initramfs.c)


class CpioWriter:
    """Writes one archive to `stream`; directories above a path are made as needed.

    Use as a context manager: the trailer is written on a clean exit, so a half-written archive never looks whole.
    """

    def __init__(self, stream: BinaryIO, *, mtime: int = 0) -> None:
        self._stream = stream
        self._mtime = mtime
        self._inode = 0
        self._written = 0
        self._names: set[str] = set()

    def __enter__(self) -> CpioWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._record(TRAILER, 0, b"", nlink=1, inode=0)

    def __contains__(self, path: str) -> bool:
        return _clean(path) in self._names

    def directory(self, path: str, mode: int = 0o755) -> None:
        """A directory; a second call for the same path does nothing."""
        name = _clean(path)
        if name and name not in self._names:
            self._parents(name)
            self._add(name, stat.S_IFDIR | mode, b"", nlink=2)

    def directories(self, paths: Iterable[str]) -> None:
        for path in paths:
            self.directory(path)

    def file(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """A regular file with this content."""
        self._entry(path, stat.S_IFREG | mode, data)

    def symlink(self, path: str, target: str) -> None:
        self._entry(path, stat.S_IFLNK | 0o777, target.encode())

    def device(self, path: str, kind: int, major: int, minor: int, mode: int = 0o600) -> None:
        """A device node; `kind` is `stat.S_IFCHR` or `stat.S_IFBLK`."""
        self._entry(path, kind | mode, b"", rdev=(major, minor))

    def _entry(self, path: str, mode: int, data: bytes, rdev: tuple[int, int] = (0, 0)) -> None:
        name = _clean(path)
        if name in self._names or not name:
            raise InvalidArgument(f"the archive already has {path!r}" if name else "an archive entry needs a name")
        self._parents(name)
        self._add(name, mode, data, rdev=rdev)

    def _parents(self, name: str) -> None:
        if "/" in name:
            self.directory(name.rpartition("/")[0])

    def _add(self, name: str, mode: int, data: bytes, *, nlink: int = 1, rdev: tuple[int, int] = (0, 0)) -> None:
        self._inode += 1
        self._names.add(name)
        self._record(name, mode, data, nlink=nlink, inode=self._inode, rdev=rdev)

    def _record(
        self, name: str, mode: int, data: bytes, *, nlink: int, inode: int, rdev: tuple[int, int] = (0, 0)
    ) -> None:
        encoded = name.encode() + b"\0"
        if len(encoded) > PATH_MAX:
            raise InvalidArgument(f"a path of {len(encoded) - 1} bytes is too long for an initramfs")
        if len(data) >= 1 << 32:
            raise InvalidArgument(f"{name!r} is too big for an initramfs: 4 GiB is the format's limit")
        fields = (inode, mode, 0, 0, nlink, self._mtime, len(data), 0, 0, *rdev, len(encoded), 0)
        self._write(MAGIC + b"".join(b"%08X" % field for field in fields) + encoded)
        self._pad()
        self._write(data)
        self._pad()

    def _write(self, data: bytes) -> None:
        self._stream.write(data)
        self._written += len(data)

    def _pad(self) -> None:
        self._write(b"\0" * (-self._written % 4))


def _clean(path: str) -> str:
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if ".." in parts or "\0" in path:
        raise InvalidArgument(f"{path!r} cannot be a path in an archive")
    return "/".join(parts)
