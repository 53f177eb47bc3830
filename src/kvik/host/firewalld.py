"""firewalld's zones: in which one an interface is. https://firewalld.org/documentation/man-pages/firewalld.dbus.html"""

from __future__ import annotations

from kvik.errors import DBusError, HostError, NotFound, OperationInvalid
from kvik.host.dbus import SystemBus

__all__ = ["is_running", "require_zone", "set_zone", "unset_zone", "watch"]

NAME, PATH = "org.fedoraproject.FirewallD1", "/org/fedoraproject/FirewallD1"
ZONES = f"{NAME}.zone"


def is_running() -> bool:
    """Also False where there is no D-Bus."""
    try:
        with SystemBus() as bus:
            return _is_there(bus)
    except HostError:
        return False


def _is_there(bus: SystemBus) -> bool:
    return bool(
        bus.call("org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus", "NameHasOwner", NAME)[0]
    )


def require_zone(zone: str, who: str) -> None:
    """`OperationInvalid` if firewalld does not run, `NotFound` if it has no such zone. `who` wants it."""
    try:
        bus = SystemBus()
    except HostError as error:
        raise OperationInvalid(_absent(zone, who), remedy=_REMEDY) from error
    with bus:
        if not _is_there(bus):
            raise OperationInvalid(_absent(zone, who), remedy=_REMEDY)
        known = bus.call(NAME, PATH, ZONES, "getZones")[0]
    if zone not in known:
        raise NotFound(f"{who} is to be in firewalld's zone {zone!r}, which it does not have", remedy=", ".join(known))


_REMEDY = "start firewalld, or leave zone out"


def _absent(zone: str, who: str) -> str:
    return f"{who} is to be in firewalld's zone {zone!r}, and firewalld does not run"


def watch() -> SystemBus:
    """A connection that receives a signal whenever firewalld comes or goes. `HostError` if there is no D-Bus."""
    bus = SystemBus()
    try:
        bus.subscribe(
            "type='signal',sender='org.freedesktop.DBus',interface='org.freedesktop.DBus',"
            f"member='NameOwnerChanged',arg0='{NAME}'"
        )
    except BaseException:
        bus.close()
        raise
    return bus


def set_zone(zone: str, interface: str) -> None:
    """Put an interface into a zone, whichever it was in; until firewalld is restarted. `HostError` if it refuses."""
    with SystemBus() as bus:
        if bus.call(NAME, PATH, ZONES, "getZoneOfInterface", interface)[0] != zone:
            bus.call(NAME, PATH, ZONES, "changeZoneOfInterface", zone, interface)


def unset_zone(zone: str, interface: str) -> None:
    """Take an interface out of a zone; no error if it is not in that, or firewalld does not run any more."""
    try:
        with SystemBus() as bus:
            if bus.call(NAME, PATH, ZONES, "getZoneOfInterface", interface)[0] == zone:
                bus.call(NAME, PATH, ZONES, "removeInterface", zone, interface)
    except DBusError as error:
        if not error.name.endswith(("ServiceUnknown", "NameHasNoOwner")):
            raise
    except HostError:
        pass  # no bus: nobody keeps zones
