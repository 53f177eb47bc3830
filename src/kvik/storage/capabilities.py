"""<storagepoolCapabilities>: which types of pools there are, and which formats each knows."""

from __future__ import annotations

from collections.abc import Iterator

from kvik.conf.storage_pool import DEFAULT_FORMATS, FORMATS, POOL_TYPES
from kvik.errors import OperationUnsupported
from kvik.storage.types import backend_of

__all__ = ["capabilities"]


def capabilities() -> str:
    """libvirt's document. A type is supported if it can work on this host now: its tools are there."""
    return "".join(f"{line}\n" for line in _lines())


def _lines() -> Iterator[str]:
    yield "<storagepoolCapabilities>"
    for type_ in POOL_TYPES:
        try:
            backend = backend_of(type_)
            supported = not backend.missing()
        except OperationUnsupported:
            yield f"  <pool type='{type_}' supported='no'/>"
            continue
        yield f"  <pool type='{type_}' supported='{'yes' if supported else 'no'}'>"
        if type_ in FORMATS:
            yield "    <poolOptions>"
            yield f"      <defaultFormat type='{DEFAULT_FORMATS[type_]}'/>"
            yield from _enum("sourceFormatType", FORMATS[type_])
            yield "    </poolOptions>"
        if backend.names_formats:
            yield "    <volOptions>"
            yield f"      <defaultFormat type='{backend.default_format}'/>"
            yield from _enum("targetFormatType", backend.formats)
            yield "    </volOptions>"
        yield "  </pool>"
    yield "</storagepoolCapabilities>"


def _enum(name: str, values: tuple[str, ...]) -> Iterator[str]:
    yield f"      <enum name='{name}'>"
    for value in values:
        yield f"        <value>{value}</value>"
    yield "      </enum>"
