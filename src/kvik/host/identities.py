"""Which files many paths lead to, also where some of them are on storage that does not answer (`reach.py`).

A path that does not answer is not the file of one that does if they are mounted with different file systems. Only a
link on the silent storage that leads out of it would be missed: nobody could see through that.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Iterable, Mapping

from kvik.errors import HostError
from kvik.host.files import Identity, identify
from kvik.host.filesystem import mount_point
from kvik.host.reach import about, reach

__all__ = ["identities", "look_up", "may_be"]

AT_ONCE = 8  # looks, once it is known that some do not answer


def identities(paths: Iterable[str]) -> dict[str, Identity | None]:
    """What each path leads to, None for nothing (blocking)."""
    found = {}
    for path in paths:
        about(path)
        found[path] = identify(path)
    return found


async def look_up(paths: Iterable[str]) -> dict[str, Identity | None]:
    """The same, without those that do not answer."""
    wanted = sorted(paths)
    try:
        return await reach(identities, wanted)
    except HostError as error:
        if error.errno != errno.ETIMEDOUT:
            raise
    found: dict[str, Identity | None] = {}
    turns = asyncio.Semaphore(AT_ONCE)

    async def one(path: str) -> None:
        async with turns:
            try:
                found.update(await reach(identities, [path]))
            except HostError as error:
                if error.errno != errno.ETIMEDOUT:
                    raise

    await asyncio.gather(*(one(path) for path in wanted))
    return found


def may_be(path: str, other: str, known: Mapping[str, Identity | None]) -> bool:
    """Whether `other`, which may be silent, can be the file that `path`, which is `known`, leads to."""
    if other in known:
        return known[other] is not None and known[other] == known[path]
    return path == other or mount_point(path) == mount_point(other)
