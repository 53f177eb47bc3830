"""Pools of type fs: a formatted device, mounted where the pool's target says."""

from __future__ import annotations

import os

from kvik.errors import ConfigUnsupported
from kvik.host.files import identify
from kvik.storage import mounts
from kvik.storage.mounted import MountedBackend
from kvik.storage.signatures import check_empty, check_free
from kvik.storage.tool import call

__all__ = ["Backend"]

# How each tool is told that the device may hold something: what was there has been looked at before.
FORCE = {
    "ext2": ("-F", "-q"), "ext3": ("-F", "-q"), "ext4": ("-F", "-q"), "xfs": ("-f", "-q"), "btrfs": ("-f", "-q"),
    "vfat": ("-I",), "ocfs2": ("-F", "-q"),
}  # fmt: skip
KERNEL_NAMES = {"auto": "", "hfs+": "hfsplus"}
MAKING = 600.0  # seconds: the tables of a large file system


class Backend(MountedBackend):
    type = "fs"

    @property
    def device(self) -> str:
        return self.document.origin.device

    def is_ours(self, found: mounts.Mount) -> bool:
        identity = identify(self.device)
        if identity is None:
            return False
        number = f"{os.major(identity[1])}:{os.minor(identity[1])}"
        # btrfs has numbers of its own: there the name that was mounted tells.
        return found.device == number or identify(found.source) == identity

    def attach(self) -> None:
        check_free(self.device)
        kind = self.document.format
        mounts.mount(self.device, self.document.path, KERNEL_NAMES.get(kind, kind), self.options)

    def build(self, *, overwrite: bool = False, no_overwrite: bool = False) -> None:
        """Without a flag only the directory is made; `no_overwrite` formats a device that holds nothing, `overwrite`
        any that is not in use."""
        if overwrite or no_overwrite:
            kind = self.document.format
            if kind == "gfs2":
                raise ConfigUnsupported(
                    "a file system of format gfs2 is made for the hosts of one cluster, which the pool does not name",
                    path="/pool/source/format/@type",
                    remedy=f"make it with mkfs.gfs2 -p lock_dlm -t CLUSTER:NAME -j HOSTS {self.device}",
                )
            if kind not in FORCE:
                raise ConfigUnsupported(
                    f"a file system of format {kind} cannot be made here",
                    path="/pool/source/format/@type",
                    remedy=f"known are {', '.join(FORCE)}",
                )
            check_free(self.device)
            if no_overwrite:
                check_empty(self.device)
            call([f"mkfs.{kind}", *FORCE[kind], "--", self.device], timeout=MAKING)
        self.make_directory()
