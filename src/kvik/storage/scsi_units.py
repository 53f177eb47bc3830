"""Logical units of SCSI hosts, as sysfs shows them: what the pool types scsi and iscsi list."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from kvik.errors import HostError
from kvik.host.files import host_error, try_read_file
from kvik.named import NamedTuple
from kvik.storage.backend import VOLUMES_MAX, Contents
from kvik.storage.devices import device_volume, settle
from kvik.storage.directory import leave_out

__all__ = ["Unit", "attribute", "fill", "names_in", "scan", "units"]

DISK = "0"  # SPC-4 table 138: a direct access block device
APPEARING = 5.0  # seconds until a unit's device is there: the kernel looks at its size first
LINKS_MAX = 65536
_ADDRESS = re.compile(r"(\d+):(\d+):(\d+):(\d+)")


class Unit(NamedTuple):
    """`device`: its name below /dev, "" while there is none; `wwid`: what tells it from all others."""

    bus: int
    target: int
    lun: int
    device: str
    wwid: str

    @property
    def name(self) -> str:
        return f"unit:{self.bus}:{self.target}:{self.lun}"


def attribute(path: Path) -> str:
    """What a file of sysfs says, without its end of line; "" if it is not there or says nothing."""
    with suppress(HostError):
        return (try_read_file(path, limit=4096) or b"").decode(errors="replace").strip()
    return ""


def names_in(directory: Path) -> list[str]:
    """In order; none if there is no such directory."""
    try:
        return sorted(path.name for path in directory.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def units(host: int, sysfs: Path) -> list[Unit]:
    """The disks of one SCSI host, by their addresses."""
    found = []
    devices = sysfs / "bus/scsi/devices"
    for name in names_in(devices):
        match = _ADDRESS.fullmatch(name)
        if match is None or int(match[1]) != host or attribute(devices / name / "type") != DISK:
            continue
        blocks = names_in(devices / name / "block")
        wwid = attribute(devices / name / "wwid")
        found.append(Unit(int(match[2]), int(match[3]), int(match[4]), blocks[0] if blocks else "", wwid))
    return sorted(found)


def scan(host: int, sysfs: Path) -> None:
    """Have the kernel look for units, and wait until their devices are there. HostError if there is no such host."""
    path = sysfs / f"class/scsi_host/host{host}/scan"
    try:
        path.write_text("- - -")
    except OSError as error:
        raise HostError(
            f"Could not open '{path}' to trigger host scan: {error.strerror}", errno=error.errno or 0
        ) from error
    deadline = time.monotonic() + APPEARING
    while any(not unit.device for unit in units(host, sysfs)) and time.monotonic() < deadline:
        time.sleep(0.02)
    settle()


def fill(contents: Contents, host: int, sysfs: Path, directory: str) -> None:
    """Each unit becomes a volume, named by a link of `directory` where one leads to it."""
    links = dict(_links(directory))
    for unit in units(host, sysfs):
        if not unit.device:
            leave_out(contents, unit.name, "it has no device yet")
            continue
        if len(contents.volumes) >= VOLUMES_MAX:
            leave_out(contents, unit.name, f"a pool shows {VOLUMES_MAX} volumes at most")
            continue
        node = f"/dev/{unit.device}"
        try:
            volume = device_volume(unit.name, links.get(node, node), key=unit.wwid)
        except HostError as error:
            leave_out(contents, unit.name, error.message)
            continue
        contents.volumes[unit.name] = volume
        contents.capacity += volume.size
        contents.allocation += volume.size


def _links(directory: str) -> Iterator[tuple[str, str]]:
    """(device, link to it) of a directory of stable names such as /dev/disk/by-path."""
    try:
        if Path(directory).resolve() == Path("/dev") or not directory.startswith("/dev/"):
            return
        with os.scandir(directory) as entries:
            for number, entry in enumerate(entries):
                if number >= LINKS_MAX:
                    return
                if entry.is_symlink():
                    yield str(Path(entry.path).resolve()), entry.path
    except FileNotFoundError:
        return
    except OSError as error:
        raise host_error("list", directory, error) from error
