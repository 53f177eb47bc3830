"""QMP events as the manager's `MachineEvent`s: one table.

Event payloads come from QEMU and are not trusted: a translator takes what has the right type and lets the rest be
empty. Every event, known or not, is also passed on raw (`EventKind.MONITOR`).

Reference: QEMU's qapi/*.json.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from kvik.hypervisor.driver import EventKind, MachineEvent
from kvik.qmp.protocol import Event

__all__ = ["translate"]

Data = Mapping[str, Any]
_NO_SPACE = os.strerror(errno.ENOSPC)
Translator = Callable[[Data], tuple[EventKind, str, Data] | None]


def _text(data: Data, key: str) -> str:
    value = data.get(key)
    return value if isinstance(value, str) else ""


def _number(data: Data, key: str) -> int:
    value = data.get(key)
    return value if isinstance(value, int) else 0


def _alias(data: Data, *keys: str) -> str:
    """The device's alias. Paths look like /machine/peripheral/ALIAS/...; our block nodes like libvirt-ALIAS-...."""
    for key in keys:
        value = _text(data, key)
        if value.startswith("/machine/peripheral/"):
            return value.split("/")[3]
        if value and not value.startswith("/"):
            return value
    return ""


def _plain(kind: EventKind, detail: str = "") -> Translator:
    return lambda data: (kind, detail, {})


def _shutdown(data: Data) -> tuple[EventKind, str, Data]:
    return EventKind.SHUTDOWN, "guest" if data.get("guest") is True else "host", {"reason": _text(data, "reason")}


def _reset(data: Data) -> tuple[EventKind, str, Data] | None:
    if data.get("guest") is False:  # our own system_reset: whoever asked knows
        return EventKind.RESET, "host", {}
    return EventKind.RESET, "guest", {}


def _panicked(data: Data) -> tuple[EventKind, str, Data]:
    info = data.get("info")
    return EventKind.CRASHED, _text(data, "action"), info if isinstance(info, dict) else {}


def _io_error(data: Data) -> tuple[EventKind, str, Data]:
    reason = _text(data, "reason")
    if data.get("nospace") is True or reason == _NO_SPACE:  # the first is told of disks that stop the machine only
        reason = "enospc"
    details = {"reason": reason, "action": _text(data, "action"), "operation": _text(data, "operation")}
    # Before 9.2 QEMU names a disk by its block node alone: the machine, which made that, knows whose it is.
    return EventKind.IO_ERROR, _alias(data, "qom-path", "device"), details | {"node": _text(data, "node-name")}


def _back_end_gone(data: Data) -> tuple[EventKind, str, Data] | None:
    """kvik-vmm's: whoever served a disk (or a shared directory) over vhost-user has ended. A disk that waits for
    another has not failed."""
    if data.get("waiting") is True:
        return None
    return EventKind.IO_ERROR, _alias(data, "device"), {"reason": _text(data, "reason"), "action": "report"}


def _port(data: Data) -> tuple[EventKind, str, Data]:
    # The machine, which knows the document, makes AGENT of it if this channel is the agent's.
    return EventKind.CHANNEL, _alias(data, "id"), {"open": data.get("open") is True}


def _deleted(data: Data) -> tuple[EventKind, str, Data] | None:
    alias = _text(data, "device")  # absent when a part inside a device went
    return (EventKind.DEVICE_REMOVED, alias, {}) if alias else None


def _tray(data: Data) -> tuple[EventKind, str, Data]:
    return EventKind.TRAY_CHANGE, _alias(data, "id", "device"), {"open": data.get("tray-open") is True}


def _threshold(data: Data) -> tuple[EventKind, str, Data]:
    numbers = {"threshold": _number(data, "write-threshold"), "excess": _number(data, "amount-exceeded")}
    return EventKind.WRITE_THRESHOLD, _text(data, "node-name"), numbers


def _graphics(phase: str) -> Translator:
    def translator(data: Data) -> tuple[EventKind, str, Data]:
        ends = {}
        for side in ("server", "client"):
            end = data.get(side)
            if isinstance(end, dict):
                ends[side] = {key: value for key, value in end.items() if isinstance(value, str)}
        return EventKind.GRAPHICS, phase, ends

    return translator


TABLE: Mapping[str, Translator] = {
    "ACPI_DEVICE_OST": lambda data: None,
    "BALLOON_CHANGE": lambda data: (EventKind.BALLOON_CHANGE, "", {"actual": _number(data, "actual")}),
    "BLOCK_IO_ERROR": _io_error,
    "BLOCK_WRITE_THRESHOLD": _threshold,
    "DEVICE_DELETED": _deleted,
    "DEVICE_TRAY_MOVED": _tray,
    "DEVICE_UNPLUG_GUEST_ERROR": lambda data: (
        EventKind.DEVICE_REMOVAL_FAILED,
        _alias(data, "device", "path"),
        {},
    ),
    "GUEST_CRASHLOADED": _panicked,
    "GUEST_PANICKED": _panicked,
    "NIC_RX_FILTER_CHANGED": lambda data: (EventKind.RX_FILTER, _alias(data, "name", "path"), {}),
    "POWERDOWN": lambda data: None,
    "RESET": _reset,
    "RESUME": _plain(EventKind.RESUMED),
    "RTC_CHANGE": lambda data: (EventKind.RTC_CHANGE, "", {"offset": _number(data, "offset")}),
    "SHUTDOWN": _shutdown,
    "SPICE_CONNECTED": _graphics("connect"),
    "SPICE_DISCONNECTED": _graphics("disconnect"),
    "SPICE_INITIALIZED": _graphics("initialize"),
    "STOP": _plain(EventKind.PAUSED),
    "SUSPEND": _plain(EventKind.SUSPENDED, "memory"),
    "SUSPEND_DISK": _plain(EventKind.SUSPENDED, "disk"),
    "VHOST_USER_DISCONNECTED": _back_end_gone,
    "VNC_CONNECTED": _graphics("connect"),
    "VNC_DISCONNECTED": _graphics("disconnect"),
    "VNC_INITIALIZED": _graphics("initialize"),
    "VSERPORT_CHANGE": _port,
    "WAKEUP": _plain(EventKind.WOKEN),
    "WATCHDOG": lambda data: (EventKind.WATCHDOG, _text(data, "action"), {}),
}


def translate(event: Event) -> Iterator[MachineEvent]:
    """What the manager hears: the known meaning first, then the raw event."""
    translator = TABLE.get(event.name)
    meaning = translator(event.data) if translator is not None else None
    if meaning is not None:
        kind, detail, data = meaning
        yield MachineEvent(kind, detail, data, event.timestamp)
    yield MachineEvent(EventKind.MONITOR, event.name, event.data, event.timestamp)
