"""Copying what is on one disk image, or on several one after the other, to another image."""

from __future__ import annotations

import errno
import os

from kvik.errors import InvalidArgument, OperationUnsupported
from kvik.image.base import DATA, SECTOR, Image, zero
from kvik.image.pipeline import in_order
from kvik.image.windows import WINDOW, Window, fill, spans, used, windows

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Any

    from kvik.image.windows import ReadFault

    Progress = Callable[[int, int], None]
    Compress = Callable[[bytes | memoryview], bytes | None]

__all__ = ["SPARSE", "convert", "deflate"]

SPARSE = 4096  # bytes of zeros that become a hole, as qemu-img's
MOST_WORKERS = 8  # what they hold is to stay small
ZLIB_LEVEL = 6
SAMPLE = 1024  # bytes


def convert(
    source: Image | Sequence[Image],
    target: Image,
    *,
    zeroed: bool = False,
    compressed: bool = False,
    sparse: int = SPARSE,
    own: bool = False,
    salvage: ReadFault | None = None,
    offload: bool = False,
    rate: int = 0,
    workers: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Make `target` read as `source` does; several sources follow each other on it.

    `zeroed`: the target's own layer is empty, so zeros need not be written where nothing is below it. `sparse` is how
    many bytes of zeros become a hole, rounded down to a power of two (0: none, all is written). `own`: what only the
    images below `source` have is left out, for a target that sits on them, too. With `salvage` sectors that cannot be
    read become zero, and it is called with their offset and error. `rate` limits what is written, in bytes a second.
    `workers` are threads that read and compress. `progress` is called with the bytes done and the bytes in all.
    Raises `InvalidArgument`, `OperationUnsupported`, `ImageError`, `OSError`.
    """
    sources = [source] if isinstance(source, Image) else list(source)
    total = sum(one.size for one in sources)
    if target.size < total:
        raise InvalidArgument(
            f"the target of {target.size} bytes is smaller than the {total} bytes to be copied",
            remedy="make it bigger: kvik img resize",
        )
    if own and len(sources) > 1:
        raise InvalidArgument("several images one after the other cannot have a backing file in common")
    # From here on nothing need be done for zeros.
    blank_from = total if not zeroed else target.backing.size if target.backing is not None else 0
    kind = _Compressing if compressed else _Offloading if offload and target.format == "raw" else _Copying
    job = kind(target, total, sparse, blank_from, exact=own or blank_from > 0)
    job.salvage = salvage
    if workers is None:
        processors = len(os.sched_getaffinity(0))
        # A copy is reading and writing: beside each other where there are two processors.
        workers = min(MOST_WORKERS, processors) if compressed else min(1, processors - 1)
    pace = _Pace(rate) if rate else None
    found = windows(sources, job.window, own=own)
    if own and compressed:
        found = _whole_clusters(sources[0], found, job.unit)
    if not sparse:
        found = _all_written(found, job.window)
    # With fewer windows under way the two wait for each other at every one.
    ahead = min(4 * workers, 2 * MOST_WORKERS)
    for window, loaded in in_order(found, job.load, workers, ahead):
        try:
            written = job.store(window, loaded)
        except OSError as error:
            error.filename = error.filename or target.path
            raise
        if pace is not None:
            pace.spent(written)
        if progress is not None:
            progress(window.end, total)


def _whole_clusters(source: Image, found: Iterator[Window], unit: int) -> Iterator[Window]:
    """A cluster that is compressed is written as a whole: what of it the image below has belongs to it, too."""
    for window in found:
        if not window.parts:
            yield window
            continue
        for first, last in spans(window, unit, source.size):
            yield from windows([source], unit, start=first, end=last)


def _all_written(found: Iterator[Window], size: int) -> Iterator[Window]:
    """Zeros in pieces of at most `size`."""
    for window in found:
        at = window.end if window.parts else window.start
        if window.parts:
            yield window
        while at < window.end:
            stop = min(window.end, (at // size + 1) * size)
            yield Window(at, stop, [])
            at = stop


class _Pace:
    """Not more than so many bytes a second."""

    def __init__(self, rate: int) -> None:
        from time import monotonic

        self._rate = rate
        self._start = monotonic()
        self._bytes = 0

    def spent(self, count: int) -> None:
        from time import monotonic, sleep

        self._bytes += count
        ahead = self._bytes / self._rate - (monotonic() - self._start)
        if ahead > 0:
            sleep(ahead)


class _Copying:
    """Windows are read, and what is not zero in them is written."""

    def __init__(self, target: Image, total: int, sparse: int, blank_from: int, *, exact: bool) -> None:
        """With `exact` nothing may be written but what the windows have."""
        self.target = target
        self.total = total
        self.sparse = sparse
        self.blank_from = blank_from
        # What has room as a whole is written as a whole.
        self.grain = SECTOR if exact else getattr(target, "granularity", SECTOR)
        self.unit = max(self.grain, 1 << max(0, sparse.bit_length() - 1))
        self.window = max(WINDOW, self.unit)
        self.salvage: ReadFault | None = None
        self._buffers: dict[int, bytearray] = {}

    def read(self, window: Window, slot: int, unit: int, end: int) -> tuple[bytearray, int, list[tuple[int, int]]]:
        """(buffer, offset of its first byte, (start, end) of what of it is to be looked at)."""
        buffer = self._buffers.get(slot)
        if buffer is None:
            buffer = self._buffers[slot] = bytearray(self.window)
        base = window.start - window.start % self.window
        if window.parts:
            found = spans(window, unit, end)
            fill(window, found, base, buffer, self.salvage)
        else:
            found = [(window.start & -unit, min(end, (window.end + unit - 1) & -unit))]
            zero(memoryview(buffer)[found[0][0] - base : found[0][1] - base])
        return buffer, base, found

    def load(self, window: Window, slot: int) -> Any:
        """(buffer, offset of its first byte, (start, end, whether there is data) in the buffer)."""
        if not window.parts and self.sparse:
            return None
        buffer, base, found = self.read(window, slot, self.grain, self.total)
        if not self.sparse:
            return buffer, base, [(first - base, last - base, True) for first, last in found]
        runs: list[tuple[int, int, bool]] = []
        for first, last in found:
            runs += used(buffer, first - base, last - base, self.unit)
        return buffer, base, runs

    def store(self, window: Window, loaded: Any) -> int:
        """The number of bytes written."""
        if loaded is None:
            self.blank(window.start, window.end - window.start)
            return 0
        buffer, base, runs = loaded
        view = memoryview(buffer)
        written = 0
        for first, last, is_data in runs:
            if is_data:
                self.target.write(base + first, view[first:last])
                written += last - first
            else:
                self.blank(base + first, last - first)
        return written

    def blank(self, offset: int, length: int) -> None:
        """Zeros, where the target may have something else."""
        length = min(length, self.blank_from - offset)
        if length > 0:
            self.target.write_zeroes(offset, length, discard=True)


class _Offloading(_Copying):
    """By copy_file_range(2), where the kernel has it for the two files."""

    def load(self, window: Window, slot: int) -> Any:
        if all(part[0] == DATA for part in window.parts):
            return None
        return super().load(window, slot)

    def store(self, window: Window, loaded: Any) -> int:
        if loaded is not None or not window.parts:
            return super().store(window, loaded)
        written = 0
        for number, (_, start, _, length, image, host) in enumerate(window.parts):
            done = 0
            while done < length:
                try:
                    count = os.copy_file_range(image.data_fd, self.target.fd, length - done, host + done, start + done)
                except OSError as error:
                    if error.errno not in (errno.EXDEV, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                        raise
                    count = 0
                if not count:  # not for these files, or behind the source's end
                    rest = Window(start, window.end, window.parts[number:])
                    return written + super().store(rest, super().load(rest, 0))
                done += count
                written += count
        return written


class _Compressing(_Copying):
    """Whole clusters, compressed where that makes them smaller."""

    def __init__(self, target: Image, total: int, sparse: int, blank_from: int, *, exact: bool) -> None:
        from kvik.image.qcow2.writer import Qcow2Writer

        if not isinstance(target, Qcow2Writer):
            raise OperationUnsupported(
                f"images of format {target.format} have no compressed clusters", remedy="use -O qcow2"
            )
        super().__init__(target, total, sparse, blank_from, exact=exact)
        self.qcow2 = target
        self.unit = target.cluster_size
        self.window = max(WINDOW, self.unit)
        self.compress = compressor(target)

    def load(self, window: Window, slot: int) -> Any:
        """(offset of a cluster, its data compressed or None, its data) of each; None in all for zeros."""
        if not window.parts and self.sparse:
            return None
        unit = self.unit
        buffer, base, found = self.read(window, slot, unit, (self.total + unit - 1) & -unit)
        clusters: list[tuple[int, bytes | None, memoryview]] = []
        view = memoryview(buffer)
        for first, last in found:
            for start, end, is_data in used(buffer, first - base, last - base, unit):
                if not is_data and self.sparse:
                    clusters.append((base + start, None, view[start:start]))
                    continue
                for at in range(start, end, unit):
                    data = view[at : at + unit]
                    clusters.append((base + at, self.compress(data), data))
        return clusters

    def store(self, window: Window, loaded: Any) -> int:
        if loaded is None:
            self.blank(window.start, window.end - window.start)
            return 0
        written = 0
        for offset, compressed, data in loaded:
            if compressed is not None:
                self.qcow2.write_compressed(offset, compressed)
                written += len(compressed)
            elif data:
                self.qcow2.write(offset, data[: min(len(data), self.target.size - offset)])
                written += len(data)
            else:
                self.blank(offset, self.unit)
        return written


def compressor(target: Any) -> Compress:
    """What makes of a cluster its compressed data, None where that is not smaller."""
    if target.header.compression == 0:
        return deflate
    from kvik.image.zstd import compress

    def checked(data: bytes | memoryview) -> bytes | None:
        out = compress(data)
        return out if out is not None and len(out) < len(data) else None

    return checked


def deflate(data: bytes | memoryview) -> bytes | None:
    """A raw deflate stream with a window of 4 KiB ("Compressed Clusters Descriptor" of docs/interop/qcow2.rst).

    What four samples show to be random is not tried: zlib takes longest for what it cannot make smaller.
    """
    import zlib

    step = len(data) // 4
    if step >= 4 * SAMPLE:
        sample = b"".join(data[at : at + SAMPLE] for at in range(step // 2, len(data), step))
        if len(zlib.compress(sample, 1)) >= len(sample):
            return None
    out = zlib.compress(data, ZLIB_LEVEL, wbits=-12)  # one call: threads meet at the interpreter's lock only once
    return out if len(out) < len(data) else None
