"""Where the uncompressed kernel of a bzImage lies in the cache, without opening the bzImage. Imports nothing slow: a
machine's start goes through here (`image.kernel` fills the cache)."""

from __future__ import annotations

import os

__all__ = ["identity", "lookup"]


def identity(fd: int) -> str:
    """What tells an open kernel file from all others and from its own earlier contents."""
    status = os.fstat(fd)
    fields = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return "-".join(f"{value:x}" for value in fields)


def lookup(cache: str, identity: str, path: str) -> str | None:
    """The cached kernel (or `path` itself); "" for "known to have no PVH entry"; None for "not known"."""
    try:
        with open(f"{cache}/index/{identity}", "rb") as stream:  # noqa: PTH123 - pathlib takes 4 ms to import
            digest = stream.read(128).decode("ascii")
    except (FileNotFoundError, NotADirectoryError, UnicodeDecodeError):
        return None
    if digest == "none":
        return ""
    if digest == "self":
        return path
    kernel = f"{cache}/{digest}.vmlinux"
    try:
        os.utime(kernel)  # what was used last stays longest
    except OSError:
        return None
    return kernel
