"""Pools of type zfs: volumes (zvols) of a ZFS pool or of a data set in it, by zfs and zpool in their form for scripts:
no heading, a tab between fields, exact numbers (zfs(8), "-H -p").
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from kvik.conf.storage_pool import bytes_of
from kvik.conf.storage_volume import StorageVolume
from kvik.errors import ConfigError, HostError, OperationInvalid, ResourceBusy, StorageVolumeExists
from kvik.storage.backend import VOLUMES_MAX, Contents
from kvik.storage.devices import DeviceBackend, device_volume, header_of, settle
from kvik.storage.directory import leave_out
from kvik.storage.signatures import check_empty, check_free
from kvik.storage.tool import call, missing, number

__all__ = ["Backend"]

DEADLINE = 120.0  # seconds
SETTLING = 10.0  # seconds
BLOCK = 16384  # bytes: a zvol's size is a multiple of its block size (volblocksize), which is 8 KiB or 16 KiB
SIGNS = frozenset("_-.: ")  # what a component may hold beside letters and digits (zfs(8), "ZFS File System Hierarchy")


class Backend(DeviceBackend):
    type = "zfs"
    takes_room = True

    @property
    def group(self) -> str:
        return self.document.origin.name or self.name

    @staticmethod
    def _rows(*argv: str) -> Iterator[list[str]]:
        for line in call(list(argv), timeout=DEADLINE).text.splitlines():
            yield line.split("\t")

    def check(self) -> bool:
        return call(["zfs", "list", "-H", "-o", "name", "--", self.group], timeout=DEADLINE, check=False).code == 0

    def start(self) -> None:
        if not self.check():
            raise HostError(f"there is no ZFS pool '{self.group}'", errno=2, remedy=f"kvik pool-build {self.name}")

    def build(self, *, overwrite: bool = False, no_overwrite: bool = False) -> None:
        devices = [device.path for device in self.document.origin.devices]
        if not devices or "/" in self.group:
            raise ConfigError("a ZFS pool is built of devices: none is named", path="/pool/source")
        for device in devices:
            check_free(device)
            if not overwrite:
                check_empty(device)
        call(["zpool", "create", *(["-f"] if overwrite else []), "--", self.group, *devices], timeout=DEADLINE)

    def delete(self) -> None:
        """Only a pool that holds nothing."""
        held = [row[0] for row in self._rows("zfs", "list", "-H", "-r", "-o", "name", "--", self.group)]
        if len(held) > 1:
            raise OperationInvalid(f"ZFS pool '{self.group}' holds '{held[1]}'", remedy="delete that first")
        call(["zpool", "destroy", "--", self.group], timeout=DEADLINE)

    def refresh(self) -> Contents:
        contents = Contents()
        fields = "name,volsize,refreservation,used"
        for row in self._rows("zfs", "list", "-H", "-p", "-d", "1", "-t", "volume", "-o", fields, "--", self.group):
            if len(row) != 4 or not row[0].startswith(f"{self.group}/"):
                continue
            name = row[0].rpartition("/")[2]
            if len(contents.volumes) >= VOLUMES_MAX:
                leave_out(contents, name, f"a pool shows {VOLUMES_MAX} volumes at most")
                continue
            try:
                volume = device_volume(name, f"{self.document.path}/{name}", size=number(row[1]), sealable=True)
            except HostError as error:
                leave_out(contents, name, error.message)
                continue
            volume.key = row[0]
            volume.allocation = bytes_of(min(number(row[3]), volume.size) if number(row[2]) == 0 else volume.size)
            contents.volumes[name] = volume
        contents.capacity, contents.allocation, contents.available = self.measure()
        return contents

    def measure(self) -> tuple[int, int, int]:
        rows = [*self._rows("zfs", "list", "-H", "-p", "-o", "used,available", "--", self.group)]
        used, free = (number(value) for value in rows[0]) if rows and len(rows[0]) == 2 else (0, 0)
        return used + free, used, free

    def make_device(self, document: StorageVolume) -> StorageVolume:
        name = document.name
        if not all(sign.isascii() and (sign.isalnum() or sign in SIGNS) for sign in name):
            raise ConfigError(f"{name!r} is not the name of a ZFS volume", path="/volume/name")
        if any(row[0] == f"{self.group}/{name}" for row in self._rows("zfs", "list", "-H", "-o", "name")):
            raise StorageVolumeExists(f"storage volume '{name}' exists already")
        sparse = ["-s"] if document.allocated < document.size else []
        size = -(-document.size // BLOCK) * BLOCK
        call(["zfs", "create", *sparse, "-V", str(size), "--", f"{self.group}/{name}"], timeout=DEADLINE)
        self._wait_for(name)
        return self.look_at(document)

    def _wait_for(self, name: str) -> None:
        """ZFS makes a volume's device, and udev its name, some time after it said that the volume is there."""
        path, end = Path(f"{self.document.path}/{name}"), time.monotonic() + SETTLING
        settle()
        while not path.exists() and time.monotonic() < end:
            time.sleep(0.05)
            settle()

    def delete_volume(self, volume: StorageVolume) -> None:
        done = call(["zfs", "destroy", "--", f"{self.group}/{volume.name}"], timeout=DEADLINE, check=False)
        if done.code != 0:
            if "has children" in done.message or "has dependent clones" in done.message:
                raise OperationInvalid(
                    f"volume '{volume.name}' has snapshots: {done.message}", remedy="remove them first: zfs destroy"
                )
            kind = ResourceBusy if "busy" in done.message else HostError
            raise kind(f"volume '{volume.name}' was not deleted: {done.message}")
        settle()

    def resize_volume(self, volume: StorageVolume, capacity: int, *, allocate: bool = False) -> None:
        name = f"{self.group}/{volume.name}"
        rows = [*self._rows("zfs", "get", "-H", "-p", "-o", "value", "volblocksize", name)]
        block = number(rows[0][0]) if rows else 0
        if not block:
            raise HostError(f"ZFS does not tell the block size of volume '{name}'")
        size = -(-(capacity + header_of(volume)) // block) * block
        call(["zfs", "set", f"volsize={size}", name], timeout=DEADLINE)

    @classmethod
    def missing(cls) -> str:
        return missing("zfs", "zpool")
