"""Blocking work beside the event loop, one thread each: a storage server that does not answer holds its own caller.

A pool of threads would be shared by all storage pools, and four calls to a dead NFS server would stop every other one.
The threads are daemons: one that the kernel never gives back does not keep the process from ending.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

__all__ = ["in_thread", "settle", "settled"]

P = ParamSpec("P")
T = TypeVar("T")


def settle(future: asyncio.Future[T], outcome: list[T], error: BaseException | None) -> None:
    """In the loop: what came of a call, its one result or an error. Nothing if the loop has cancelled the future."""
    if future.cancelled():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(outcome[0])


async def in_thread(function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a blocking function. A caller that is cancelled is held until it has returned: what it asked for is done
    or not, and nothing of it can come after what the next one asks for."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def work() -> None:
        outcome: list[T] = []
        failure = None
        try:
            outcome.append(function(*args, **kwargs))
        except BaseException as error:
            failure = error
        try:
            loop.call_soon_threadsafe(settle, future, outcome, failure)
        except RuntimeError:  # the loop has ended: nobody waits any more
            pass

    threading.Thread(target=work, name="kvik-waits", daemon=True).start()
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        await asyncio.wait({future})
        raise


async def settled(function: Callable[[], T], then: Callable[[T], object]) -> T:
    """`in_thread`, and what came out of it is told to `then` in the loop even if whoever asked is gone by then: what is
    done on the host is known here."""
    outcome: list[T] = []
    try:
        await in_thread(lambda: outcome.append(function()))
    finally:
        if outcome:
            then(outcome[0])
    return outcome[0]
