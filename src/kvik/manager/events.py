"""What the manager tells whoever listens: one hub, plain callbacks, in the order things happened.

An event names the machine as it was when the event happened (`DomainRef`), its kind by libvirt's event id and the
fields of that kind in the wire's order. The hub calls back in the event loop, synchronously; a callback that
raises is logged and does not stop the others.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

logger = logging.getLogger(__name__)

# kind -> (virDomainEventID, its fields in the order of libvirt's callback)
KINDS: Mapping[str, tuple[int, tuple[str, ...]]] = {
    "lifecycle": (0, ("event", "detail")),
    "reboot": (1, ()),
    "rtc-change": (2, ("offset",)),  # seconds
    "watchdog": (3, ("action",)),
    "io-error": (4, ("src_path", "dev_alias", "action")),
    "graphics": (5, ("phase", "local", "remote", "auth_scheme", "subject")),
    "io-error-reason": (6, ("src_path", "dev_alias", "action", "reason")),
    "control-error": (7, ()),
    "block-job": (8, ("path", "type", "status")),
    "disk-change": (9, ("old_src_path", "new_src_path", "dev_alias", "reason")),
    "tray-change": (10, ("dev_alias", "reason")),
    "pmwakeup": (11, ("reason",)),
    "pmsuspend": (12, ("reason",)),
    "balloon-change": (13, ("actual",)),  # KiB
    "pmsuspend-disk": (14, ("reason",)),
    "device-removed": (15, ("dev_alias",)),
    "block-job-2": (16, ("disk", "type", "status")),
    "tunable": (17, ("params",)),
    "agent-lifecycle": (18, ("state", "reason")),
    "device-added": (19, ("dev_alias",)),
    "migration-iteration": (20, ("iteration",)),
    "job-completed": (21, ("params",)),
    "device-removal-failed": (22, ("dev_alias",)),
    "metadata-change": (23, ("type", "uri")),
    "block-threshold": (24, ("dev", "path", "threshold", "excess")),
    "memory-failure": (25, ("recipient", "action", "flags")),
    "memory-device-size-change": (26, ("alias", "size")),
    # Ours, from 100: no libvirt client asks for them.
    "stage": (100, ("stage", "seconds", "state")),
    # Of the qemu program, which has a registration of its own: any event of the VMM's monitor, details as JSON or None.
    "monitor": (-1, ("event", "details", "timestamp")),
}


@dataclass(frozen=True, slots=True)
class DomainRef:
    """A machine as the wire names it: `uuid` is 16 bytes, `id` is -1 while it is off."""

    name: str
    uuid: bytes
    id: int


@dataclass(frozen=True, slots=True)
class DomainEvent:
    domain: DomainRef
    kind: str
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def number(self) -> int:
        """libvirt's virDomainEventID."""
        return KINDS[self.kind][0]


Callback = Callable[[DomainEvent], None]


class EventHub:
    """Delivers every event to every subscriber, in order."""

    def __init__(self) -> None:
        self._subscribers: dict[int, Callback] = {}
        self._next = 0

    def subscribe(self, callback: Callback) -> Callable[[], None]:
        """Call `callback` for each event from now on; the returned function ends that (more than once is fine)."""
        key = self._next
        self._next += 1
        self._subscribers[key] = callback

        def unsubscribe() -> None:
            self._subscribers.pop(key, None)

        return unsubscribe

    def emit(self, domain: DomainRef, kind: str, **fields: Any) -> None:
        if tuple(fields) != KINDS[kind][1]:
            raise TypeError(f"event {kind} has the fields {KINDS[kind][1]}, not {tuple(fields)}")
        if not self._subscribers:
            return
        event = DomainEvent(domain, kind, fields)
        for callback in list(self._subscribers.values()):
            try:
                callback(event)
            except Exception:
                logger.exception("a subscriber failed on a %s event of %s", kind, domain.name)
