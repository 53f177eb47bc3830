"""A volume opened as an image, with the volumes that it shows through.

A header's word leads to other volumes of active pools and to nothing else: an image with /etc/shadow as its base would
make a copy of it readable. Formats are those that the documents and headers name, raw where they name none.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from kvik.conf.storage_volume import StorageVolume
from kvik.errors import ConfigUnsupported, NoStorageVolume, OperationInvalid
from kvik.image.base import Image
from kvik.image.opening import open_image
from kvik.storage.backend import Backend

if TYPE_CHECKING:
    from kvik.storage.pools import Pools

__all__ = ["image_format", "open_volume_image"]

DEPTH_MAX = 64


def image_format(volume: StorageVolume) -> str:
    """raw or qcow2: what a volume is read as. ConfigUnsupported for what is read by neither."""
    if volume.type == "block":
        return "raw"
    if volume.format not in ("raw", "qcow2"):
        raise ConfigUnsupported(
            f"volume '{volume.name}' of format {volume.format} cannot be converted here",
            remedy="convert the file itself: kvik img convert",
        )
    return volume.format


@contextmanager
def open_volume_image(pools: Pools, backend: Backend, volume: StorageVolume) -> Iterator[Image]:
    """To be read. Blocks; raises ImageError, OperationInvalid, HostError."""
    kind = image_format(volume)
    with backend.opened(volume) as fd, _image(pools, os.dup(fd), volume, kind, DEPTH_MAX) as image:
        yield image


def _image(pools: Pools, fd: int, volume: StorageVolume, kind: str, depth: int) -> Image:
    """Of a descriptor that it takes."""
    try:
        return open_image(fd, format=kind, path=volume.path, backing=partial(_below, pools, volume, depth - 1))
    except BaseException:
        os.close(fd)
        raise


def _below(pools: Pools, above: StorageVolume, depth: int, name: str, kind: str | None) -> Image:
    if depth <= 0:
        raise OperationInvalid(f"volume '{above.name}' has more than {DEPTH_MAX} others below it, or itself")
    path = os.path.normpath(Path(above.path).parent / name)
    try:
        pool, volume = pools.lookup_path(path)
    except NoStorageVolume:
        raise OperationInvalid(
            f"volume '{above.name}' is based on {path}, which is no volume of an active pool: it is not read",
            remedy="start or refresh the pool that it lies in",
        ) from None
    kind = kind or "raw"
    if kind not in ("raw", "qcow2"):
        raise ConfigUnsupported(f"volume '{above.name}' is based on an image of format {kind}")
    return _image(pools, pool.active().open_volume(volume), volume, kind, depth)
