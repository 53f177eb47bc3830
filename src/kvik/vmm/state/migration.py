"""A machine's migration: its parameters, and the one that goes on or was the last."""

from __future__ import annotations

from kvik.errors import InvalidArgument, OperationInvalid
from kvik.vmm.state.outgoing import AFTER, GOING, Outgoing
from kvik.vmm.state.stream import MAX_CHANNELS
from kvik.vmm.state.throttle import Throttle

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from kvik.vmm.machine import Machine
    from kvik.vmm.state.incoming import Incoming
    from kvik.vmm.state.postcopy import Ability

__all__ = ["Migration", "await_incoming", "migration_of"]

# QEMU's names (qapi/migration.json), with what is accepted: smallest and largest value.
PARAMETERS: dict[str, tuple[int, int]] = {
    "max-bandwidth": (0, (1 << 63) - 1),  # bytes a second, 0: no limit
    "downtime-limit": (0, 2_000_000),  # milliseconds
    "multifd-channels": (1, MAX_CHANNELS),
    "cpu-throttle-initial": (1, 99),  # percent of the time that vCPUs sleep, with auto-converge
    "cpu-throttle-increment": (1, 99),
    "max-cpu-throttle": (1, 99),
    "max-postcopy-bandwidth": (0, (1 << 63) - 1),  # bytes a second of pages that nobody asked for, 0: no limit
}
CAPABILITIES = ("events", "multifd", "return-path", "zero-copy-send", "auto-converge", "postcopy-ram", "xbzrle")
ALWAYS = ("return-path",)  # the destination always answers
POSSIBLE = ("events", "multifd", "postcopy-ram", "auto-converge", *ALWAYS)


class Migration:
    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.parameters = {
            "max-bandwidth": 0,
            "downtime-limit": 300,
            "multifd-channels": 2,
            "max-postcopy-bandwidth": 0,
            "cpu-throttle-initial": 20,
            "cpu-throttle-increment": 10,
            "max-cpu-throttle": 99,
        }
        self.capabilities = {name: name in ALWAYS for name in CAPABILITIES}
        self.outgoing: Outgoing | None = None
        self.incoming: Incoming | None = None
        self.ability: Ability | None = None  # of a machine that waits for one: whether it could be post-copy

    def set_parameters(self, values: dict[str, Any]) -> None:
        for name, value in values.items():
            if name not in PARAMETERS:
                raise InvalidArgument(
                    f"kvik-vmm's migration has no parameter {name[:40]!r}", remedy=f"it has {', '.join(PARAMETERS)}"
                )
            low, high = PARAMETERS[name]
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
                raise InvalidArgument(f"{name} is a number from {low} to {high}, not {str(value)[:40]!r}")
        self.parameters.update(values)
        if self.outgoing is not None and self.outgoing.status in GOING:
            self.outgoing.downtime_limit = self.parameters["downtime-limit"] / 1000
            self.outgoing.postcopy_bandwidth = self.parameters["max-postcopy-bandwidth"]
            self.outgoing.set_bandwidth(
                self.parameters["max-postcopy-bandwidth" if self.outgoing.postcopy else "max-bandwidth"]
            )

    def set_capability(self, name: str, state: bool) -> None:
        if name not in CAPABILITIES or (state and name not in POSSIBLE) or (name in ALWAYS and not state):
            raise InvalidArgument(
                f"the migration of kvik-vmm cannot have {name[:40]!r} {'on' if state else 'off'}",
                remedy=f"it knows {', '.join(POSSIBLE)}",
            )
        if name == "postcopy-ram" and state and self.machine.status == "inmigrate":
            self._able().check(self.machine)
        self.capabilities[name] = state

    def _able(self) -> Ability:
        if self.ability is None:
            from kvik.vmm.state.postcopy import Ability

            self.ability = Ability()
        return self.ability

    def _told(self, status: str) -> None:
        if self.capabilities["events"]:
            self.machine.emit("MIGRATION", {"status": status})

    def start(self, uri: str) -> Outgoing:
        """Begin to send the machine there. Returns at once; `outgoing` tells how far it is."""
        if self.outgoing is not None and self.outgoing.status in GOING:
            raise OperationInvalid("There's a migration process in progress")  # QEMU's words: clients look for them
        if self.machine.status == "inmigrate":
            raise OperationInvalid("Guest is waiting for an incoming migration")
        if self.machine.status == "postmigrate":
            raise OperationInvalid("the guest has left for another machine")
        self.machine.memory.require_whole("be sent elsewhere")
        self.machine.memory.require_free("be sent elsewhere")
        self._told("setup")
        self.outgoing = Outgoing(
            self.machine,
            uri,
            channels=self.parameters["multifd-channels"] if self.capabilities["multifd"] else 1,
            bandwidth=self.parameters["max-bandwidth"],
            downtime_limit=self.parameters["downtime-limit"] / 1000,
            postcopy=self.capabilities["postcopy-ram"],
            postcopy_bandwidth=self.parameters["max-postcopy-bandwidth"],
            throttle=self._throttle() if self.capabilities["auto-converge"] else None,
            on_change=self._told,
        )
        return self.outgoing

    def _throttle(self) -> Throttle:
        names = ("cpu-throttle-initial", "cpu-throttle-increment", "max-cpu-throttle")
        initial, increment, most = (self.parameters[name] for name in names)
        return Throttle(self.machine, initial, increment, most)

    def start_postcopy(self) -> None:
        if self.outgoing is None:
            raise OperationInvalid("Start of postcopy without migration")
        self.outgoing.start_postcopy()

    def pause_postcopy(self) -> None:
        if self.outgoing is None or self.outgoing.status not in AFTER:
            raise OperationInvalid("migrate-pause is currently only supported during postcopy-active")
        self.outgoing.pause_postcopy()

    def resume(self, uri: str) -> None:
        """Go on with post-copy whose connection was lost."""
        if self.outgoing is None:
            raise OperationInvalid("Cannot resume if there is no paused migration")
        self.outgoing.recover(uri)

    def recover(self, uri: str) -> None:
        """The same, at the destination: wait for the source there."""
        if self.incoming is None:
            raise OperationInvalid("Migrate recover can only be run when postcopy is paused.")
        self.incoming.recover(uri)

    def cancel(self) -> None:
        if self.outgoing is not None:
            self.outgoing.cancel()

    def listen(self, uri: str) -> Incoming:
        if self.machine.status != "inmigrate":
            raise OperationInvalid("The incoming migration has already been started")
        if self.incoming is not None:
            raise OperationInvalid("The incoming migration has already been started")
        from kvik.vmm.state.incoming import Incoming

        told: Callable[[str], None] = self._told
        self.incoming = Incoming(self.machine, uri, self._able(), told)
        return self.incoming

    def report(self) -> dict[str, Any]:
        current = self.outgoing or self.incoming
        return current.report() if current is not None else {}


def migration_of(machine: Machine) -> Migration:
    if machine.migration is None:
        machine.migration = Migration(machine)
    return machine.migration


def await_incoming(machine: Machine, uri: str) -> Incoming | None:
    """Start a machine that was built without booting, to be filled from `uri`; "defer": wait to be told from where."""
    from kvik.vmm.state import incoming  # noqa: F401 - "defer" wants it when the sandbox is entered
    from kvik.vmm.state.postcopy import Ability

    machine.hold_devices()
    machine.start(paused=True)
    machine.status = "inmigrate"
    migration_of(machine).ability = Ability()  # before the sandbox is entered
    return migration_of(machine).listen(uri) if uri != "defer" else None
