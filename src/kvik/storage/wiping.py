"""Overwriting what a volume holds: the passes of each algorithm, as scrub(1) documents them."""

from __future__ import annotations

import fcntl
import os
import stat
import struct
from collections.abc import Iterator, Sequence

from kvik.conf.enums import StorageVolWipeAlgorithm as Algorithm
from kvik.errors import InvalidArgument
from kvik.storage.sparse import extents

__all__ = ["overwrite", "passes_of"]

CHUNK = 1 << 20
BLKDISCARD = 0x1277  # <linux/fs.h>
RANDOM = b""  # stands for random data, anew for each chunk
R3 = (b"\x92\x49\x24", b"\x49\x24\x92", b"\x24\x92\x49")
PASSES: dict[int, Sequence[bytes]] = {
    Algorithm.ZERO: (b"\0",),
    Algorithm.RANDOM: (RANDOM,),
    Algorithm.NNSA: (RANDOM, RANDOM, b"\0"),  # NNSA Policy Letter NAP-14.1-C
    Algorithm.DOD: (RANDOM, b"\0", b"\xff"),  # DoD 5220.22-M section 8-306 (d)
    Algorithm.BSI: tuple(bytes([value]) for value in (0xFF, 0xFE, 0xFD, 0xFB, 0xF7, 0xEF, 0xDF, 0xBF, 0x7F)),
    Algorithm.GUTMANN: (
        *(RANDOM,) * 4, b"\x55", b"\xaa", *R3, *(bytes([value * 0x11]) for value in range(16)), *R3,
        b"\x6d\xb6\xdb", b"\xb6\xdb\x6d", b"\xdb\x6d\xb6", *(RANDOM,) * 4,
    ),
    Algorithm.SCHNEIER: (b"\0", b"\xff", *(RANDOM,) * 5),
    Algorithm.PFITZNER7: (RANDOM,) * 7,
    Algorithm.PFITZNER33: (RANDOM,) * 33,
}  # fmt: skip


def passes_of(algorithm: int) -> Sequence[bytes]:
    """Patterns in their order; b"" is random data; none at all: what it holds is given back. Raises InvalidArgument."""
    if algorithm == Algorithm.TRIM:
        return ()
    try:
        return PASSES[algorithm]
    except KeyError:
        raise InvalidArgument(f"wiping algorithm {algorithm} not supported") from None


def discard(fd: int, size: int) -> None:
    """Give all blocks back to the file system or device, which then shows zeros, or (a device) what it likes. Raises
    OSError, for one that cannot."""
    if stat.S_ISBLK(os.fstat(fd).st_mode):
        fcntl.ioctl(fd, BLKDISCARD, struct.pack("QQ", 0, size))
    else:
        os.ftruncate(fd, 0)
        os.ftruncate(fd, size)
    os.fsync(fd)


def _written(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """(offset, length) of what holds anything. A device tells of no holes: what it shows as zeros is left, or a thin
    volume would take all of its pool."""
    is_device = stat.S_ISBLK(os.fstat(fd).st_mode)
    for offset, length, is_data in extents(fd, 0, size):
        if not is_data:
            continue
        if not is_device:
            yield offset, length
            continue
        for start in range(offset, offset + length, CHUNK):
            count = min(CHUNK, offset + length - start)
            if os.pread(fd, count, start).count(0) != count:
                yield start, count


def overwrite(fd: int, size: int, passes: Sequence[bytes]) -> None:
    """Everything that was ever written to the first `size` bytes, once for each pass; each is on disk before the next.

    Holes hold nothing, and stay: filling those of a large volume would fill its pool. Raises OSError.
    """
    if not passes:
        discard(fd, size)
        return
    written = [*_written(fd, size)]
    for pattern in passes:
        fixed = pattern * (CHUNK // len(pattern) + 2) if pattern else b""
        for offset, length in written:
            for start in range(offset, offset + length, CHUNK):
                count = min(CHUNK, offset + length - start)
                shift = start % len(pattern) if pattern else 0
                data = memoryview(fixed[shift : shift + count] if pattern else os.urandom(count))
                while data:
                    done = os.pwrite(fd, data, start)
                    data, start = data[done:], start + done
        os.fsync(fd)
