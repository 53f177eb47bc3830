"""Sessions with the kvik-blks that serve a machine's disks, and the jobs that are told of there."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvik.conf.devices.disk import Disk
from kvik.errors import HypervisorError, MonitorError, OperationInvalid, OperationTimeout, OperationUnsupported
from kvik.host.reach import about
from kvik.hypervisor.driver import JobState
from kvik.hypervisor.names import alias_of
from kvik.hypervisor.sidecars import kvik_blk, storage_daemon
from kvik.image.qcow2.redo import identity_of
from kvik.qmp.aio import QmpConnection

if TYPE_CHECKING:
    from kvik.hypervisor.kvik.machine import KvikMachine

__all__ = ["DEADLINE", "INTERVAL", "ask", "follow", "identity", "number", "serves", "session"]

DEADLINE = 60.0  # seconds: what the guest wrote may have to be written out first
INTERVAL = 0.5  # seconds between two looks at a job's progress
_CONNECT = 5.0  # seconds
_FIRST_LOOK = 0.05  # seconds; small disks are done by then


@contextlib.asynccontextmanager
async def session(machine: KvikMachine, disk: Disk, lacks: str) -> AsyncIterator[QmpConnection]:
    """`lacks`: what one of an older kvik knows nothing of."""
    alias = alias_of(disk)
    path = storage_daemon.monitor_path(machine.directory, alias)
    connection = await storage_daemon.connect(path, f"kvik-blk of {alias}", _CONNECT)
    try:
        yield connection
    except MonitorError as error:
        if error.qmp_class == "CommandNotFound":
            raise OperationUnsupported(
                f"disk {disk.target.dev} of machine {machine.name} is served by the kvik-blk of an older kvik, which "
                f"knows of no {lacks}",
                remedy=f"start the machine anew: kvik shutdown {machine.name}, kvik start",
            ) from error
        raise
    finally:
        connection.close()


async def ask(
    machine: KvikMachine, disk: Disk, command: str, arguments: Mapping[str, Any] | None = None, *, lacks: str
) -> Any:
    async with session(machine, disk, lacks) as connection:
        return await connection.execute(command, arguments, deadline=DEADLINE)


def serves(machine: KvikMachine, disk: Disk) -> bool:
    """Whether a kvik-blk of this disk lives."""
    alias = alias_of(disk)
    return any(
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
