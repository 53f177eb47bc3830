"""One device by itself: what attach, detach and update are given. https://libvirt.org/formatdomain.html#devices"""

from __future__ import annotations

from collections.abc import Iterator

from kvik.conf.codec import Element, plan_of
from kvik.conf.devices.common import BootableDevice, Device
from kvik.conf.devices.hostdev import Redirdev
from kvik.conf.domain import Devices
from kvik.conf.reader import read_xml
from kvik.conf.xmlformat import format_element
from kvik.conf.xmlparse import parse_element
from kvik.errors import ConfigError

# kind (the element's name) -> (field of Devices, whether that is a list)
FIELDS: dict[str, tuple[str, bool]] = {
    "disk": ("disks", True),
    "controller": ("controllers", True),
    "lease": ("leases", True),
    "filesystem": ("filesystems", True),
    "interface": ("interfaces", True),
    "smartcard": ("smartcards", True),
    "serial": ("serials", True),
    "parallel": ("parallels", True),
    "console": ("consoles", True),
    "channel": ("channels", True),
    "input": ("inputs", True),
    "tpm": ("tpms", True),
    "graphics": ("graphics", True),
    "sound": ("sounds", True),
    "audio": ("audios", True),
    "video": ("videos", True),
    "hostdev": ("hostdevs", True),
    "redirdev": ("redirdevs", True),
    "hub": ("hubs", True),
    "watchdog": ("watchdogs", True),
    "memballoon": ("memballoon", False),
    "rng": ("rngs", True),
    "nvram": ("nvram", False),
    "panic": ("panics", True),
    "shmem": ("shmems", True),
    "memory": ("memorys", True),
    "iommu": ("iommu", False),
    "vsock": ("vsock", False),
    "crypto": ("cryptos", True),
}
_MODELS: dict[str, type[Element]] = {}
_KINDS: dict[type[Element], str] = {}


def _models() -> dict[str, type[Element]]:
    if not _MODELS:
        for kind, child in plan_of(Devices).children.items():
            if kind in FIELDS:
                _MODELS[kind] = child.model
                _KINDS[child.model] = kind
    return _MODELS


def kind_of(device: Element) -> str:
    """The element name of a device Struct: 'disk', 'interface', ..."""
    _models()
    return _KINDS[type(device)]


def parse_device(xml: str | bytes) -> tuple[str, Element]:
    """(kind, Struct) of a lone device element. Raises ConfigError."""
    root = read_xml(xml, "device document")
    kind = str(root.tag)
    model = _models().get(kind)
    if model is None:
        raise ConfigError(f"<{kind}> is not a device; known are {', '.join(FIELDS)}", line=1, path=f"/{kind}")
    return kind, parse_element(root, model)


def format_device(device: Element, *, secure: bool = False, inactive: bool = False) -> str:
    return format_element(device, kind_of(device), secure=secure, inactive=inactive)


def devices_of(devices: Devices) -> Iterator[tuple[str, Element]]:
    """(path below /domain/devices, Struct) of every device, in the document's order."""
    for kind, (field, many) in FIELDS.items():
        value = getattr(devices, field)
        if not many:
            if value is not None:
                yield kind, value
        elif len(value) == 1:
            yield kind, value[0]
        elif value:
            for index, item in enumerate(value, 1):
                yield f"{kind}[{index}]", item


def guest_devices(devices: Devices) -> Iterator[tuple[str, Device]]:
    """Those of them that can have an address and an alias."""
    for path, item in devices_of(devices):
        if isinstance(item, Device):
            yield path, item


def bootable_devices(devices: Devices) -> Iterator[tuple[str, BootableDevice | Redirdev]]:
    """(path below /domain/devices, Struct) of those that can have a boot order."""
    for path, item in devices_of(devices):
        if isinstance(item, BootableDevice | Redirdev):
            yield path, item


def path_of(devices: Devices, device: Element) -> str:
    """`/domain/devices/disk[2]`, or the bare kind for a device that is not part of the document."""
    return "/domain/devices/" + next((path for path, item in devices_of(devices) if item is device), kind_of(device))


def device_list(devices: Devices, kind: str) -> list[Element]:
    """The devices of one kind, also where there can be only one."""
    field, many = FIELDS[kind]
    value = getattr(devices, field)
    return list(value) if many else [value] if value is not None else []


def add_device(devices: Devices, device: Element) -> None:
    """Put it where it belongs; ConfigError if there can be only one and there is one."""
    kind = kind_of(device)
    field, many = FIELDS[kind]
    if many:
        getattr(devices, field).append(device)
    elif getattr(devices, field) is not None:
        raise ConfigError(f"there is a {kind} already, and there can be only one", path=f"/domain/devices/{kind}")
    else:
        setattr(devices, field, device)


def remove_device(devices: Devices, device: Element) -> None:
    """Take this very Struct (not an equal one) out."""
    field, many = FIELDS[kind_of(device)]
    if many:
        items = getattr(devices, field)
        items[:] = [item for item in items if item is not device]
    elif getattr(devices, field) is device:
        setattr(devices, field, None)
