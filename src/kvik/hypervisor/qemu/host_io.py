"""How QEMU reads and writes an image where the document does not say (<driver io=...>): through io_uring where that is
known to be sound, else by threads, which is QEMU's default.

Sound means: a regular file on a local file system that handles it without detours, and a kernel whose io_uring runs
what would block in threads of the process itself. Not block devices (writes through the page cache of LVM and rbd have
hung in io_uring), not files of a network or of FUSE (CIFS has had trouble with it), not ZFS. It is chosen by the open
descriptor, at each start and each time that an image is added: it is this host's matter and no part of the machine's
document, so a machine goes to a host that has no io_uring as it goes anywhere.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping

from kvik.host import facilities, filesystem
from kvik.hypervisor.qemu.argv.options import Files
from kvik.hypervisor.qemu.capabilities import QemuCapabilities

__all__ = ["IORING_FEAT_NATIVE_WORKERS", "LOCAL", "by_io_uring", "files"]

# <linux/io_uring.h>: since Linux 5.12; rings are no longer counted against RLIMIT_MEMLOCK since then, either.
IORING_FEAT_NATIVE_WORKERS = 1 << 9
LOCAL = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "tmpfs"})


def by_io_uring(capabilities: QemuCapabilities, fds: Mapping[str, int]) -> frozenset[str]:
    """Of descriptors by name, the images that QEMU had best read and write through io_uring."""
    images = {name: fd for name, fd in fds.items() if name.startswith("disk:")}
    if not images or not capabilities.io_uring or not facilities.io_uring().value & IORING_FEAT_NATIVE_WORKERS:
        return frozenset()
    return frozenset(name for name, fd in images.items() if _sound(fd))


def files(capabilities: QemuCapabilities, fds: Mapping[str, int], paths: Mapping[str, str] | None = None) -> Files:
    """Descriptors for QEMU's command line or (`paths`) its monitor, with the way of host I/O chosen."""
    return Files(fds, paths, by_io_uring(capabilities, fds))


def _sound(fd: int) -> bool:
    try:  # the kind of file only where no server has to answer
        return filesystem.type_name(fd) in LOCAL and stat.S_ISREG(os.fstat(fd).st_mode)
    except OSError:  # whoever uses the image will say what is wrong with it
        return False
