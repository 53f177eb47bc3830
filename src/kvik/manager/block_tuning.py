"""Limits of a disk's requests: read, and changed live, in the definition, or both (virDomainSetBlockIoTune).

Of the limits of one kind (bytes or requests, lasting or in bursts) total excludes read and write; where one of a kind
is given the others of it are none, where none is given they stay, but for bursts of a limit that goes. Disks of one
group share its limits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from kvik.conf.devices.disk import Disk, IoTune
from kvik.conf.domain import Domain
from kvik.errors import InvalidArgument, OperationUnsupported

if TYPE_CHECKING:
    from kvik.manager.domain import DomainObject

__all__ = ["FIELDS", "parameters", "set_limits"]

LIVE, CONFIG = 1, 2
LIMIT_MAX = 1_000_000_000_000_000  # QEMU's THROTTLE_VALUE_MAX
GROUP_NAME_MAX = 255
_DIRECTIONS = ("total", "read", "write")
_KINDS = ("bytes_sec", "iops_sec", "bytes_sec_max", "iops_sec_max", "bytes_sec_max_length", "iops_sec_max_length")
# In the order in which libvirt tells them.
FIELDS = (
    *(f"{direction}_{kind}" for kind in _KINDS[:4] for direction in _DIRECTIONS),
    "size_iops_sec",
    "group_name",
    *(f"{direction}_{kind}" for kind in _KINDS[4:] for direction in _DIRECTIONS),
)


def find_disk(document: Domain, name: str) -> Disk:
    """By target or by the path of its image."""
    for disk in document.devices.disks:
        if name == disk.target.dev or (disk.source is not None and name == disk.source.location):
            return disk
    raise InvalidArgument(
        f"disk '{name}' was not found in the domain config", remedy=f"kvik domblklist {document.name} shows all"
    )


def parameters(document: Domain, name: str) -> dict[str, int | str]:
    """All limits of a disk; 0: none."""
    tune = find_disk(document, name).iotune or IoTune()
    return {field: getattr(tune, field) or ("" if field == "group_name" else 0) for field in FIELDS}


def _changed(old: IoTune, given: Mapping[str, int | str]) -> IoTune:
    values: dict[str, Any] = {field: getattr(old, field) for field in FIELDS}
    for kind in _KINDS:
        names = [f"{direction}_{kind}" for direction in _DIRECTIONS]
        if any(name in given for name in names):
            total, *parts = (given.get(name, 0) for name in names)
            if total and any(parts):
                raise InvalidArgument(f"total and read/write of {kind} cannot be set at the same time")
            values |= {name: given.get(name, 0) for name in names}
    values |= {name: given[name] for name in ("size_iops_sec", "group_name") if name in given}
    for kind in ("bytes_sec", "iops_sec"):
        for direction in _DIRECTIONS:
            name = f"{direction}_{kind}"
            for upper, lower in ((name, f"{name}_max"), (f"{name}_max", f"{name}_max_length")):
                if not values[upper] and not given.get(lower):
                    values[lower] = None  # a burst goes with the limit that it exceeds
            base, burst, length = (values[f"{name}{suffix}"] or 0 for suffix in ("", "_max", "_max_length"))
            if burst and not base:
                raise InvalidArgument(f"value '{name}_max' cannot be set if '{name}' is not set")
            if burst and burst < base:
                raise InvalidArgument(f"value '{name}_max' cannot be smaller than '{name}'")
            if length and not burst:
                raise InvalidArgument(f"value '{name}_max_length' cannot be set if '{name}_max' is not set")
    return IoTune(**{field: value or None for field, value in values.items()})


def _check(given: Mapping[str, int | str]) -> None:
    for name, value in given.items():
        if name == "group_name":
            if not isinstance(value, str) or not value or len(value.encode()) > GROUP_NAME_MAX:
                raise InvalidArgument(f"a group's name has 1 to {GROUP_NAME_MAX} bytes")
        elif not isinstance(value, int) or value > LIMIT_MAX:
            raise OperationUnsupported(f"block I/O throttle limit value must be no more than {LIMIT_MAX}")


def _apply(document: Domain, name: str, given: Mapping[str, int | str]) -> list[Disk]:
    """Writes the limits into the document; the disk, and those that share its group. A disk that joins a group and
    says nothing else takes what that has."""
    disk = find_disk(document, name)
    old = disk.iotune or IoTune()
    group = given.get("group_name") or old.group_name
    sharing = list(_group(document, group, disk)) if group else []
    if sharing and group != old.group_name:
        old = sharing[0].iotune or old
    tune = _changed(old, given)
    for each in (disk, *sharing):
        each.iotune = msgspec.structs.replace(tune)
    return [disk, *sharing]


def _group(document: Domain, group: int | str, besides: Disk) -> Iterator[Disk]:
    for disk in document.devices.disks:
        if disk is not besides and disk.iotune is not None and disk.iotune.group_name == group:
            yield disk


async def set_limits(domain: DomainObject, name: str, given: Mapping[str, int | str], flags: int) -> None:
    """Raises `InvalidArgument`, `OperationUnsupported`, `ConfigUnsupported` for what the VMM does not do."""
    _check(given)
    impact = domain.impact(flags)

    async def live() -> None:
        machine, run = domain.require_machine(), domain.run
        assert run is not None
        trial = run.live.copy()
        changed = _apply(trial, name, given)
        await domain.driver.validate(trial)
        for disk in changed:
            await machine.set_limits(disk)
        for disk in changed:
            find_disk(run.live, disk.target.dev or "").iotune = disk.iotune
        domain.live_changed()
        told = {f"blkdeviotune.{field}": value for field, value in given.items()}
        domain.emit("tunable", params={"blkdeviotune.disk": changed[0].target.dev or "", **told})
        await domain.save_status()

    if not impact & CONFIG:
        await live()
        return
    async with domain.manager.editing(domain) as document:
        _apply(document, name, given)
        if impact & LIVE:
            await live()
