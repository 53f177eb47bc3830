"""Transient disks: what the guest writes goes to an image that has no name, and that nobody can find when it is over.

The overlay is a file without a directory entry (open(2), O_TMPFILE) beside the disk's own image, or in /var/tmp for
what is no file. The VMM holds it open; the kernel frees it when that ends, however it ends: there is nothing to clean
up, and nothing that a crash could leave. https://libvirt.org/formatdomain.html (transient)
"""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from kvik.conf.devices.disk import Disk
from kvik.errors import ConfigUnsupported
from kvik.host import files as host_files
from kvik.hypervisor.chain import qcow2_size
from kvik.hypervisor.names import alias_of, image_name, overlay_name
from kvik.image.create import create

if TYPE_CHECKING:
    from kvik.hypervisor.descriptors import Opened

__all__ = ["check_transient", "open_overlay"]

_ELSEWHERE = "/var/tmp"
# Of a file system that cannot make files without a name.
_NO_TMPFILE = frozenset({errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL})


def check_transient(disk: Disk) -> None:
    """Raises `ConfigUnsupported` for a transient disk that cannot be one."""
    why = ""
    if disk.transient is None:
        return
    source, driver = disk.source, disk.driver
    if disk.device != "disk" or disk.readonly:
        why = "a drive that is only read has nothing to throw away"
    elif disk.type not in ("file", "block", "volume"):
        why = f"its image is of type {disk.type}, and the size of what is no file is not known before the start"
    elif driver is not None and driver.type not in (None, "raw", "qcow2"):
        why = f"its image has format {driver.type}, and an overlay can be put on raw and qcow2"
    elif disk.encryption is not None or (source is not None and source.encryption is not None):
        why = "its image is encrypted, and what is written on top of it would not be"
    elif source is not None and source.slices is not None:
        why = "its image is a slice of a file"
    elif driver is not None and driver.copy_on_read:
        why = "copy_on_read would write to its image"
    elif disk.shareable:
        why = "machines that share a disk see what the others write"
    if why:
        raise ConfigUnsupported(
            f"disk {disk.target.dev} cannot be transient: {why}", path="/domain/devices/disk/transient"
        )


def open_overlay(opened: Opened, disk: Disk) -> None:
    """On the disk's image, which is open already. Raises `ConfigUnsupported`, `HostError`."""
    check_transient(disk)
    assert disk.source is not None
    alias, image = alias_of(disk), disk.source.location or ""
    below = opened.fds[image_name(alias, 0)]
    raw = disk.driver is None or disk.driver.type in (None, "raw")
    size = os.lseek(below, 0, os.SEEK_END) if raw else qcow2_size(below, image)
    directory = Path(image).parent if disk.type == "file" and not disk.source.fdgroup else Path(_ELSEWHERE)
    fd = _nameless(directory)
    opened.add(overlay_name(alias), fd)
    try:
        create(fd, "qcow2", size)
    except OSError as error:
        raise host_files.host_error("make an overlay in", directory, error) from error


def _nameless(directory: Path) -> int:
    try:
        return os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno not in _NO_TMPFILE:
            raise host_files.host_error("make an overlay in", directory, error) from error
    try:
        fd, name = tempfile.mkstemp(prefix=".kvik-transient-", dir=directory)
        os.unlink(name)  # noqa: PTH108
    except OSError as error:
        raise host_files.host_error("make an overlay in", directory, error) from error
    return fd
