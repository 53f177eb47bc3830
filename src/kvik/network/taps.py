"""The host's side of a machine's interfaces: a tap for each one on a bridge, open until the VMM has it.

The kernel removes a tap with its last descriptor: when the VMM ends, however it ends, nothing stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack

from kvik.conf.devices.interface import Interface, InterfaceTarget
from kvik.errors import ConfigUnsupported
from kvik.host.tap import create_tap

__all__ = ["open_taps"]

QUEUES_MAX = 256


def open_taps(
    interfaces: Iterable[Interface], close: ExitStack, protect: Callable[[Interface], None] | None = None
) -> dict[str, int]:
    """ "net:ALIAS:N" -> descriptor of queue N; `close` closes ours. Writes each tap's name into the live document.

    `protect` puts an interface whose tap is there, and has no guest yet, under its network filter.
    Raises `ConfigUnsupported`, `HostError`, `NoNetwork`; then `close` still takes back what was made. Blocks for about
    a millisecond each.
    """
    files: dict[str, int] = {}
    for interface in interfaces:
        if not _wants_tap(interface):
            continue
        alias = interface.alias.name if interface.alias else ""
        _refuse_unkept_promises(interface, alias, filters=protect is not None)
        target = interface.target = interface.target or InterfaceTarget()
        tap = create_tap(
            target.dev or "",
            bridge=interface.source.bridge if interface.type == "bridge" and interface.source else None,
            queues=_queues(interface, alias),
            mac=_host_side(interface.mac.address) if interface.mac else None,
            mtu=interface.mtu.size if interface.mtu else None,
        )
        close.callback(tap.close)
        target.dev = tap.name
        if protect is not None:
            protect(interface)
        files |= {f"net:{alias}:{number}": fd for number, fd in enumerate(tap.fds)}
    return files


def _wants_tap(interface: Interface) -> bool:
    if interface.type == "ethernet":
        return interface.target is None or interface.target.managed is not False
    return interface.type in ("bridge", "network", "direct")


def _refuse_unkept_promises(interface: Interface, alias: str, *, filters: bool) -> None:
    """What is not done here yet and would be missed: a bridge, or a wall."""
    if interface.type in ("network", "direct"):
        what = "virtual networks are" if interface.type == "network" else "direct attachment (macvtap) is"
        raise ConfigUnsupported(
            f"interface {alias}: {what} not supported yet",
            path="/domain/devices/interface/@type",
            remedy="use <interface type='user'>, or type='bridge' with a bridge of this host",
        )
    if interface.type == "bridge" and not (interface.source and interface.source.bridge):
        raise ConfigUnsupported(
            f"interface {alias} of type bridge names no bridge", path="/domain/devices/interface/source"
        )
    kept = {
        "filterref": interface.filterref if not filters else None,
        "vlan": interface.vlan,
        "virtualport": interface.virtualport,
        "bandwidth": interface.bandwidth,
        "port isolated='yes'": interface.port if interface.port and interface.port.isolated else None,
    }
    for name, value in kept.items():
        if value is not None:
            raise ConfigUnsupported(
                f"interface {alias}: <{name}> is not supported yet", path="/domain/devices/interface"
            )


def _queues(interface: Interface, alias: str) -> int:
    queues = (interface.driver.queues if interface.driver else None) or 1
    if queues > QUEUES_MAX:
        raise ConfigUnsupported(
            f"interface {alias} has {queues} queues; {QUEUES_MAX} are the most a tap can have",
            path="/domain/devices/interface/driver/@queues",
        )
    return queues


def _host_side(mac: str) -> str:
    """The guest's address with the highest first byte: a bridge takes the lowest of its ports' for its own."""
    return "fe" + mac[2:]
