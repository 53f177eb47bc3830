"""Starting, stopping and everything between, for one machine. The rules are tables in `states`.

Commands hold the machine's job; `destroy` does not, so that nothing a VMM does can keep it from being ended. Events
from the VMM change the state at once, in `heard`; what they call for (end it, boot it again) runs as a task.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable, Hashable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvik import __version__
from kvik.conf.aliases import assign_aliases
from kvik.conf.domain import format_domain
from kvik.conf.enums import DomainCreateFlags, DomainShutdownFlags, DomainState
from kvik.errors import (
    AgentError,
    HypervisorError,
    KvikError,
    OperationFailed,
    OperationInvalid,
    OperationTimeout,
    OperationUnsupported,
)
from kvik.host import process
from kvik.hypervisor.driver import Feature, Machine, MachineEvent, StartRequest
from kvik.manager import disks, filtering, ports, reports
from kvik.manager.definition import Definition
from kvik.manager.interfaces import open_interfaces
from kvik.manager.stages import BootStages
from kvik.manager.states import (
    RESTART_LIMIT,
    RESTART_WINDOW,
    TRANSITIONS,
    Outcome,
    Trigger,
    advance,
    outcome,
    state_text,
)
from kvik.manager.store import Status

if TYPE_CHECKING:
    from kvik.manager.domain import DomainObject, Run

logger = logging.getLogger(__name__)

QUIT_GRACE = 1.0  # seconds for the VMM to end when asked
GRACEFUL = 15.0  # ... when destroyed gracefully
END_WAIT = 5.0  # seconds from the VMM's end to its last event
AGENT_ACCEPT = 2.0  # guest-shutdown is not answered when it succeeds: silence for this long is consent


def apply(domain: DomainObject, trigger: Trigger, why: str = "") -> bool:
    """Move along the table and tell; False if `trigger` means nothing in the present state."""
    following = TRANSITIONS.get((domain.state, trigger))
    if following is None:
        return False
    domain.state, domain.reason, domain.reason_text = following.state, following.reason, why
    for event, detail in following.events:
        domain.emit("lifecycle", event=event, detail=detail)
    return True


# Starting -------------------------------------------------------------------------------------------------------


async def start(
    domain: DomainObject, paused: bool, flags: int, files: Mapping[str, int], autodestroy: Hashable | None
) -> None:
    if flags & DomainCreateFlags.START_RESET_NVRAM:
        raise OperationUnsupported("resetting the firmware's variables at start is not supported yet")
    async with domain.jobs.hold("start"):
        await boot(domain, paused or bool(flags & DomainCreateFlags.START_PAUSED), files, autodestroy)


async def boot(
    domain: DomainObject,
    paused: bool,
    files: Mapping[str, int],
    autodestroy: Hashable | None = None,
    config: Definition | None = None,
) -> None:
    """Run the definition (or `config`, for this once); the job is the caller's.

    On an error the machine is off and nothing is left behind.
    """
    from kvik.manager.domain import Run

    if domain.is_active or domain.starting:
        raise OperationInvalid(f"machine {domain.name!r} is already {state_text(domain.state)}")
    if domain.cleaning:
        await asyncio.shield(domain.cleaning)
    manager, log = domain.manager, domain.log
    definition = (config or domain.config).parse()
    assign_aliases(definition)
    run = Run(definition, Path(), BootStages(definition))
    uses = await manager.store.run(_look_at_files, definition, tuple(files))
    await manager.driver_of(definition).validate(definition)
    # No await between this check and the next line: two starts with one disk cannot pass it together.
    disks.check_unused(uses, manager.disk_uses(domain))
    run.uses = uses
    run.autodestroy = autodestroy
    number = manager.next_id()
    run.directory = manager.store.runtime_directory(number, domain.name)
    domain.run = run
    definition.id = number
    try:
        machine = await _spawn(domain, run, number, paused, files)
        run.machine, run.pid = machine, machine.pid
        stat = process.read_stat(machine.pid)
        run.pid_start = stat.start_time if stat else 0
        domain.id = number
        manager.activated(domain)
        following = advance(domain.state, Trigger.BOOTED_PAUSED if paused else Trigger.BOOTED, domain.name)
        status = domain.status()
        status.state, status.reason = following.state, following.reason
        try:
            await manager.store.save_status(status)
        except BaseException:
            # A machine that the next daemon could not find must not run.
            run.pending = Trigger.DESTROYED
            await asyncio.shield(machine.quit(QUIT_GRACE))
            raise
    except BaseException as error:
        domain.starting = None
        domain.id = -1
        manager.deactivated(domain, number)
        why = str(error) or type(error).__name__
        domain.run = None
        apply(domain, Trigger.START_FAILED, why)
        domain.cleaning = manager.spawn(_clean(domain, run, f"not started: {why}"))
        if isinstance(error, asyncio.CancelledError):
            current = asyncio.current_task()
            if not (current and current.cancelling()):  # not we but the start was cancelled: by a destroy
                await asyncio.shield(domain.cleaning)
                raise OperationFailed(f"machine {domain.name!r} was destroyed while it was starting") from error
            raise
        await asyncio.shield(domain.cleaning)
        raise
    domain.updated = False
    reached(domain, "vmm started")
    apply(domain, Trigger.BOOTED_PAUSED if paused else Trigger.BOOTED)
    log.note(f"started: pid {run.pid}, accelerator {machine.accelerator}{', paused' if paused else ''}")
    early, run.early = run.early or [], None
    for event in early:
        heard(domain, run, event)


def _look_at_files(definition: Any, given: tuple[str, ...]) -> list[disks.Use]:
    disks.check_files(definition, given)
    return disks.uses(definition)


async def _spawn(domain: DomainObject, run: Run, number: int, paused: bool, files: Mapping[str, int]) -> Machine:
    """The intent on disk, then the driver. The status says "starting" until the caller replaces it."""
    manager = domain.manager
    attachments = {}
    if Feature.TAPS in domain.driver.features():
        # Before the intent, which names the ports.
        attachments = ports.join(domain, run.live.devices.interfaces)
    intent = Status(
        name=domain.name,
        id=number,
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
        files = {**await open_interfaces(domain, run.directory, interfaces, taps, attachments), **files}
        request = StartRequest(
            definition=run.live,
            directory=run.directory,
            log_fd=log_fd,
            paused=paused,
            files=files,
            sink=lambda event: heard(domain, run, event),
        )
        domain.starting = asyncio.get_running_loop().create_task(domain.driver.start(request))
        try:
            return await domain.starting
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


def _open_log(domain: DomainObject) -> int:
    log = domain.log
    log.rotate()
    log.note(f"starting: kvik {__version__}, driver {domain.driver.name}, uuid {domain.uuid_text}")
    return log.open()


# What the VMM tells ---------------------------------------------------------------------------------------------


def heard(domain: DomainObject, run: Run, event: MachineEvent) -> None:
    """One event of one run; those of an earlier run are nobody's."""
    if domain.run is not run:
        return
    if run.early is not None:
        if len(run.early) < 10_000:
            run.early.append(event)
        return
    handler = _HANDLERS.get(event.kind.value)
    if handler is not None:
        handler(domain, run, event)
    else:
        reports.report(domain, run, event)


def reached(domain: DomainObject, stage: str) -> None:
    if domain.run:
        seconds = domain.run.stages.reach(stage)
        if seconds is not None:
            domain.emit("stage", stage=stage, seconds=seconds, state="done")


def _started(domain: DomainObject, run: Run, event: MachineEvent) -> None:
    reached(domain, "guest running")


def _paused(domain: DomainObject, run: Run, event: MachineEvent) -> None:
    cause, run.pause_cause = event.detail or run.pause_cause, ""
    trigger = {"io-error": Trigger.PAUSED_BY_IO_ERROR, "watchdog": Trigger.PAUSED_BY_WATCHDOG}.get(
        cause, Trigger.PAUSED_BY_USER
    )
    if apply(domain, trigger):
        domain.spawn(domain.save_quietly())


def _resumed(domain: DomainObject, run: Run, event: MachineEvent) -> None:
    reached(domain, "guest running")
    if apply(domain, Trigger.RESUMED):
        domain.spawn(domain.save_quietly())


def _suspended(domain: DomainObject, run: Run, event: MachineEvent) -> None:
    if event.detail == "disk":
        domain.emit("pmsuspend-disk", reason=0)
    else:
        domain.emit("pmsuspend", reason=0)
        apply(domain, Trigger.SUSPENDED)
    domain.spawn(domain.save_quietly())


def _woken(domain: DomainObject, run: Run, event: MachineEvent) -> None:
    domain.emit("pmwakeup", reason=0)
    if apply(domain, Trigger.WOKEN):
        domain.spawn(domain.save_quietly())


def _powered_off(domain: DomainObject, run: Run, event: MachineEvent) -> None:
    if run.pending is not None:
        return  # we ended it ourselves
    by_host = event.detail == "host"
    if not apply(domain, Trigger.POWERED_OFF_BY_HOST if by_host else Trigger.POWERED_OFF):
        return
    live = run.live
    if run.reboot_wanted:
        run.reboot_wanted = False
        wanted = Outcome.RESTART
    elif by_host:
        wanted = Outcome.END
    elif event.data.get("reason") == "guest-reset":  # a reboot that ends the VMM
        wanted = outcome("reboot", live.on_reboot)
        wanted = Outcome.RESTART if wanted is Outcome.GO_ON else wanted
    else:
        wanted = outcome("poweroff", live.on_poweroff)
    _follow(domain, run, wanted, Trigger.SHUT_DOWN)


def _panicked(domain: DomainObject, run: Run, event: MachineEvent) -> None:
    why = f"the guest panicked: {event.detail}" if event.detail else "the guest panicked"
    if not apply(domain, Trigger.PANICKED, why):
        return
    domain.log.note(why)
    wanted = outcome("crash", run.live.on_crash)
    if wanted is Outcome.RESTART:
        now = time.monotonic()
        domain.crashes = [*(then for then in domain.crashes if now - then < RESTART_WINDOW), now]
        if len(domain.crashes) > RESTART_LIMIT:
            wanted = Outcome.END
            domain.reason_text = f"{why}; {len(domain.crashes)} times within {RESTART_WINDOW:g} s: not restarted again"
    _follow(domain, run, wanted, Trigger.CRASHED)


def _reset(domain: DomainObject, run: Run, event: MachineEvent) -> None:
    domain.emit("reboot")
    run.stages.lose("agent", "address")
    if event.detail != "host" and outcome("reboot", run.live.on_reboot) is Outcome.END:
        _follow(domain, run, Outcome.END, Trigger.SHUT_DOWN)


def _follow(domain: DomainObject, run: Run, wanted: Outcome, end: Trigger) -> None:
    if wanted is Outcome.END:
        run.pending = run.pending or end
        domain.manager.spawn(_end(domain, run))
    elif wanted is Outcome.RESTART:
        domain.manager.spawn(_restart(domain, run, end))
    else:
        domain.spawn(domain.save_quietly())


def _ended(domain: DomainObject, run: Run, event: MachineEvent) -> None:
    trigger = run.pending
    why = domain.reason_text
    if trigger is None:
        trigger = {DomainState.SHUTDOWN: Trigger.SHUT_DOWN, DomainState.CRASHED: Trigger.CRASHED}.get(
            domain.state, Trigger.VMM_DIED
        )
        if trigger is Trigger.VMM_DIED:
            why = f"the VMM died: {event.detail}" if event.detail else "the VMM died"
    finish(domain, run, trigger, why)


_HANDLERS: Mapping[str, Callable[[DomainObject, Run, MachineEvent], None]] = {
    "started": _started,
    "paused": _paused,
    "resumed": _resumed,
    "suspended": _suspended,
    "woken": _woken,
    "shutdown": _powered_off,
    "reset": _reset,
    "crashed": _panicked,
    "ended": _ended,
}


# Ending ---------------------------------------------------------------------------------------------------------


def finish(domain: DomainObject, run: Run, trigger: Trigger, why: str) -> None:
    """The VMM is gone: the machine is off from here on; its files are cleaned by a task of their own."""
    if domain.run is not run:
        return
    number = domain.id
    run.stages.end(why or trigger.value)
    domain.id = -1
    domain.run = None
    domain.updated = False
    domain.manager.deactivated(domain, number)
    for waiting in run.removals.values():
        if not waiting.done():
            waiting.set_result(True)
    apply(domain, trigger, why)
    told = trigger.value if not why or trigger.value in why else f"{trigger.value} ({why})"
    text = f"ended: {why if trigger.value in why else told}"
    domain.cleaning = domain.manager.spawn(_clean(domain, run, text))
    run.ended.set()
    current = asyncio.current_task() if _in_task() else None
    for task in list(run.tasks):
        if task is not current:
            task.cancel()
    if not domain.persistent:
        domain.manager.forget(domain)


def _in_task() -> bool:
    try:
        return asyncio.current_task() is not None
    except RuntimeError:
        return False


async def _clean(domain: DomainObject, run: Run, note: str) -> None:
    name, transient = domain.name, not domain.persistent
    try:
        domain.log.note(note)
        await ports.release(domain.manager, domain, run.live.devices.interfaces)
        await domain.manager.store.remove_status(name, run.directory)
        await filtering.release(domain, run.live.devices.interfaces)
        if transient:
            await domain.manager.driver_of(run.live).forget(run.live, keep_tpm=domain.keep_tpm)
    except KvikError as error:
        logger.warning("machine %s: %s", name, error)
    finally:
        domain.cleaning = None


async def _end(domain: DomainObject, run: Run, grace: float = QUIT_GRACE) -> None:
    """Make the VMM go, and wait until it is accounted for."""
    if run.machine is not None:
        try:
            await run.machine.quit(grace)
        except KvikError as error:
            logger.warning("machine %s did not quit: %s", domain.name, error)
            await _kill(run)
    else:
        await _kill(run)
    try:
        async with asyncio.timeout(END_WAIT):
            await run.ended.wait()
    except TimeoutError:
        finish(domain, run, run.pending or Trigger.DESTROYED, domain.reason_text)


async def _kill(run: Run) -> None:
    """A VMM that we cannot talk to: by pid and start time, so that no other process is ever hit."""
    if not run.pid or not run.pid_start:
        return
    with contextlib.suppress(KvikError, OSError):
        found = process.find(run.pid, run.pid_start)
        if found is not None:
            found.kill()
            for _ in range(100):
                if not found.alive:
                    break
                await asyncio.sleep(0.01)
            found.close()


async def destroy(domain: DomainObject, graceful: bool) -> None:
    if domain.starting is not None:
        domain.starting.cancel()
        with contextlib.suppress(asyncio.CancelledError, KvikError):
            await asyncio.shield(domain.starting)
        if domain.cleaning:
            await asyncio.shield(domain.cleaning)
        return
    run = domain.run
    if run is None or not domain.is_active:
        raise OperationInvalid(f"machine {domain.name!r} is not running")
    run.pending = run.pending or Trigger.DESTROYED
    # Shielded: a client that goes away must not leave a half-ended machine.
    await asyncio.shield(domain.manager.spawn(_end(domain, run, GRACEFUL if graceful else QUIT_GRACE)))
    if domain.cleaning:
        await asyncio.shield(domain.cleaning)


async def _restart(domain: DomainObject, run: Run, end: Trigger) -> None:
    """Boot again after a power-off or a panic: in place if the VMM can."""
    try:
        async with domain.jobs.hold("restart"):
            if domain.run is not run or run.machine is None:
                return
            if Feature.REBOOT_IN_PLACE in domain.driver.features():
                run.stages.lose("agent", "address")
                if not _pauses(run):  # it was for this once
                    await run.machine.set_action("poweroff", "exit")
                await run.machine.reset()
                await run.machine.resume()
                apply(domain, Trigger.RESTARTED)
                await domain.save_quietly()
                return
            run.pending = end
            persistent, domain.persistent = domain.persistent, True  # not to be forgotten in between
            try:
                await _end(domain, run)
                await boot(domain, False, {}, run.autodestroy)
            finally:
                domain.persistent = persistent
                if not persistent and not domain.is_active:
                    domain.manager.forget(domain)
    except KvikError as error:
        domain.log.note(f"not restarted: {error}")
        logger.warning("machine %s was not restarted: %s", domain.name, error)
        run.pending = run.pending or end
        domain.manager.spawn(_end(domain, run))


# Commands -------------------------------------------------------------------------------------------------------


async def suspend(domain: DomainObject) -> None:
    async with domain.jobs.hold("suspend"):
        machine = domain.require_machine()
        if domain.state == DomainState.PAUSED:
            return  # as libvirt: it is what was asked for
        domain.require_running()
        await machine.pause()
        apply(domain, Trigger.PAUSED_BY_USER)
        await domain.save_quietly()


async def resume(domain: DomainObject) -> None:
    async with domain.jobs.hold("resume"):
        machine = domain.require_machine()
        if domain.state == DomainState.RUNNING:
            raise OperationInvalid(f"machine {domain.name!r} is already running")
        if domain.state != DomainState.PAUSED:
            raise OperationInvalid(f"machine {domain.name!r} is {state_text(domain.state)}: it cannot be resumed")
        await machine.resume()
        reached(domain, "guest running")
        apply(domain, Trigger.RESUMED)
        await domain.save_quietly()


async def reset(domain: DomainObject) -> None:
    async with domain.jobs.hold("reset"):
        machine = domain.require_machine()
        await machine.reset()
        if domain.state in (DomainState.CRASHED, DomainState.SHUTDOWN):
            await machine.resume()
            apply(domain, Trigger.RESTARTED)
            await domain.save_quietly()


async def shutdown(domain: DomainObject, mode: int) -> None:
    async with domain.jobs.hold("shutdown"):
        await _ask(domain, mode, "powerdown")


async def reboot(domain: DomainObject, mode: int) -> None:
    async with domain.jobs.hold("reboot"):
        await _ask(domain, mode, "reboot")


async def _ask(domain: DomainObject, mode: int, what: str) -> None:
    """By agent or by power button; flags are the same for shutdown and reboot."""
    if mode & ~(DomainShutdownFlags.ACPI_POWER_BTN | DomainShutdownFlags.GUEST_AGENT):
        raise OperationUnsupported("a machine can be shut down by its agent or by ACPI only")
    machine = domain.require_machine()
    run = domain.run
    assert run is not None
    if domain.state not in (DomainState.RUNNING, DomainState.PAUSED, DomainState.PMSUSPENDED):
        raise OperationInvalid(f"machine {domain.name!r} is {state_text(domain.state)}")
    agent_wanted = mode & DomainShutdownFlags.GUEST_AGENT if mode else run.stages.has("agent")
    acpi_wanted = not mode or mode & DomainShutdownFlags.ACPI_POWER_BTN
    if agent_wanted:
        try:
            await _by_agent(domain, machine, what)
            return
        except (AgentError, OperationTimeout):
            if not acpi_wanted:
                raise
    # A reboot by the power button is a power-off that we answer: the VMM must still be there then.
    before, run.reboot_wanted = run.reboot_wanted, what == "reboot"
    if run.reboot_wanted != before and not _pauses(run):
        await machine.set_action("poweroff", "pause" if run.reboot_wanted else "exit")
    await machine.powerdown()


def _pauses(run: Run) -> bool:
    return outcome("poweroff", run.live.on_poweroff) is not Outcome.END


async def _by_agent(domain: DomainObject, machine: Machine, what: str) -> None:
    run = domain.run
    if domain.state != DomainState.RUNNING:
        raise AgentError(f"machine {domain.name!r} is {state_text(domain.state)}: its agent cannot answer")
    asked = asyncio.get_running_loop().create_task(
        machine.agent("guest-shutdown", {"mode": what}, timeout=AGENT_ACCEPT + 1)
    )
    ended = asyncio.get_running_loop().create_task(run.ended.wait() if run else asyncio.sleep(0))
    try:
        await asyncio.wait({asked, ended}, timeout=AGENT_ACCEPT, return_when=asyncio.FIRST_COMPLETED)
        if asked.done() and not ended.done():
            try:
                asked.result()
            except HypervisorError:
                if domain.run is run and domain.state == DomainState.RUNNING:
                    raise
    finally:
        for task in (asked, ended):
            task.cancel()
        await asyncio.gather(asked, ended, return_exceptions=True)
