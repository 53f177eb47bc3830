"""What lies on a device before it is built on: nothing that anybody uses or may still want is overwritten by chance."""

from __future__ import annotations

import errno
import os
import stat

from kvik.errors import HostError, ResourceBusy, StoragePoolBuilt
from kvik.host.files import host_error
from kvik.storage.tool import call_json

__all__ = ["check_empty", "check_free", "signatures"]


def check_free(path: str) -> None:
    """HostError unless it is a block device, ResourceBusy if it is mounted or part of something."""
    try:
        # O_EXCL on a block device without O_CREAT: open(2), "EBUSY if the block device is in use by the system".
        fd = os.open(path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise ResourceBusy(
                f"device '{path}' is in use: mounted, or part of another one", remedy="see what is on it: lsblk"
            ) from error
        raise host_error("open device", path, error) from error
    try:
        if not stat.S_ISBLK(os.fstat(fd).st_mode):
            raise HostError(f"{path} is not a block device", errno=errno.ENOTBLK)
    finally:
        os.close(fd)


def signatures(path: str) -> list[str]:
    """File systems, partition tables, volume groups and the like, by wipefs(8)'s names."""
    answer = call_json(["wipefs", "--json", "--no-act", "--", path])
    found = answer.get("signatures", []) if isinstance(answer, dict) else []
    kinds = [str(each.get("type")) for each in found if isinstance(each, dict)]
    return list(dict.fromkeys(kinds))


def check_empty(path: str) -> None:
    """StoragePoolBuilt if anything that is known is on the device."""
    found = signatures(path)
    if found:
        raise StoragePoolBuilt(
            f"Storage pool already built: device '{path}' already contains {', '.join(found[:4])}, forced overwrite is "
            "necessary",
            remedy="look at it first: lsblk -f; --overwrite destroys it",
        )
