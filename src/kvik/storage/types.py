"""Which types of pools there are, and the module of each; nothing registers itself."""

from __future__ import annotations

import importlib

from kvik.conf.prepare import located
from kvik.conf.storage_pool import StoragePool, parse_source
from kvik.conf.xmlformat import format_element
from kvik.errors import OperationUnsupported
from kvik.storage.backend import Backend, SecretReader, no_secrets

__all__ = ["MODULES", "backend_of", "find_sources", "make"]

MODULES = {
    "dir": "kvik.storage.backends.dir",
    "fs": "kvik.storage.backends.fs",
    "netfs": "kvik.storage.backends.netfs",
    "logical": "kvik.storage.backends.logical",
    "disk": "kvik.storage.backends.disk",
    "iscsi": "kvik.storage.backends.iscsi",
    "iscsi-direct": "kvik.storage.backends.iscsi_direct",
    "scsi": "kvik.storage.backends.scsi",
    "mpath": "kvik.storage.backends.mpath",
    "rbd": "kvik.storage.backends.rbd",
    "gluster": "kvik.storage.backends.gluster",
    "zfs": "kvik.storage.backends.zfs",
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


def make(document: StoragePool, secret: SecretReader = no_secrets) -> Backend:
    return backend_of(document.type)(document, secret)


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
