"""The file of a saved machine: what it is, its document, its memory and devices.

    0      header, 512 bytes: magic, version, what lies where, checksums; the last thing that is written
    4096   the document, and where that ends, at a multiple of 4096, the stream that the VMM sent
    ...    documents that replaced the first one, each behind all that was there

Everything in it may come from anywhere: it is bounded before it is read, and what was read is checked. Numbers are
little-endian. All functions block, and raise `HostError` and `OperationFailed`.
"""

from __future__ import annotations

import fcntl
import logging
import os
import stat
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

from kvik.errors import InvalidArgument, OperationFailed, ResourceBusy
from kvik.host.documents import DOCUMENT_LIMIT
from kvik.host.files import fsync_directory, host_error

logger = logging.getLogger(__name__)

__all__ = ["Facts", "Reader", "Writer", "document", "look", "remove", "replace_document"]

MAGIC, VERSION = b"KVIKSAVE", 1
HEADER_SIZE, ALIGNMENT = 512, 4096
RUNNING = 1  # flag: it ran when it was saved
LARGEST = 1 << 52  # bytes of a stream
DROP_EVERY = 64 << 20  # bytes between two rounds of emptying the cache
# magic, version, flags, document: offset, size, CRC; stream: offset, size, CRC; token; driver; then the CRC of all that
_HEADER = struct.Struct("<8sIIQQIxxxxQQIxxxx16s32s")
_CRC = struct.Struct("<I")


class Facts(NamedTuple):
    """What the header says. `token` is of this file alone; `driver` is the VMM that wrote the stream."""

    flags: int
    document: tuple[int, int, int]  # offset, size, CRC
    stream: tuple[int, int, int]
    token: str
    driver: str

    @property
    def running(self) -> bool:
        return bool(self.flags & RUNNING)

    def pack(self) -> bytes:
        head = _HEADER.pack(
            MAGIC, VERSION, self.flags, *self.document, *self.stream, bytes.fromhex(self.token), self.driver.encode()
        )
        return (head + _CRC.pack(zlib.crc32(head))).ljust(HEADER_SIZE, b"\0")


def _up(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


class Writer:
    """A `StateTarget`: a file beside its place, which takes its place when all of it is on disk. Until then there is
    nothing under its name, or what was there before."""

    def __init__(
        self, path: str, text: str, *, driver: str, token: str, running: bool, bypass_cache: bool = False
    ) -> None:
        """`token`: 16 bytes in hexadecimal that no other file has."""
        self.path = path
        self.cancelled = False
        self.total = self.size = 0
        self.token = token
        self._bypass, self._dropped = bypass_cache, 0
        self._crc = 0
        data = text.encode()
        if len(data) > DOCUMENT_LIMIT:
            raise InvalidArgument(f"a document of {len(data)} bytes cannot be saved: {DOCUMENT_LIMIT} is the most")
        self._flags, self._driver = RUNNING if running else 0, driver
        self._document = (ALIGNMENT, len(data), zlib.crc32(data))
        self._start = _up(ALIGNMENT + len(data))
        self._check_place()
        self._temporary = temporary(path)
        try:
            self._fd = os.open(self._temporary, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise host_error("write", path, error) from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._fd)
            raise ResourceBusy(f"{path} is being written by somebody else", remedy="save to another file") from None
        try:
            os.ftruncate(self._fd, 0)  # what a daemon that was killed had left there
            os.fchmod(self._fd, 0o600)
            self._put(data, ALIGNMENT)
        except BaseException:
            self.discard()
            raise

    def _check_place(self) -> None:
        place = Path(self.path)
        if not self.path.startswith("/") or not place.name:
            raise InvalidArgument(f"{self.path!r} is no absolute path of a file")
        if place.exists() and not place.is_file():
            raise InvalidArgument(f"{self.path} is no regular file", remedy="name a file: it is replaced when complete")

    def _put(self, data: bytes | memoryview, offset: int) -> None:
        view = memoryview(data)
        try:
            while view:
                count = os.pwrite(self._fd, view, offset)
                view, offset = view[count:], offset + count
        except OSError as error:
            raise host_error("write", self.path, error) from error

    def write(self, data: memoryview) -> None:
        self._put(data, self._start + self.size)
        self._crc = zlib.crc32(data, self._crc)
        self.size += len(data)
        if self._bypass and self.size - self._dropped >= DROP_EVERY:
            self._drop()

    def _drop(self) -> None:
        """Written out, and out of the host's memory."""
        try:
            os.fdatasync(self._fd)
            os.posix_fadvise(self._fd, self._start + self._dropped, self.size - self._dropped, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            raise host_error("write", self.path, error) from error
        self._dropped = self.size

    def finish(self) -> None:
        """On disk in full, not yet in its place."""
        facts = Facts(self._flags, self._document, (self._start, self.size, self._crc), self.token, self._driver)
        try:
            os.fdatasync(self._fd)
            self._put(facts.pack(), 0)
            os.fsync(self._fd)
            if self._bypass:
                os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            raise host_error("write", self.path, error) from error

    def place(self) -> None:
        """Under its name from here on."""
        placed = False
        try:
            os.rename(self._temporary, self.path)  # noqa: PTH104
            placed = True
            fsync_directory(Path(self.path).parent)
        except OSError as error:
            if placed:  # the machine goes on: nothing may be restored from it later
                remove(self.path)
            raise host_error("write", self.path, error) from error
        os.close(self._fd)
        self._fd = -1

    def discard(self) -> None:
        """Nothing of it stays. Can be called at any time, and again."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        try:
            os.unlink(self._temporary)  # noqa: PTH108
        except OSError:
            pass  # it is in its place, or was never made


def temporary(path: str) -> str:
    """Where a file is written before it is complete: a daemon that comes back removes it there."""
    place = Path(path)
    return str(place.with_name(f".{place.name[:200]}.saving"))


class Reader:
    """A `StateSource`."""

    def __init__(self, path: str, *, bypass_cache: bool = False) -> None:
        self.path = path
        self._fd = _open(path)
        try:
            self.facts = _read_header(self._fd, path)
        except BaseException:
            self.close()
            raise
        self._bypass = bypass_cache
        self._at = self._crc = 0

    def document(self) -> str:
        return _read_document(self._fd, self.path, self.facts)

    def read(self, size: int) -> bytes:
        start, length, crc = self.facts.stream
        count = min(size, length - self._at)
        try:
            data = os.pread(self._fd, count, start + self._at) if count else b""
            if self._bypass and data:
                os.posix_fadvise(self._fd, start + self._at, len(data), os.POSIX_FADV_DONTNEED)
        except OSError as error:
            raise host_error("read", self.path, error) from error
        self._at += len(data)
        self._crc = zlib.crc32(data, self._crc)
        if not data and (self._at < length or self._crc != crc):
            raise _damaged(self.path, "the machine's state fails its check")
        return data

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _damaged(path: str, why: str) -> OperationFailed:
    return OperationFailed(f"{path} is damaged: {why}", remedy="nothing was started from it; use another copy")


def _open(path: str, flags: int = os.O_RDONLY) -> int:
    try:
        fd = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise host_error("open", path, error) from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OperationFailed(f"{path} is no regular file")
    return fd


def _read_header(fd: int, path: str) -> Facts:
    try:
        data, size = os.pread(fd, HEADER_SIZE, 0), os.fstat(fd).st_size
    except OSError as error:
        raise host_error("read", path, error) from error
    if data[:16] == b"LibvirtQemudSave" or data[:16] == b"LibvirtQemudPart":
        raise OperationFailed(f"{path} was saved by libvirt, whose saved machines cannot be restored here")
    if len(data) < HEADER_SIZE or data[:8] != MAGIC:
        raise OperationFailed(
            f"{path} is no saved machine, or was never completed", remedy="kvik save writes one; see kvik help save"
        )
    (crc,) = _CRC.unpack_from(data, _HEADER.size)
    fields = _HEADER.unpack_from(data)
    version = fields[1]
    if version != VERSION:
        raise OperationFailed(f"{path} has version {version} of the format; this kvik reads {VERSION}")
    if crc != zlib.crc32(data[: _HEADER.size]):
        raise _damaged(path, "its header fails its check")
    facts = Facts(
        fields[2], fields[3:6], fields[6:9], fields[9].hex(), fields[10].rstrip(b"\0").decode("ascii", "replace")
    )
    for what, (offset, length, _), limit in (
        ("document", facts.document, DOCUMENT_LIMIT),
        ("state", facts.stream, LARGEST),
    ):
        if offset < ALIGNMENT or length > limit or offset + length > size:
            raise _damaged(path, f"the {what} would be {length} bytes at {offset}, and the file has {size}")
    return facts


def _read_document(fd: int, path: str, facts: Facts) -> str:
    offset, size, crc = facts.document
    try:
        data = os.pread(fd, size, offset)
    except OSError as error:
        raise host_error("read", path, error) from error
    if len(data) != size or zlib.crc32(data) != crc:
        raise _damaged(path, "its document fails its check")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise _damaged(path, "its document is no text") from error


def look(path: str) -> Facts:
    fd = _open(path)
    try:
        return _read_header(fd, path)
    finally:
        os.close(fd)


def document(path: str) -> str:
    fd = _open(path)
    try:
        return _read_document(fd, path, _read_header(fd, path))
    finally:
        os.close(fd)


def replace_document(path: str, text: str | None, *, running: bool | None = None) -> None:
    """The new document goes behind everything, and then one sector, the header, says where it is: a crash leaves the
    old one or the new one. `running`: whether it is to run when it is restored; None: as it was."""
    fd = _open(path, os.O_RDWR)
    try:
        facts = _read_header(fd, path)
        if text is not None:
            data = text.encode()
            if len(data) > DOCUMENT_LIMIT:
                raise InvalidArgument(f"the document has {len(data)} bytes: {DOCUMENT_LIMIT} is the most")
            end = _up(os.fstat(fd).st_size)
            _write_all(fd, data, end)
            os.fsync(fd)
            facts = facts._replace(document=(end, len(data), zlib.crc32(data)))
        if running is not None:
            facts = facts._replace(flags=facts.flags & ~RUNNING | (RUNNING if running else 0))
        _write_all(fd, facts.pack(), 0)
        os.fsync(fd)
    except OSError as error:
        raise host_error("write", path, error) from error
    finally:
        os.close(fd)


def _write_all(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(fd, view, offset)
        view, offset = view[count:], offset + count


def remove(path: str) -> bool:
    """Durably: a machine that goes on from it must never be started from it again. False if there was none."""
    try:
        os.unlink(path)  # noqa: PTH108
    except FileNotFoundError:
        return False
    except OSError as error:
        raise host_error("remove", path, error) from error
    try:
        fsync_directory(Path(path).parent)
    except OSError as error:  # it is gone, and the machine that has its contents must not go as well
        logger.warning("%s was removed, and may be back after a power failure: %s", path, error)
    return True
