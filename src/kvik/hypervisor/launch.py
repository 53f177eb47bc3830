"""What every VMM that speaks QMP has in common when it is started, and when a later daemon finds it again.

The drivers differ in what comes between: the command line, and how a process is made of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple, TypeVar

from kvik.conf.domain import Domain
from kvik.errors import ConfigError, KvikError, OperationFailed
from kvik.host.process import ProcessHandle, find
from kvik.hypervisor.descriptors import Opened
from kvik.hypervisor.driver import StartRequest
from kvik.hypervisor.machine import QmpMachine
from kvik.hypervisor.sidecars.group import Sidecars, attach_sidecars

__all__ = ["Found", "bring_up", "find_running", "take_up"]

START_DEADLINE = 30.0
ATTACH_DEADLINE = 2.0

M = TypeVar("M", bound=QmpMachine)


async def bring_up(
    machine: M,
    request: StartRequest,
    opened: Opened,
    undo: ExitStack,
    *,
    settings: Callable[[M], Awaitable[None]],
    explain: Callable[[KvikError], Awaitable[KvikError]],
) -> M:
    """From a process that was just spawned to a machine that runs, or waits if that was asked for.

    `settings` does what is no option of the command line; `explain` makes of a failure what the VMM itself said of it.
    On an error the process is gone and `undo` is left for the caller's `with`; on success nothing is undone any more.
    """
    machine.hold_events()
    try:
        await machine.connect(START_DEADLINE)
        await machine.refresh()
        await settings(machine)
        if request.state is not None:
            await machine.load_state(request.state)
            await machine.refresh()
        if request.inside is not None:
            tag, targets = request.inside
            disks = [disk for disk in request.definition.devices.disks if disk.target.dev in targets]
            await machine.load_inside(tag, disks)
        if opened.output is not None:
            machine.watch_output(opened.output)
            opened.output = None
        failure = machine.sidecars.failure(request.log_fd)
        if failure is not None:
            raise failure
        if not request.paused:
            await machine.resume()
    except BaseException as error:
        reason = error
        # A saved state that is damaged says so itself, whatever the VMM made of it.
        if isinstance(error, KvikError) and not isinstance(error, OperationFailed):
            reason = await explain(error)
            reason = machine.sidecars.failure(request.log_fd, qemu_alive=machine.process.alive) or reason
        await asyncio.shield(machine.quit(0.0))
        if reason is error:
            raise
        raise reason from error
    undo.pop_all()
    machine.watch_sidecars()
    machine.release_events()
    return machine


class Found(NamedTuple):
    process: ProcessHandle
    sidecars: Sidecars
    lost: list[str]  # side processes that ended while no daemon watched


async def find_running(definition: Domain, handle: Mapping[str, Any]) -> Found | None:
    """The process that a status file's `handle` describes; None if it is gone, and its side processes with it.

    Raises `ConfigError` for a handle that says nothing.
    """
    pid, start_time, boot = handle.get("pid"), handle.get("start_time"), handle.get("boot")
    if not isinstance(pid, int) or not isinstance(start_time, int) or not isinstance(boot, str):
        raise ConfigError(f"the status of machine {definition.name} does not say which process it is")
    found = find(pid, start_time, boot)
    sidecars, lost = attach_sidecars(definition.name, handle.get("sidecars"), boot)
    if found is None:
        await sidecars.end()
        return None
    return Found(found, sidecars, lost)


async def take_up(machine: M, handle: Mapping[str, Any], found: Found) -> M:
    """A machine whose monitor does not answer is found all the same; its monitor is tried until it does."""
    if handle.get("started") is not False:
        machine.mark_started()
    machine.clock_base = int(handle.get("clock_base") or 0)
    try:
        await machine.connect(ATTACH_DEADLINE)
        await machine.refresh()
    except KvikError:
        if not machine.ended:
            machine.keep_reconnecting()
    machine.watch_sidecars(found.lost)
    return machine
