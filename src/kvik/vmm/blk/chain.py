"""A disk's chain of images from descriptors: what lies below which is told by the caller, never by an image."""

from __future__ import annotations

import os
import sys

from kvik.errors import ImageError, OperationUnsupported
from kvik.image.lock import lock_image
from kvik.image.opening import open_image
from kvik.image.qcow2.header import DIRTY, parse
from kvik.image.qcow2.redo import identity

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.image.base import Image
    from kvik.image.qcow2.redo import Redo

__all__ = ["check_can_open", "check_redo", "check_served", "name_of", "open_chain"]


def open_chain(
    images: list[tuple[int, str]], *, read_only: bool, locking: bool = True, redo: Redo | None = None
) -> Image:
    """(descriptor, format) from the top down; the descriptors become the images'. Those below are locked as readers
    here, the top by whoever opens its data. `redo`: what a process before this one had not written of it. Raises
    `ImageError`, `ResourceBusy`, `HostError`, OSError; then they are closed."""
    below: Image | None = None
    left = len(images)
    try:
        for number, (fd, form) in reversed(list(enumerate(images))):
            name = name_of(fd)
            if locking and number:
                lock_image(fd, name, write=False)
            writable = not number and not read_only
            image = open_image(fd, format=form, writable=writable, path=name, redo=redo if writable else None)
            image.backing, below, left = below, image, number
            check_served(image, image.backing)
    except BaseException:
        if below is not None:
            below.release()
        for fd, _ in images[:left]:
            os.close(fd)
        raise
    assert below is not None
    return below


def check_redo(redo: Redo, images: list[tuple[int, str]]) -> None:
    """That what a process before this one left belongs to this chain. Raises `ImageError`.

    One that had an image on top which the guest never wrote to is about the image below it still, and about nothing;
    not so one that went on in an image below: what is above would hide that."""
    found = [identity(fd) for fd, _ in images]
    if redo.identity in (None, found[0]) or (not redo.count and not redo.alone and redo.identity in found):
        return
    raise ImageError(
        "is not the image that the process before this one wrote to",
        file=name_of(images[0][0]),
        remedy="the machine's document and its disk do not agree: shut it down, and look at its snapshots",
    )


def check_served(image: Image, below: Image | None) -> None:
    """That it can be a disk's, on top of `below`. Raises `ImageError`."""
    header = getattr(image, "header", None)
    if header is None:
        if below is not None:
            raise ImageError("is raw, and nothing can lie below it", file=image.path)
        return
    if header.crypt_method:
        raise image.fault("is encrypted, which is not supported", 32)
    if image.data_fd < 0:
        raise image.fault("keeps its data in another file, which is not supported", 72)
    if header.backing_file is not None and below is None:
        raise image.fault(f"sits on {header.backing_file!r}, which was not passed", 8)


def check_can_open(fd: int, name: str) -> None:
    """Whoever opens it is confined by now: what opening needs and was not imported before cannot be had."""
    header = parse(fd, name)
    if header.incompatible & DIRTY:
        remedy = f"repair it: kvik img check -r all {name}"
        raise ImageError("was not closed by its last writer", file=name, offset=72, remedy=remedy)
    if header.compression and "kvik.image.zstd" not in sys.modules:
        raise OperationUnsupported(
            f"{name} is compressed by zstd, which kvik-vmm does not read", remedy="use an image of zlib, the usual"
        )


def name_of(fd: int) -> str:
    """What it was opened as, for messages."""
    try:
        return os.readlink(f"/proc/self/fd/{fd}")  # noqa: PTH115 - pathlib is not imported
    except OSError:
        return f"descriptor {fd}"
