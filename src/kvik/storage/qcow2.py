"""qcow2 volumes: made and looked at by `image/`. Nothing that a header refers to is opened to look at a volume."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kvik.conf.storage_pool import bytes_of
from kvik.conf.storage_volume import (
    BackingStore,
    ClusterSize,
    Encryption,
    StorageVolume,
    VolumeFeatures,
    VolumeFormat,
    VolumeTarget,
)
from kvik.errors import ConfigError, ConfigUnsupported, ImageError
from kvik.image.base import Image
from kvik.image.create import create as create_image
from kvik.image.opening import open_image, plain_file
from kvik.storage.formats import look

__all__ = ["create", "describe"]


def create(fd: int, document: StorageVolume, *, preallocate_metadata: bool = False) -> None:
    """Make an image of the open, empty file. Where the document says no capacity it has its backing file's.

    Raises ConfigError, InvalidArgument, ImageError, OSError.
    """
    target = document.target or VolumeTarget()
    options: dict[str, Any] = {"preallocation": "metadata" if preallocate_metadata else "off"}
    if target.compat is not None:
        options["compat"] = target.compat
    if target.cluster_size is not None:
        options["cluster_size"] = target.cluster_size.value
    if target.features is not None:
        options["lazy_refcounts"] = target.features.lazy_refcounts
        options["extended_l2"] = target.features.extended_l2
    size = document.size
    if document.backing_store is not None:
        below = _size_below(document.backing_store)
        options["backing_file"], options["backing_format"] = (
            document.backing_store.path,
            _format(document.backing_store),
        )
        size = size if document.capacity is not None else below
    create_image(fd, "qcow2", size, **options)


@contextmanager
def writing(fd: int, format_: str, path: str) -> Iterator[Image]:
    """The open file as an image that is written to, by a descriptor of its own; on disk when the block ends well.
    Nothing below it is opened."""
    own = os.dup(fd)
    try:
        image = open_image(own, format=format_, path=path, writable=True)
    except BaseException:
        os.close(own)
        raise
    with image:
        yield image
        image.flush()


def _format(store: BackingStore) -> str:
    """raw where the document does not say, as in libvirt: never what the file's first bytes pretend."""
    return store.format.type if store.format is not None else "raw"


def _size_below(store: BackingStore) -> int:
    """Bytes of the disk in the backing file, which must be there and be what the document says."""
    kind = _format(store)
    if kind not in ("raw", "qcow2"):
        raise ConfigUnsupported(
            f"a backing store of format {kind} is not possible here",
            path="/volume/backingStore/format/@type",
            remedy="raw or qcow2",
        )
    try:
        fd = os.open(store.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        raise ConfigError(
            f"the backing store {store.path} cannot be opened: {error.strerror}", path="/volume/backingStore/path"
        ) from error
    try:
        mode = os.fstat(fd).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise ConfigError(
                f"the backing store {store.path} is neither a file nor a block device",
                path="/volume/backingStore/path",
            )
        if kind == "raw":
            return os.lseek(fd, 0, os.SEEK_END)
        found = look(fd, store.path)
        if found is None:
            raise ImageError(f"{store.path} is no sound qcow2 image")
        return found.virtual_size
    finally:
        os.close(fd)


def describe(fd: int, volume: StorageVolume, directory: str) -> None:
    """Write into the volume's document what the header says. A damaged one says nothing: the file is still a volume,
    which can be deleted."""
    found = look(fd, volume.path)
    if found is None:
        return
    target = volume.target
    assert target is not None  # its path is there
    target.compat = found.compat
    if found.encrypted:
        target.encryption = Encryption(format="luks" if found.encryption == "luks" else "qcow")
    if found.cluster_size is not None:
        target.cluster_size = ClusterSize(unit="B", value=found.cluster_size)
    if found.lazy_refcounts or found.extended_l2:
        target.features = VolumeFeatures(lazy_refcounts=found.lazy_refcounts, extended_l2=found.extended_l2)
    elif found.compat == "1.1":
        target.features = VolumeFeatures()
    volume.capacity = bytes_of(found.virtual_size)
    if found.backing_file:
        try:
            below = str(Path(directory, plain_file(found.backing_file, "backing file", volume.path)))
        except ImageError:  # no file: shown as it is
            below = found.backing_file
        volume.backing_store = BackingStore(path=below)
        if found.backing_format is not None:
            volume.backing_store.format = VolumeFormat(type=found.backing_format)
