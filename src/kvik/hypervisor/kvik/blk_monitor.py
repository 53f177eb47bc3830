"""Sessions with whoever writes to a machine's disks, the kvik-blks that serve them or the VMM itself, and the jobs that
are told of there."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from kvik.conf.devices.disk import Disk
from kvik.errors import HypervisorError, MonitorError, OperationInvalid, OperationTimeout, OperationUnsupported
from kvik.host.reach import about
from kvik.hypervisor.driver import JobState
from kvik.hypervisor.names import alias_of
from kvik.hypervisor.sidecars import kvik_blk, storage_daemon
from kvik.image.qcow2.redo import identity_of

if TYPE_CHECKING:
    from kvik.hypervisor.kvik.machine import KvikMachine

__all__ = ["DEADLINE", "INTERVAL", "Monitor", "Own", "ask", "follow", "identity", "number", "serves", "session"]

DEADLINE = 60.0  # seconds: what the guest wrote may have to be written out first
INTERVAL = 0.5  # seconds between two looks at a job's progress
_CONNECT = 5.0  # seconds
_FIRST_LOOK = 0.05  # seconds; small disks are done by then


class Monitor(Protocol):
    """Of whoever writes to one disk."""

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        fds: Sequence[int] = (),
        deadline: float = _CONNECT,
    ) -> Any: ...


class Own:
    """The VMM's monitor, about a disk of its own."""

    def __init__(self, machine: KvikMachine, alias: str) -> None:
        self._machine, self._alias = machine, alias

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        fds: Sequence[int] = (),
        deadline: float = _CONNECT,
    ) -> Any:
        about = {"device": self._alias} if command.startswith("x-kvik-") else {}
        return await self._machine.execute(command, about | dict(arguments or {}), fds=fds, deadline=deadline)


@contextlib.asynccontextmanager
async def _connected(machine: KvikMachine, alias: str) -> AsyncIterator[Monitor]:
    if alias in machine.own_disks:
        yield Own(machine, alias)
        return
    path = storage_daemon.monitor_path(machine.directory, alias)
    connection = await storage_daemon.connect(path, f"kvik-blk of {alias}", _CONNECT)
    try:
        yield connection
    finally:
        connection.close()


@contextlib.asynccontextmanager
async def session(machine: KvikMachine, disk: Disk, lacks: str) -> AsyncIterator[Monitor]:
    """`lacks`: what a program of an older kvik knows nothing of."""
    async with _connected(machine, alias_of(disk)) as monitor:
        try:
            yield monitor
        except MonitorError as error:
            if error.qmp_class != "CommandNotFound":
                raise
            raise OperationUnsupported(
                f"disk {disk.target.dev} of machine {machine.name} is served by a program of an older kvik, which "
                f"knows of no {lacks}",
                remedy=f"start the machine anew: kvik shutdown {machine.name}, kvik start",
            ) from error


async def ask(
    machine: KvikMachine, disk: Disk, command: str, arguments: Mapping[str, Any] | None = None, *, lacks: str
) -> Any:
    async with session(machine, disk, lacks) as connection:
        return await connection.execute(command, arguments, deadline=DEADLINE)


def serves(machine: KvikMachine, disk: Disk) -> bool:
    """Whether a kvik-blk of this disk lives, or the VMM has it itself."""
    alias = alias_of(disk)
    return alias in machine.own_disks or any(
        member.alias == alias and member.kind == kvik_blk.KIND and member.process.alive for member in machine.sidecars
    )


async def follow(
    machine: KvikMachine, states: Callable[[], Awaitable[dict[str, JobState]]], job: str
) -> AsyncIterator[JobState]:
    """A job every now and then, up to its end; ends without that if nobody knows it (any more)."""
    pause = _FIRST_LOOK
    while True:
        try:
            state = (await states()).get(job)
        except (MonitorError, OperationInvalid):
            raise
        except (HypervisorError, OperationTimeout):
            if machine.ended:
                raise
        else:
            if state is None:
                return
            yield state
            if state.concluded:
                return
        await asyncio.sleep(pause)
        pause = min(2 * pause, INTERVAL)


def number(item: Mapping[str, Any], key: str) -> int:
    value = item.get(key)
    return value if isinstance(value, int) and value > 0 else 0


def identity(path: str | None) -> tuple[int, int]:
    """As `kvik.image.qcow2.redo.identity`, of a file by its name; (0, 0) for one that is not there. Looks at a file
    that may not answer: see `host/reach.py`."""
    about(path or "")
    try:
        return identity_of(Path(path or "").stat())
    except OSError:
        return 0, 0
