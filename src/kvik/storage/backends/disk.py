"""Pools of type disk: a whole device with a partition table; each partition is a volume.

The table is read and written by sfdisk, which answers in JSON; the kernel is told of each change by itself, so that
partitions that are in use stay as they are. The kernel chooses a partition's name, so a new volume must be called what
its partition will be.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, ClassVar

from kvik.conf.storage_pool import FreeExtent, bytes_of
from kvik.conf.storage_volume import PARTITION_FORMATS, StorageVolume
from kvik.errors import (
    ConfigUnsupported,
    HostError,
    InvalidArgument,
    OperationFailed,
    OperationInvalid,
    ResourceBusy,
    StorageProbeFailed,
)
from kvik.host import partitions
from kvik.named import NamedTuple
from kvik.storage.backend import Contents
from kvik.storage.devices import DeviceBackend, add_extent, device_volume, open_device, settle
from kvik.storage.directory import leave_out
from kvik.storage.signatures import check_empty, check_free
from kvik.storage.tool import call, missing, number, read_json

__all__ = ["Backend"]

LABELS = {"unknown": "dos", "dos": "dos", "gpt": "gpt", "sun": "sun", "dvh": "sgi"}  # what sfdisk can make
SFDISK = ("sfdisk", "--quiet", "--no-reread", "--no-tell-kernel")
ALIGNMENT = 1 << 20  # bytes, as every tool does it today
LINUX = "0FC63DAF-8483-4772-8E79-3D69D8477DE4"
BASIC_DATA = "EBD0A0A2-B9E5-4433-87C0-68B6B72699C7"
# Partition types: UEFI 2.10, 5.3.3, and the Discoverable Partitions Specification; MBR's numbers are of 1983 and later.
GPT_TYPES = {
    "none": LINUX, "linux": LINUX, "fat16": BASIC_DATA, "fat32": BASIC_DATA,
    "linux-swap": "0657FD6D-A4AB-43C4-84E5-0933C84B4F4F", "linux-lvm": "E6D6D379-F507-44C2-A23C-238F2A3DF928",
    "linux-raid": "A19D880F-05FC-4D3B-A006-743F0F84911E",
}  # fmt: skip
DOS_TYPES = {
    "none": "83", "linux": "83", "fat16": "6", "fat32": "c", "linux-swap": "82", "linux-lvm": "8e", "linux-raid": "fd",
    "extended": "5",
}  # fmt: skip
DOS_SHOWN = {
    "83": "linux", "82": "linux-swap", "8e": "linux-lvm", "fd": "linux-raid", "6": "fat16", "e": "fat16", "b": "fat32",
    "c": "fat32", "5": "extended", "f": "extended", "85": "extended",
}  # fmt: skip
PRIMARY_MAX = 4  # of a table of type dos; numbers above are logical partitions


class Partition(NamedTuple):
    """`start` and `size` in bytes."""

    number: int
    path: str
    start: int
    size: int
    type: str

    @property
    def end(self) -> int:
        return self.start + self.size


class Table(NamedTuple):
    """`first` and `end`: what partitions can be made of, in bytes."""

    label: str
    sector: int
    first: int
    end: int
    parts: list[Partition]

    @property
    def extended(self) -> Partition | None:
        return next((part for part in self.parts if self.shown(part) == "extended"), None)

    def shown(self, part: Partition) -> str:
        """The format of the volume that a partition is."""
        if self.label == "gpt":
            return next(
                (name for name, kind in GPT_TYPES.items() if kind == part.type.upper() and name != "none"), "none"
            )
        return DOS_SHOWN.get(part.type.lower(), "none")

    def is_logical(self, part: Partition) -> bool:
        return self.label == "dos" and part.number > PRIMARY_MAX

    def free(self, *, logical: bool = False) -> Iterator[tuple[int, int]]:
        """(first byte, end) of what no partition takes; `logical`: inside the extended one."""
        start, end = self.first, self.end
        if logical:
            if self.extended is None:
                return
            start, end = self.extended.start, self.extended.end
        taken = sorted((part.start, part.end) for part in self.parts if self.is_logical(part) == logical)
        for low, high in taken:
            if low > start:
                yield start, low
            start = max(start, high)
        if end > start:
            yield start, end


class Backend(DeviceBackend):
    type = "disk"
    formats: ClassVar[tuple[str, ...]] = PARTITION_FORMATS
    default_format = "none"
    names_formats = True

    @property
    def device(self) -> str:
        return self.document.origin.device

    # the pool

    def check(self) -> bool:
        try:
            return self.table() is not None
        except HostError:
            return False

    def start(self) -> None:
        """libvirt's words: a device without its table is to be built first."""
        table = self.table()
        wanted = LABELS.get(self.document.format, self.document.format)
        if table is None:
            raise StorageProbeFailed(
                f"Storage pool probe failed: Device '{self.device}' is unrecognized, requires build",
                remedy=f"kvik pool-build {self.name}",
            )
        if self.document.format != "unknown" and table.label != wanted:
            raise StorageProbeFailed(
                f"Storage pool probe failed: Device '{self.device}' has a partition table of type "
                f"'{table.label}', not '{wanted}'",
                remedy="change the pool's format, or build it anew: all that it holds is lost",
            )

    def table(self) -> Table | None:
        """None: it has no partition table. HostError: there is no such device."""
        os.close(open_device(self.device))
        done = call(["sfdisk", "--json", "--", self.device], check=False)
        if done.code != 0 and b"does not contain a recognized partition table" in done.err:
            return None
        answer = read_json(done).get("partitiontable")
        return self._table(answer) if isinstance(answer, dict) else None

    def _table(self, answer: dict[str, Any]) -> Table:
        sector = number(answer.get("sectorsize")) or 512
        parts = []
        for each in answer.get("partitions", []):
            path = str(each.get("node"))
            digits = path[len(path.rstrip("0123456789")) :]
            if digits:
                start, size = number(each.get("start")) * sector, number(each.get("size")) * sector
                parts.append(Partition(int(digits), path, start, size, str(each.get("type"))))
        fd = open_device(self.device)
        try:
            size = os.lseek(fd, 0, os.SEEK_END)
        finally:
            os.close(fd)
        first = number(answer.get("firstlba")) * sector or ALIGNMENT
        end = (number(answer.get("lastlba")) + 1) * sector if answer.get("lastlba") else size
        return Table(str(answer.get("label")), sector, first, min(end, size), parts)

    def build(self, *, overwrite: bool = False, no_overwrite: bool = False) -> None:
        """A new, empty partition table. Nothing is overwritten without `overwrite`, as in libvirt."""
        label = LABELS.get(self.document.format)
        if label is None:
            raise ConfigUnsupported(
                f"a partition table of format {self.document.format} cannot be made here",
                path="/pool/source/format/@type",
                remedy=f"known are {', '.join(LABELS)}",
            )
        check_free(self.device)
        if not overwrite:
            check_empty(self.device)
        table = self.table()
        self._forget(table.parts if table is not None else [])
        self._write(["--wipe", "always", "--wipe-partitions", "never"], f"label: {label}\n")

    def _forget(self, parts: list[Partition]) -> None:
        """The kernel's partitions of a table that goes. ResourceBusy if one is in use: then all are there again."""
        gone: list[Partition] = []
        for part in parts:
            try:
                partitions.remove(self.device, part.number)
                gone.append(part)
            except HostError as error:
                if error.errno == 6:  # ENXIO: the kernel does not know it
                    continue
                for each in gone:
                    partitions.add(self.device, each.number, each.start, each.size)
                raise ResourceBusy(f"partition {part.path} is in use", remedy="see who uses it: lsblk") from error

    def _write(self, options: list[str], script: str) -> None:
        """sfdisk changes the table only; the kernel is told of single partitions by us."""
        call([*SFDISK, *options, "--", self.device], input=script.encode())

    def _take_out(self, index: int) -> None:
        call([*SFDISK, "--delete", "--", self.device, str(index)])

    def delete(self) -> None:
        """Only a device without partitions loses its table: what somebody keeps there is not ours to lose."""
        table = self.table()
        if table is None:
            return
        if table.parts:
            raise OperationInvalid(
                f"device '{self.device}' has {len(table.parts)} partitions", remedy="delete those volumes first"
            )
        check_free(self.device)
        call(["wipefs", "--all", "--quiet", "--", self.device])

    def refresh(self) -> Contents:
        table = self.table()
        if table is None:
            raise HostError(f"device '{self.device}' has no partition table any more")
        contents = Contents()
        device = self.document.origin.devices[0]
        device.free_extents = [FreeExtent(start=start, end=end) for start, end in self._all_free(table)]
        contents.capacity = table.end
        contents.available = sum(each.end - each.start for each in device.free_extents)
        for part in table.parts:
            name = part.path.rpartition("/")[2]
            try:
                kind = table.shown(part)
                volume = device_volume(name, part.path, size=part.size, format_=kind, sealable=kind != "extended")
                add_extent(volume, self.device, part.start, part.end)
            except HostError as error:
                leave_out(contents, name, error.message)
                continue
            if volume.format == "extended":
                inside = sum(each.size for each in table.parts if table.is_logical(each))
                volume.allocation = bytes_of(inside)
            elif not table.is_logical(part):
                contents.allocation += part.size
            contents.volumes[name] = volume
        if table.extended is not None:
            contents.allocation += sum(each.size for each in table.parts if table.is_logical(each))
        return contents

    def _all_free(self, table: Table) -> Iterator[tuple[int, int]]:
        for logical in (False, True):
            for start, end in table.free(logical=logical):
                start = -(-start // ALIGNMENT) * ALIGNMENT
                if end - start >= ALIGNMENT:
                    yield start, end

    # volumes

    def make_device(self, document: StorageVolume) -> StorageVolume:
        table = self.table()
        if table is None:
            raise HostError(f"device '{self.device}' has no partition table any more")
        kind = document.format if document.target is not None and document.target.format is not None else "none"
        types = {"gpt": GPT_TYPES, "dos": DOS_TYPES}.get(table.label, {})
        if kind not in types:
            raise ConfigUnsupported(
                f"a partition table of type {table.label} has no partitions of format {kind}",
                path="/volume/target/format/@type",
            )
        if kind == "extended" and table.extended is not None:
            raise OperationInvalid(f"device '{self.device}' has an extended partition already")
        used = {part.number for part in table.parts}
        primaries = range(1, PRIMARY_MAX + 1) if table.label == "dos" else range(1, 129)
        index = next((each for each in primaries if each not in used), 0)
        logical = index == 0 and table.extended is not None and kind != "extended"
        if logical:
            index = max([PRIMARY_MAX, *used]) + 1
        if not index:
            raise OperationFailed(
                f"device '{self.device}' has no place for another partition", remedy="make an extended one, or use gpt"
            )
        path = partitions.partition_path(self.device, index)
        if document.name != path.rpartition("/")[2]:
            raise InvalidArgument(f"invalid partition name '{document.name}', expected '{path.rpartition('/')[2]}'")
        size = -(-document.size // table.sector) * table.sector
        start = self._room(table, size, logical=logical)
        words = f"start={start // table.sector}, size={size // table.sector}, type={types[kind]}\n"
        if not logical:
            words = f"{index}: {words}"
        self._write(["--append", "--wipe-partitions", "always"], words)
        try:
            # An extended partition shows its first two sectors only: what is in it has devices of its own.
            shown = 2 * table.sector if kind == "extended" else size
            partitions.add(self.device, index, start, shown)
            settle()
            return self.look_at(StorageVolume(type="block", name=document.name))
        except BaseException:
            with suppress(HostError):
                partitions.remove(self.device, index)
            self._take_out(index)
            raise

    def _room(self, table: Table, size: int, *, logical: bool) -> int:
        """Where a partition of so many bytes fits best, aligned. A logical one has its own table before it."""
        fitting = []
        for start, end in table.free(logical=logical):
            aligned = -(-(start + (table.sector if logical else 0)) // ALIGNMENT) * ALIGNMENT
            if end - aligned >= size:
                fitting.append((end - aligned, aligned))
        if not fitting:
            raise OperationFailed(
                f"no large enough free extent for {size} bytes on device '{self.device}'",
                remedy=f"see what is free: kvik pool-dumpxml {self.name}",
            )
        return min(fitting)[1]

    def delete_volume(self, volume: StorageVolume) -> None:
        table = self.table()
        part = next((each for each in table.parts if each.path == volume.path), None) if table is not None else None
        if table is None or part is None:
            raise HostError(f"partition {volume.path} is gone", errno=2)
        if table.shown(part) == "extended" and any(table.is_logical(each) for each in table.parts):
            raise OperationInvalid(f"partition {part.path} holds others", remedy="delete those first")
        if table.is_logical(part) and any(each.number > part.number for each in table.parts):
            raise OperationInvalid(
                f"partition {part.path} is not the last of the logical ones, which would get other names",
                remedy="delete the later ones first",
            )
        self._forget([part])
        try:
            self._take_out(part.number)
        except BaseException:
            partitions.add(self.device, part.number, part.start, part.size)
            raise
        settle()

    @classmethod
    def missing(cls) -> str:
        return missing("sfdisk")
