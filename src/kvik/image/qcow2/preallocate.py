"""Preallocation of a new image: every cluster gets its place, and with `falloc` and `full` its room, at once."""

from __future__ import annotations

import errno
import os
import stat
from array import array

from kvik.image.qcow2.tables import COPIED

__all__ = ["preallocate", "preallocate_range"]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.image.qcow2.writer import Qcow2Writer


def preallocate(fd: int, path: str, mode: str) -> None:
    """All of a new image in `fd`, which stays open; the external data file is seen to by whoever makes it."""
    from kvik.image.qcow2.writer import Qcow2Writer

    def data_file(name: str) -> int:
        return os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)  # tables only: nothing is written there

    with Qcow2Writer(os.dup(fd), path, barriers=False, data_file=data_file) as image:
        preallocate_range(image, 0, image.size, mode)


def preallocate_range(image: Qcow2Writer, offset: int, length: int, mode: str) -> None:
    """Places for the clusters of a range that has none: `offset` begins a cluster that is not allocated."""
    from kvik.image.create import reserve

    size, stride = image.cluster_size, 2 if image.extended else 1
    for number, index, start, end in image._spans(offset, length):
        _, table = image._own_l2(number)
        count = (end - start + size - 1) // size
        place = start if image.has_data_file else image.allocate(count)
        entries = array("Q", range(place | COPIED, (place | COPIED) + count * size, size))
        table[index * stride : (index + count) * stride : stride] = entries
        if not image.has_data_file:
            upto = place + count * size
            if os.lseek(image.fd, 0, os.SEEK_END) < upto:
                if stat.S_ISBLK(os.fstat(image.fd).st_mode):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.ftruncate(image.fd, upto)
            if mode in ("falloc", "full"):
                reserve(image.fd, place, count * size, mode)
        if image.l2.crowded or image.refcounts.crowded:
            image.write_back()
    image.write_back()
