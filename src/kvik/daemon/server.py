"""The daemon's life: lock, socket, clients, idleness, a graceful end.

One `Server` serves one scope. It owns the connections and the tasks of calls that wait; the manager owns the
machines, and they outlive both.

Nobody can starve the others: connections are limited in total and per user, those that have not opened a hypervisor
connection yet (half-open) are few and short-lived, and when there are too many of them the process that holds most
loses its oldest.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import logging
import os
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvik.daemon.connection import Connection
from kvik.daemon.eventing import EventRouter
from kvik.daemon.instance import InstanceLock, bind_socket, private_directory
from kvik.daemon.network_events import NetworkEvents
from kvik.daemon.pool_events import PoolEvents
from kvik.daemon.secret_events import SecretEvents
from kvik.daemon.streams import Stream
from kvik.paths import Paths

if TYPE_CHECKING:
    from kvik.manager.manager import Manager

__all__ = ["Identity", "Limits", "Server"]

log = logging.getLogger("kvik.daemon")

UCRED = struct.Struct("3i")  # struct ucred: pid, uid, gid
TICK = 1.0  # seconds between looks at deadlines while anybody is connected
ACCEPT_BATCH = 32
ACCEPT_PAUSE = 0.2  # seconds without accepting after the host ran out of descriptors or memory
EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


@dataclass(frozen=True, slots=True)
class Identity:
    """Who is at the other end, by the kernel's word (SO_PEERCRED)."""

    pid: int
    uid: int
    gid: int


@dataclass(frozen=True, slots=True)
class Limits:
    """Numbers that bound what clients can make the daemon hold. Times in seconds, sizes in bytes."""

    connections: int = 5000
    per_user: int = 4000
    half_open: int = 64
    open_deadline: float = 10.0
    calls: int = 64  # running calls of one connection; more wait unread in its socket
    call_bytes: int = 64 * 1024 * 1024  # bodies of running calls of one connection
    output: int = 64 * 1024 * 1024  # unsent output beyond which a client that does not read is cut
    keepalive_interval: float = 5.0
    keepalive_count: int = 5
    grace: float = 5.0  # for calls still running when the daemon ends


class Server:
    """Serves `manager` on Unix sockets until `stop` is called or it was idle for `idle_timeout` seconds (0: never)."""

    def __init__(
        self,
        manager: Manager,
        paths: Paths,
        *,
        node: Any,
        socket_path: Path | None = None,
        limits: Limits | None = None,
        idle_timeout: float = 0.0,
    ) -> None:
        self.manager = manager
        self.node = node
        self.paths = paths
        self.socket_path = socket_path or paths.socket
        self.limits = limits or Limits()
        self.idle_timeout = idle_timeout
        self.started = time.time()
        self.loop = asyncio.get_running_loop()
        self.events = EventRouter(manager.events)
        self.network_events = NetworkEvents(manager.networks)
        self.pool_events = PoolEvents(manager.pools)
        self.secret_events = SecretEvents(manager.secrets)
        self.connections: set[Connection] = set()
        self.consoles: dict[tuple[bytes, str], Stream] = {}  # (machine's UUID, device) -> who has it
        self.served = 0  # connections since the start
        self.calls = 0  # calls answered by connections that have ended
        self._half_open: dict[Connection, None] = {}  # in order of arrival
        self._per_user: Counter[int] = Counter()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._listener: socket.socket | None = None
        self._lock = InstanceLock(paths.run / "kvikd.pid")
        self._stopping = asyncio.Event()
        self._tick_handle: asyncio.TimerHandle | None = None
        self._idle_handle: asyncio.TimerHandle | None = None
        self._ids = itertools.count(1)
        self._last_complaint = 0.0

    # life

    async def start(self) -> None:
        """Lock, open the manager, listen. Raises `KvikError` or `OSError`; then nothing is left behind."""
        private_directory(self.paths.run)
        self._lock.acquire()
        try:
            await self.manager.open()
            try:
                self.socket_path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                self._listener = bind_socket(self.socket_path, backlog=1024)
            except BaseException:
                await self.manager.close()
                raise
        except BaseException:
            self._lock.release()
            raise
        self.loop.add_reader(self._listener.fileno(), self._accept)
        self._check_idle()
        for warning in getattr(self.manager, "warnings", ()):
            log.warning("%s", warning)
        log.info("serving the %s scope on %s", self.paths.scope, self.socket_path)

    def stop(self, reason: str) -> None:
        """Ask for a graceful end. Returns at once; `run` ends when all is done."""
        if not self._stopping.is_set():
            log.info("ending: %s", reason)
            self._stopping.set()

    @property
    def stopping(self) -> bool:
        return self._stopping.is_set()

    async def run(self, ready: Callable[[], None] = lambda: None) -> None:
        """Start, tell `ready`, serve until stopped, clean up."""
        await self.start()
        try:
            ready()
            await self._stopping.wait()
        finally:
            await self._finish()

    async def _finish(self) -> None:
        if self._listener is not None:
            self.loop.remove_reader(self._listener.fileno())
            self._listener.close()
            # Ours for sure: the lock is still held. A client that finds no name starts a new daemon, which waits
            # for the lock.
            self.socket_path.unlink(missing_ok=True)
        for handle in (self._tick_handle, self._idle_handle):
            if handle is not None:
                handle.cancel()
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=self.limits.grace)
            for task in late:
                task.cancel()
            if late:
                log.warning("%d calls did not end within %.0f s and were cancelled", len(late), self.limits.grace)
                await asyncio.wait(late, timeout=1.0)
        for connection in list(self.connections):
            connection.close("the daemon is ending")
        await asyncio.sleep(0)  # lets the close callbacks run
        if self._tasks:  # machines that end with their client
            await asyncio.wait(self._tasks, timeout=self.limits.grace)
        self.events.close()
        self.network_events.close()
        self.pool_events.close()
        self.secret_events.close()
        await self.manager.close()
        self._lock.release()

    # tasks

    def spawn(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """Run `work` as a task the server keeps alive and waits for at the end."""
        task = self.loop.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)
        return task

    def _task_done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("task %s failed", task.get_name(), exc_info=error)
        if not self._tasks:
            self._check_idle()

    # connections

    def _accept(self) -> None:
        assert self._listener is not None
        for _ in range(ACCEPT_BATCH):
            try:
                sock, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in EXHAUSTED:
                    log.exception("accepting a connection failed")
                    return
                self._complain("cannot accept connections: %s", error.strerror)
                if not self._drop_half_open("the daemon is out of descriptors"):
                    self._pause_accepting()
                    return
                continue
            try:
                self._admit(sock)
            except OSError as error:  # gone already, or no descriptor left for the loop
                log.debug("a client left before it was served: %s", error)
                sock.close()

    def _pause_accepting(self) -> None:
        # Readiness would come back at once and eat the processor.
        assert self._listener is not None
        listener = self._listener
        self.loop.remove_reader(listener.fileno())

        def again() -> None:
            if not self.stopping:
                self.loop.add_reader(listener.fileno(), self._accept)

        self.loop.call_later(ACCEPT_PAUSE, again)

    def _admit(self, sock: socket.socket) -> None:
        identity = Identity(*UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, UCRED.size)))
        if identity.uid not in (0, os.geteuid()):
            self._complain("user %d (pid %d) refused: this daemon serves its own user only", identity.uid, identity.pid)
            sock.close()
            return
        limits = self.limits
        if len(self.connections) >= limits.connections or self._per_user[identity.uid] >= limits.per_user:
            self._complain("connection of user %d (pid %d) refused: too many", identity.uid, identity.pid)
            sock.close()
            return
        if len(self._half_open) >= limits.half_open:
            self._drop_half_open("too many connections that were never opened")
        connection = Connection(self, sock, identity, next(self._ids))
        self.connections.add(connection)
        self._half_open[connection] = None
        self._per_user[identity.uid] += 1
        self.served += 1
        if self._idle_handle is not None:
            self._idle_handle.cancel()
            self._idle_handle = None
        if self._tick_handle is None:
            self._tick_handle = self.loop.call_later(TICK, self._tick)

    def _drop_half_open(self, reason: str) -> bool:
        """Cut the oldest half-open connection of the process that has most of them."""
        if not self._half_open:
            return False
        pids = Counter(connection.identity.pid for connection in self._half_open)
        greedy = pids.most_common(1)[0][0]
        victim = next(connection for connection in self._half_open if connection.identity.pid == greedy)
        self._complain("pid %d loses a connection: %s", greedy, reason)
        self._half_open.pop(victim)
        victim.close(reason)
        return True

    def opened(self, connection: Connection) -> None:
        """`connection` made its CONNECT_OPEN: it is no longer half-open."""
        self._half_open.pop(connection, None)

    def closed(self, connection: Connection) -> None:
        """`connection` ended (it says so itself, once)."""
        self._half_open.pop(connection, None)
        self.connections.discard(connection)
        self.calls += connection.calls
        uid = connection.identity.uid
        self._per_user[uid] -= 1
        if not self._per_user[uid]:
            del self._per_user[uid]
        self._check_idle()

    def _tick(self) -> None:
        self._tick_handle = None
        if not self.connections or self.stopping:
            return
        now = self.loop.time()
        oldest_allowed = now - self.limits.open_deadline
        for connection in list(self._half_open):
            if connection.created > oldest_allowed:
                break
            self._half_open.pop(connection, None)
            connection.close(f"not opened within {self.limits.open_deadline:.0f} s")
        for connection in list(self.connections):
            connection.tick(now)
        self._tick_handle = self.loop.call_later(TICK, self._tick)

    # idleness

    def _check_idle(self) -> None:
        idle = not self.connections and not self._tasks and not self.stopping
        if idle and self.idle_timeout and self._idle_handle is None:
            self._idle_handle = self.loop.call_later(self.idle_timeout, self._idle)

    def _idle(self) -> None:
        self._idle_handle = None
        if self.manager.needed_by:
            self._check_idle()  # its guest may end at any time, and we are to start it again: look later
        elif not self.connections and not self._tasks:
            self.stop(f"idle for {self.idle_timeout:g} s")

    def _complain(self, message: str, *values: object) -> None:
        """Log a warning, at most one a second: a flood of clients must not become a flood of lines."""
        now = time.monotonic()
        level = logging.WARNING if now - self._last_complaint >= 1.0 else logging.DEBUG
        if level == logging.WARNING:
            self._last_complaint = now
        log.log(level, message, *values)
