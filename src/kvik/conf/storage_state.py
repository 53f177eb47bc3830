"""<poolstate>: an active pool as it is written to disk, so that a restarted daemon finds it again.

The form is libvirt's; where the pool stands stands in our own namespace.
"""

from __future__ import annotations

from typing import Annotated, Literal

from kvik.conf.codec import KVIK_NS, Element, YesNo
from kvik.conf.reader import read_xml
from kvik.conf.storage_pool import StoragePool
from kvik.conf.xmlformat import format_element
from kvik.conf.xmlparse import parse_element
from kvik.errors import ConfigError

__all__ = ["PoolOrigin", "PoolState", "format_state", "parse_state"]


class PoolOrigin(Element):
    """`state`: what is under way; what another `boot` (its id, random(4)) made may be gone."""

    state: Literal["starting", "active", "stopping"]
    boot: str
    persistent: YesNo = None


class PoolState(Element):
    pool: StoragePool | None = None
    origin: Annotated[PoolOrigin | None, f"{{{KVIK_NS}}}origin"] = None

    @property
    def document(self) -> StoragePool:
        """The pool as it is active. `parse_state` has made sure that it is there."""
        assert self.pool is not None
        return self.pool


def parse_state(xml: str | bytes) -> PoolState:
    """Raises ConfigError if it is none, or has no pool."""
    root = read_xml(xml, "pool state")
    if root.tag != "poolstate":
        raise ConfigError(f"a pool's state starts with <poolstate>, not <{root.tag}>", path=f"/{root.tag}")
    state = parse_element(root, PoolState)
    if state.pool is None or state.origin is None:
        raise ConfigError("the state holds no pool, or not how it stands", path="/poolstate")
    return state


def format_state(state: PoolState) -> bytes:
    return format_element(state, "poolstate").encode()
