"""What happens to one machine, and how it ends. The rules are tables in `states`.

Events from the VMM change the state at once, in `heard`; what they call for (end it, boot it again) runs as a task.
`destroy` holds no job of the machine, so that nothing a VMM does can keep it from being ended. How it begins:
`starting`; what people ask of it: `power`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from kvik.conf.enums import DomainState
from kvik.errors import (
    KvikError,
    OperationInvalid,
)
from kvik.host import process
from kvik.hypervisor.driver import Feature, MachineEvent
from kvik.manager import filtering, pivots, ports, reports
from kvik.manager.backup import job as backup_job
from kvik.manager.checkpoints.store import store_of
from kvik.manager.snapshots.collect import collect_quietly
from kvik.manager.states import (
    RESTART_LIMIT,
    RESTART_WINDOW,
    TRANSITIONS,
    Outcome,
    Trigger,
    outcome,
)

if TYPE_CHECKING:
    from kvik.manager.domain import DomainObject
    from kvik.manager.run import Run

logger = logging.getLogger(__name__)

QUIT_GRACE = 1.0  # seconds for the VMM to end when asked
GRACEFUL = 15.0  # ... when destroyed gracefully
END_WAIT = 5.0  # seconds from the VMM's end to its last event


def apply(domain: DomainObject, trigger: Trigger, why: str = "") -> bool:
    """Move along the table and tell; False if `trigger` means nothing in the present state."""
    following = TRANSITIONS.get((domain.state, trigger))
    if following is None:
        return False
    domain.state, domain.reason, domain.reason_text = following.state, following.reason, why
    for event, detail in following.events:
        domain.emit("lifecycle", event=event, detail=detail)
    return True


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
    ours = run.pause_cause in ("save", "snapshot")  # the VMM only knows that somebody told it to
    cause, run.pause_cause = run.pause_cause if ours else event.detail or run.pause_cause, ""
    trigger = {
        "io-error": Trigger.PAUSED_BY_IO_ERROR,
        "watchdog": Trigger.PAUSED_BY_WATCHDOG,
        "save": Trigger.PAUSED_TO_SAVE,
        "snapshot": Trigger.PAUSED_FOR_SNAPSHOT,
    }.get(cause, Trigger.PAUSED_BY_USER)
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
        domain.manager.spawn(end_run(domain, run))
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
    domain.cleaning = domain.manager.spawn(clean(domain, run, text))
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


async def clean(domain: DomainObject, run: Run, note: str) -> None:
    name, transient = domain.name, not domain.persistent
    try:
        domain.log.note(note)
        await pivots.machine_gone(domain, run)
        await backup_job.machine_gone(domain, run)
        await ports.release(domain.manager, domain, run.live.devices.interfaces)
        await domain.manager.store.remove_status(name, run.directory)
        await filtering.release(domain, run.live.devices.interfaces)
        if transient:
            await domain.manager.driver_of(run.live).forget(run.live, keep_tpm=domain.keep_tpm)
            await domain.manager.store.run(store_of(domain).forget)
    except KvikError as error:
        logger.warning("machine %s: %s", name, error)
    finally:
        domain.cleaning = None
        if domain.snapshots.made or domain.snapshots.inside:  # images that could not be merged while it ran
            domain.manager.spawn(collect_quietly(domain))


async def end_run(domain: DomainObject, run: Run, grace: float = QUIT_GRACE) -> None:
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
    await asyncio.shield(domain.manager.spawn(end_run(domain, run, GRACEFUL if graceful else QUIT_GRACE)))
    if domain.cleaning:
        await asyncio.shield(domain.cleaning)


async def _restart(domain: DomainObject, run: Run, end: Trigger) -> None:
    """Boot again after a power-off or a panic: in place if the VMM can."""
    from kvik.manager import starting  # which imports this module

    try:
        async with domain.jobs.hold("restart"):
            if domain.run is not run or run.machine is None:
                return
            if Feature.REBOOT_IN_PLACE in domain.driver.features():
                run.stages.lose("agent", "address")
                if not pauses(run):  # it was for this once
                    await run.machine.set_action("poweroff", "exit")
                await run.machine.reset()
                await run.machine.resume()
                apply(domain, Trigger.RESTARTED)
                await domain.save_quietly()
                return
            run.pending = end
            persistent, domain.persistent = domain.persistent, True  # not to be forgotten in between
            try:
                await end_run(domain, run)
                await starting.boot(domain, False, {}, run.autodestroy)
            finally:
                domain.persistent = persistent
                if not persistent and not domain.is_active:
                    domain.manager.forget(domain)
    except KvikError as error:
        domain.log.note(f"not restarted: {error}")
        logger.warning("machine %s was not restarted: %s", domain.name, error)
        run.pending = run.pending or end
        domain.manager.spawn(end_run(domain, run))


def pauses(run: Run) -> bool:
    """Whether the VMM stays when the guest powers off, for something that comes then."""
    return outcome("poweroff", run.live.on_poweroff) is not Outcome.END
