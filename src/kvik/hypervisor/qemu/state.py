"""QEMU's memory and devices as a stream: `migrate` into a pipe, and back out of one (qapi/migration.json).

The guest is stopped when all of it was sent, and QEMU has let go of its images; `cont` takes them up again. What QEMU
sends begins with "QEVM" and ends by itself, so that nothing needs to be known of what is in it.
"""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any

from kvik.errors import HypervisorError, KvikError
from kvik.hypervisor.state import FD_NAME, StateSource, StateTarget, copy_in, in_own_thread, received, widen

if TYPE_CHECKING:
    from kvik.hypervisor.qemu.machine import QemuMachine

__all__ = ["load", "save"]

_POLL = 0.05  # seconds between looks at how far it is
_NO_LIMIT = 1 << 50  # bytes a second
_GOING = ("none", "setup", "active", "device", "pre-switchover", "cancelling", "wait-unplug")


async def save(machine: QemuMachine, target: StateTarget) -> None:
    """Raises `HypervisorError` and others; then the guest is here as it was before. Afterwards it is stopped."""
    async with received(machine, target) as copying:
        try:
            await machine.execute("migrate-set-parameters", {"max-bandwidth": _NO_LIMIT, "downtime-limit": 2000})
            try:
                await machine.execute("migrate", {"uri": f"fd:{FD_NAME}"})
            except BaseException:
                await _close(machine)
                raise
            await _sent(machine, copying, target)
        except BaseException:
            target.cancelled = True
            await asyncio.shield(_give_up(machine))
            raise


async def _close(machine: QemuMachine) -> None:
    """A pipe that QEMU did not take: its end would stay open, and our thread would wait for ever."""
    try:
        await machine.execute("closefd", {"fdname": FD_NAME})
    except KvikError:
        pass  # it has been used, or the machine is gone


async def _sent(machine: QemuMachine, copying: asyncio.Future[None], target: StateTarget) -> None:
    while True:
        report = await _report(machine)
        status = report.get("status")
        ram = report.get("ram")
        if isinstance(ram, dict) and isinstance(ram.get("total"), int):
            target.total = ram["total"]
        if status == "completed":
            return
        if copying.done() and copying.exception() is not None:
            await copying  # why it was not written, rather than that QEMU's pipe broke
        if status not in _GOING:
            why = report.get("error-desc")
            raise HypervisorError(
                f"{machine.name}: QEMU could not send its state ({status}){f': {why}' if why else ''}"
            )
        await asyncio.sleep(_POLL)


async def _report(machine: QemuMachine) -> dict[str, Any]:
    reply = await machine.execute("query-migrate")
    if not isinstance(reply, dict):
        raise HypervisorError(f"{machine.name}: the reply to query-migrate is malformed")
    return reply


async def _give_up(machine: QemuMachine) -> None:
    """QEMU sends no more and its thread has ended, so that the next try finds it ready."""
    try:
        await machine.execute("migrate_cancel")
        for _ in range(200):
            if (await _report(machine)).get("status") not in _GOING[1:]:
                break
            await asyncio.sleep(_POLL)
    except KvikError:
        pass  # it is gone, and its end of the pipe with it


async def load(machine: QemuMachine, source: StateSource) -> None:
    """Into a QEMU that was started with `-incoming defer`; it is stopped afterwards. If QEMU refuses it, it ends."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    widen(writer)
    try:
        await machine.execute("getfd", {"fdname": FD_NAME}, fds=[reader])
    except BaseException:
        os.close(writer)
        raise
    finally:
        os.close(reader)
    feeding = in_own_thread(lambda: copy_in(source, writer))
    feeding.add_done_callback(lambda future: future.cancelled() or future.exception())  # QEMU's own words come first
    try:
        await machine.execute("migrate-incoming", {"uri": f"fd:{FD_NAME}"})
    except BaseException:
        await _close(machine)  # our thread's pipe breaks
        raise
    while True:
        report = await _report(machine)
        status = report.get("status")
        if status == "completed":
            break
        if status == "failed":
            raise HypervisorError(f"{machine.name}: QEMU does not take the saved state: {report.get('error-desc')}")
        await asyncio.sleep(_POLL)
    await feeding  # whether it was what was saved
