"""A machine's memory and devices as a stream of bytes: where a VMM sends it to, and where one is filled from.

The VMM has one end of a pipe or socket pair, a thread of the daemon the other: whatever holds that thread up (a slow
disk) holds up neither the loop nor another machine. If the daemon is killed the VMM sees its end close, gives up
sending, and still has its guest.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import fcntl
import os
import threading
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Protocol, TypeVar

from kvik.errors import KvikError, OperationFailed

if TYPE_CHECKING:
    from kvik.hypervisor.monitored import MonitoredProcess

__all__ = [
    "FD_NAME",
    "PIECE",
    "LiveSave",
    "StateSource",
    "StateTarget",
    "copy_in",
    "copy_out",
    "in_own_thread",
    "received",
    "widen",
]

FD_NAME = "kvik-state"  # the VMM's name of our pipe
PIECE = 1 << 20  # bytes that are read and written in one go
_F_SETPIPE_SZ = 1031  # linux/fcntl.h

T = TypeVar("T")


class StateTarget(Protocol):
    """Both functions block, and are called by one thread. They raise `HostError`; `cancelled` may be set by anybody."""

    cancelled: bool
    total: int  # bytes that are expected, for progress

    def write(self, data: memoryview) -> None: ...
    def finish(self) -> None:
        """All of it was written: it is on disk when this returns."""


class LiveSave(Protocol):
    """A machine's state, as it is at one instant, on its way to a `StateTarget` while the guest goes on."""

    async def freeze(self) -> None:
        """This is the instant: the guest stands still, for a moment. Raises as `finish`; then nothing has begun."""

    async def finish(self) -> None:
        """`target.finish` has returned. Raises `HypervisorError`, `HostError`, `OperationFailed`; the guest goes on."""

    async def close(self) -> None:
        """Give up what is not finished. Idempotent."""


class StateSource(Protocol):
    """`read` blocks: at most so many bytes, b"" at the end. Raises `OperationFailed` at the end if what was read is not
    what was written."""

    def read(self, size: int) -> bytes: ...


def widen(fd: int) -> None:
    """Let a pipe hold more than its usual 64 KiB, as far as this user may."""
    with contextlib.suppress(OSError):
        fcntl.fcntl(fd, _F_SETPIPE_SZ, PIECE)


@contextlib.asynccontextmanager
async def received(machine: MonitoredProcess, target: StateTarget) -> AsyncIterator[asyncio.Future[None]]:
    """The VMM has a pipe, `FD_NAME`, and a thread writes what comes out of it to `target`: that is what is yielded. The
    block has the VMM send its state; when it ends all of it is written. Raises `OperationFailed` if it cannot be."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    widen(writer)
    try:
        await machine.execute("getfd", {"fdname": FD_NAME}, fds=[writer])
    except BaseException:
        os.close(reader)
        raise
    finally:
        os.close(writer)
    copying = in_own_thread(lambda: copy_out(reader, target))
    try:
        yield copying
        await copying
        await in_own_thread(target.finish)
    except BaseException as error:
        target.cancelled = True
        await asyncio.wait([copying], timeout=10)
        if isinstance(error, OSError) and not isinstance(error, KvikError):
            raise OperationFailed(f"the state of machine {machine.name} was not written: {error}") from error
        raise


def copy_out(fd: int, target: StateTarget) -> None:
    """From the VMM's pipe to `target`, until the VMM closes its end. Closes `fd`: a target that fails ends the VMM's
    sending."""
    buffer = memoryview(bytearray(PIECE))
    try:
        while count := os.readv(fd, [buffer]):
            if target.cancelled:
                raise OperationFailed("it was cancelled")
            target.write(buffer[:count])
    finally:
        os.close(fd)


def copy_in(source: StateSource, fd: int) -> None:
    """Everything of `source` into the VMM's pipe. Closes `fd`. A VMM that closed its end has said why itself."""
    try:
        while data := source.read(PIECE):
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
    except BrokenPipeError:
        raise OperationFailed("the VMM stopped reading the saved state") from None
    finally:
        os.close(fd)


def in_own_thread(function: Callable[[], T]) -> asyncio.Future[T]:
    """Run what may block for minutes, in a thread that no other work waits for; it is not ended with its caller."""
    outcome: concurrent.futures.Future[T] = concurrent.futures.Future()

    def work() -> None:
        outcome.set_running_or_notify_cancel()  # from here on a caller that is cancelled does not cancel it
        try:
            outcome.set_result(function())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=work, name="kvik-state", daemon=True).start()
    return asyncio.wrap_future(outcome)
