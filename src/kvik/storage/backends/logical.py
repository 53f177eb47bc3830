"""Pools of type logical: a volume group of LVM. Its tools are told to answer in JSON, sizes in bytes.

A volume whose allocation is less than its capacity is made in the group's thin pool if it has one, else in full. A
group that is built with <features><cow state='yes'/></features> is one thin pool, and all its volumes are thin.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvik.conf.storage_pool import PoolSource, SourceDevice, SourceFormat, bytes_of
from kvik.conf.storage_volume import BackingStore, StorageVolume
from kvik.errors import ConfigError, ConfigUnsupported, HostError, OperationInvalid, ResourceBusy, StorageVolumeExists
from kvik.host.files import host_error
from kvik.storage.backend import VOLUMES_MAX, Contents
from kvik.storage.devices import UDEV, DeviceBackend, add_extent, device_volume, header_of, settle
from kvik.storage.directory import leave_out
from kvik.storage.signatures import check_empty, check_free
from kvik.storage.tool import call, call_json, missing, number

__all__ = ["Backend"]

BYTES = ("--reportformat", "json", "--units", "b", "--nosuffix")
FIELDS = (
    "lv_name,lv_uuid,lv_size,lv_attr,lv_path,origin,pool_lv,segtype,data_percent,lv_role,seg_size,"
    "seg_pe_ranges,devices,vg_extent_size"
)
NEW_THIN_POOL = "kvik-thin"
DEADLINE = 120.0  # seconds: LVM waits for its own locks
MIB = 1 << 20
# Names that LVM keeps for itself (lvm(8), "Reserved names").
RESERVED = ("_cdata", "_cmeta", "_corig", "_mimage", "_mlog", "_pmspare", "_rimage", "_rmeta", "_tdata", "_tmeta",
            "_vdata", "_vorigin")  # fmt: skip


def environment() -> dict[str, str]:
    """Without udev nobody else makes the names of devices: LVM shall not wait for it."""
    return {} if UDEV.exists() else {"DM_DISABLE_UDEV": "1"}


def report(argv: list[str], kind: str) -> list[dict[str, Any]]:
    """The rows of one LVM report. HostError."""
    answer = call_json(argv, env=environment(), timeout=DEADLINE)
    found: list[dict[str, Any]] = []
    for each in answer.get("report", []) if isinstance(answer, dict) else []:
        found += [row for row in each.get(kind, []) if isinstance(row, dict)]
    return found


class Backend(DeviceBackend):
    type = "logical"

    @property
    def group(self) -> str:
        return self.document.origin.name or self.name

    # the pool

    def check(self) -> bool:
        """A group without volumes is as active as it can be."""
        rows = self._rows("lvs", "lv_name,lv_active")
        return any(row.get("lv_active") for row in rows) if rows else bool(self._rows("vgs", "vg_name"))

    def _rows(self, tool: str, fields: str) -> list[dict[str, Any]]:
        """What a report says of our group; nothing if there is none."""
        kind = {"vgs": "vg", "lvs": "lv", "pvs": "pv"}[tool]
        rows = report([tool, *BYTES, "--options", f"{fields},vg_name", *(["--all"] if tool == "lvs" else [])], kind)
        return [row for row in rows if row.get("vg_name") == self.group]

    def _one(self, name: str, fields: str) -> list[dict[str, Any]]:
        """What is reported of one volume, a row for each segment. HostError if it is not there."""
        return report(["lvs", *BYTES, "--options", fields, "--", f"{self.group}/{name}"], "lv")

    def start(self) -> None:
        if not self._rows("vgs", "vg_name"):
            raise ConfigUnsupported(
                f"cannot find logical volume group name '{self.group}'",
                remedy=f"build it: kvik pool-build {self.name}; what there is: vgs",
            )
        self._run("vgchange", "--activate", "y", "--", self.group)
        settle()

    def stop(self) -> None:
        if self._rows("vgs", "vg_name"):
            self._run("vgchange", "--activate", "n", "--", self.group)

    def _run(self, *argv: str) -> None:
        try:
            # Where nobody looks after daemons LVM shall start none: dmeventd would be ours.
            unwatched = [] if UDEV.exists() else ["--config", "activation/monitoring=0"]
            call([argv[0], *unwatched, *argv[1:]], env=environment(), timeout=DEADLINE)
        except HostError as error:
            if "already exists" in error.message:
                raise StorageVolumeExists(error.message) from error
            if "in use" in error.message or "open logical volume" in error.message:
                raise ResourceBusy(error.message, remedy=f"see who uses it: lsblk /dev/{self.group}/*") from error
            raise

    def build(self, *, overwrite: bool = False, no_overwrite: bool = False) -> None:
        """A new group of the source's devices. Nothing is overwritten without `overwrite`, as in libvirt."""
        devices = [device.path for device in self.document.origin.devices]
        if not devices:
            raise ConfigError("a volume group is built of devices: none is named", path="/pool/source")
        for device in devices:
            check_free(device)
            if not overwrite:
                check_empty(device)
        if overwrite:
            call(["wipefs", "--all", "--quiet", "--", *devices])
        self._run("vgcreate", "--yes", "--", self.group, *devices)
        if self._is_thin:
            argv = ["lvcreate", "--yes", "--type", "thin-pool", "--extents", "100%FREE", "--name", NEW_THIN_POOL]
            try:
                self._run(*argv, "--", self.group)
            except BaseException:
                self._run("vgremove", "--yes", "--", self.group)
                raise

    @property
    def _is_thin(self) -> bool:
        features = self.document.features
        return features is not None and features.cow is not None and features.cow.state

    def delete(self) -> None:
        """The group and its marks on the devices. One that holds volumes stays: they are somebody's."""
        holds = [str(row.get("lv_name")) for row in self._rows("lvs", "lv_name,segtype") if _is_shown(row)]
        if holds:
            raise OperationInvalid(
                f"volume group '{self.group}' holds {len(holds)} volumes, '{holds[0]}' among them",
                remedy="delete them first",
            )
        devices = [str(row["pv_name"]) for row in self._rows("pvs", "pv_name")]
        self._run("vgremove", "--yes", "--", self.group)
        if devices:
            self._run("pvremove", "--yes", "--", *devices)

    def refresh(self) -> Contents:
        contents = Contents()
        contents.capacity, contents.allocation, contents.available = self.measure()
        for row in self._rows("lvs", FIELDS):
            name = str(row.get("lv_name"))
            if not _is_shown(row):
                continue
            known = contents.volumes.get(name)
            try:
                if known is None:
                    if len(contents.volumes) >= VOLUMES_MAX:
                        leave_out(contents, name, f"a pool shows {VOLUMES_MAX} volumes at most")
                        continue
                    known = contents.volumes[name] = self._volume(name, row)
                for device, start, end in _extents(row):
                    add_extent(known, device, start, end)
            except HostError as error:
                leave_out(contents, name, error.message)
        return contents

    def measure(self) -> tuple[int, int, int]:
        rows = self._rows("vgs", "vg_size,vg_free")
        if not rows:
            raise HostError(f"volume group '{self.group}' is gone", errno=2)
        size, free = number(rows[0].get("vg_size")), number(rows[0].get("vg_free"))
        return size, size - free, free

    def look_at(self, volume: StorageVolume) -> StorageVolume:
        rows = self._one(volume.name, FIELDS)
        found = self._volume(volume.name, rows[0])
        for row in rows:
            for device, start, end in _extents(row):
                add_extent(found, device, start, end)
        return found

    def _volume(self, name: str, row: dict[str, Any]) -> StorageVolume:
        path = f"{self.document.path}/{name}"
        size = number(row.get("lv_size"))
        volume = device_volume(name, path, key=str(row.get("lv_uuid")), size=size, sealable=True)
        if row.get("segtype") == "thin":
            volume.allocation = bytes_of(size * number(float(row.get("data_percent") or 0) * 100) // 10000)
        if row.get("origin"):
            volume.backing_store = BackingStore(path=f"{self.document.path}/{row['origin']}")
        return volume

    # volumes

    def make_device(self, document: StorageVolume) -> StorageVolume:
        name = document.name
        if any(sign not in ALLOWED for sign in name) or any(part in name for part in RESERVED):
            raise ConfigError(
                f"{name!r} is not a name of a logical volume", path="/volume/name", remedy="letters, digits, . _ + -"
            )
        argv = ["lvcreate", "--yes", "--name", name, "--setactivationskip", "n", "--activate", "y"]
        size, thin = f"{document.size}b", ""
        if document.backing_store is not None:
            self._run(*argv, "--snapshot", *self._snapshot(document), "--", self._origin(document))
        elif (self._is_thin or document.allocated < document.size) and (thin := self._thin_pool()):
            self._run(*argv, "--type", "thin", "--virtualsize", size, "--thinpool", thin, "--", self.group)
        else:
            self._run(*argv, "--wipesignatures", "y", "--size", size, "--", self.group)
        settle()
        try:
            self._permit(document, f"{self.document.path}/{name}")
            return self.look_at(document)
        except BaseException:
            self.delete_volume(document)
            raise

    def _thin_pool(self) -> str:
        """The group's, or nothing."""
        rows = self._rows("lvs", "lv_name,segtype")
        return next((str(row["lv_name"]) for row in rows if row.get("segtype") == "thin-pool"), "")

    def _origin(self, document: StorageVolume) -> str:
        """What a snapshot is taken of: a volume of this group."""
        path = document.backing_store.path if document.backing_store is not None else ""
        group, _, name = path.removeprefix("/dev/").partition("/")
        if group != self.group or not name or "/" in name:
            raise ConfigUnsupported(f"{path} is no volume of group '{self.group}'", path="/volume/backingStore/path")
        return f"{group}/{name}"

    def _snapshot(self, document: StorageVolume) -> list[str]:
        """Of a thin volume it shares the blocks; any other needs room for what changes."""
        rows = self._one(self._origin(document).partition("/")[2], "segtype")
        if rows and rows[0].get("segtype") == "thin":
            return []
        return ["--size", f"{document.allocated or document.size}b"]

    def _permit(self, document: StorageVolume, path: str) -> None:
        """Owner and mode of the device, until the group is active anew."""
        wanted = document.target.permissions if document.target is not None else None
        if wanted is None:
            return
        try:
            if wanted.owner is not None or wanted.group is not None:
                owner = -1 if wanted.owner is None else wanted.owner
                os.chown(path, owner, -1 if wanted.group is None else wanted.group)
            if wanted.mode_bits is not None:
                Path(path).chmod(wanted.mode_bits)
        except OSError as error:
            raise host_error("set owner and mode of", path, error) from error

    def delete_volume(self, volume: StorageVolume) -> None:
        self._run("lvremove", "--yes", "--", f"{self.group}/{volume.name}")

    def resize_volume(self, volume: StorageVolume, capacity: int, *, allocate: bool = False) -> None:
        if capacity == volume.size:
            return
        tool = "lvextend" if capacity > volume.size else "lvreduce"
        forced = ["--force"] if tool == "lvreduce" else []
        size = f"{capacity + header_of(volume)}b"
        self._run(tool, "--yes", *forced, "--size", size, "--", f"{self.group}/{volume.name}")

    # finding

    @classmethod
    def find_sources(cls, source: PoolSource | None) -> list[PoolSource]:
        """All volume groups that have a device here."""
        found: dict[str, PoolSource] = {}
        for row in report(["pvs", *BYTES, "--options", "pv_name,vg_name"], "pv"):
            name = str(row.get("vg_name") or "")
            if name:
                group = found.setdefault(name, PoolSource(name=name, format=SourceFormat(type="lvm2")))
                group.devices.append(SourceDevice(path=str(row.get("pv_name"))))
        return [*found.values()]

    @classmethod
    def missing(cls) -> str:
        return missing("lvs")


ALLOWED = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._+-")


def _is_shown(row: dict[str, Any]) -> bool:
    """Pools of thin volumes, and what LVM keeps for itself (in brackets), are no volumes."""
    return row.get("segtype") != "thin-pool" and not str(row.get("lv_name")).startswith("[")


def _extents(row: dict[str, Any]) -> Iterator[tuple[str, int, int]]:
    """(device, first byte, end) of one segment: "/dev/sda1(0)" with the number of its first extent."""
    size = number(row.get("seg_size"))
    devices = [each for each in str(row.get("devices") or "").split(",") if each.startswith("/")]
    for each in devices:
        device, _, first = each.removesuffix(")").rpartition("(")
        start = number(first) * number(row.get("vg_extent_size"))
        yield device, start, start + size // len(devices)
