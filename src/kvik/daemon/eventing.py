"""From the manager's events to the clients that asked for them.

One subscription to the manager serves all clients; an event nobody asked for costs a dictionary look-up. The body is
encoded once for each form in use (with a callback id, and the older one without), however many clients get it: the
callback id is the body's first field.
"""

from __future__ import annotations

import itertools
import struct
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from kvik.errors import InvalidArgument
from kvik.rpc import message as m
from kvik.rpc import program as programs
from kvik.rpc import typed_params
from kvik.rpc.program import Procedure

if TYPE_CHECKING:
    from kvik.daemon.connection import Connection
    from kvik.manager.events import DomainEvent, EventHub

__all__ = ["EventRouter"]

CALLBACKS_MAX = 1024  # of one connection
CALLBACK_ID = struct.Struct(">i")
UNIX_ADDRESS = 2  # VIR_DOMAIN_EVENT_GRAPHICS_ADDRESS_UNIX
STAGE = 100  # our own event: a boot stage was reached
STAGE_STATES = {"waiting": 0, "done": 1, "stalled": 2, "skipped": 3, "failed": 4}

Body = Callable[[Any, tuple[Any, ...]], tuple[Any, ...]]  # (machine, the event's fields) -> the wire's fields


def _flat(domain: Any, fields: tuple[Any, ...]) -> tuple[Any, ...]:
    return (0, domain, *fields)


def _nested(domain: Any, fields: tuple[Any, ...]) -> tuple[Any, ...]:
    return (0, (domain, *fields))


def _power(domain: Any, fields: tuple[Any, ...]) -> tuple[Any, ...]:
    return (0, fields[0], (domain,))


def _address(value: Any) -> tuple[int, str, str]:
    """An end of a display's connection, given as (family, node, service) or by those names."""
    if isinstance(value, Mapping):
        value = (value.get("family", UNIX_ADDRESS), value.get("node") or "", value.get("service") or "")
    family, node, service = value or (UNIX_ADDRESS, "", "")
    return (family, str(node), str(service))


def _graphics(domain: Any, fields: tuple[Any, ...]) -> tuple[Any, ...]:
    phase, local, remote, scheme, subject = fields
    return (0, (domain, phase, _address(local), _address(remote), scheme or "", list(subject or ())))


def _params(domain: Any, fields: tuple[Any, ...]) -> tuple[Any, ...]:
    values = fields[0]
    return (0, domain, typed_params.from_dict(values) if isinstance(values, Mapping) else values)


class Kind(NamedTuple):
    """One event of libvirt's: its procedures with and without a callback id, and how its body is made."""

    name: str
    legacy: str
    body: Body


# virDomainEventID -> procedures. An empty legacy name: newer than the registrations without callback ids.
_CALLBACK = "DOMAIN_EVENT_CALLBACK_"
KINDS: dict[int, Kind] = {
    0: Kind(_CALLBACK + "LIFECYCLE", "DOMAIN_EVENT_LIFECYCLE", _nested),
    1: Kind(_CALLBACK + "REBOOT", "DOMAIN_EVENT_REBOOT", _nested),
    2: Kind(_CALLBACK + "RTC_CHANGE", "DOMAIN_EVENT_RTC_CHANGE", _nested),
    3: Kind(_CALLBACK + "WATCHDOG", "DOMAIN_EVENT_WATCHDOG", _nested),
    4: Kind(_CALLBACK + "IO_ERROR", "DOMAIN_EVENT_IO_ERROR", _nested),
    5: Kind(_CALLBACK + "GRAPHICS", "DOMAIN_EVENT_GRAPHICS", _graphics),
    6: Kind(_CALLBACK + "IO_ERROR_REASON", "DOMAIN_EVENT_IO_ERROR_REASON", _nested),
    7: Kind(_CALLBACK + "CONTROL_ERROR", "DOMAIN_EVENT_CONTROL_ERROR", _nested),
    8: Kind(_CALLBACK + "BLOCK_JOB", "DOMAIN_EVENT_BLOCK_JOB", _nested),
    9: Kind(_CALLBACK + "DISK_CHANGE", "DOMAIN_EVENT_DISK_CHANGE", _nested),
    10: Kind(_CALLBACK + "TRAY_CHANGE", "DOMAIN_EVENT_TRAY_CHANGE", _nested),
    11: Kind(_CALLBACK + "PMWAKEUP", "DOMAIN_EVENT_PMWAKEUP", _power),
    12: Kind(_CALLBACK + "PMSUSPEND", "DOMAIN_EVENT_PMSUSPEND", _power),
    13: Kind(_CALLBACK + "BALLOON_CHANGE", "DOMAIN_EVENT_BALLOON_CHANGE", _nested),
    14: Kind(_CALLBACK + "PMSUSPEND_DISK", "DOMAIN_EVENT_PMSUSPEND_DISK", _power),
    15: Kind(_CALLBACK + "DEVICE_REMOVED", "DOMAIN_EVENT_DEVICE_REMOVED", _nested),
    16: Kind("DOMAIN_EVENT_BLOCK_JOB_2", "", _flat),
    17: Kind(_CALLBACK + "TUNABLE", "", _params),
    18: Kind(_CALLBACK + "AGENT_LIFECYCLE", "", _flat),
    19: Kind(_CALLBACK + "DEVICE_ADDED", "", _flat),
    20: Kind(_CALLBACK + "MIGRATION_ITERATION", "", _flat),
    21: Kind(_CALLBACK + "JOB_COMPLETED", "", _params),
    22: Kind(_CALLBACK + "DEVICE_REMOVAL_FAILED", "", _flat),
    23: Kind(_CALLBACK + "METADATA_CHANGE", "", _flat),
    24: Kind("DOMAIN_EVENT_BLOCK_THRESHOLD", "", _flat),
    25: Kind("DOMAIN_EVENT_MEMORY_FAILURE", "", _flat),
    26: Kind("DOMAIN_EVENT_MEMORY_DEVICE_SIZE_CHANGE", "", _flat),
}
# Those that a power event's older form has no reason for.
POWER = frozenset({11, 12, 14})


class _Callback(NamedTuple):
    connection: Connection
    id: int
    uuid: bytes | None  # one machine only


class _MonitorCallback(NamedTuple):
    connection: Connection
    id: int
    uuid: bytes | None
    event: str | None
    ignore_case: bool


class EventRouter:
    """Who asked for what."""

    def __init__(self, hub: EventHub) -> None:
        self._ids = itertools.count(1)
        self._callbacks: dict[int, dict[int, _Callback]] = {}  # event number -> callback id -> callback
        self._legacy: dict[int, dict[Connection, None]] = {}
        self._monitor: dict[int, _MonitorCallback] = {}
        self._owned: dict[Connection, dict[int, int]] = {}  # connection -> callback id -> event number (-1: monitor)
        self._unsubscribe = hub.subscribe(self._deliver)

    def close(self) -> None:
        self._unsubscribe()

    # subscribing

    def _new(self, connection: Connection, number: int) -> int:
        owned = self._owned.setdefault(connection, {})
        if len(owned) >= CALLBACKS_MAX:
            raise InvalidArgument(f"too many event callbacks on one connection (at most {CALLBACKS_MAX})")
        callback = next(self._ids) & 0x7FFFFFFF
        owned[callback] = number
        return callback

    def add(self, connection: Connection, number: int, uuid: bytes | None) -> int:
        if number not in KINDS and number != STAGE:
            raise InvalidArgument(f"event {number} is unknown")
        callback = self._new(connection, number)
        self._callbacks.setdefault(number, {})[callback] = _Callback(connection, callback, uuid)
        return callback

    def add_monitor(self, connection: Connection, uuid: bytes | None, event: str | None, ignore_case: bool) -> int:
        callback = self._new(connection, -1)
        self._monitor[callback] = _MonitorCallback(connection, callback, uuid, event, ignore_case)
        return callback

    def remove(self, connection: Connection, callback: int) -> None:
        owned = self._owned.get(connection, {})
        if callback not in owned:
            raise InvalidArgument(f"event callback {callback} is not registered")
        number = owned.pop(callback)
        if number < 0:
            del self._monitor[callback]
        else:
            self._forget(number, callback)

    def _forget(self, number: int, callback: int) -> None:
        del self._callbacks[number][callback]
        if not self._callbacks[number]:
            del self._callbacks[number]

    def add_legacy(self, connection: Connection, number: int) -> None:
        if number not in KINDS or not KINDS[number].legacy:
            raise InvalidArgument(f"event {number} is unknown, or needs a callback id")
        listeners = self._legacy.setdefault(number, {})
        if connection in listeners:
            raise InvalidArgument(f"event {number} is registered already on this connection")
        listeners[connection] = None

    def remove_legacy(self, connection: Connection, number: int) -> None:
        listeners = self._legacy.get(number, {})
        if connection not in listeners:
            raise InvalidArgument(f"event {number} is not registered on this connection")
        del listeners[connection]
        if not listeners:
            del self._legacy[number]

    def drop(self, connection: Connection) -> None:
        """Forget everything that `connection` asked for."""
        for callback, number in self._owned.pop(connection, {}).items():
            if number < 0:
                del self._monitor[callback]
            else:
                self._forget(number, callback)
        for number in list(self._legacy):
            if connection in self._legacy[number]:
                self.remove_legacy(connection, number)

    @property
    def count(self) -> int:
        """How many subscriptions there are."""
        return sum(map(len, self._owned.values())) + sum(map(len, self._legacy.values()))

    # delivering

    def _deliver(self, event: DomainEvent) -> None:
        if event.kind == "monitor":
            self._deliver_monitor(event)
            return
        number = event.number
        callbacks = self._callbacks.get(number)
        legacy = self._legacy.get(number)
        if not callbacks and not legacy:
            return
        domain = (event.domain.name, event.domain.uuid, event.domain.id)
        fields = tuple(event.fields.values())
        if number == STAGE:
            self._deliver_stage(domain, fields, callbacks or {})
            return
        kind = KINDS[number]
        values = kind.body(domain, fields)
        if callbacks:
            procedure = programs.remote()[kind.name]
            rest = procedure.args.encode(values)[CALLBACK_ID.size :]
            for callback in list(callbacks.values()):
                if callback.uuid is None or callback.uuid == domain[1]:
                    callback.connection.send_event(_event(procedure, CALLBACK_ID.pack(callback.id) + rest))
        if legacy:
            procedure = programs.remote()[kind.legacy]
            data = m.event(procedure, values[2] if number in POWER else values[1])
            for connection in list(legacy):
                connection.send_event(data)

    def _deliver_stage(self, domain: Any, fields: tuple[Any, ...], callbacks: dict[int, _Callback]) -> None:
        name, seconds, state, *detail = fields
        wire = (name, seconds, STAGE_STATES.get(state, 0), detail[0] if detail else "")
        data = m.event(programs.kvik()["DOMAIN_EVENT_STAGE"], (domain, wire))
        for callback in list(callbacks.values()):
            if callback.uuid is None or callback.uuid == domain[1]:
                callback.connection.send_event(data)

    def _deliver_monitor(self, event: DomainEvent) -> None:
        if not self._monitor:
            return
        name = str(event.fields["event"])
        details = event.fields.get("details")
        now = event.fields.get("timestamp") or time.time()
        seconds, micros = int(now), int(now % 1 * 1_000_000)
        domain = (event.domain.name, event.domain.uuid, event.domain.id)
        procedure = programs.qemu()["DOMAIN_MONITOR_EVENT"]
        for callback in list(self._monitor.values()):
            if callback.uuid is not None and callback.uuid != domain[1]:
                continue
            wanted = callback.event
            if wanted is not None and wanted != name and not (callback.ignore_case and wanted.lower() == name.lower()):
                continue
            callback.connection.send_event(m.event(procedure, (callback.id, domain, name, seconds, micros, details)))


def _event(procedure: Procedure, payload: bytes) -> bytes:
    return m.frame((procedure.program.number, procedure.number, m.EVENT_SERIAL), m.MESSAGE, m.OK, payload)
