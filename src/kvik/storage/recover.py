"""What happens to storage pools when the daemon comes back: found again, put right, or taken away.

| state           | the source     | then                                                     |
|-----------------|----------------|----------------------------------------------------------|
| of another boot |                | inactive: mounts and sessions went with that boot        |
| starting        |                | nobody was told of it: what is there of it is taken away |
| stopping        |                | it was to go: the rest is taken away                     |
| active          | there          | active, looked at anew                                   |
| active          | gone           | inactive, and said                                       |
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from kvik.conf.storage_pool import complete_pool, format_pool, parse_pool, validate_pool
from kvik.conf.storage_state import PoolState
from kvik.errors import HostError, KvikError
from kvik.host import files
from kvik.host.threads import in_thread
from kvik.storage.pool import PoolObject
from kvik.storage.store import Loaded
from kvik.storage.types import backend_of, make

if TYPE_CHECKING:
    from kvik.storage.pools import Pools

logger = logging.getLogger(__name__)

AUTOSTARTED = "autostarted"  # in the status directory: the id of the boot whose autostart is done
WAIT = 5.0  # seconds until the daemon goes on without pools whose servers do not answer


async def recover(pools: Pools) -> None:
    loaded = await in_thread(pools.store.load)
    pools.warnings += loaded.warnings
    for name, text in loaded.documents:
        await _load(pools, name, text, loaded)
    await _beside([(state.document.name, _recover_one(pools, state)) for state in loaded.statuses], pools)


async def _load(pools: Pools, name: str, text: str, loaded: Loaded) -> None:
    try:
        document = parse_pool(text)
        document.name = document.name or name
        if document.name != name:
            raise KvikError(f"its file is named {name!r} but its <name> is {document.name!r}")
        new = document.uuid is None
        complete_pool(document)
        validate_pool(document)
        backend_of(document.type)
        if new:  # written by hand: what was left out is fixed from now
            await in_thread(pools.store.save, name, format_pool(document, inactive=True))
        pool = PoolObject(pools, document, persistent=True)
        other = next((each for each in pools.list() if each.uuid == pool.uuid), None)
        if other is not None:
            raise KvikError(f"storage pool {other.name!r} has the same UUID")
    except KvikError as error:
        pools.warnings.append(pools.store.set_aside(name, str(error)))
        return
    pool.autostart = name in loaded.autostart
    pools.add(pool)


async def _beside(work: list[tuple[str, Coroutine[Any, Any, None]]], pools: Pools) -> None:
    """All at once: a server that does not answer keeps its own pool only. One that fails keeps no other from coming."""
    tasks = {asyncio.ensure_future(each): name for name, each in work}
    if not tasks:
        return
    done, pending = await asyncio.wait(tasks, timeout=WAIT)
    for task in done:
        error = task.exception()
        if error is not None:
            logger.error("storage pool %s", tasks[task], exc_info=error)
            pools.warn(f"storage pool {tasks[task]!r} could not be brought back: {error}")
    for task in pending:
        pools.warn(f"storage pool {tasks[task]!r} does not answer; it comes back when it does")
        pools.keep(task)


async def _recover_one(pools: Pools, state: PoolState) -> None:
    document, name = state.document, state.document.name
    origin = state.origin
    assert origin is not None  # the store has made sure
    if origin.boot != pools.store.boot:
        await in_thread(pools.store.remove_status, name)
        return
    complete_pool(document)
    validate_pool(document)
    backend = make(document, pools.secret)
    if origin.state != "active":
        await in_thread(backend.clean)
        await in_thread(pools.store.remove_status, name)
        pools.warn(f"storage pool {name!r} was {origin.state} when the daemon was stopped: it is inactive")
        return
    if not await in_thread(backend.check):
        await in_thread(pools.store.remove_status, name)
        pools.warn(f"storage pool {name!r} is not active any more: its source is gone")
        return
    try:
        contents = await in_thread(backend.refresh)
    except KvikError as error:
        await in_thread(pools.store.remove_status, name)
        pools.warn(f"storage pool {name!r} is not active any more: {error}")
        return
    pool = next((each for each in pools.list() if each.name == name), None)
    if pool is None:
        pool = PoolObject(pools, document.copy(), persistent=False)
        pools.add(pool)
    pool.adopt(backend, contents)


async def autostart(pools: Pools) -> None:
    """Start what starts with the host, once per boot of it, however often the daemon is restarted."""
    marker, boot = pools.store.status / AUTOSTARTED, pools.store.boot.encode()
    with suppress(HostError):
        if await in_thread(files.try_read_file, marker, limit=256) == boot:
            return

    async def start(pool: PoolObject) -> None:
        try:
            await pool.start()
        except KvikError as error:
            pools.warn(f"storage pool {pool.name!r} was not started automatically: {error}")

    await _beside([(pool.name, start(pool)) for pool in pools.list() if pool.autostart and not pool.is_active], pools)
    with suppress(HostError):
        await in_thread(files.atomic_write, marker, boot, durable=False)
