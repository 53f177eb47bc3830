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

from dataclasses import dataclass, field
from typing import ClassVar, NoReturn

from kvik.conf.storage_pool import Permissions, PoolSource, StoragePool
from kvik.conf.storage_volume import FILE_FORMATS, StorageVolume
from kvik.errors import OperationUnsupported

__all__ = ["VOLUMES_MAX", "Backend", "Contents"]

VOLUMES_MAX = 16384  # REMOTE_STORAGE_VOL_LIST_MAX: more cannot be listed


@dataclass(slots=True)
class Contents:
    """What `refresh` found; sizes in bytes. `left_out`: one line for each thing that is no volume, and why."""

    capacity: int = 0
    allocation: int = 0
    available: int = 0
    permissions: Permissions | None = None
    volumes: dict[str, StorageVolume] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


class Backend:
    """A pool of one type. `document` is complete and valid."""

    type: ClassVar[str] = ""
    formats: ClassVar[tuple[str, ...]] = FILE_FORMATS  # of its volumes
    default_format: ClassVar[str] = "raw"

    def __init__(self, document: StoragePool) -> None:
        self.document = document

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

    def build(self, *, overwrite: bool = False, no_overwrite: bool = False) -> None:
        """`no_overwrite`: not where anything was before; `overwrite`: whatever was there."""
        self.refuse("being built")

    def delete(self) -> None:
        self.refuse("being deleted")

    def refresh(self) -> Contents:
        raise NotImplementedError

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

    def delete_volume(self, volume: StorageVolume) -> None:
        self.refuse("deleting volumes")

    def resize_volume(self, volume: StorageVolume, capacity: int, *, allocate: bool = False) -> None:
        """To `capacity` bytes, more or less than before; `allocate`: take the new bytes from the pool now."""
        self.refuse("resizing volumes")

    def open_volume(self, volume: StorageVolume, *, writable: bool = False) -> int:
        """A descriptor of its bytes. HostError if what has its name now is not a volume any more."""
        self.refuse("reading and writing volumes")

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
