"""The host's storage tools: found, run without a shell, with a deadline; their JSON read as what a stranger says."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvik.errors import HostError, MissingPackages
from kvik.host.process import BASE_ENVIRONMENT, describe_exit, find_program
from kvik.host.tools import Completed, run

__all__ = ["PACKAGES", "call", "call_json", "missing", "number", "read_json"]

DEADLINE = 60.0  # seconds
OUTPUT_LIMIT = 16 << 20  # bytes: lists of VOLUMES_MAX volumes fit
# The Debian package that each tool comes with.
PACKAGES = {
    "blkid": "util-linux", "wipefs": "util-linux", "mount": "mount", "umount": "mount", "sfdisk": "fdisk",
    "mkfs.ext2": "e2fsprogs", "mkfs.ext3": "e2fsprogs", "mkfs.ext4": "e2fsprogs", "mkfs.xfs": "xfsprogs",
    "mkfs.btrfs": "btrfs-progs", "mkfs.vfat": "dosfstools", "mkfs.ocfs2": "ocfs2-tools",
    "mount.nfs": "nfs-common", "showmount": "nfs-common", "mount.cifs": "cifs-utils",
    "mount.glusterfs": "glusterfs-client", "gluster": "glusterfs-cli",
    "lvs": "lvm2", "vgs": "lvm2", "pvs": "lvm2", "vgcreate": "lvm2", "vgremove": "lvm2", "vgchange": "lvm2",
    "pvremove": "lvm2", "lvcreate": "lvm2", "lvremove": "lvm2", "lvresize": "lvm2",
    "iscsiadm": "open-iscsi", "iscsi-ls": "libiscsi-bin", "iscsi-readcapacity16": "libiscsi-bin",
    "qemu-img": "qemu-utils", "qemu-storage-daemon": "qemu-system-common", "rbd": "ceph-common", "ceph": "ceph-common",
    "zfs": "zfsutils-linux", "zpool": "zfsutils-linux",
}  # fmt: skip


def missing(*tools: str) -> str:
    """The first package whose tool is not on this host; "" if all are."""
    return next((PACKAGES.get(tool, tool) for tool in tools if find_program(tool) is None), "")


def call(
    argv: Sequence[str],
    *,
    input: bytes = b"",
    env: Mapping[str, str] | None = None,
    timeout: float = DEADLINE,
    pass_fds: Sequence[int] = (),
    check: bool = True,
) -> Completed:
    """Run one. MissingPackages if it is not there, HostError with its own words if it fails, OperationTimeout."""
    tool = argv[0]
    if "/" not in tool and find_program(tool) is None:
        package = PACKAGES.get(tool, tool)
        raise MissingPackages(
            f"{tool} is not on this host",
            packages=(package,),
            command=f"apt-get install --no-install-recommends {package}",
        )
    environment = {**BASE_ENVIRONMENT, **(env or {})}
    return run(argv, input=input, env=environment, timeout=timeout, limit=OUTPUT_LIMIT, pass_fds=pass_fds, check=check)


def call_json(argv: Sequence[str], **options: Any) -> Any:
    """The same, and what it printed."""
    return read_json(call(argv, **options))


def read_json(done: Completed) -> Any:
    """HostError with the tool's own words if it failed, and if that is not JSON."""
    name = Path(done.argv[0]).name
    if done.code != 0:
        raise HostError(f"{name} failed ({describe_exit(done.code)}): {done.message}")
    try:
        return json.loads(done.out or b"null")
    except (ValueError, RecursionError) as error:
        raise HostError(f"{name} did not answer in JSON: {error}") from error


def number(value: Any) -> int:
    """A size or count as tools give it, a number or its decimal digits, in bytes; anything else counts as 0."""
    text = str(value).strip().removesuffix("B")
    whole = text.partition(".")[0]
    return int(whole) if whole.isascii() and whole.isdecimal() and len(whole) < 20 else 0
