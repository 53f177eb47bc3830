"""Files that may lie on storage which does not answer: an NFS server that is gone, a lock manager that stands still.

A system call on such a file comes back when the server does, and nothing else ends it. So each look at files that
people name has a thread of its own, and who asked waits for `PATIENCE` only, then gets an error that names the path.
The thread is given up: it goes no further than the call it stands in, and gives back itself what it had opened. Until
it is back that path is not tried again, and of one mount no more than `CROWD` threads stand so.

What changes files is not done here but by `threads.in_thread`: it is waited for, for nothing of it may come later.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import os
import threading
import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from kvik.errors import HostError
from kvik.host.files import AnyPath, host_error
from kvik.host.filesystem import may_stand_still, mount_point
from kvik.host.threads import settle

__all__ = ["CROWD", "about", "closer", "obtain", "open_file", "reach"]

PATIENCE = 30.0  # seconds for one path
CROWD = 4  # threads that may stand still at one mount
_REMEDY = "see to the server or lock manager behind it (findmnt -T PATH, dmesg), then try again"

P = ParamSpec("P")
T = TypeVar("T")


class _Call:
    def __init__(self) -> None:
        self.path = ""
        self.since = time.monotonic()
        self.done = self.given_up = False
        self.mount = ""  # once it is given up


_here = threading.local()
_lock = threading.Lock()  # of `done` and `given_up`, of which but one comes to be, and of the list
_standing: list[_Call] = []


def about(path: AnyPath) -> None:
    """The calling thread is about to look at this path. `HostError` if nobody waits for it any more, or if it is known
    not to answer. Nothing outside of `reach` and `obtain`."""
    call: _Call | None = getattr(_here, "call", None)
    if call is None:
        return
    if call.given_up:
        raise _silent(call.path, PATIENCE)
    if _standing:
        _check(os.fspath(path))
    call.path, call.since = os.fspath(path), time.monotonic()


async def reach(function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Call what only looks at files. `HostError` (ETIMEDOUT) when one of them does not answer."""
    return await obtain(lambda _: None, function, *args, **kwargs)


async def obtain(leave: Callable[[T], object], function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """The same of what comes back with something: `leave` gives it back, in the thread, if nobody waits any more. A
    function that fails gives back its own."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()
    call = _Call()

    def work() -> None:
        _here.call = call
        outcome: list[T] = []
        failure = None
        try:
            outcome.append(function(*args, **kwargs))
        except BaseException as error:
            failure = error
        with _lock:
            call.done = True
            if call in _standing:
                _standing.remove(call)
        if not call.given_up:
            try:
                loop.call_soon_threadsafe(settle, future, outcome, failure)
                return
            except RuntimeError:  # the loop has ended: nobody waits any more
                pass
        for result in outcome:
            leave(result)

    threading.Thread(target=work, name="kvik-reach", daemon=True).start()
    try:
        while not future.done():
            left = call.since + PATIENCE - time.monotonic()
            if left <= 0 and _give_up(call):
                raise _silent(call.path, PATIENCE)
            await asyncio.wait({future}, timeout=max(left, 0.01))
        return future.result()
    except asyncio.CancelledError:
        if not _give_up(call):  # it came just now
            future.add_done_callback(functools.partial(_left, leave))
        raise


def _left(leave: Callable[[T], object], future: asyncio.Future[T]) -> None:
    if not future.cancelled() and future.exception() is None:
        threading.Thread(target=leave, args=(future.result(),), name="kvik-reach", daemon=True).start()


async def open_file(path: AnyPath, flags: int, *, action: str = "open") -> int:
    """A descriptor. `HostError`."""

    def opened() -> int:
        about(path)
        try:
            return os.open(path, flags | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise host_error(action, path, error) from error

    return await obtain(os.close, opened)


def closer(fd: int) -> Callable[[int], None]:
    """What to close it with: a server may have to be told of it, and to answer. Asks that server: may stand still."""
    return _close_aside if may_stand_still(fd) else os.close


def _close_aside(fd: int) -> None:
    threading.Thread(target=os.close, args=(fd,), name="kvik-close", daemon=True).start()


def _give_up(call: _Call) -> bool:
    """False if it is done."""
    mount = mount_point(call.path)
    with _lock:
        if call.done:
            return False
        call.mount, call.given_up = mount, True
        _standing.append(call)
    return True


def _check(path: str) -> None:
    mount = mount_point(path)
    with _lock:
        same = [call for call in _standing if call.path == path]
        beside = [call for call in _standing if call.mount == mount and call.path]
    stuck = same or (beside if len(beside) >= CROWD else [])
    if stuck:
        raise _silent(stuck[0].path, time.monotonic() - stuck[0].since, path)


def _silent(path: str, seconds: float, wanted: str = "") -> HostError:
    where = f"cannot look at {wanted}: " if wanted and wanted != path else ""
    return HostError(
        f"{where}the storage that {path or 'a file'} is on does not answer, for {seconds:.0f} s now",
        errno=errno.ETIMEDOUT,
        remedy=_REMEDY.replace("PATH", path or "PATH"),
    )
