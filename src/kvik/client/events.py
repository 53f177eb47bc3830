"""What the daemon tells unasked, typed: `for event in connection.events(): print(event.kind, event.domain.name)`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from kvik.client.handle import uuid_text
from kvik.rpc.message import Event
from kvik.rpc.program import KVIK_NUMBER, QEMU_NUMBER, REMOTE_NUMBER
from kvik.rpc.xdr_types import Record

# virDomainEventID -> (kind, procedure). Kinds are virsh's names for them.
DOMAIN_EVENTS: Final[dict[int, tuple[str, str]]] = {
    0: ("lifecycle", "DOMAIN_EVENT_CALLBACK_LIFECYCLE"),
    1: ("reboot", "DOMAIN_EVENT_CALLBACK_REBOOT"),
    2: ("rtc-change", "DOMAIN_EVENT_CALLBACK_RTC_CHANGE"),
    3: ("watchdog", "DOMAIN_EVENT_CALLBACK_WATCHDOG"),
    4: ("io-error", "DOMAIN_EVENT_CALLBACK_IO_ERROR"),
    5: ("graphics", "DOMAIN_EVENT_CALLBACK_GRAPHICS"),
    6: ("io-error-reason", "DOMAIN_EVENT_CALLBACK_IO_ERROR_REASON"),
    7: ("control-error", "DOMAIN_EVENT_CALLBACK_CONTROL_ERROR"),
    8: ("block-job", "DOMAIN_EVENT_CALLBACK_BLOCK_JOB"),
    9: ("disk-change", "DOMAIN_EVENT_CALLBACK_DISK_CHANGE"),
    10: ("tray-change", "DOMAIN_EVENT_CALLBACK_TRAY_CHANGE"),
    11: ("pm-wakeup", "DOMAIN_EVENT_CALLBACK_PMWAKEUP"),
    12: ("pm-suspend", "DOMAIN_EVENT_CALLBACK_PMSUSPEND"),
    13: ("balloon-change", "DOMAIN_EVENT_CALLBACK_BALLOON_CHANGE"),
    14: ("pm-suspend-disk", "DOMAIN_EVENT_CALLBACK_PMSUSPEND_DISK"),
    15: ("device-removed", "DOMAIN_EVENT_CALLBACK_DEVICE_REMOVED"),
    16: ("block-job-2", "DOMAIN_EVENT_BLOCK_JOB_2"),
    17: ("tunable", "DOMAIN_EVENT_CALLBACK_TUNABLE"),
    18: ("agent-lifecycle", "DOMAIN_EVENT_CALLBACK_AGENT_LIFECYCLE"),
    19: ("device-added", "DOMAIN_EVENT_CALLBACK_DEVICE_ADDED"),
    20: ("migration-iteration", "DOMAIN_EVENT_CALLBACK_MIGRATION_ITERATION"),
    21: ("job-completed", "DOMAIN_EVENT_CALLBACK_JOB_COMPLETED"),
    22: ("device-removal-failed", "DOMAIN_EVENT_CALLBACK_DEVICE_REMOVAL_FAILED"),
    23: ("metadata-change", "DOMAIN_EVENT_CALLBACK_METADATA_CHANGE"),
    24: ("block-threshold", "DOMAIN_EVENT_BLOCK_THRESHOLD"),
    25: ("memory-failure", "DOMAIN_EVENT_MEMORY_FAILURE"),
    26: ("memory-device-size-change", "DOMAIN_EVENT_MEMORY_DEVICE_SIZE_CHANGE"),
}
EVENT_IDS: Final = {kind: number for number, (kind, _) in DOMAIN_EVENTS.items()}
_KINDS: Final = {procedure: kind for kind, procedure in DOMAIN_EVENTS.values()}

# virNetworkEventID -> (kind, procedure)
NETWORK_EVENTS: Final[dict[int, tuple[str, str]]] = {
    0: ("lifecycle", "NETWORK_EVENT_LIFECYCLE"),
    1: ("metadata-change", "NETWORK_EVENT_CALLBACK_METADATA_CHANGE"),
}
NETWORK_EVENT_IDS: Final = {kind: number for number, (kind, _) in NETWORK_EVENTS.items()}
_NETWORK_KINDS: Final = {procedure: kind for kind, procedure in NETWORK_EVENTS.values()}
NETWORK_LIFECYCLE: Final = ("Defined", "Undefined", "Started", "Stopped")  # virNetworkEventLifecycleType

# virStoragePoolEventID -> (kind, procedure)
POOL_EVENTS: Final[dict[int, tuple[str, str]]] = {
    0: ("lifecycle", "STORAGE_POOL_EVENT_LIFECYCLE"),
    1: ("refresh", "STORAGE_POOL_EVENT_REFRESH"),
}
POOL_EVENT_IDS: Final = {kind: number for number, (kind, _) in POOL_EVENTS.items()}
_POOL_KINDS: Final = {procedure: kind for kind, procedure in POOL_EVENTS.values()}
POOL_LIFECYCLE: Final = ("Defined", "Undefined", "Started", "Stopped", "Created", "Deleted")

# virSecretEventID -> (kind, procedure)
SECRET_EVENTS: Final[dict[int, tuple[str, str]]] = {
    0: ("lifecycle", "SECRET_EVENT_LIFECYCLE"),
    1: ("value-changed", "SECRET_EVENT_VALUE_CHANGED"),
}
SECRET_EVENT_IDS: Final = {kind: number for number, (kind, _) in SECRET_EVENTS.items()}
_SECRET_KINDS: Final = {procedure: kind for kind, procedure in SECRET_EVENTS.values()}
SECRET_LIFECYCLE: Final = ("Defined", "Undefined")  # virSecretEventLifecycleType

# virDomainEventType -> (name, names of its details). Source: libvirt-domain.h, the names virsh prints.
LIFECYCLE: Final[tuple[tuple[str, tuple[str, ...]], ...]] = (
    ("Defined", ("Added", "Updated", "Renamed", "Snapshot")),
    ("Undefined", ("Removed", "Renamed")),
    ("Started", ("Booted", "Migrated", "Restored", "Snapshot", "Event wakeup", "Recovered")),
    ("Suspended", ("Paused", "Migrated", "I/O Error", "Watchdog", "Restored", "Snapshot", "API error", "Post-copy",
                   "Post-copy Error")),
    ("Resumed", ("Unpaused", "Migrated", "Snapshot", "Post-copy", "Post-copy Error")),
    ("Stopped", ("Shutdown", "Destroyed", "Crashed", "Migrated", "Saved", "Failed", "Snapshot")),
    ("Shutdown", ("Finished", "Finished after guest request", "Finished after host request")),
    ("PMSuspended", ("Memory", "Disk")),
    ("Crashed", ("Panicked", "Crashloaded")),
)  # fmt: skip


def lifecycle_text(event: int, detail: int) -> tuple[str, str]:
    """Names of a life-cycle event and its detail; numbers nobody knows yet stay numbers."""
    if not 0 <= event < len(LIFECYCLE):
        return f"event {event}", f"detail {detail}"
    name, details = LIFECYCLE[event]
    return name, details[detail] if 0 <= detail < len(details) else f"detail {detail}"


@dataclass(frozen=True, slots=True)
class DomainRef:
    name: str
    uuid: bytes
    id: int


@dataclass(frozen=True, slots=True)
class DomainEvent:
    """`kind` as in DOMAIN_EVENTS (also "stage" and "monitor"); `fields` are the procedure's, without the domain."""

    kind: str
    domain: DomainRef
    callback: int
    fields: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        if self.kind == "lifecycle":
            name, detail = lifecycle_text(self.fields["event"], self.fields["detail"])
            return f"{name} {detail}"
        return " ".join(f"{key}={value}" for key, value in self.fields.items())


@dataclass(frozen=True, slots=True)
class NetworkEvent:
    """`kind` as in NETWORK_EVENTS; `fields` are the procedure's, without the network."""

    kind: str
    name: str
    uuid: bytes
    callback: int
    fields: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        if self.kind == "lifecycle":
            return _word(NETWORK_LIFECYCLE, self.fields["event"])
        return " ".join(f"{key}={value}" for key, value in self.fields.items())


@dataclass(frozen=True, slots=True)
class PoolEvent:
    """`kind` as in POOL_EVENTS; `fields` are the procedure's, without the pool."""

    kind: str
    name: str
    uuid: bytes
    callback: int
    fields: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        """virStoragePoolEventLifecycleType in words; a refresh says nothing more."""
        if self.kind != "lifecycle":
            return ""
        return _word(POOL_LIFECYCLE, self.fields["event"])


@dataclass(frozen=True, slots=True)
class SecretEvent:
    """`kind` as in SECRET_EVENTS; `fields` are the procedure's, without the secret."""

    kind: str
    uuid: bytes
    callback: int
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def uuid_text(self) -> str:
        return uuid_text(self.uuid)

    def __str__(self) -> str:
        if self.kind != "lifecycle":
            return ""
        return _word(SECRET_LIFECYCLE, self.fields["event"])


@dataclass(frozen=True, slots=True)
class ConnectionClosed:
    """The daemon says goodbye; `reason` is virConnectCloseReason."""

    reason: int


def _word(words: Sequence[str], number: int) -> str:
    """A later daemon may have more events than this client has words for."""
    return words[number] if 0 <= number < len(words) else f"event {number}"


AnyEvent = DomainEvent | NetworkEvent | PoolEvent | SecretEvent | ConnectionClosed


def decode_event(message: Event) -> AnyEvent | None:
    """An event message -> typed; None for what this client has no use for (devices)."""
    procedure = message.lookup()
    record = message.decode()
    if procedure.name == "CONNECT_EVENT_CONNECTION_CLOSED":
        return ConnectionClosed(record[0])
    if message.program == REMOTE_NUMBER and procedure.name in _NETWORK_KINDS:
        values = record.asdict()
        network, callback = values.pop("net"), values.pop("callbackID")
        return NetworkEvent(_NETWORK_KINDS[procedure.name], network[0], network[1], callback, values)
    if message.program == REMOTE_NUMBER and procedure.name in _POOL_KINDS:
        values = record.asdict()
        pool, callback = values.pop("pool"), values.pop("callbackID")
        return PoolEvent(_POOL_KINDS[procedure.name], pool[0], pool[1], callback, values)
    if message.program == REMOTE_NUMBER and procedure.name in _SECRET_KINDS:
        values = record.asdict()
        secret, callback = values.pop("secret"), values.pop("callbackID")
        return SecretEvent(_SECRET_KINDS[procedure.name], secret[0], callback, values)
    if message.program == KVIK_NUMBER:
        kind = "stage"
    elif message.program == QEMU_NUMBER:
        kind = "monitor"
    elif message.program == REMOTE_NUMBER and procedure.name in _KINDS:
        kind = _KINDS[procedure.name]
    else:
        return None
    values = record.asdict()
    callback = int(values.pop("callbackID", -1))
    inner = values.pop("msg", None)
    if isinstance(inner, Record):
        values |= inner.asdict()
    name, uuid, number = values.pop("dom")
    values = {key: value.asdict() if isinstance(value, Record) else value for key, value in values.items()}
    return DomainEvent(kind, DomainRef(name, uuid, number), callback, values)
