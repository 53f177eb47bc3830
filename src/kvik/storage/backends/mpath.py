"""Pools of type mpath: all multipath maps of this host, as the device mapper shows them in sysfs."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from kvik.errors import HostError
from kvik.storage.backend import Contents
from kvik.storage.devices import DeviceBackend, device_volume
from kvik.storage.directory import leave_out
from kvik.storage.scsi_units import attribute, names_in

__all__ = ["Backend"]

PREFIX = "mpath-"  # of the uuid that multipathd gives its maps


class Backend(DeviceBackend):
    type = "mpath"
    sysfs: ClassVar[Path] = Path("/sys")
    devices: ClassVar[Path] = Path("/dev")

    def check(self) -> bool:
        return True

    def refresh(self) -> Contents:
        contents = Contents()
        blocks = self.sysfs / "block"
        for name in names_in(blocks):
            uuid = attribute(blocks / name / "dm/uuid")
            if not name.startswith("dm-") or not uuid.startswith(PREFIX):
                continue
            alias = attribute(blocks / name / "dm/name") or name
            node = self.devices / "mapper" / alias
            try:
                path = str(node if node.exists() else self.devices / name)
                volume = device_volume(name, path, key=uuid.removeprefix(PREFIX))
            except HostError as error:
                leave_out(contents, name, error.message)
                continue
            contents.volumes[name] = volume
            contents.capacity += volume.size
            contents.allocation += volume.size
        return contents
