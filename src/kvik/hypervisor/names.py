"""What both sides of a start call things: aliases, and the names under which descriptors are passed to a VMM.

`descriptors.py` opens under these names, each driver's `argv` looks for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from kvik.conf.devices.chardev import Chardev, ChardevSource
from kvik.conf.devices.common import Device
from kvik.conf.devices.interface import Interface
from kvik.conf.domain import Domain
from kvik.errors import ConfigUnsupported

__all__ = [
    "MONITOR",
    "TAP_TYPES",
    "HostSide",
    "alias_of",
    "character_devices",
    "chardev_name",
    "first_output",
    "image_name",
    "is_passt",
    "life_name",
    "listens",
    "log_name",
    "overlay_name",
    "passt_name",
    "switch_name",
    "tap_name",
    "vhost_name",
    "vhost_user_name",
]

MONITOR = "monitor"
TAP_TYPES = frozenset({"ethernet", "network", "bridge", "direct"})  # interfaces whose host side is a tap


class HostSide(Protocol):
    """What <rng>'s egd backend shares with the character devices."""

    type: Any
    sources: list[ChardevSource]
    protocol: Any


def alias_of(device: Device) -> str:
    if device.alias is None or not device.alias.name:
        raise ConfigUnsupported(f"a {type(device).__name__.lower()} has no alias")
    return device.alias.name


def overlay_name(alias: str) -> str:
    """What is written to a transient disk: an image without a name, gone with whoever has it open."""
    return f"disk:{alias}:overlay"


def chardev_name(alias: str) -> str:
    """A listening socket or an open file of a serial line, console or channel."""
    return f"chardev:{alias}"


def log_name(alias: str) -> str:
    return f"log:{alias}"


def image_name(alias: str, layer: int) -> str:
    """A layer of a disk's chain; 0 is the top."""
    return f"disk:{alias}:{layer}"


def tap_name(alias: str) -> str:
    """Descriptors are passed as `net:ALIAS:0`, `net:ALIAS:1`, ... one for each queue."""
    return f"net:{alias}"


def vhost_name(alias: str) -> str:
    return f"vhost:{alias}"


def passt_name(alias: str) -> str:
    """The connection to passt is passed as `passt:ALIAS`."""
    return f"passt:{alias}"


def switch_name(alias: str) -> str:
    """The connection to a network's switch in user space, or the socket where that connects, is `switch:ALIAS`."""
    return f"switch:{alias}"


def vhost_user_name(alias: str) -> str:
    """The connection to a disk's back end is passed as `vublk:ALIAS`."""
    return f"vublk:{alias}"


def life_name(alias: str) -> str:
    """What a side process ends with: the VMM holds `life:ALIAS` open."""
    return f"life:{alias}"


def is_passt(device: Interface) -> bool:
    return device.type == "user" and device.backend is not None and device.backend.type == "passt"


def listens(device: HostSide) -> bool:
    """Whether we bind a Unix socket for it."""
    source = device.sources[0] if device.sources else None
    return device.type == "unix" and (source is None or source.mode != "connect")


def first_output(domain: Domain) -> Chardev | None:
    """The device whose first byte shows that the guest has begun to speak."""
    devices = domain.devices
    if devices.serials:
        return devices.serials[0]
    return next((item for item in devices.consoles if item.target and item.target.type == "virtio"), None)


def character_devices(domain: Domain) -> Iterator[Chardev]:
    """Those with a host side of their own: a console of type serial is the first serial line under another name."""
    devices = domain.devices
    yield from devices.serials
    yield from devices.parallels
    yield from (item for item in devices.consoles if item.target is not None and item.target.type == "virtio")
    yield from devices.channels
