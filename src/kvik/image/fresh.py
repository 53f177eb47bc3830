"""A file that becomes an image: made, or made anew; undone if it does not become one."""

from __future__ import annotations

import os
import stat

from kvik.errors import ImageError
from kvik.image.create import create
from kvik.image.opening import beside, plain_file

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Self

__all__ = ["Fresh", "FreshImage"]

FLAGS = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK


class Fresh:
    """An open, locked descriptor of a regular file or block device to be filled.

    Left without `keep` having been called, a file that did not exist is removed, and one that did and was changed is
    empty: half an image would look like a whole one. Raises `ImageError`, `OSError`, `ResourceBusy`.
    """

    def __init__(self, path: str, *, lock: bool = True) -> None:
        self.path = path
        self.kept = False
        self.made = True
        try:
            self.fd = os.open(path, FLAGS | os.O_EXCL, 0o644)
        except FileExistsError:
            self.made = False
            self.fd = os.open(path, FLAGS, 0o644)
        try:
            self._before = os.fstat(self.fd)
            self.is_device = stat.S_ISBLK(self._before.st_mode)
            if not (stat.S_ISREG(self._before.st_mode) or self.is_device):
                raise ImageError("is neither a regular file nor a block device", file=path)
            if lock:
                from kvik.image.lock import lock_image

                lock_image(self.fd, path, write=True)
        except BaseException:
            os.close(self.fd)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            if not self.kept:
                self._undo()
        finally:
            os.close(self.fd)

    def keep(self) -> None:
        """It is an image now."""
        self.kept = True

    def _undo(self) -> None:
        ours = os.fstat(self.fd)
        if self.is_device or (not self.made and _version(ours) == _version(self._before)):
            return  # nothing was done to it
        if not self.made:
            os.ftruncate(self.fd, 0)
            return
        try:
            os.ftruncate(self.fd, 0)
        except OSError:  # btrfs at its quota, which lets files be removed
            pass
        try:
            there = os.stat(self.path, follow_symlinks=False)  # noqa: PTH116
        except OSError:
            return
        if (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino):  # and nobody put another in its place
            os.unlink(self.path)  # noqa: PTH108 - pathlib costs 4 ms of start


def _version(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


class FreshImage:
    """An empty image in a new file, with its external data file, which is beside it unless its name is absolute.

    `options` are those of `CreateOptions`. Left without `keep`, nothing of it stays.
    """

    def __init__(self, path: str, format: str, size: int, options: dict[str, Any]) -> None:
        self.path, self.format = path, format
        self._files = [Fresh(path)]
        try:
            if (name := options.get("data_file")) is not None:
                there = beside(path, plain_file(name, "data file", path))
                self._files.append(Fresh(there, lock=False))
                create(self._files[1].fd, "raw", size)
            create(self.fd, format, size, **options)
        except BaseException as error:
            self.__exit__(type(error), error)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        for error in exc:
            if isinstance(error, OSError):  # the kernel does not say of which file
                error.filename = error.filename or self.path
        for file in self._files:
            file.__exit__()

    @property
    def fd(self) -> int:
        return self._files[0].fd

    @property
    def zeroed(self) -> bool:
        """Whether it reads as zero everywhere: a device keeps what was on it."""
        return not self._files[0].is_device or self.format != "raw"

    def keep(self) -> None:
        for file in self._files:
            file.keep()
