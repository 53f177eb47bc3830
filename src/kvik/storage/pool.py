"""One storage pool: its definition, whether it is active, its volumes, and who works on it.

One job at a time changes the pool as a whole (start, stop, build, refresh); one at a time changes a volume. Volumes
are worked on beside each other, and while that goes on the pool cannot be stopped.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from typing import TYPE_CHECKING
from uuid import UUID

from kvik.conf.enums import StoragePoolEventLifecycleType as Event
from kvik.conf.storage_pool import StoragePool, bytes_of, format_pool
from kvik.conf.storage_state import PoolOrigin, PoolState
from kvik.conf.storage_volume import StorageVolume
from kvik.errors import KvikError, NoStorageVolume, OperationInvalid, OperationTimeout, ResourceBusy
from kvik.storage.backend import Backend, Contents
from kvik.storage.threads import in_thread
from kvik.storage.types import make

if TYPE_CHECKING:
    from kvik.storage.pools import Pools

__all__ = ["JOB_WAIT", "PoolObject"]

logger = logging.getLogger(__name__)

JOB_WAIT = 30.0  # seconds to wait for the present job
WARNINGS_MAX = 64


class PoolObject:
    """Made by `Pools`. Reads are answered from memory; what changes it is a coroutine and holds its job."""

    def __init__(self, pools: Pools, definition: StoragePool, *, persistent: bool) -> None:
        self._pools = pools
        self.definition = definition
        self.persistent = persistent
        self.autostart = False
        self.backend: Backend | None = None  # of an active pool
        self.contents = Contents()
        self.warnings: list[str] = []  # what was found since the last start
        self._lock = asyncio.Lock()
        self._job = ""
        self._working: dict[str, str] = {}  # volume -> what is done with it

    def __repr__(self) -> str:
        return f"PoolObject({self.name!r}, {'active' if self.is_active else 'inactive'})"

    # who and what

    @property
    def name(self) -> str:
        return self.definition.name

    @property
    def uuid_text(self) -> str:
        return self.definition.uuid or ""

    @property
    def uuid(self) -> bytes:
        return UUID(self.uuid_text).bytes

    @property
    def is_active(self) -> bool:
        return self.backend is not None

    @property
    def is_building(self) -> bool:
        return self._job == "build"

    @property
    def document(self) -> StoragePool:
        """The live document of an active pool, else the definition."""
        return self.backend.document if self.backend is not None else self.definition

    def xml(self, inactive: bool = False) -> str:
        """libvirt's document, with the figures of the last refresh."""
        document = (self.definition if inactive else self.document).copy()
        if self.backend is not None:
            document.capacity = bytes_of(self.contents.capacity)
            document.allocation = bytes_of(self.contents.allocation)
            document.available = bytes_of(self.contents.available)
            if self.contents.permissions is not None and document.target is not None:
                document.target.permissions = self.contents.permissions
        return format_pool(document, inactive=inactive)

    def active(self) -> Backend:
        """Its backend. OperationInvalid if it is not active."""
        if self.backend is None:
            raise OperationInvalid(
                f"storage pool '{self.name}' is not active", remedy=f"start it: kvik pool-start {self.name}"
            )
        return self.backend

    # volumes

    def volumes(self) -> list[StorageVolume]:
        self.active()
        return [*self.contents.volumes.values()]

    def volume(self, name: str) -> StorageVolume:
        self.active()
        try:
            return self.contents.volumes[name]
        except KeyError:
            raise NoStorageVolume(
                f"no storage vol with matching name '{name}'", remedy=f"see which there are: kvik vol-list {self.name}"
            ) from None

    @contextmanager
    def working(self, name: str, what: str) -> Iterator[Backend]:
        """Be the only one to change this volume; the pool stays active meanwhile. ResourceBusy if another does."""
        backend = self.active()
        if self._job in ("destroy", "delete"):
            raise ResourceBusy(f"storage pool '{self.name}' is being stopped")
        if name in self._working:
            raise ResourceBusy(f"volume '{name}' is in use: {self._working[name]}", remedy="try again later")
        self._working[name] = what
        try:
            yield backend
        finally:
            del self._working[name]

    def note(self, volume: StorageVolume | None, name: str) -> None:
        """Show a volume as it is now; None: it is gone."""
        if volume is None:
            self.contents.volumes.pop(name, None)
        else:
            self.contents.volumes[name] = volume

    async def look_again(self, volume: StorageVolume) -> None:
        """After a change of a volume: its figures, and the pool's."""
        backend = self.backend
        if backend is None:
            return
        try:
            self.note(await in_thread(backend.look_at, volume), volume.name)
        except KvikError as error:
            logger.info("volume %s of pool %s is shown as it was: %s", volume.name, self.name, error)

    async def measure(self) -> None:
        """The pool's figures anew, which change with every volume."""
        backend = self.backend
        if backend is None:
            return
        try:
            figures = await in_thread(backend.measure)
        except KvikError as error:
            logger.info("the figures of pool %s stay as they were: %s", self.name, error)
            return
        self.contents.capacity, self.contents.allocation, self.contents.available = figures

    # jobs

    @asynccontextmanager
    async def job(self, name: str) -> AsyncIterator[None]:
        """Be the only one to change the pool. `OperationTimeout` when the present job takes longer than JOB_WAIT.

        The work itself has no deadline: what a storage server does to it cannot be taken back by looking away.
        """
        try:
            async with asyncio.timeout(JOB_WAIT):
                await self._lock.acquire()
        except TimeoutError:
            raise OperationTimeout(
                f"cannot {name} storage pool '{self.name}': it is held by {self._job or 'others'}, "
                f"and {JOB_WAIT:g} s of waiting are over",
                remedy="try again later",
            ) from None
        self._job = name
        try:
            yield
        finally:
            self._job = ""
            self._lock.release()

    def _idle(self, what: str) -> None:
        if self._working:
            volume, work = next(iter(self._working.items()))
            raise ResourceBusy(
                f"cannot {what} storage pool '{self.name}': volume '{volume}' is in use: {work}",
                remedy="try again when that is done",
            )

    async def start(self, build: Callable[[Backend], None] | None = None) -> None:
        """Make it active, after building it if that is asked for. On an error nothing of it stays."""
        async with self.job("start"):
            if self.backend is not None:
                raise OperationInvalid(f"storage pool '{self.name}' is already active")
            backend = make(self.definition.copy())
            self.adopt(backend, await in_thread(self._start, backend, build))
            self._pools.emit(self, Event.STARTED)

    def _start(self, backend: Backend, build: Callable[[Backend], None] | None) -> Contents:
        with ExitStack() as undo:
            self._state(backend, "starting")
            undo.callback(self._pools.store.remove_state, self.name)
            if build is not None:
                build(backend)
            backend.start()
            undo.callback(backend.stop)
            contents = backend.refresh()
            self._state(backend, "active")
            undo.pop_all()
        return contents

    def _state(self, backend: Backend, state: str) -> None:
        origin = PoolOrigin(state=state, boot=self._pools.store.boot, persistent=self.persistent)  # type: ignore[arg-type]
        self._pools.store.save_state(PoolState(pool=backend.document, origin=origin))

    def adopt(self, backend: Backend, contents: Contents) -> None:
        """Be active with what `backend` made or found."""
        self.backend = backend
        self._show(contents)

    def _show(self, contents: Contents) -> None:
        self.contents = contents
        self.warnings.clear()
        for line in contents.left_out:
            self.warn(line)

    async def destroy(self) -> None:
        """Make it inactive; what it holds is untouched. A transient one is forgotten."""
        async with self.job("destroy"):
            backend = self.active()
            self._idle("stop")
            await in_thread(self._stop, backend)
            self.backend = None
            self.contents = Contents()
            self.warnings.clear()
            self._pools.emit(self, Event.STOPPED)
            if not self.persistent:
                self._pools.forget(self)

    def _stop(self, backend: Backend) -> None:
        self._state(backend, "stopping")
        try:
            backend.stop()
        except KvikError:
            self._state(backend, "active")
            raise
        self._pools.store.remove_state(self.name)

    async def save_origin(self) -> None:
        """After a change of `persistent`."""
        if self.backend is not None:
            await in_thread(self._state, self.backend, "active")

    async def build(self, work: Callable[[Backend], None]) -> None:
        async with self.job("build"):
            self._inactive()
            await in_thread(work, make(self.definition.copy()))
            self._pools.emit(self, Event.CREATED)

    async def delete(self) -> None:
        """Remove what it is kept in."""
        async with self.job("delete"):
            self._inactive()
            await in_thread(make(self.definition.copy()).delete)
            self._pools.emit(self, Event.DELETED)

    def _inactive(self) -> None:
        if self.backend is not None:
            raise OperationInvalid(
                f"storage pool '{self.name}' is still active", remedy=f"stop it: kvik pool-destroy {self.name}"
            )

    async def refresh(self) -> None:
        """Look at everything anew. A pool that cannot be looked at any more becomes inactive."""
        async with self.job("refresh"):
            backend = self.active()
            try:
                contents = await in_thread(backend.refresh)
            except KvikError as error:
                self.warn(f"it cannot be refreshed: {error}")
                raise
            self._show(contents)
            self._pools.emit_refresh(self)

    async def set_autostart(self, on: bool) -> None:
        async with self.job("set autostart of"):
            if not self.persistent:
                raise OperationInvalid("pool has no config file")
            await in_thread(self._pools.store.set_autostart, self.name, on)
            self.autostart = on

    def warn(self, text: str) -> None:
        if text not in self.warnings and len(self.warnings) < WARNINGS_MAX:
            logger.info("pool %s: %s", self.name, text)
            self.warnings.append(text)
