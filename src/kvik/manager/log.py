"""One log per machine: what was started, what the VMM said, why it ended.

The VMM writes to it itself, through an append-only descriptor that outlives the daemon. So a log is rotated by
copying its end away and truncating it, never by renaming it under the writer.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from kvik.errors import HostError
from kvik.host.files import ensure_directory, host_error

LIMIT = 2 << 20  # bytes in one file before it is rotated
KEPT = 3  # old files: NAME.log.1 is the youngest
LINE_LIMIT = 64 << 10  # bytes of one note

_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC


def timestamp(now: float | None = None) -> str:
    """UTC with milliseconds, as in `2026-01-31 12:00:00.123+0000`."""
    seconds = time.time() if now is None else now
    return f"{time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime(seconds))}.{int(seconds * 1000) % 1000:03d}+0000"


def cut(path: Path, limit: int = LIMIT) -> bool:
    """Rotate any file that somebody appends to, as `MachineLog.rotate` does its own."""
    return MachineLog(path.parent, "", limit=limit, path=path).rotate()


class MachineLog:
    """The log of one machine, `DIRECTORY/NAME.log`. Nothing is created before the first use."""

    def __init__(self, directory: Path, name: str, *, limit: int = LIMIT, path: Path | None = None) -> None:
        self.path = path or directory / f"{name}.log"
        self._limit = limit

    def open(self) -> int:
        """An append-only descriptor for the VMM's stderr; the caller closes it. `HostError` if it cannot be had."""
        ensure_directory(self.path.parent)
        try:
            return os.open(self.path, _FLAGS, 0o600)
        except OSError as error:
            raise host_error("open log", self.path, error) from error

    def note(self, text: str) -> None:
        """Add a line of our own. Never raises: a full disk must not stop a machine from being stopped."""
        data = f"{timestamp()}: {text}\n".encode(errors="replace")[:LINE_LIMIT]
        with contextlib.suppress(OSError, HostError):
            ensure_directory(self.path.parent)
            fd = os.open(self.path, _FLAGS, 0o600)
            try:
                os.write(fd, data)
            finally:
                os.close(fd)

    def size(self) -> int:
        try:
            return self.path.stat().st_size
        except OSError:
            return 0

    def rotate(self) -> bool:
        """Move the content away if there is too much of it; at most `KEPT` old files stay. False if left alone.

        What a VMM writes between the copy and the truncation is lost; what it writes afterwards goes to the start
        of the file, because its descriptor appends.
        """
        size = self.size()
        if size <= self._limit:
            return False
        try:
            for number in range(KEPT, 1, -1):
                with contextlib.suppress(FileNotFoundError):
                    self._old(number - 1).rename(self._old(number))
            self._copy_end(size, self._old(1))
            os.truncate(self.path, 0)
        except OSError:
            # No room for a copy: the bound is kept all the same.
            with contextlib.suppress(OSError):
                os.truncate(self.path, 0)
        return True

    def _old(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{number}")

    def _copy_end(self, size: int, target: Path) -> None:
        """The last `limit` bytes: a VMM that floods its log must not fill the disk with copies either."""
        source = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
            sink = os.open(target, flags, 0o600)
            try:
                offset = max(0, size - self._limit)
                while data := os.pread(source, 1 << 18, offset):
                    os.write(sink, data)
                    offset += len(data)
            finally:
                os.close(sink)
        finally:
            os.close(source)

    def tail(self, limit: int = 4096) -> str:
        """The last `limit` bytes as text, "" if there is no log."""
        try:
            with self.path.open("rb") as file:
                file.seek(max(0, self.size() - limit))
                return file.read(limit).decode(errors="replace")
        except OSError:
            return ""

    def remove(self) -> None:
        for path in (self.path, *(self._old(number) for number in range(1, KEPT + 1))):
            path.unlink(missing_ok=True)

    def rename(self, name: str) -> None:
        """Follow a machine that got another name. Never raises."""
        new = MachineLog(self.path.parent, name, limit=self._limit)
        for old, fresh in [(self.path, new.path), *((self._old(n), new._old(n)) for n in range(1, KEPT + 1))]:
            with contextlib.suppress(OSError):
                old.rename(fresh)
        self.path = new.path
