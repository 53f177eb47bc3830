"""Storage pools on a directory of a test, and a daemon that can be killed at any step of its work on files."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from kvik.paths import Paths
from kvik.storage.pools import Pools

POOL = "<pool type='dir'><name>{name}</name><target><path>{path}</path></target></pool>"
VOLUME = "<volume><name>{name}</name><capacity>{size}</capacity><allocation>{allocation}</allocation>{more}</volume>"


def pool_xml(name: str, path: Path) -> str:
    return POOL.format(name=name, path=path)


def volume_xml(name: str, size: int, allocation: int = 0, more: str = "") -> str:
    return VOLUME.format(name=name, size=size, allocation=allocation, more=more)


@contextlib.asynccontextmanager
async def opened(root: Path) -> AsyncIterator[Pools]:
    """All pools of a scope below `root`, as a daemon that starts finds them."""
    pools = Pools(Paths.system(root))
    await pools.open()
    try:
        yield pools
    finally:
        pools.close()
