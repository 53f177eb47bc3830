"""Showing a machine's way from start to ready, stage by stage, and saying which stage stalled."""

from __future__ import annotations

import time

from kvik.cli import flags
from kvik.errors import OperationFailed, OperationTimeout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.cli.progress import Progress
    from kvik.client import Domain
    from kvik.client.domain import Readiness, Stage

POLL = 0.02  # seconds; an answer from the daemon's memory takes a tenth of a millisecond
WAITING, DONE, STALLED, NOT_EXPECTED = range(4)
STATE_EVERY = 0.25


def stage_line(domain: Domain, stage: Stage) -> str:
    detail = f" ({stage.detail})" if stage.detail else ""
    return f"{domain.name}: {stage.name} after {stage.seconds:.2f} s{detail}"


def current(readiness: Readiness) -> Stage | None:
    """The stage that is waited for. One before a stage that is done cannot be: a quiet kernel prints nothing until an
    agent answers, and a line with a log of its own does not tell when it began."""
    done = max((at for at, stage in enumerate(readiness.stages) if stage.state == DONE), default=-1)
    return next((stage for stage in readiness.stages[done + 1 :] if stage.state in (WAITING, STALLED)), None)


def is_ready(readiness: Readiness) -> bool:
    return readiness.ready or (bool(readiness.stages) and current(readiness) is None)


def follow(domain: Domain, progress: Progress, timeout: float) -> Readiness:
    """Until the machine is ready. OperationTimeout names the stage; OperationFailed if it ended instead."""
    began = time.monotonic()
    shown: set[str] = set()
    asked_state = began
    while True:
        readiness = domain.stages()
        for stage in readiness.stages:
            if stage.state == DONE and stage.name not in shown:
                shown.add(stage.name)
                progress.line(stage_line(domain, stage))
        if is_ready(readiness):
            return readiness._replace(ready=True)
        now = time.monotonic()
        waiting = current(readiness)
        if waiting is not None:
            progress.transient(f"{domain.name}: waiting for {waiting.name} {now - began:.1f} s")
        if waiting is not None and waiting.state == STALLED:
            raise stalled(domain, waiting, now - began)
        if now - began > timeout:
            raise stalled(domain, waiting, now - began)
        if now - asked_state > STATE_EVERY:
            asked_state = now
            check_alive(domain, waiting)
        time.sleep(POLL)


def check_alive(domain: Domain, waiting: Stage | None) -> None:
    state, reason = domain.state()
    if state in (flags.SHUTOFF, flags.CRASHED):
        before = f" before it was {waiting.name}" if waiting else ""
        raise OperationFailed(
            f"the machine '{domain.name}' ended{before}: {flags.state_name(state)}, {flags.reason_name(state, reason)}",
            remedy="its log says more",
        )


def stalled(domain: Domain, stage: Stage | None, waited: float) -> OperationTimeout:
    where = f"at '{stage.name}'" if stage else "before its first stage"
    why = f": {stage.detail}" if stage and stage.detail else ""
    return OperationTimeout(
        f"the machine '{domain.name}' stalled {where} for {waited:.1f} s{why}",
        remedy=f"'kvik console {domain.name}' shows what it does; --timeout gives it longer",
    )
