"""Which types of pools there are, and the module of each; nothing registers itself."""

from __future__ import annotations

import importlib

from kvik.conf.prepare import located
from kvik.conf.storage_pool import StoragePool, parse_source
from kvik.conf.xmlformat import format_element
from kvik.errors import OperationUnsupported
from kvik.storage.backend import Backend

__all__ = ["MODULES", "backend_of", "find_sources", "make"]

MODULES = {
    "dir": "kvik.storage.backends.dir",
}


def backend_of(type_: str) -> type[Backend]:
    """Raises OperationUnsupported."""
    try:
        module = importlib.import_module(MODULES[type_])
    except KeyError:
        raise OperationUnsupported(
            f"missing backend for pool type '{type_}'", remedy=f"there are {', '.join(MODULES)}"
        ) from None
    cls: type[Backend] = module.Backend
    return cls


def make(document: StoragePool) -> Backend:
    return backend_of(document.type)(document)


def find_sources(type_: str, xml: str | None) -> str:
    """<sources>: what pools of this type could be made from, on this host or where the <source> in `xml` says. Blocks;
    raises OperationUnsupported, InvalidArgument, HostError."""
    backend = backend_of(type_)
    source = None
    if xml:
        with located(xml):
            source = parse_source(xml)
    found = backend.find_sources(source)
    inner = "".join(_indented(format_element(each, "source")) for each in found)
    return f"<sources>\n{inner}</sources>\n"


def _indented(text: str) -> str:
    return "".join(f"  {line}\n" for line in text.splitlines())
