"""The life of a machine as tables: what may happen in which state, what follows, and what is told.

`TRANSITIONS` maps (state, trigger) to the next state with its reason and the lifecycle events to send, in order.
`ACTIONS` says what a document's <on_poweroff>, <on_reboot> and <on_crash> come to. Numbers are libvirt's
(virDomainState and its reasons, virDomainEventType and its details): https://libvirt.org/html/libvirt-libvirt-domain.html
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import NamedTuple

from kvik.conf.enums import (
    DomainCrashedReason,
    DomainEventCrashedDetailType,
    DomainEventPMSuspendedDetailType,
    DomainEventResumedDetailType,
    DomainEventShutdownDetailType,
    DomainEventStartedDetailType,
    DomainEventStoppedDetailType,
    DomainEventSuspendedDetailType,
    DomainEventType,
    DomainPausedReason,
    DomainPMSuspendedReason,
    DomainRunningReason,
    DomainShutdownReason,
    DomainShutoffReason,
    DomainState,
)
from kvik.errors import ConfigUnsupported, OperationInvalid


class Trigger(enum.StrEnum):
    """What can happen to a machine."""

    BOOTED = "booted"
    BOOTED_PAUSED = "booted paused"
    RESTORED = "restored"
    RESTORED_PAUSED = "restored paused"
    REVERTED = "gone back to a snapshot"
    REVERTED_PAUSED = "gone back to a snapshot, paused"
    START_FAILED = "start failed"
    PAUSED_BY_USER = "paused by the user"
    PAUSED_BY_IO_ERROR = "paused by an I/O error"
    PAUSED_BY_WATCHDOG = "paused by the watchdog"
    PAUSED_TO_SAVE = "paused to be saved"
    PAUSED_FOR_SNAPSHOT = "paused for a snapshot"
    RESUMED = "resumed"
    SUSPENDED = "suspended by the guest"
    WOKEN = "woken"
    POWERED_OFF = "powered off by the guest"
    POWERED_OFF_BY_HOST = "powered off by the host"
    PANICKED = "panicked"
    RESTARTED = "restarted in place"
    SHUT_DOWN = "ended after a shutdown"
    DESTROYED = "destroyed"
    SAVED = "saved"
    CRASHED = "ended after a panic"
    VMM_DIED = "the VMM died"
    LOST = "gone when the daemon came back"
    HOST_REBOOTED = "gone with a reboot of the host"


class Next(NamedTuple):
    state: int
    reason: int
    events: tuple[tuple[int, int], ...] = ()  # (virDomainEventType, its detail)


_S, _E = DomainState, DomainEventType
_STOPPED = DomainEventStoppedDetailType
_STARTED = (_E.STARTED, DomainEventStartedDetailType.BOOTED)
_RESTORED = (_E.STARTED, DomainEventStartedDetailType.RESTORED)
_REVERTED = (_E.STARTED, DomainEventStartedDetailType.FROM_SNAPSHOT)
_RESUMED = (_E.RESUMED, DomainEventResumedDetailType.UNPAUSED)
_SUSPENDED = DomainEventSuspendedDetailType
_UP = (_S.RUNNING, _S.PAUSED)  # the guest exists and has not ended
_ACTIVE = (*_UP, _S.SHUTDOWN, _S.CRASHED, _S.PMSUSPENDED)  # a VMM process exists

# trigger -> (states it can happen in, what follows)
_TABLE: Mapping[Trigger, tuple[tuple[int, ...], Next]] = {
    Trigger.BOOTED: ((_S.SHUTOFF,), Next(_S.RUNNING, DomainRunningReason.BOOTED, (_STARTED,))),
    Trigger.BOOTED_PAUSED: (
        (_S.SHUTOFF,),
        Next(_S.PAUSED, DomainPausedReason.USER, (_STARTED, (_E.SUSPENDED, _SUSPENDED.PAUSED))),
    ),
    Trigger.RESTORED: ((_S.SHUTOFF,), Next(_S.RUNNING, DomainRunningReason.RESTORED, (_RESTORED,))),
    Trigger.RESTORED_PAUSED: (
        (_S.SHUTOFF,),
        Next(_S.PAUSED, DomainPausedReason.USER, (_RESTORED, (_E.SUSPENDED, _SUSPENDED.RESTORED))),
    ),
    Trigger.REVERTED: ((_S.SHUTOFF,), Next(_S.RUNNING, DomainRunningReason.FROM_SNAPSHOT, (_REVERTED,))),
    Trigger.REVERTED_PAUSED: (
        (_S.SHUTOFF,),
        Next(_S.PAUSED, DomainPausedReason.FROM_SNAPSHOT, (_REVERTED, (_E.SUSPENDED, _SUSPENDED.FROM_SNAPSHOT))),
    ),
    Trigger.START_FAILED: ((_S.SHUTOFF,), Next(_S.SHUTOFF, DomainShutoffReason.FAILED)),
    Trigger.PAUSED_BY_USER: (
        (_S.RUNNING,),
        Next(_S.PAUSED, DomainPausedReason.USER, ((_E.SUSPENDED, _SUSPENDED.PAUSED),)),
    ),
    Trigger.PAUSED_BY_IO_ERROR: (
        (_S.RUNNING,),
        Next(_S.PAUSED, DomainPausedReason.IOERROR, ((_E.SUSPENDED, _SUSPENDED.IOERROR),)),
    ),
    Trigger.PAUSED_BY_WATCHDOG: (
        (_S.RUNNING,),
        Next(_S.PAUSED, DomainPausedReason.WATCHDOG, ((_E.SUSPENDED, _SUSPENDED.WATCHDOG),)),
    ),
    Trigger.PAUSED_TO_SAVE: (
        (_S.RUNNING,),
        Next(_S.PAUSED, DomainPausedReason.SAVE, ((_E.SUSPENDED, _SUSPENDED.PAUSED),)),
    ),
    Trigger.PAUSED_FOR_SNAPSHOT: (
        (_S.RUNNING,),
        Next(_S.PAUSED, DomainPausedReason.SNAPSHOT, ((_E.SUSPENDED, _SUSPENDED.PAUSED),)),
    ),
    Trigger.RESUMED: ((_S.PAUSED,), Next(_S.RUNNING, DomainRunningReason.UNPAUSED, (_RESUMED,))),
    Trigger.SUSPENDED: (
        _UP,
        Next(
            _S.PMSUSPENDED,
            DomainPMSuspendedReason.UNKNOWN,
            ((_E.PMSUSPENDED, DomainEventPMSuspendedDetailType.MEMORY),),
        ),
    ),
    Trigger.WOKEN: (
        (_S.PMSUSPENDED,),
        Next(_S.RUNNING, DomainRunningReason.WAKEUP, ((_E.STARTED, DomainEventStartedDetailType.WAKEUP),)),
    ),
    Trigger.POWERED_OFF: (
        (*_UP, _S.PMSUSPENDED),
        Next(_S.SHUTDOWN, DomainShutdownReason.UNKNOWN, ((_E.SHUTDOWN, DomainEventShutdownDetailType.GUEST),)),
    ),
    Trigger.POWERED_OFF_BY_HOST: (
        (*_UP, _S.PMSUSPENDED),
        Next(_S.SHUTDOWN, DomainShutdownReason.USER, ((_E.SHUTDOWN, DomainEventShutdownDetailType.HOST),)),
    ),
    Trigger.PANICKED: (
        _UP,
        Next(_S.CRASHED, DomainCrashedReason.PANICKED, ((_E.CRASHED, DomainEventCrashedDetailType.PANICKED),)),
    ),
    Trigger.RESTARTED: ((_S.SHUTDOWN,), Next(_S.RUNNING, DomainRunningReason.BOOTED, (_RESUMED,))),
    Trigger.SHUT_DOWN: (
        _ACTIVE,
        Next(_S.SHUTOFF, DomainShutoffReason.SHUTDOWN, ((_E.STOPPED, _STOPPED.SHUTDOWN),)),
    ),
    Trigger.DESTROYED: (
        _ACTIVE,
        Next(_S.SHUTOFF, DomainShutoffReason.DESTROYED, ((_E.STOPPED, _STOPPED.DESTROYED),)),
    ),
    Trigger.SAVED: (_ACTIVE, Next(_S.SHUTOFF, DomainShutoffReason.SAVED, ((_E.STOPPED, _STOPPED.SAVED),))),
    Trigger.CRASHED: (_ACTIVE, Next(_S.SHUTOFF, DomainShutoffReason.CRASHED, ((_E.STOPPED, _STOPPED.CRASHED),))),
    Trigger.VMM_DIED: (_ACTIVE, Next(_S.SHUTOFF, DomainShutoffReason.CRASHED, ((_E.STOPPED, _STOPPED.FAILED),))),
    Trigger.LOST: (_ACTIVE, Next(_S.SHUTOFF, DomainShutoffReason.DAEMON, ((_E.STOPPED, _STOPPED.FAILED),))),
    Trigger.HOST_REBOOTED: (_ACTIVE, Next(_S.SHUTOFF, DomainShutoffReason.UNKNOWN)),
}

TRANSITIONS: Mapping[tuple[int, Trigger], Next] = {
    **{(state, trigger): following for trigger, (states, following) in _TABLE.items() for state in states},
    # A crash that is answered by a restart keeps its trace in the reason.
    (_S.CRASHED, Trigger.RESTARTED): Next(_S.RUNNING, DomainRunningReason.CRASHED, (_RESUMED,)),
}


def advance(state: int, trigger: Trigger, name: str) -> Next:
    """What follows `trigger` in `state`; `OperationInvalid` if it cannot happen there."""
    following = TRANSITIONS.get((state, trigger))
    if following is None:
        raise OperationInvalid(f"machine {name!r} is {state_text(state)}: it cannot be {trigger.value}")
    return following


_STATE_TEXT = {
    _S.NOSTATE: "in no known state",
    _S.RUNNING: "running",
    _S.BLOCKED: "idle",
    _S.PAUSED: "paused",
    _S.SHUTDOWN: "shutting down",
    _S.SHUTOFF: "shut off",
    _S.CRASHED: "crashed",
    _S.PMSUSPENDED: "suspended by the guest",
}


def state_text(state: int) -> str:
    return _STATE_TEXT.get(state, f"in state {state}")


# What the guest's end comes to --------------------------------------------------------------------------------


class Outcome(enum.StrEnum):
    END = "end"  # stop the VMM
    RESTART = "restart"  # boot again, in place if the VMM can
    KEEP = "keep"  # leave the VMM as it is, for somebody to look at
    GO_ON = "go on"  # the VMM already did what is wanted


# (what happened, the document's action) -> outcome; what is missing is refused when defined
ACTIONS: Mapping[tuple[str, str], Outcome] = {
    ("poweroff", "destroy"): Outcome.END,
    ("poweroff", "restart"): Outcome.RESTART,
    ("poweroff", "preserve"): Outcome.KEEP,
    ("reboot", "restart"): Outcome.GO_ON,
    ("reboot", "destroy"): Outcome.END,
    ("crash", "destroy"): Outcome.END,
    ("crash", "restart"): Outcome.RESTART,
    ("crash", "preserve"): Outcome.KEEP,
}
DEFAULTS = {"poweroff": "destroy", "reboot": "restart", "crash": "destroy"}

# A guest that panics again and again is left alone after this many restarts within the time.
RESTART_LIMIT = 5
RESTART_WINDOW = 60.0  # seconds


def outcome(occasion: str, action: str | None) -> Outcome:
    return ACTIONS.get((occasion, action or DEFAULTS[occasion]), Outcome.END)


def needs_daemon(on_poweroff: str | None, on_reboot: str | None, on_crash: str | None) -> bool:
    """Whether somebody must be there to answer the guest's end: the VMM by itself can only end, pause, or reset.

    The VMM is told at its start to do by itself what it can, so that a machine is right without a daemon as well.
    """
    ends_by_reboot = outcome("reboot", on_reboot) is Outcome.END
    return (
        outcome("poweroff", on_poweroff) is Outcome.RESTART
        or outcome("crash", on_crash) is Outcome.RESTART
        or (ends_by_reboot and outcome("poweroff", on_poweroff) is Outcome.KEEP)
    )


def check_actions(on_poweroff: str | None, on_reboot: str | None, on_crash: str | None) -> None:
    """`ConfigUnsupported` for an action that would not be carried out."""
    for occasion, action in (("poweroff", on_poweroff), ("reboot", on_reboot), ("crash", on_crash)):
        if action and (occasion, action) not in ACTIONS:
            known = ", ".join(name for what, name in ACTIONS if what == occasion)
            raise ConfigUnsupported(
                f"on_{occasion} {action!r} is not supported",
                path=f"/domain/on_{occasion}",
                remedy=f"use one of {known}",
            )
    if on_poweroff == "restart" and on_reboot == "destroy":
        raise ConfigUnsupported(
            "on_poweroff 'restart' with on_reboot 'destroy' is not supported",
            path="/domain/on_reboot",
            remedy="the VMM cannot tell the two apart when one of them ends it: choose one",
        )
