"""One storage pool: its definition, whether it is active, its volumes, and who works on it.

One job at a time changes the pool as a whole (start, stop, build, refresh); one at a time changes a volume. Volumes
are worked on beside each other, and while that goes on the pool cannot be stopped.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar
from uuid import UUID

from kvik.conf.enums import StoragePoolEventLifecycleType as Event
from kvik.conf.storage_pool import StoragePool, bytes_of, format_pool
from kvik.conf.storage_state import PoolOrigin, PoolState
from kvik.conf.storage_volume import EncryptionSecret, StorageVolume
from kvik.errors import KvikError, NoStorageVolume, OperationInvalid, OperationTimeout, ResourceBusy
from kvik.host.files import Identity
from kvik.host.threads import in_thread, settled
from kvik.storage.backend import Backend, Contents
from kvik.storage.encryption import encryption_of
from kvik.storage.types import make

if TYPE_CHECKING:
    from kvik.storage.pools import Pools

__all__ = ["JOB_WAIT", "Bars", "PoolObject", "Work"]

logger = logging.getLogger(__name__)

JOB_WAIT = 30.0  # seconds to wait for the present job
WARNINGS_MAX = 64
SILENT = "its source does not answer"
Bars = Literal["", "writers", "all"]
T = TypeVar("T")


@dataclass(slots=True)
class Work:
    """What is done with one volume, and which machines it keeps from starting. `identity` is known a moment later;
    `places` are those of a network disk."""

    backend: Backend
    name: str
    what: str
    bars: Bars
    identity: Identity | None = None
    places: set[str] = field(default_factory=set)


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
        self._overdue: set[asyncio.Task[Any]] = set()  # what waits for a source that does not answer
        self._lock = asyncio.Lock()
        self._job = ""
        self._working: dict[str, Work] = {}  # by the volume's name

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

    def _make(self) -> Backend:
        return make(self.definition.copy(), self._pools.secret)

    def active(self) -> Backend:
        """Its backend. OperationInvalid if it is not active."""
        if self.backend is None:
            raise OperationInvalid(
                f"storage pool '{self.name}' is not active", remedy=f"start it: kvik pool-start {self.name}"
            )
        return self.backend

    def remarks(self) -> list[str]:
        """What people should know of it: who else may use it, and what was found since it is active."""
        shared = []
        if self.contents.shared:
            reach = "a machine that runs keeps its images from machines of other hosts"
            if self.contents.lockless:
                reach = f"locks do not reach them ({self.contents.lockless}): give machines a <lease>"
            shared.append(f"other hosts may use it at the same time ({self.contents.shared}): {reach}")
        return [*self.document.warnings(), *shared, *self.warnings]

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
    def working(self, name: str, what: str, bars: Bars = "all") -> Iterator[Work]:
        """Be the only one to change this volume; the pool stays active meanwhile. `bars`: which machines may not start
        from it until that is done. ResourceBusy if another works on it."""
        backend = self.active()
        if self._job in ("destroy", "delete"):
            raise ResourceBusy(f"storage pool '{self.name}' is being stopped")
        if self._overdue:
            raise self._silence()
        self.check_idle(name)
        work = self._working[name] = Work(backend, name, what, bars)
        try:
            yield work
        finally:
            del self._working[name]

    def check_idle(self, name: str) -> None:
        """ResourceBusy if somebody changes this volume."""
        work = self._working.get(name)
        if work is not None:
            raise ResourceBusy(f"volume '{name}' is in use: {work.what}", remedy="try again later")

    def work_on(self, identity: Identity | set[str], writes: bool) -> Work | None:
        """What is done just now with the file or device (or network disk, by its places), if it bars a machine that
        only reads it, or `writes`, too."""
        for work in self._working.values():
            same = work.identity == identity if isinstance(identity, tuple) else not work.places.isdisjoint(identity)
            if same and (work.bars == "all" or (work.bars == "writers" and writes)):
                return work
        return None

    def note(self, name: str, volume: StorageVolume | None) -> None:
        """Show a volume as it is now; None: it is gone."""
        if volume is None:
            self.contents.volumes.pop(name, None)
        else:
            self._name_secret(volume, self.contents.volumes.get(name))
            self.contents.volumes[name] = volume

    def _name_secret(self, volume: StorageVolume, before: StorageVolume | None) -> None:
        """What opens an encrypted volume: no header says it. As its document said, or the secret for its path."""
        encryption, known = encryption_of(volume), encryption_of(before) if before is not None else None
        if encryption is None or encryption.secrets:
            return
        if known is not None and known.secrets:
            encryption.secrets = known.secrets
        elif (uuid := self._pools.secret_for(volume.path)) is not None:
            encryption.secrets = [EncryptionSecret(type="passphrase", uuid=uuid)]

    async def look_again(self, volume: StorageVolume) -> None:
        """After a change of a volume: its figures, and the pool's."""
        backend = self.backend
        if backend is None:
            return
        try:
            self.note(volume.name, await self._glance(partial(backend.look_at, volume)))
        except KvikError as error:
            logger.info("volume %s of pool %s is shown as it was: %s", volume.name, self.name, error)

    async def measure(self, *, written: bool = False) -> None:
        """The pool's figures anew, which change with every volume. Where one was `written` to, only of a pool that
        gives room then: others are spared the question, which may be a login at a target."""
        backend = self.backend
        if backend is None or (written and not backend.takes_room):
            return
        try:
            figures = await self._glance(backend.measure)
        except KvikError as error:
            logger.info("the figures of pool %s stay as they were: %s", self.name, error)
            return
        self.contents.capacity, self.contents.allocation, self.contents.available = figures

    # sources that do not answer: a thread that waits for one cannot be called back

    async def _glance(self, look: Callable[[], T]) -> T:
        """In a thread, for a moment at most. OperationTimeout if it takes longer, and at once while others wait."""
        if self._overdue:
            raise self._silence()
        return await self._answered(in_thread(look), self._pools.glance)

    async def _answered(self, work: Coroutine[Any, Any, T], patience: float | None) -> T:
        """What `work` comes to. It goes on to its end, but who asked waits for `patience` seconds only, and may go."""
        task = asyncio.ensure_future(work)
        try:
            await asyncio.wait({task}, timeout=patience)
        finally:
            if not task.done():
                self._pools.keep(task)
        if task.done():
            return task.result()
        self._overdue.add(task)
        task.add_done_callback(self._answers)
        self.warn(SILENT)
        raise self._silence()

    def _answers(self, task: asyncio.Task[Any]) -> None:
        self._overdue.discard(task)
        if not self._overdue and SILENT in self.warnings:
            self.warnings.remove(SILENT)
            logger.info("pool %s: its source answers again", self.name)

    def _silence(self) -> OperationTimeout:
        return OperationTimeout(
            f"the source of storage pool '{self.name}' does not answer",
            remedy=f"what was asked goes on when it does; to give it up: kvik pool-destroy {self.name}",
        )

    # jobs

    @asynccontextmanager
    async def job(self, name: str) -> AsyncIterator[None]:
        """Be the only one to change the pool. `OperationTimeout` when the present job takes longer than JOB_WAIT.

        The work itself has no deadline: what a storage server does to it cannot be taken back by looking away.
        """
        try:
            async with asyncio.timeout(JOB_WAIT):
                lock = self._lock  # another one once the job is given up
                await lock.acquire()
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
            if lock is self._lock:
                self._job = ""
            lock.release()

    def _idle(self, what: str) -> None:
        if self._working:
            volume, work = next((name, work.what) for name, work in self._working.items())
            raise ResourceBusy(
                f"cannot {what} storage pool '{self.name}': volume '{volume}' is in use: {work}",
                remedy="try again when that is done",
            )

    async def start(self, build: Callable[[Backend], None] | None = None, document: StoragePool | None = None) -> None:
        """Make it active, after building it if that is asked for, as `document` says if one is given. On an error
        nothing of it stays. OperationTimeout: it does not answer, and is active once it does."""
        patience = self._pools.patience if build is None else None
        await self._answered(self._start(build, document), patience)

    async def _start(self, build: Callable[[Backend], None] | None, document: StoragePool | None) -> None:
        async with self.job("start"):
            if self.backend is not None:
                raise OperationInvalid(f"storage pool '{self.name}' is already active")
            backend = make((document or self.definition).copy(), self._pools.secret)

            def started(contents: Contents) -> None:
                self.adopt(backend, contents)
                self._pools.emit(self, Event.STARTED)

            try:
                await settled(partial(self._run, backend, build), started)
            finally:
                if not self.persistent and not self.is_active:
                    self._pools.forget(self)

    def _run(self, backend: Backend, build: Callable[[Backend], None] | None) -> Contents:
        with ExitStack() as undo:
            self._state(backend, "starting")
            undo.callback(self._pools.store.remove_status, self.name)
            if build is not None:
                build(backend)
            backend.start()
            undo.callback(backend.stop)
            contents = backend.refresh()
            self._state(backend, "active")
            undo.pop_all()
        return contents

    def _state(self, backend: Backend, state: str) -> None:
        origin = PoolOrigin(state=state, boot=self._pools.store.boot, persistent=self.persistent)  # type: ignore[arg-type]  # its Literal
        self._pools.store.save_state(PoolState(pool=backend.document, origin=origin))

    def adopt(self, backend: Backend, contents: Contents) -> None:
        """Be active with what `backend` made or found."""
        self.backend = backend
        self._show(contents)

    def _show(self, contents: Contents) -> None:
        for volume in contents.volumes.values():
            self._name_secret(volume, None)
        self.contents = contents
        self.warnings.clear()
        for line in contents.left_out:
            self.warn(line)

    async def destroy(self) -> None:
        """Make it inactive; what it holds is untouched. A transient one is forgotten, and what still waits for its
        source given up."""
        if self.backend is not None:
            self.backend.given_up = bool(self._overdue)
            if self._overdue and self._job == "refresh":  # which changes nothing, and whose outcome nobody wants now
                self._lock, self._job = asyncio.Lock(), ""
        await self._answered(self._destroy(), self._pools.patience)

    async def _destroy(self) -> None:
        async with self.job("destroy"):
            backend = self.active()
            self._idle("stop")
            await settled(partial(self._stop, backend), self._stopped)

    def _stopped(self, _: None) -> None:
        self.backend = None
        self.contents = Contents()
        self.warnings.clear()
        self._overdue.clear()  # those of the backend that is gone
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
        self._pools.store.remove_status(self.name)

    async def save_origin(self) -> None:
        """After a change of `persistent`."""
        if self.backend is not None:
            await in_thread(self._state, self.backend, "active")

    async def build(self, work: Callable[[Backend], None]) -> None:
        async with self.job("build"):
            self._inactive()
            await settled(partial(work, self._make()), lambda _: self._pools.emit(self, Event.CREATED))

    async def delete(self) -> None:
        """Remove what it is kept in."""
        async with self.job("delete"):
            self._inactive()
            await settled(self._make().delete, lambda _: self._pools.emit(self, Event.DELETED))

    def _inactive(self) -> None:
        if self.backend is not None:
            raise OperationInvalid(
                f"storage pool '{self.name}' is still active", remedy=f"stop it: kvik pool-destroy {self.name}"
            )

    async def refresh(self) -> None:
        """Look at everything anew. If that is not possible it stays as it was shown, with a warning."""
        if self._overdue:
            raise self._silence()
        await self._answered(self._refresh(), self._pools.patience)

    async def _refresh(self) -> None:
        async with self.job("refresh"):
            backend = self.active()
            try:
                contents = await in_thread(backend.refresh)
            except KvikError as error:
                self.warn(f"it cannot be refreshed: {error}")
                raise
            if self.backend is backend:
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
