"""What every type of pool can be asked: one class a type, one object an active (or to be built) pool.

    start, stop          make the pool's source usable on this host, and undo that
    check                whether it is usable already: asked when the daemon comes back
    build, delete        make and destroy what the pool is kept in: a directory, a volume group, a partition table
    refresh              look at everything, anew
    create_volume, ...   of single volumes
    find_sources         what pools of this type could be made from

All methods block, and are called in threads: at most one of start, stop, build, delete and refresh at a time, volume
methods beside each other, but never two for one volume. What a type cannot do says so (OperationUnsupported). Nothing
half done is left behind by any of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar, NoReturn

from kvik.conf.storage_pool import AuthSecret, Permissions, PoolSource, StoragePool
from kvik.conf.storage_volume import FILE_FORMATS, Encryption, StorageVolume
from kvik.errors import OperationUnsupported
from kvik.image.base import Image
from kvik.storage.sparse import size_of
from kvik.storage.wiping import overwrite

__all__ = ["VOLUMES_MAX", "Backend", "Contents", "SecretReader", "no_secrets"]

VOLUMES_MAX = 16384  # REMOTE_STORAGE_VOL_LIST_MAX: more cannot be listed


SecretReader = Callable[[str, AuthSecret], bytes]  # of which usage it must be ("iscsi", "ceph"); raises KvikError


def no_secrets(usage: str, which: AuthSecret) -> bytes:
    raise OperationUnsupported(f"secret {which.usage or which.uuid} cannot be had here")


@dataclass(slots=True)
class Contents:
    """What `refresh` found; sizes in bytes. `left_out`: one line for each thing that is no volume, and why. `shared`:
    by which file system other hosts may have the same volumes open, "" if they cannot. `lockless`: why locks on them do
    not reach those hosts."""

    capacity: int = 0
    allocation: int = 0
    available: int = 0
    permissions: Permissions | None = None
    shared: str = ""
    lockless: str = ""
    volumes: dict[str, StorageVolume] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


class Backend:
    """A pool of one type. `document` is complete and valid."""

    type: ClassVar[str] = ""
    formats: ClassVar[tuple[str, ...]] = FILE_FORMATS  # of its volumes
    default_format: ClassVar[str] = "raw"
    names_formats: ClassVar[bool] = True  # whether people choose among them: a device of a group has none
    takes_room: ClassVar[bool] = False  # whether bytes that are written to a volume may take room of the pool

    def __init__(self, document: StoragePool, secret: SecretReader = no_secrets) -> None:
        self.document = document
        self.secret = secret
        self.given_up = False  # the source does not answer: `stop` shall not wait for it, where that can be had

    @property
    def name(self) -> str:
        return self.document.name

    # the pool

    def check(self) -> bool:
        """Whether the source is usable now, without `start`."""
        return False

    def start(self) -> None:
        """Nothing to do for sources that are simply there."""

    def stop(self) -> None:
        """The counterpart; what is gone already is no error."""

    def clean(self) -> None:
        """Take away what a start or stop left that a kill broke off; nothing of it may be there."""
        if self.check():
            self.stop()

    def build(self, *, overwrite: bool = False, no_overwrite: bool = False) -> None:
        """`no_overwrite`: not where anything was before; `overwrite`: whatever was there."""
        self.refuse("being built")

    def delete(self) -> None:
        self.refuse("being deleted")

    def refresh(self) -> Contents:
        raise NotImplementedError  # each type's own

    def measure(self) -> tuple[int, int, int]:
        """Capacity, allocation and what is available, in bytes, after a change of one volume."""
        contents = self.refresh()
        return contents.capacity, contents.allocation, contents.available

    # volumes

    def create_volume(self, document: StorageVolume, *, preallocate_metadata: bool = False) -> StorageVolume:
        """A new one, empty; the document as it then is. StorageVolumeExists if the name is taken."""
        self.refuse("creating volumes")

    def copy_volume(self, document: StorageVolume, source: int, *, reflink: bool = False) -> StorageVolume:
        """A new one, with the bytes that can be read from the descriptor `source` (a file or block device)."""
        self.refuse("copying volumes")

    def convert_volume(
        self,
        document: StorageVolume,
        source: Image,
        locked: Encryption | None = None,
        *,
        preallocate_metadata: bool = False,
    ) -> StorageVolume:
        """A new one, of the format that the document names, that reads as `source` does; `locked`: when that is opened
        with its secret."""
        self.refuse("converting volumes")

    def delete_volume(self, volume: StorageVolume) -> None:
        self.refuse("deleting volumes")

    def resize_volume(self, volume: StorageVolume, capacity: int, *, allocate: bool = False) -> None:
        """To `capacity` bytes, more or less than before; `allocate`: take the new bytes from the pool now."""
        self.refuse("resizing volumes")

    def open_volume(self, volume: StorageVolume, *, writable: bool = False) -> int:
        """A descriptor of its bytes. HostError if what has its name now is not a volume any more."""
        self.refuse("reading and writing volumes")

    @contextmanager
    def opened(self, volume: StorageVolume, *, writable: bool = False) -> Iterator[int]:
        """The same for the time of a block. What is written is on disk when it was asked for (fsync(2)) and has ended
        well."""
        fd = self.open_volume(volume, writable=writable)
        try:
            yield fd
        finally:
            os.close(fd)

    def wipe_volume(self, volume: StorageVolume, passes: Sequence[bytes]) -> None:
        """Overwrite all of it, once for each of `passes` (`wiping.passes_of`)."""
        with self.opened(volume, writable=True) as fd:
            overwrite(fd, size_of(fd), passes)

    def look_at(self, volume: StorageVolume) -> StorageVolume:
        """The volume as it is now."""
        self.refuse("looking at single volumes")

    # finding

    @classmethod
    def find_sources(cls, source: PoolSource | None) -> list[PoolSource]:
        """Sources on this host or, where `source` names one, on another."""
        raise OperationUnsupported(f"pool type '{cls.type}' does not support source discovery")

    @classmethod
    def missing(cls) -> str:
        """The package that this type needs and this host lacks, or nothing."""
        return ""

    def refuse(self, what: str) -> NoReturn:
        raise OperationUnsupported(f"pool type '{self.type}' of pool '{self.name}' does not support {what}")
