"""Zstandard by the system's libzstd.so.1, which apt and dpkg themselves need. Its calls run beside Python."""

from __future__ import annotations

import ctypes
import threading
from functools import cache
from typing import Any

from kvik.errors import ImageError, OperationUnsupported

__all__ = ["compress", "decompress"]

LEVEL = 3  # ZSTD_CLEVEL_DEFAULT, as QEMU compresses


class _Buffer(ctypes.Structure):
    """ZSTD_inBuffer and ZSTD_outBuffer: pointer, size, position."""

    _fields_ = (("data", ctypes.c_void_p), ("size", ctypes.c_size_t), ("position", ctypes.c_size_t))


@cache
def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("libzstd.so.1")
    except OSError:
        raise OperationUnsupported(
            "no zstd is here: libzstd.so.1 is missing", remedy="install the package libzstd1"
        ) from None
    size, pointer = ctypes.c_size_t, ctypes.c_void_p
    library.ZSTD_isError.argtypes, library.ZSTD_isError.restype = [size], ctypes.c_uint
    library.ZSTD_createDStream.restype = pointer
    library.ZSTD_initDStream.argtypes, library.ZSTD_initDStream.restype = [pointer], size
    library.ZSTD_decompressStream.argtypes = [pointer, ctypes.POINTER(_Buffer), ctypes.POINTER(_Buffer)]
    library.ZSTD_decompressStream.restype = size
    library.ZSTD_createCCtx.restype = pointer
    library.ZSTD_compressCCtx.argtypes = [pointer, pointer, size, pointer, size, ctypes.c_int]
    library.ZSTD_compressCCtx.restype = size
    return library


_local = threading.local()  # a context belongs to one thread at a time, and is costly to make


def compress(data: bytes | memoryview, level: int = LEVEL) -> bytes | None:
    """One frame; None where it would not be smaller than `data`, which is not copied if it is memory that can be
    written."""
    library, size = _library(), len(data)
    if not hasattr(_local, "compressor"):
        _local.compressor, _local.output = library.ZSTD_createCCtx(), bytearray()
    if len(_local.output) < size:
        _local.output = bytearray(size)
    output = ctypes.c_char.from_buffer(_local.output)
    given: Any = data
    if isinstance(data, memoryview):
        given = bytes(data) if data.readonly or not size else ctypes.byref(ctypes.c_char.from_buffer(data))
    written = library.ZSTD_compressCCtx(_local.compressor, ctypes.byref(output), size, given, size, level)
    return None if library.ZSTD_isError(written) else bytes(memoryview(_local.output)[:written])


def decompress(data: bytes, size: int) -> bytes:
    """The first `size` bytes that `data` unpacks to; what follows is not looked at.

    Raises `ImageError` for damaged data, and for less than `size` bytes.
    """
    library = _library()
    if not hasattr(_local, "stream"):
        _local.stream = library.ZSTD_createDStream()
    library.ZSTD_initDStream(_local.stream)
    output = ctypes.create_string_buffer(size)
    source = ctypes.create_string_buffer(data, len(data))
    into = _Buffer(ctypes.addressof(output), size, 0)
    out_of = _Buffer(ctypes.addressof(source), len(data), 0)
    while into.position < size:
        before = into.position, out_of.position
        code = library.ZSTD_decompressStream(_local.stream, ctypes.byref(into), ctypes.byref(out_of))
        if library.ZSTD_isError(code):
            raise ImageError("the zstd data is damaged")
        if (into.position, out_of.position) == before:
            raise ImageError("the zstd data is cut short")
    return output.raw
