"""Making a disk image bigger or smaller, in place."""

from __future__ import annotations

import os
import stat

from kvik.errors import InvalidArgument, OperationInvalid, OperationUnsupported
from kvik.image.base import Image
from kvik.image.raw import RawImage

__all__ = ["resize"]


def resize(image: Image, size: int, *, shrink: bool = False, preallocation: str = "off") -> None:
    """The disk is to have `size` bytes: what is new reads as zero.

    Without `shrink` it only grows. `preallocation` (off, metadata, falloc, full) is that of the new part. Raises
    `InvalidArgument`, `OperationInvalid` for what an image of its kind cannot do, `ImageError`, `OSError`.
    """
    from kvik.image.create import PREALLOCATIONS

    if not 0 < size < 1 << 63:
        raise InvalidArgument("New image size must be positive")
    if preallocation not in PREALLOCATIONS:
        raise InvalidArgument(f"unknown preallocation '{preallocation}'", remedy=f"one of: {', '.join(PREALLOCATIONS)}")
    if size <= image.size and preallocation != "off":
        raise InvalidArgument("Preallocation can only be used for growing images")
    if size < image.size and not shrink:
        raise InvalidArgument(
            "Use the --shrink option to perform a shrink operation.",
            remedy="all data behind the new end will be lost: make sure that there is none of importance",
        )
    try:
        _resize(image, size, preallocation)
    except OSError as error:
        error.filename = error.filename or image.path
        raise


def _resize(image: Image, size: int, preallocation: str) -> None:
    if isinstance(image, RawImage):
        _resize_raw(image, size, preallocation)
        return
    from kvik.image.qcow2.writer import Qcow2Writer

    if not isinstance(image, Qcow2Writer):
        raise OperationUnsupported(f"images of format {image.format} cannot be resized")
    from kvik.image.qcow2.resize import resize_qcow2

    resize_qcow2(image, size, preallocation)


def _resize_raw(image: RawImage, size: int, preallocation: str) -> None:
    if stat.S_ISBLK(os.fstat(image.fd).st_mode):
        if size > image.size:
            raise OperationInvalid(f"{image.path}: a device cannot be made bigger here")
        return  # what is behind the end stays unused, as QEMU sees it
    if preallocation == "metadata":
        raise InvalidArgument("raw images have no preallocation 'metadata'", remedy="falloc or full")
    old = image.file_end
    image.resize(size)
    if preallocation != "off":
        from kvik.image.create import reserve

        try:
            reserve(image.fd, old, size - old, preallocation)
        except BaseException:
            image.resize(old)
            raise
