"""Pools on disk: definitions, autostart links, live status. The daemon may be killed between any two steps.

    <config>/storage/NAME.xml            the definition; fsynced
    <config>/storage/autostart/NAME.xml  link to it
    <run>/storage/NAME.xml               live status: said before anything is done on this host

All functions block. What cannot be read is set aside under another name with a warning, and stops nothing.
"""

from __future__ import annotations

from kvik.conf.storage_state import PoolState, format_state, parse_state
from kvik.errors import ConfigError
from kvik.host import documents
from kvik.host.process import boot_id
from kvik.paths import Paths

__all__ = ["Loaded", "Store", "check_name"]

WHAT = "storage pool"
Loaded = documents.Loaded[PoolState]


def check_name(name: str) -> str:
    """The name if a pool can have it, else `InvalidArgument`."""
    return documents.check_document_name(name, WHAT)


class Store(documents.Definitions[PoolState]):
    def __init__(self, paths: Paths) -> None:
        super().__init__(paths.pools, paths.pool_status, WHAT, _parse)
        self.images = paths.images
        self.boot = boot_id()

    def save_state(self, state: PoolState) -> None:
        self.write_status(state.document.name, format_state(state))


def _parse(data: bytes, name: str) -> PoolState:
    state = parse_state(data)
    if state.document.name != name:
        raise ConfigError("it is not of this pool")
    return state
