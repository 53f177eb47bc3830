"""Snapshots inside qcow2 images, as snapshots of machines need them. All functions block; each change is made as a
whole or not at all (`image/qcow2/snapshotting.py`)."""

from __future__ import annotations

from pathlib import Path

from kvik.errors import HostError, ImageError, NoSnapshot
from kvik.image.opening import Opener
from kvik.image.qcow2.snapshots import find_by_name
from kvik.image.qcow2.snapshotting import apply_snapshot, create_snapshot, delete_snapshot
from kvik.image.qcow2.writer import Qcow2Writer
from kvik.storage.overlay_bitmaps import remove_all

__all__ = ["go_back", "names", "put", "take_out"]


def _open(path: str) -> Qcow2Writer:
    image = Opener().open(path, "qcow2", writable=True, chain=False)
    if not isinstance(image, Qcow2Writer):
        image.close()
        raise ImageError("cannot be changed", file=path)
    return image


def names(path: str) -> set[str]:
    """Of an image that may be in use."""
    with Opener(share=True, lock=False).open(path, "qcow2", chain=False) as image:
        return {one.name for one in getattr(image, "snapshots", [])}


def put(path: str, name: str) -> None:
    with _open(path) as image:
        create_snapshot(image, name)


def go_back(path: str, name: str) -> None:
    """The image shows what it did; its bitmaps go, for they would not know what changed. Can be done twice. Raises
    `NoSnapshot`."""
    with _open(path) as image:
        snapshot = find_by_name(image.snapshots, name, path)
        remove_all(image)
        apply_snapshot(image, snapshot.id)


def take_out(path: str, name: str) -> None:
    """An image or a snapshot that is gone is as good."""
    try:
        with _open(path) as image:
            delete_snapshot(image, find_by_name(image.snapshots, name, path))
    except NoSnapshot:
        pass
    except HostError:
        if Path(path).exists():
            raise
