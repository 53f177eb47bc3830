"""Events on their way to clients: which there are, and how often.

A guest can cause some events as often as it likes. QEMU sends those at most once a second (`monitor_qapi_event_conf` in
its monitor/monitor.c): the first at once, of those that follow within the second only the last, at its end. Where an
event is about one of several things (a port, a disk) each has a second of its own, and the number of those is bounded.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from kvik.vmm.monitor.schema import ANYTHING, TEXT, Bool, Int, Struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from kvik.vmm.loop import EventLoop

Data = dict[str, "Any"]
Sender = Callable[[str, Data, float], None]  # name, data, seconds since the epoch

PERIOD = 1.0  # seconds
MAX_LIMITED = 1024  # (event, thing) pairs remembered

# event -> the member that tells which thing it is about
LIMITED: dict[str, str | None] = {
    "BALLOON_CHANGE": None,
    "BLOCK_IO_ERROR": "qom-path",
    "GUEST_CRASHLOADED": None,  # QEMU does not limit the last four; a guest that loops would fill logs
    "GUEST_PANICKED": None,
    "MEMORY_DEVICE_SIZE_CHANGE": "qom-path",
    "NIC_RX_FILTER_CHANGED": "path",
    "POWERDOWN": None,
    "RTC_CHANGE": None,
    "VSERPORT_CHANGE": "id",
    "WATCHDOG": None,
}

SCHEMA: dict[str, Struct] = {
    "ACPI_DEVICE_OST": Struct({"info": ANYTHING}),
    "BALLOON_CHANGE": Struct({"actual": Int(0)}),
    "BLOCK_IO_ERROR": Struct(
        {
            "device": TEXT,
            "*qom-path": TEXT,
            "*node-name": TEXT,
            "operation": TEXT,
            "action": TEXT,
            "*nospace": Bool(),
            "reason": TEXT,
        }
    ),
    "DEVICE_DELETED": Struct({"*device": TEXT, "path": TEXT}),
    "DEVICE_UNPLUG_GUEST_ERROR": Struct({"*device": TEXT, "path": TEXT}),
    "DUMP_COMPLETED": Struct({"result": ANYTHING, "*error": TEXT}),
    "GUEST_CRASHLOADED": Struct({"action": TEXT, "*info": ANYTHING}),
    "GUEST_PANICKED": Struct({"action": TEXT, "*info": ANYTHING}),
    "MEMORY_DEVICE_SIZE_CHANGE": Struct({"*id": TEXT, "size": Int(0), "qom-path": TEXT}),
    "NIC_RX_FILTER_CHANGED": Struct({"*name": TEXT, "path": TEXT}),
    "POWERDOWN": Struct(),
    "RESET": Struct({"guest": Bool(), "reason": TEXT}),
    "RESUME": Struct(),
    "RTC_CHANGE": Struct({"offset": Int(), "qom-path": TEXT}),
    "SHUTDOWN": Struct({"guest": Bool(), "reason": TEXT}),
    "STOP": Struct(),
    "SUSPEND": Struct(),
    "VSERPORT_CHANGE": Struct({"id": TEXT, "open": Bool()}),
    "WAKEUP": Struct(),
    "WATCHDOG": Struct({"action": TEXT}),
}


class _Pending:
    __slots__ = ("data", "when")

    def __init__(self) -> None:
        self.data: Data | None = None
        self.when = 0.0


class RateLimiter:
    """Between `machine.emit` and the sessions. Runs on the main loop."""

    def __init__(self, loop: EventLoop, send: Sender, clock: Callable[[], float] = time.time) -> None:
        self._loop = loop
        self._send = send
        self._clock = clock
        self._pending: dict[tuple[str, str], _Pending] = {}
        self.dropped = 0

    def event(self, name: str, data: Data) -> None:
        now = self._clock()
        if name not in LIMITED:
            self._send(name, data, now)
            return
        member = LIMITED[name]
        key = (name, str(data.get(member, "")) if member else "")
        pending = self._pending.get(key)
        if pending is not None:  # its second is not over
            self.dropped += pending.data is not None
            pending.data, pending.when = data, now
            return
        if len(self._pending) >= MAX_LIMITED:
            self.dropped += 1
            return
        self._send(name, data, now)
        self._pending[key] = _Pending()
        self._loop.call_later(PERIOD, lambda: self._over(key))

    def _over(self, key: tuple[str, str]) -> None:
        pending = self._pending[key]
        if pending.data is None:
            del self._pending[key]
            return
        data, when = pending.data, pending.when
        pending.data = None
        self._loop.call_later(PERIOD, lambda: self._over(key))
        self._send(key[0], data, when)
