"""Volumes that are block devices: what the pool types logical, disk, iscsi, scsi, mpath and zfs share."""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

from kvik.conf.storage_pool import bytes_of
from kvik.conf.storage_volume import (
    Encryption,
    ExtentDevice,
    SourceExtent,
    StorageVolume,
    VolumeFormat,
    VolumeSource,
    VolumeTarget,
)
from kvik.errors import ConfigUnsupported, HostError, NoStorageVolume, ResourceBusy
from kvik.host.files import host_error
from kvik.host.process import find_program
from kvik.image.base import Image
from kvik.image.convert import convert
from kvik.image.raw import RawImage
from kvik.storage import encryption, sparse
from kvik.storage.backend import Backend
from kvik.storage.directory import permissions_of
from kvik.storage.formats import is_luks
from kvik.storage.tool import call

__all__ = ["DeviceBackend", "device_volume", "header_of", "open_device", "settle"]

UDEV = Path("/run/udev/control")
SETTLING = 30.0  # seconds: udevadm settle's own deadline is longer
LUKS_ROOM = 2 << 20  # bytes that QEMU's LUKS header and its keys take at most


def settle() -> None:
    """Wait until udev, where there is one, has made the names of new devices."""
    if UDEV.exists() and find_program("udevadm"):
        call(["udevadm", "settle", f"--timeout={SETTLING:g}"], timeout=SETTLING + 5, check=False)


def open_device(path: str, *, writable: bool = False) -> int:
    """A descriptor of a block device, and of nothing else. HostError; ResourceBusy if it is to be written to and the
    host itself uses it: mounted, part of another device."""
    flags = (os.O_RDWR | os.O_EXCL) if writable else os.O_RDONLY
    try:
        fd = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise ResourceBusy(f"device {path} is in use on this host", remedy="see what is on it: lsblk") from error
        raise host_error("open", path, error) from error
    if not stat.S_ISBLK(os.fstat(fd).st_mode):
        os.close(fd)
        raise HostError(f"{path} is not a block device", errno=errno.ENOTBLK)
    os.set_blocking(fd, True)
    return fd


def device_volume(
    name: str, path: str, *, key: str = "", size: int | None = None, format_: str = "raw", sealable: bool = False
) -> StorageVolume:
    """The volume that a device is. `size` in bytes where a tool said it; else the device is asked. `sealable`: of a
    pool whose volumes may be encrypted, which their first bytes tell. HostError."""
    try:
        info = os.stat(path)  # noqa: PTH116
        if not stat.S_ISBLK(info.st_mode):
            raise HostError(f"{path} is not a block device", errno=errno.ENOTBLK)
        if size is None:
            fd = open_device(path)
            try:
                size = sparse.size_of(fd)
            finally:
                os.close(fd)
    except OSError as error:
        raise host_error("look at", path, error) from error
    volume = StorageVolume(type="block", name=name, key=key or path)
    volume.capacity, volume.allocation, volume.physical = bytes_of(size), bytes_of(size), bytes_of(size)
    volume.target = VolumeTarget(path=path, format=VolumeFormat(type=format_), permissions=permissions_of(info))
    if sealable:
        _see_encryption(volume, size)
    return volume


def _see_encryption(volume: StorageVolume, size: int) -> None:
    """A machine sees what lies behind the header. A device that cannot be read now is shown as it is."""
    with suppress(OSError, HostError):
        fd = open_device(volume.path)
        try:
            if is_luks(fd) and volume.target is not None:
                volume.target.encryption = Encryption(format="luks")
                volume.capacity = bytes_of(max(0, size - encryption.payload_offset(fd)))
        finally:
            os.close(fd)


def add_extent(volume: StorageVolume, device: str, start: int, end: int) -> None:
    """The volume lies on the bytes from `start` to `end` of `device`, among others."""
    source = volume.source = volume.source or VolumeSource()
    same = next((each for each in source.devices if each.path == device), None)
    if same is None:
        same = ExtentDevice(path=device)
        source.devices.append(same)
    same.extents.append(SourceExtent(start=start, end=end))


class DeviceBackend(Backend):
    """A type finds its volumes (`refresh`) and, where it can, makes them; reading and writing is the same for all."""

    formats: ClassVar[tuple[str, ...]] = ("raw",)
    names_formats: ClassVar[bool] = False

    def open_volume(self, volume: StorageVolume, *, writable: bool = False) -> int:
        return open_device(volume.path, writable=writable)

    def look_at(self, volume: StorageVolume) -> StorageVolume:
        try:
            return self.refresh().volumes[volume.name]
        except KeyError:
            raise NoStorageVolume(f"volume '{volume.name}' of pool '{self.name}' is gone") from None

    def create_volume(self, document: StorageVolume, *, preallocate_metadata: bool = False) -> StorageVolume:
        """An encrypted one is larger than what a machine sees of it, by its header."""
        self.plain(document)
        if encryption.encryption_of(document) is None:
            return self.make_device(document)
        within = as_raw(document)
        encryption.check_encryption(within)
        made = self.make_device(_larger(document, document.size + LUKS_ROOM))
        try:
            with self.opened(made, writable=True) as fd:
                encryption.create(fd, within, self.secret)
        except BaseException:
            self.delete_volume(made)
            raise
        return self.look_at(made)

    def make_device(self, document: StorageVolume) -> StorageVolume:
        """A new one with at least `document.size` bytes. StorageVolumeExists if the name is taken."""
        self.refuse("creating volumes")

    def copy_volume(self, document: StorageVolume, source: int, *, reflink: bool = False) -> StorageVolume:
        """A new device as large as asked for, with all bytes: where the source has holes, what the device held before
        is overwritten."""
        if reflink:
            self.refuse("copies that share their blocks")
        self.plain(document)
        size = sparse.size_of(source)  # of an encrypted one more than its machine sees
        made = self.make_device(_larger(document, max(size, document.size + encryption.payload_offset(source))))
        try:
            fd = self.open_volume(made, writable=True)
            try:
                copy_all(source, fd, min(size, sparse.size_of(fd)))
                os.fsync(fd)
            finally:
                os.close(fd)
        except OSError as error:
            self.delete_volume(made)
            raise host_error("copy to", made.path, error) from error
        except BaseException:
            self.delete_volume(made)
            raise
        return self.look_at(made)

    def convert_volume(
        self,
        document: StorageVolume,
        source: Image,
        locked: Encryption | None = None,
        *,
        preallocate_metadata: bool = False,
    ) -> StorageVolume:
        made = self.create_volume(document)
        try:
            with self.opened(made, writable=True) as fd:
                if encryption.encryption_of(document) is not None:
                    encryption.fill(fd, as_raw(document), self.secret, source, locked)
                else:
                    with RawImage(os.dup(fd), made.path, writable=True) as target:
                        convert(source, target)
                        target.flush()
        except BaseException:
            self.delete_volume(made)
            raise
        return self.look_at(made)

    def plain(self, document: StorageVolume) -> None:
        """ConfigUnsupported if the document wants more than a device has."""
        target = document.target
        if target is not None and target.format is not None and target.format.type not in self.formats:
            raise ConfigUnsupported(
                f"a volume of pool '{self.name}' has no format {document.format}", path="/volume/target/format/@type"
            )


def header_of(volume: StorageVolume) -> int:
    """Bytes of a device that its machine does not see: the header of an encrypted one."""
    return volume.physical.value - volume.size if volume.physical is not None else 0


def as_raw(document: StorageVolume) -> StorageVolume:
    """For what cares for the volume's bytes: a partition's format is what its table says of it."""
    made = document.copy()
    if made.target is not None:
        made.target.format = VolumeFormat(type="raw")
    return made


def _larger(document: StorageVolume, size: int) -> StorageVolume:
    """The same with room for more; taken as a whole where that was asked for."""
    made = document.copy()
    made.capacity = bytes_of(size)
    if document.allocated >= document.size:
        made.allocation = bytes_of(size)
    return made


def copy_all(source: int, target: int, size: int) -> None:
    """The first `size` bytes, holes as zeros."""
    for offset, length, is_data in sparse.extents(source, 0, size):
        if is_data:
            sparse.copy_range(source, target, offset, length)
        else:
            sparse.punch(target, offset, length, growing=False)
