"""Decompression of what arrives from outside: kernel payloads and package members. Output is always bounded.

gzip, bzip2, xz and lzma come with Python. LZ4 (the kernel's legacy frame: Documentation/staging/lz4, magic
0x184C2102) and Zstandard use the system's liblz4.so.1 and libzstd.so.1, which apt and dpkg themselves need, through
ctypes; LZ4 also has a decoder here, slower by a factor of twenty, for systems without the library.
"""

from __future__ import annotations

import bz2
import ctypes
import lzma
import struct
import zlib
from collections.abc import Callable
from functools import cache
from typing import Protocol

from kvik.errors import ImageError, OperationUnsupported

__all__ = ["decompress", "detect"]

LZ4_LEGACY_MAGIC = b"\x02\x21\x4c\x18"
LZ4_BLOCK = 8 << 20  # each block of the legacy frame unpacks to at most this
ZSTD_UNKNOWN_SIZE = (1 << 64) - 1
ZSTD_SIZE_ERROR = (1 << 64) - 2
CHUNK = 4 << 20

MAGICS: tuple[tuple[bytes, str], ...] = (
    (b"\x1f\x8b", "gzip"),
    (b"\xfd7zXZ\0", "xz"),
    (b"BZh", "bzip2"),
    (b"\x5d\0\0", "lzma"),
    (LZ4_LEGACY_MAGIC, "lz4"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"\x89LZO\0\r\n\x1a\n", "lzo"),
)


def detect(data: bytes | memoryview) -> str:
    """The compression's name by its magic bytes; empty when none is known."""
    head = bytes(data[:9])
    return next((name for magic, name in MAGICS if head.startswith(magic)), "")


def decompress(data: bytes | memoryview, *, limit: int, size: int | None = None) -> bytes:
    """The first compressed stream in `data`, at most `limit` bytes of it; what follows the stream is ignored.

    `size` is what the container claims the result to be, if it says so: needed for Zstandard frames without a size.
    Raises `ImageError` for damaged data or more than `limit` bytes, `OperationUnsupported` for a missing decompressor.
    """
    name = detect(data)
    try:
        decoder = DECODERS[name]
    except KeyError:
        raise (
            OperationUnsupported(f"no {name} decompressor is here")
            if name
            else ImageError(f"the compression is unknown (it begins with {bytes(data[:6]).hex()})")
        ) from None
    return decoder(memoryview(data), limit, size)


class _Stream(Protocol):
    """What the decompressor objects of `bz2` and `lzma` have in common."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    def decompress(self, data: bytes, max_length: int = -1) -> bytes: ...


def _from_stream(stream: _Stream, data: memoryview, limit: int, what: str) -> bytes:
    """Feed piece by piece and never ask for more than `limit` + 1 bytes: a bomb stops at the limit."""
    output = bytearray()
    at = 0
    try:
        while not stream.eof:
            piece = b""
            if stream.needs_input:
                piece = bytes(data[at : at + CHUNK])
                at += len(piece)
                if not piece:
                    raise ImageError(f"the {what} data is cut short")
            output += stream.decompress(piece, min(CHUNK, limit + 1 - len(output)))
            if len(output) > limit:
                raise _too_big(what, limit)
    except (lzma.LZMAError, OSError, ValueError, EOFError) as error:
        raise ImageError(f"the {what} data is damaged: {error}") from error
    return bytes(output)


def _bzip2(data: memoryview, limit: int, _size: int | None) -> bytes:
    return _from_stream(bz2.BZ2Decompressor(), data, limit, "bzip2")


def _xz(data: memoryview, limit: int, _size: int | None) -> bytes:
    # The memory limit bounds the dictionary that a hostile header may ask for.
    return _from_stream(lzma.LZMADecompressor(lzma.FORMAT_AUTO, memlimit=512 << 20), data, limit, "xz")


def _gzip(data: memoryview, limit: int, _size: int | None) -> bytes:
    stream = zlib.decompressobj(wbits=31)
    try:
        output = stream.decompress(data, limit + 1)
    except zlib.error as error:
        raise ImageError(f"the gzip data is damaged: {error}") from error
    if len(output) > limit:
        raise _too_big("gzip", limit)
    if not stream.eof:
        raise ImageError("the gzip data is cut short")
    return output


def _too_big(what: str, limit: int) -> ImageError:
    return ImageError(f"the {what} data unpacks to more than {limit} bytes")


@cache
def _library(name: str) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(name)
    except OSError:
        return None


def _zstd(data: memoryview, limit: int, size: int | None) -> bytes:
    library = _library("libzstd.so.1")
    if library is None:
        raise OperationUnsupported(
            "no zstd decompressor is here: libzstd.so.1 is missing", remedy="install the package libzstd1"
        )
    source = bytes(data)
    count, text = ctypes.c_size_t, ctypes.c_char_p
    library.ZSTD_findFrameCompressedSize.argtypes, library.ZSTD_findFrameCompressedSize.restype = [text, count], count
    library.ZSTD_getFrameContentSize.argtypes = [text, count]
    library.ZSTD_getFrameContentSize.restype = ctypes.c_ulonglong
    library.ZSTD_decompress.argtypes, library.ZSTD_decompress.restype = [ctypes.c_void_p, count, text, count], count
    library.ZSTD_isError.argtypes, library.ZSTD_isError.restype = [count], ctypes.c_uint

    frame = library.ZSTD_findFrameCompressedSize(source, len(source))
    if library.ZSTD_isError(frame):
        raise ImageError("the zstd data is damaged or cut short")
    claimed = library.ZSTD_getFrameContentSize(source, len(source))
    if claimed in (ZSTD_UNKNOWN_SIZE, ZSTD_SIZE_ERROR):
        claimed = size if size is not None else min(limit, len(source) * 32)
    if claimed > limit:
        raise _too_big("zstd", limit)
    buffer = ctypes.create_string_buffer(max(claimed, 1))
    written = library.ZSTD_decompress(buffer, claimed, source, frame)
    if library.ZSTD_isError(written):
        raise ImageError("the zstd data is damaged, or bigger than it says")
    return ctypes.string_at(buffer, written)


def _lz4(data: memoryview, limit: int, _size: int | None) -> bytes:
    """The legacy frame: magic, then blocks of {u32 length, data} until the data ends."""
    block = _lz4_decoder()
    output = bytearray()
    at = len(LZ4_LEGACY_MAGIC)
    while at + 4 <= len(data):
        (length,) = struct.unpack_from("<I", data, at)
        # The kernel's build appends the unpacked size, which looks like one more block header at the very end.
        if at + 4 == len(data) and output:
            break
        at += 4
        if length == 0 or at + length > len(data):
            raise ImageError("the lz4 data is cut short")
        output += block(bytes(data[at : at + length]), min(LZ4_BLOCK, limit + 1 - len(output)))
        if len(output) > limit:
            raise _too_big("lz4", limit)
        at += length
    return bytes(output)


def _lz4_decoder() -> Callable[[bytes, int], bytes]:
    library = _library("liblz4.so.1")
    if library is None:
        return lz4_block

    safe = library.LZ4_decompress_safe
    safe.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int]
    safe.restype = ctypes.c_int
    buffer = ctypes.create_string_buffer(LZ4_BLOCK)

    def decode(source: bytes, room: int) -> bytes:
        written = safe(source, buffer, len(source), room)
        if written < 0:
            raise ImageError("the lz4 data is damaged, or bigger than allowed")
        return ctypes.string_at(buffer, written)

    return decode


def lz4_block(source: bytes, room: int) -> bytes:
    """One LZ4 block (lz4_Block_format.md) of at most `room` bytes, in plain Python."""
    output = bytearray()
    at = 0
    end = len(source)
    try:
        while at < end:
            token = source[at]
            at += 1
            literals = token >> 4
            if literals == 15:
                while True:
                    more = source[at]
                    at += 1
                    literals += more
                    if more != 255:
                        break
            if at + literals > end:
                raise ImageError("the lz4 data is cut short")
            output += source[at : at + literals]
            at += literals
            if at == end:
                break  # the last sequence has literals only
            offset = source[at] | source[at + 1] << 8
            at += 2
            length = token & 15
            if length == 15:
                while True:
                    more = source[at]
                    at += 1
                    length += more
                    if more != 255:
                        break
            length += 4
            start = len(output) - offset
            if offset == 0 or start < 0:
                raise ImageError("the lz4 data is damaged: a match lies before its start")
            if len(output) + length > room:
                raise ImageError("the lz4 data is damaged, or bigger than allowed")
            if offset >= length:
                output += output[start : start + length]
            else:  # an overlapping match repeats its own output
                pattern = output[start:]
                output += (pattern * (length // offset + 1))[:length]
    except IndexError:
        raise ImageError("the lz4 data is cut short") from None
    if len(output) > room:
        raise ImageError("the lz4 data is damaged, or bigger than allowed")
    return bytes(output)


DECODERS: dict[str, Callable[[memoryview, int, int | None], bytes]] = {
    "gzip": _gzip,
    "xz": _xz,
    "lzma": _xz,
    "bzip2": _bzip2,
    "lz4": _lz4,
    "zstd": _zstd,
}
