"""RAM in a file: written without its zeroes, mapped lazily when it comes back.

Uncompressed, the file is RAM as it is: regions one behind the other, pages of zeroes are holes. Restoring maps it
copy-on-write: nothing is read before the guest touches it, and machines restored from one file share what they do not
write. Compressed, it is a row of chunks, each <guest address, bytes, bytes stored, CRC of these and of the bytes> and a
zlib stream, ended by a chunk of no bytes; it must be read as a whole.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

from kvik.errors import OperationFailed
from kvik.vmm.faults import GuestFault
from kvik.vmm.layout import MIB, PAGE
from kvik.vmm.memory import Region, map_memory

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvik.vmm.memory import GuestMemory

__all__ = ["data_runs", "is_zero", "load", "map_file", "present", "read_compressed", "write", "write_compressed"]

CHUNK = 2 * MIB  # what is looked at in one piece; a transparent huge page
MAX_RUNS = 4096  # mappings of one region; Linux allows a process 65530 (vm.max_map_count)
_HEADER, _CRC = struct.Struct("<QII"), struct.Struct("<I")
_libc = ctypes.CDLL(None)
_libc.memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


def is_zero(address: int, size: int) -> bool:
    """Whether all bytes there are 0: each equals its neighbour, and the first is. 10 GB/s, without the interpreter's
    lock."""
    return not ctypes.c_ubyte.from_address(address).value and not _libc.memcmp(address, address + 1, size - 1)


def data_runs(region: Region) -> Iterator[tuple[int, int]]:
    """(offset, size) of what is not zero, in whole pages, in order; at most CHUNK each."""
    for start, end in present(region):
        for offset in range(start, end, CHUNK):
            size = min(CHUNK, end - offset)
            at = region.address + offset
            if is_zero(at, size):
                continue
            first = -1
            for page in range(0, size, PAGE):
                if is_zero(at + page, PAGE):
                    if first >= 0:
                        yield offset + first, page - first
                        first = -1
                elif first < 0:
                    first = page
            if first >= 0:
                yield offset + first, size - first


def present(region: Region) -> Iterator[tuple[int, int]]:
    """What may hold data: of a memfd what is allocated (reading a hole would allocate it), else everything."""
    if region.fd < 0:
        yield 0, region.size
        return
    yield from _extents(region.fd, region.fd_offset, region.size)


def _extents(fd: int, base: int, size: int) -> Iterator[tuple[int, int]]:
    """(start, end) of what a file holds of [base, base + size), relative to base, in whole pages."""
    at = base
    while at < base + size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole to the end
                return
            raise
        if start >= base + size:
            return
        end = min(os.lseek(fd, start, os.SEEK_HOLE), base + size)
        yield (start - base) // PAGE * PAGE, -(-(end - base) // PAGE) * PAGE
        at = end


def write(memory: GuestMemory, fd: int) -> Iterator[int]:
    """RAM into an empty file, region behind region; yields the bytes looked at so far."""
    base = 0
    os.ftruncate(fd, memory.size)
    for region in memory.regions:
        for offset, size in data_runs(region):
            done = 0
            while done < size:
                done += os.pwrite(fd, region.view[offset + done : offset + size], base + offset + done)
            yield base + offset
        base += region.size
    yield base


def write_compressed(memory: GuestMemory, fd: int, level: int = 1) -> Iterator[int]:
    import zlib

    base = 0
    for region in memory.regions:
        for offset, size in data_runs(region):
            raw = region.view[offset : offset + size]
            data = zlib.compress(raw, level)
            header = _HEADER.pack(region.start + offset, size, len(data))
            _put(fd, header + _CRC.pack(zlib.crc32(raw, zlib.crc32(header))) + data)
            yield base + offset
        base += region.size
    header = _HEADER.pack(0, 0, 0)
    _put(fd, header + _CRC.pack(zlib.crc32(header)))
    yield base


def _put(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def map_file(region: Region, fd: int, base: int) -> None:
    """Make a region of private RAM what the file holds from `base` on; nothing is read yet. The file must be as large
    as that (the caller has looked). Holes stay memory of our own, which can be huge pages."""
    grain = CHUNK
    while True:
        runs: list[list[int]] = []
        for start, end in _extents(fd, base, region.size):
            start, end = start // grain * grain, min(-(-end // grain) * grain, region.size)
            if runs and start <= runs[-1][1]:
                runs[-1][1] = max(runs[-1][1], end)
            else:
                runs.append([start, end])
        if len(runs) <= MAX_RUNS:
            break
        grain *= 2
    for start, end in runs:
        map_memory(end - start, _MAP_PRIVATE, fd, base + start, at=region.address + start)


_MAP_PRIVATE = 2


def clear(region: Region) -> None:
    """All zeroes, whatever was mapped there; private RAM loses a file's mapping too."""
    if region.fd < 0:
        anonymous = 0x20
        map_memory(region.size, _MAP_PRIVATE | anonymous | 0x4000, at=region.address)
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        madvise(region.address, region.size, 14)  # MADV_HUGEPAGE
        madvise(region.address, region.size, 16)  # MADV_DONTDUMP
    else:
        from kvik.vmm.memory import os_fallocate_punch

        os_fallocate_punch(region.fd, region.fd_offset, region.size)


def load(region: Region, fd: int, base: int) -> None:
    """As `map_file` for RAM that must stay what it is (shared, huge pages): what is in the file is read now."""
    for start, end in _extents(fd, base, region.size):
        at = start
        while at < min(end, region.size):
            count = os.preadv(fd, [region.view[at : min(end, region.size)]], base + at)
            if not count:
                raise OperationFailed("the memory file ended while it was read")
            at += count


def read_compressed(memory: GuestMemory, fd: int, where: str) -> None:
    """Fill zeroed RAM. Every chunk is checked before a byte of it is put anywhere."""
    import zlib

    def take(size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = os.read(fd, size - len(data))
            if not part:
                raise OperationFailed(f"{where} is cut off", remedy="take the snapshot anew")
            data += part
        return data

    while True:
        header, (crc,) = take(_HEADER.size), _CRC.unpack(take(_CRC.size))
        address, size, stored = _HEADER.unpack(header)
        if not size and crc == zlib.crc32(header):
            return
        if size > CHUNK or stored > CHUNK + 4096:
            raise OperationFailed(f"{where} is damaged: a chunk of {size} bytes, {stored} stored")
        unpacker = zlib.decompressobj()
        try:
            data = unpacker.decompress(take(stored), size)
            if len(data) != size or zlib.crc32(data, zlib.crc32(header)) != crc:
                raise OperationFailed(f"{where} is damaged: the chunk for address {address:#x} fails its check")
            memory.write(address, data)
        except (zlib.error, GuestFault) as error:
            raise OperationFailed(f"{where} is damaged: the chunk for address {address:#x}: {error}") from error
