"""Volumes that are files of one directory: what the pool types dir, fs and netfs share.

Others may write to that directory. So a name is never followed (`host.beneath`), only regular files and directories
are volumes, and what else lies there is left out and said. A new volume is made under a hidden name and gets its own
in one step when it is complete: there is no half volume, neither after an error nor after a kill. A hidden file that
nobody holds a lock on is what a kill left, and goes at the next start of the pool.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kvik.conf.storage_pool import Permissions, bytes_of
from kvik.conf.storage_volume import (
    Encryption,
    StorageVolume,
    Timestamps,
    VolumeFormat,
    VolumeTarget,
    check_volume_name,
)
from kvik.errors import ConfigUnsupported, HostError, InvalidArgument, OperationInvalid, StorageVolumeExists
from kvik.host.beneath import Beneath, kind_of
from kvik.host.files import host_error
from kvik.host.filesystem import locks_stay_here, shared_as
from kvik.image.base import Image
from kvik.image.convert import convert
from kvik.image.resize import resize
from kvik.storage import encryption, qcow2, sparse
from kvik.storage.backend import VOLUMES_MAX, Backend, Contents
from kvik.storage.formats import is_luks, kind_of_image

__all__ = ["DirectoryBackend"]

PREFIX, SUFFIX = ".kvik-", ".tmp"
LEFT_BEHIND = 60.0  # seconds: a file that is being made is locked before it is this old
LEFT_OUT_MAX = 64  # lines about what is no volume
POOL_MODE, VOLUME_MODE = 0o711, 0o600  # libvirt's own, where the document says none


class DirectoryBackend(Backend):
    """Its volumes are files below the pool's target path."""

    takes_room = True

    # the pool

    def check(self) -> bool:
        return Path(self.document.path).is_dir()

    def start(self) -> None:
        with Beneath(self.document.path):
            pass  # it is there

    def build(self, *, overwrite: bool = False, no_overwrite: bool = False) -> None:
        """Make the directory, with the owner and mode that the document names; one that exists keeps what the
        document does not name."""
        if overwrite or no_overwrite:
            self.refuse("being built with or without overwriting")
        self.make_directory()

    def make_directory(self) -> None:
        path = Path(self.document.path)
        wanted = self.document.target.permissions if self.document.target is not None else None
        mode = wanted.mode_bits if wanted is not None else None
        try:
            new = not path.exists()
            if new:
                path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
                path.mkdir(mode=0o700)
            with Beneath(path) as directory:
                if wanted is not None:
                    set_owner(directory.fd, wanted)
                if new or mode is not None:
                    os.fchmod(directory.fd, POOL_MODE if mode is None else mode)
        except OSError as error:
            raise host_error("make directory", path, error) from error

    def delete(self) -> None:
        """Only an empty directory: what somebody keeps in it is not ours to lose."""
        try:
            with Beneath(self.document.path) as directory:
                self.sweep(directory)
            Path(self.document.path).rmdir()
        except OSError as error:
            raise HostError(
                f"failed to remove pool '{self.document.path}': {error.strerror}", errno=error.errno or 0
            ) from error

    def sweep(self, directory: Beneath) -> None:
        """Remove what a kill left of volumes that were being made."""
        with suppress(OSError), os.scandir(directory.fd) as entries:
            for entry in entries:
                if entry.name.startswith(PREFIX) and entry.name.endswith(SUFFIX):
                    with suppress(HostError, OSError):
                        self._sweep_one(directory, entry.name)

    def _sweep_one(self, directory: Beneath, name: str) -> None:
        fd = directory.open_file(name, os.O_RDWR)
        try:
            if os.fstat(fd).st_mtime < time.time() - LEFT_BEHIND:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                directory.unlink(name)
        finally:
            os.close(fd)

    def refresh(self) -> Contents:
        with Beneath(self.document.path) as directory:
            self.sweep(directory)
            contents = Contents(permissions=permissions_of(os.fstat(directory.fd)))
            contents.capacity, contents.allocation, contents.available = _space(directory)
            contents.shared = shared_as(directory.fd)
            contents.lockless = locks_stay_here(directory.fd)
            try:
                with os.scandir(directory.fd) as entries:
                    names = [entry.name for entry in entries]
            except OSError as error:
                raise host_error("list", self.document.path, error) from error
            for name in sorted(names):
                if name.startswith(PREFIX) and name.endswith(SUFFIX):
                    continue
                try:
                    if len(contents.volumes) >= VOLUMES_MAX:
                        raise InvalidArgument(f"a pool shows {VOLUMES_MAX} volumes at most")
                    contents.volumes[name] = self._examine(directory, name)
                except HostError as error:
                    if error.errno == errno.ENOENT:  # it went while we looked
                        continue
                    leave_out(contents, name, error.message)
                except InvalidArgument as error:
                    leave_out(contents, name, error.message)
            return contents

    def measure(self) -> tuple[int, int, int]:
        with Beneath(self.document.path) as directory:
            return _space(directory)

    def _examine(self, directory: Beneath, name: str) -> StorageVolume:
        """The volume that a name of the directory is. Raises HostError, InvalidArgument: it is none."""
        check_volume_name(name)
        info = directory.stat(name)
        path = directory.join(name)
        target = VolumeTarget(path=path, permissions=permissions_of(info), timestamps=timestamps_of(info))
        volume = StorageVolume(type="file", name=name, key=path, target=target)
        if stat.S_ISDIR(info.st_mode):
            volume.type, target.format = "dir", VolumeFormat(type="dir")
            volume.capacity, volume.allocation, volume.physical = bytes_of(0), bytes_of(0), bytes_of(0)
            return volume
        if not stat.S_ISREG(info.st_mode):
            raise InvalidArgument(f"it is {kind_of(info.st_mode)}")
        fd = directory.open_file(name)
        try:
            self._read(fd, info, volume)
        except OSError as error:
            raise directory.error("read", name, error) from error
        finally:
            os.close(fd)
        return volume

    def _read(self, fd: int, info: os.stat_result, volume: StorageVolume) -> None:
        """What a regular file holds, and what it takes."""
        target, kind = volume.target, kind_of_image(fd)
        assert target is not None
        target.format = VolumeFormat(type=kind)
        volume.capacity = bytes_of(info.st_size)
        if kind == "qcow2":
            qcow2.describe(fd, volume, self.document.path)
        elif kind == "raw" and is_luks(fd):
            target.encryption = Encryption(format="luks")
            volume.capacity = bytes_of(max(0, info.st_size - encryption.payload_offset(fd)))
        allocated = info.st_blocks * 512
        if self.document.refresh is not None and self.document.refresh.volume.allocation == "capacity":
            allocated = volume.size
        volume.allocation, volume.physical = bytes_of(allocated), bytes_of(info.st_size)

    # volumes

    def look_at(self, volume: StorageVolume) -> StorageVolume:
        with Beneath(self.document.path) as directory:
            return self._examine(directory, volume.name)

    def create_volume(self, document: StorageVolume, *, preallocate_metadata: bool = False) -> StorageVolume:
        self._creatable(document)
        if preallocate_metadata and document.format == "raw":
            raise InvalidArgument("metadata preallocation is not supported for raw volumes")
        with Beneath(self.document.path) as directory:
            with self._making(directory, document) as fd:
                if encryption.encryption_of(document) is not None:
                    encryption.create(fd, document, self.secret, metadata=preallocate_metadata)
                elif document.format == "raw":
                    allocate(fd, document.size, document.allocated)
                else:
                    qcow2.create(fd, document, preallocate_metadata=preallocate_metadata)
            return self._examine(directory, document.name)

    def copy_volume(self, document: StorageVolume, source: int, *, reflink: bool = False) -> StorageVolume:
        self._creatable(document, copied=True)
        with Beneath(self.document.path) as directory:
            with self._making(directory, document) as fd:
                size = length = sparse.size_of(source)
                if document.format == "raw":
                    length = max(size, document.size + encryption.payload_offset(source))
                if reflink:
                    sparse.clone(source, fd)
                else:
                    # First all that it will take: a pool that is too small says so before anything is copied.
                    allocate(fd, length, document.allocated)
                    sparse.copy_data(source, fd, size)
                os.ftruncate(fd, length)
            return self._examine(directory, document.name)

    def convert_volume(
        self,
        document: StorageVolume,
        source: Image,
        locked: Encryption | None = None,
        *,
        preallocate_metadata: bool = False,
    ) -> StorageVolume:
        self._creatable(document)
        with Beneath(self.document.path) as directory:
            with self._making(directory, document) as fd:
                if encryption.encryption_of(document) is not None:
                    encryption.create(fd, document, self.secret, metadata=preallocate_metadata)
                    encryption.fill(fd, document, self.secret, source, locked)
                else:
                    self._convert(fd, document, source, preallocate_metadata)
            return self._examine(directory, document.name)

    def _convert(self, fd: int, document: StorageVolume, source: Image, metadata: bool) -> None:
        if document.format == "raw":
            allocate(fd, document.size, document.allocated)
        else:
            qcow2.create(fd, document, preallocate_metadata=metadata)
        with qcow2.writing(fd, document.format, document.name) as target:
            convert(source, target, zeroed=document.allocated == 0)

    def _creatable(self, document: StorageVolume, *, copied: bool = False) -> None:
        """ConfigError, ConfigUnsupported if not. `copied`: byte by byte, encrypted as what it is copied from."""
        if document.format not in ("raw", "qcow2"):
            raise ConfigUnsupported(
                f"volumes of format {document.format} cannot be created in pool {self.name!r}",
                path="/volume/target/format/@type",
                remedy="raw or qcow2",
            )
        if document.backing_store is not None and document.format == "raw":
            raise ConfigUnsupported("a raw volume has no backing store", path="/volume/backingStore")
        if not copied:
            encryption.check_encryption(document)

    @contextmanager
    def _making(self, directory: Beneath, document: StorageVolume) -> Iterator[int]:
        """A descriptor of what becomes the volume when the block ends well, and goes without a trace when not."""
        name = check_volume_name(document.name)
        with suppress(HostError):
            directory.stat(name)
            raise StorageVolumeExists(f"storage volume '{name}' exists already")
        hidden = f"{PREFIX}{os.getpid()}-{os.urandom(8).hex()}{SUFFIX}"
        fd = directory.create(hidden)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)  # `sweep` of whoever shares the directory leaves it alone
            yield fd
            wanted = document.target.permissions if document.target is not None else None
            if wanted is not None:
                set_owner(fd, wanted)
            mode = wanted.mode_bits if wanted is not None else None
            os.fchmod(fd, VOLUME_MODE if mode is None else mode)
            os.fsync(fd)
            directory.publish(hidden, name)
        except BaseException as error:
            with suppress(HostError):
                directory.unlink(hidden)
            if isinstance(error, HostError) and error.errno == errno.EEXIST:
                raise StorageVolumeExists(f"storage volume '{name}' exists already") from error
            if isinstance(error, OSError):
                raise directory.error("make", name, error) from error
            raise
        finally:
            os.close(fd)
        directory.sync()

    def delete_volume(self, volume: StorageVolume) -> None:
        with Beneath(self.document.path) as directory:
            info = directory.stat(volume.name)
            if stat.S_ISDIR(info.st_mode):
                try:
                    os.rmdir(volume.name, dir_fd=directory.fd)
                except OSError as error:
                    raise directory.error("remove", volume.name, error) from error
            elif stat.S_ISREG(info.st_mode):
                directory.unlink(volume.name)
            else:
                raise OperationInvalid(f"{directory.join(volume.name)} is {kind_of(info.st_mode)} by now")
            directory.sync()

    def resize_volume(self, volume: StorageVolume, capacity: int, *, allocate: bool = False) -> None:
        if volume.format not in ("raw", "qcow2"):
            self.refuse(f"resizing volumes of format {volume.format}")
        fd = self.open_volume(volume, writable=True)
        try:
            locked = encryption.encryption_of(volume) is not None
            if volume.format == "qcow2" and locked:
                encryption.resize(fd, volume, self.secret, capacity, allocate=allocate and capacity > volume.size)
                return
            if volume.format == "qcow2":
                with qcow2.writing(fd, "qcow2", volume.path) as image:
                    grows = capacity > image.size
                    resize(image, capacity, shrink=True, preallocation="falloc" if allocate and grows else "off")
                return
            before = os.fstat(fd).st_size
            if locked:
                capacity += encryption.payload_offset(fd)  # new bytes read as random ones, as with libvirt
            try:
                os.ftruncate(fd, capacity)
                if allocate and capacity:
                    os.posix_fallocate(fd, 0, capacity)
                os.fsync(fd)
            except OSError as error:
                with suppress(OSError):
                    os.ftruncate(fd, before)
                raise host_error("resize", volume.path, error) from error
        finally:
            os.close(fd)

    def open_volume(self, volume: StorageVolume, *, writable: bool = False) -> int:
        with Beneath(self.document.path) as directory:
            fd = directory.open_file(volume.name, os.O_RDWR if writable else os.O_RDONLY)
        if writable and os.fstat(fd).st_nlink > 1:
            os.close(fd)
            raise OperationInvalid(
                f"{volume.path} has another name as well (a hard link): writing to it would change that file too",
                remedy="remove the other name, or copy the volume: kvik vol-clone",
            )
        return fd


def _space(directory: Beneath) -> tuple[int, int, int]:
    """Capacity, allocation, available. Blocks that the file system keeps back for root count as free, as in libvirt."""
    space = os.fstatvfs(directory.fd)
    capacity, free = space.f_frsize * space.f_blocks, space.f_frsize * space.f_bfree
    return capacity, capacity - free, free


def leave_out(contents: Contents, name: str, why: str) -> None:
    if len(contents.left_out) < LEFT_OUT_MAX:
        contents.left_out.append(f"{name!r} is not shown as a volume: {why}")


def allocate(fd: int, capacity: int, allocation: int) -> None:
    """A file of `capacity` bytes, the first `allocation` of which are taken from the file system now."""
    os.ftruncate(fd, capacity)
    if min(allocation, capacity):
        os.posix_fallocate(fd, 0, min(allocation, capacity))


def set_owner(fd: int, wanted: Permissions) -> None:
    owner = -1 if wanted.owner is None else wanted.owner
    group = -1 if wanted.group is None else wanted.group
    info = os.fstat(fd)
    if (owner, group) != (-1, -1) and (owner, group) != (info.st_uid, info.st_gid):
        os.fchown(fd, owner, group)


def permissions_of(info: os.stat_result) -> Permissions:
    return Permissions(mode=f"{stat.S_IMODE(info.st_mode):04o}", owner=info.st_uid, group=info.st_gid)


def timestamps_of(info: os.stat_result) -> Timestamps:
    return Timestamps(
        atime=_moment(info.st_atime_ns), mtime=_moment(info.st_mtime_ns), ctime=_moment(info.st_ctime_ns), btime="0"
    )


def _moment(nanoseconds: int) -> str:
    seconds, rest = divmod(nanoseconds, 10**9)
    return f"{seconds}.{rest:09}" if rest else str(seconds)
