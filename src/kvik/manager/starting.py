"""Starting a machine: from its definition, or from what was saved of it. The machine's job is held meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Hashable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvik import __version__
from kvik.conf.aliases import assign_aliases
from kvik.conf.devices.other import Lease
from kvik.conf.domain import format_domain
from kvik.conf.enums import DomainCreateFlags
from kvik.errors import (
    HypervisorError,
    KvikError,
    OperationFailed,
    OperationInvalid,
)
from kvik.host import process
from kvik.host.reach import reach
from kvik.host.threads import in_thread
from kvik.hypervisor.driver import Feature, Machine, StartRequest
from kvik.hypervisor.firmware import reset_variables
from kvik.manager import disks, lifecycle, pivots, ports, sanlock, volume_disks
from kvik.manager.definition import Definition
from kvik.manager.interfaces import open_interfaces
from kvik.manager.jobs import LIMIT
from kvik.manager.leases import take_leases
from kvik.manager.run import Run
from kvik.manager.secrets import open_secrets
from kvik.manager.snapshots.apply import settle
from kvik.manager.stages import BootStages
from kvik.manager.states import (
    Trigger,
    advance,
    state_text,
)
from kvik.manager.storage import check_idle
from kvik.manager.store import Status

if TYPE_CHECKING:
    from kvik.manager.domain import DomainObject
    from kvik.manager.saved.machine import Saved

logger = logging.getLogger(__name__)

LONG = 7 * 24 * 3600.0  # seconds that reading a machine's memory may take


async def start(
    domain: DomainObject, paused: bool, flags: int, files: Mapping[str, int], autodestroy: Hashable | None
) -> None:
    anew = bool(flags & DomainCreateFlags.START_RESET_NVRAM)
    paused = paused or bool(flags & DomainCreateFlags.START_PAUSED)
    async with domain.jobs.hold("start", limit=LONG if domain.has_managed_save else LIMIT):
        if not domain.has_managed_save or domain.is_active:
            await boot(domain, paused, files, autodestroy, reset_nvram=anew)
            return
        if flags & DomainCreateFlags.START_FORCE_BOOT:
            await saved_machine().forget_managed(domain)
            await boot(domain, paused, files, autodestroy, reset_nvram=anew)
            return
        await _start_saved(domain, paused, flags, files, autodestroy)


def saved_machine() -> Any:
    """`saved.machine`, which imports this module."""
    from kvik.manager.saved import machine

    return machine


async def _start_saved(
    domain: DomainObject, paused: bool, flags: int, files: Mapping[str, int], autodestroy: Hashable | None
) -> None:
    """From its managed save, which is gone once the guest runs."""
    module = saved_machine()
    bypass = module.BYPASS_CACHE if flags & DomainCreateFlags.START_BYPASS_CACHE else 0
    saved, document = await module.open_managed(domain, bypass)
    paused = paused or not saved.running
    anew = bool(flags & DomainCreateFlags.START_RESET_NVRAM)
    try:
        await boot(domain, paused, files, autodestroy, config=Definition(document), saved=saved, reset_nvram=anew)
    finally:
        saved.close()
        domain.has_managed_save = await domain.manager.store.run(
            module.managed_path(domain.manager, domain.name).exists
        )


async def boot(
    domain: DomainObject,
    paused: bool,
    files: Mapping[str, int],
    autodestroy: Hashable | None = None,
    *,
    config: Definition | None = None,
    saved: Saved | None = None,
    reset_nvram: bool = False,
) -> None:
    """Run the definition (or `config`, for this once), or go on from what was `saved`; the job is the caller's.
    `reset_nvram`: the firmware's variables are made anew before.

    On an error the machine is off and nothing is left behind.
    """
    if domain.is_active or domain.starting:
        raise OperationInvalid(f"machine {domain.name!r} is already {state_text(domain.state)}")
    if domain.cleaning:
        await asyncio.shield(domain.cleaning)
    manager, log = domain.manager, domain.log
    if domain.snapshots.journal is not None:
        await settle(domain)
    definition = (config or domain.config).parse()
    await pivots.settle(domain, definition)
    volume_disks.resolve_all(manager, definition)
    assign_aliases(definition)
    run = Run(definition, Path(), BootStages(definition))
    uses = await reach(_look_at_files, definition, tuple(files))
    await manager.driver_of(definition).validate(definition)
    # No await between this check and the next line: two starts with one disk cannot pass it together.
    disks.check_unused(uses, manager.disk_uses(domain))
    check_idle(manager, uses, definition.devices.disks)
    run.uses = uses
    run.autodestroy = autodestroy
    number = manager.next_id()
    run.directory = manager.store.runtime_directory(number, domain.name)
    domain.run = run
    definition.id = number
    try:
        if reset_nvram:
            await in_thread(reset_variables, definition)
        machine = await _spawn(domain, run, paused or saved is not None, files, saved)
        run.machine, run.pid = machine, machine.pid
        stat = process.read_stat(machine.pid)
        run.pid_start = stat.start_time if stat else 0
        domain.id = number
        manager.activated(domain)
        following = advance(domain.state, _booted(saved, paused), domain.name)
        if saved is not None:
            run.unfinished = saved.pending(run=not paused)
        status = domain.status()
        status.state, status.reason = following.state, following.reason
        try:
            await manager.store.save_status(status)
        except BaseException:
            # A machine that the next daemon could not find must not run.
            run.pending = Trigger.DESTROYED
            await asyncio.shield(machine.quit(lifecycle.QUIT_GRACE))
            raise
        if saved is not None:
            paused = not await _go_on(domain, machine, run, saved, paused)
    except BaseException as error:
        domain.starting = None
        domain.id = -1
        manager.deactivated(domain, number)
        why = str(error) or type(error).__name__
        domain.run = None
        lifecycle.apply(domain, Trigger.START_FAILED, why)
        domain.cleaning = manager.spawn(lifecycle.clean(domain, run, f"not started: {why}"))
        if isinstance(error, asyncio.CancelledError):
            current = asyncio.current_task()
            if not (current and current.cancelling()):  # not we but the start was cancelled: by a destroy
                await asyncio.shield(domain.cleaning)
                raise OperationFailed(f"machine {domain.name!r} was destroyed while it was starting") from error
            raise
        await asyncio.shield(domain.cleaning)
        raise
    domain.updated = False
    await disks.renew_uses(run)  # with what lies below its disks
    lifecycle.reached(domain, "vmm started")
    lifecycle.apply(domain, _booted(saved, paused))
    if saved is not None:
        await domain.save_quietly()
    how = "started" if saved is None else "restored"
    log.note(f"{how}: pid {run.pid}, accelerator {machine.accelerator}{', paused' if paused else ''}")
    early, run.early = run.early or [], None
    for event in early:
        lifecycle.heard(domain, run, event)


def _booted(saved: Saved | None, paused: bool) -> Trigger:
    if saved is not None and saved.snapshot:
        return Trigger.REVERTED_PAUSED if paused else Trigger.REVERTED
    if saved is not None:
        return Trigger.RESTORED_PAUSED if paused else Trigger.RESTORED
    return Trigger.BOOTED_PAUSED if paused else Trigger.BOOTED


async def _go_on(domain: DomainObject, machine: Machine, run: Run, saved: Saved, paused: bool) -> bool:
    """The guest is there, and stands still: what it was restored from is used up before it does anything. Whether it
    runs: from here on this machine alone has its memory, and is not ended because it cannot be resumed now."""
    using = asyncio.get_running_loop().create_task(saved.used())
    try:
        await asyncio.shield(using)
    except asyncio.CancelledError:
        await using  # too late: its file may be gone, and then this machine must stay
    except KvikError:  # the file is there
        run.pending = Trigger.DESTROYED
        await asyncio.shield(machine.quit(lifecycle.QUIT_GRACE))
        raise
    run.unfinished = {}
    if not paused:
        try:
            await machine.resume()
        except KvikError as error:
            domain.log.note(f"restored, and cannot be resumed: {error}")
            return False
    return not paused


def _look_at_files(definition: Any, given: tuple[str, ...]) -> list[disks.Use]:
    disks.check_files(definition, given)
    return disks.uses(definition)


async def _spawn(
    domain: DomainObject, run: Run, paused: bool, files: Mapping[str, int], saved: Saved | None
) -> Machine:
    """The intent on disk, then the driver. The status says "starting" until the caller replaces it."""
    manager = domain.manager
    attachments = {}
    if Feature.TAPS in domain.driver.features():
        # Before the intent, which names the ports.
        attachments = ports.join(domain, run.live.devices.interfaces)
    intent = Status(
        name=domain.name,
        id=run.live.id or 0,
        state=0,
        reason=0,
        boot=manager.store.boot,
        driver=domain.driver.name,
        directory=str(run.directory),
        document=format_domain(run.live, secure=True),
        starting=True,
        persistent=domain.persistent,
        started=run.started,
    )
    await manager.store.save_status(intent)
    await manager.store.make_runtime_directory(run.directory)
    log_fd = await manager.store.run(_open_log, domain)
    taps = ExitStack()
    try:
        interfaces = run.live.devices.interfaces
        passed = open_secrets(manager.secrets, run.live.devices.disks, taps)
        own, theirs = await reach(_sort_leases, run.live.devices.leases)
        passed |= await take_leases(own, domain.name, domain.uuid_text, taps)
        files = {**await open_interfaces(domain, run.directory, interfaces, taps, attachments), **passed, **files}
        request = StartRequest(
            definition=run.live,
            directory=run.directory,
            log_fd=log_fd,
            paused=paused,
            files=files,
            sink=lambda event: lifecycle.heard(domain, run, event),
            through=sanlock.command(theirs) if theirs else (),
            state=saved.reader if saved is not None else None,
            inside=saved.inside if saved is not None else None,
        )
        domain.starting = asyncio.get_running_loop().create_task(domain.driver.start(request))
        try:
            return await domain.starting
        except HypervisorError as error:
            refused = sanlock.refusal(str(error), theirs) if theirs else None
            if refused is not None:
                raise refused from error
            raise
        except asyncio.CancelledError:
            # Cancelled while the driver works: it undoes its own, and a machine that came all the same must go.
            domain.starting.cancel()
            with contextlib.suppress(asyncio.CancelledError, KvikError):
                late = await domain.starting
                await asyncio.shield(late.quit(0))
            raise
        finally:
            domain.starting = None
    finally:
        taps.close()  # the VMM has its own
        os.close(log_fd)


def _sort_leases(leases: list[Lease]) -> tuple[list[Lease], list[Lease]]:
    """Those that we lock, and those that sanlock keeps."""
    theirs = [lease for lease in leases if sanlock.is_sanlocks(lease)]
    return [lease for lease in leases if lease not in theirs], theirs


def _open_log(domain: DomainObject) -> int:
    log = domain.log
    log.rotate()
    log.note(f"starting: kvik {__version__}, driver {domain.driver.name}, uuid {domain.uuid_text}")
    return log.open()
