"""Showing a machine's way from start to ready, stage by stage, and saying which stage stalled."""

from __future__ import annotations

import time

from kvik.cli import flags
from kvik.errors import KvikError, OperationFailed, OperationTimeout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.cli.progress import Progress
    from kvik.client import Domain
    from kvik.client.domain import Readiness, Stage

POLL = 0.02  # seconds; an answer from the daemon's memory takes a tenth of a millisecond
WAITING, DONE, STALLED, NOT_EXPECTED, FAILED = range(5)
WORDS = ("waiting", "done", "stalled", "not expected", "failed")  # of the states, for people and programs
STATE_EVERY = 0.25
DIAGNOSE_EVERY = 1.0  # the daemon looks at the console for that

# What a person reads while a stage is waited for.
DOING = {
    "vmm started": "starting QEMU",
    "guest running": "starting the guest's CPUs",
    "first output": "booting",
    "agent": "booting, waiting for the guest agent",
    "address": "waiting for an address",
}


def state_word(stage: Stage) -> str:
    return WORDS[stage.state] if 0 <= stage.state < len(WORDS) else str(stage.state)


class DoesNotBoot(OperationTimeout):
    """Waiting longer would not help; the console's last lines say why."""


def stage_line(domain: Domain, stage: Stage) -> str:
    detail = f" ({stage.detail})" if stage.detail else ""
    return f"{domain.name}: {stage.name} after {stage.seconds:.2f} s{detail}"


def current(readiness: Readiness) -> Stage | None:
    """The stage that is waited for. One before a stage that is done cannot be: a quiet kernel prints nothing until an
    agent answers, and a line with a log of its own does not tell when it began."""
    done = max((at for at, stage in enumerate(readiness.stages) if stage.state == DONE), default=-1)
    return next((stage for stage in readiness.stages[done + 1 :] if stage.state in (WAITING, STALLED, FAILED)), None)


def is_ready(readiness: Readiness) -> bool:
    return readiness.ready or (bool(readiness.stages) and current(readiness) is None)


def follow(domain: Domain, progress: Progress, timeout: float) -> Readiness:
    """Until the machine is ready. OperationTimeout names the stage; OperationFailed if it ended instead."""
    began = time.monotonic()
    shown: set[str] = set()
    asked_state = diagnosed = began
    while True:
        readiness = domain.stages()
        for stage in readiness.stages:
            if stage.state == DONE and stage.seconds > 0 and stage.name not in shown:
                shown.add(stage.name)
                progress.line(stage_line(domain, stage))
        if is_ready(readiness):
            return readiness._replace(ready=True)
        now = time.monotonic()
        waiting = current(readiness)
        if waiting is not None:
            what = DOING.get(waiting.name, f"waiting for {waiting.name}")
            progress.transient(f"{domain.name}: {what} {now - began:.1f} s")
        if waiting is not None and waiting.state in (STALLED, FAILED):
            raise stalled(domain, waiting, now - began)
        if now - began > timeout:
            raise stalled(domain, diagnose(domain) or waiting, now - began)
        if now - diagnosed > DIAGNOSE_EVERY:
            diagnosed = now
            stage_now = diagnose(domain)
            if stage_now is not None and stage_now.state == FAILED:
                raise stalled(domain, stage_now, now - began)
        if now - asked_state > STATE_EVERY:
            asked_state = now
            check_alive(domain, waiting)
        time.sleep(POLL)


def diagnose(domain: Domain) -> Stage | None:
    """The stage that is waited for, with what the daemon finds on the console and at the agent as its detail."""
    try:
        return current(domain.wait_ready(0.001))
    except KvikError:
        return None  # it just ended, or the daemon is not ours: what is known already has to do


def check_alive(domain: Domain, waiting: Stage | None) -> None:
    state, reason = domain.state()
    if state in (flags.SHUTOFF, flags.CRASHED):
        before = f" before it was {waiting.name}" if waiting else ""
        raise OperationFailed(
            f"the machine '{domain.name}' ended{before}: {flags.state_name(state)}, {flags.reason_name(state, reason)}",
            remedy="its log says more",
        )


def stalled(domain: Domain, stage: Stage | None, waited: float) -> OperationTimeout:
    where = f"before '{stage.name}'" if stage else "before its first stage"
    why = f": {stage.detail}" if stage and stage.detail else ""
    if stage and stage.state == FAILED:
        return DoesNotBoot(f"the machine '{domain.name}' does not boot{why}", remedy="what it printed last is above")
    return OperationTimeout(
        f"the machine '{domain.name}' is not ready after {waited:.1f} s, stalled {where}{why}",
        remedy=f"'kvik console {domain.name}' shows what it does; --timeout gives it longer",
    )
