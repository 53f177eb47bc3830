"""What a file or device in a pool holds, by its first bytes: for lists of volumes only.

A machine's disk never takes its format from here: a guest can write any header into a raw disk of its own. qcow2 is
read by `image/`; of other formats only the name is known, and nothing that a header points to is opened.
"""

from __future__ import annotations

import os

from kvik.errors import ImageError
from kvik.image.info import Info, info
from kvik.image.opening import open_image, probe_format

__all__ = ["is_luks", "kind_of_image", "look"]

# libvirt's names for what `image/` does not tell from raw: magic numbers at their offsets.
MAGIC = ((0, b"QFI\xfb\0\0\0\1", "qcow"), (0, b"OOOM", "cow"), (32769, b"CD001", "iso"))
NAMES = {"luks": "raw", "vhdx": "raw", "parallels": "raw"}  # those that libvirt's volumes have no name for


def kind_of_image(fd: int) -> str:
    """The format under libvirt's name; raw if nothing is recognised. Raises OSError."""
    for offset, magic, name in MAGIC:
        if os.pread(fd, len(magic), offset) == magic:
            return name
    found = probe_format(fd)
    return NAMES.get(found, found)


def is_luks(fd: int) -> bool:
    """A raw image that is encrypted as a whole."""
    return probe_format(fd) == "luks"


def look(fd: int, path: str) -> Info | None:
    """What the header of a qcow2 image says; None for one that is too damaged to say anything. Raises OSError."""
    own = os.dup(fd)
    try:
        image = open_image(own, format="qcow2", path=path)
    except ImageError:
        os.close(own)
        return None
    except BaseException:
        os.close(own)
        raise
    with image:
        try:
            return info(image)
        except ImageError:
            return None
