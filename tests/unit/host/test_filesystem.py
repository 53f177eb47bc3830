"""Which file systems other hosts share, and whether locks reach those."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvik.host import filesystem

LINE = "44 29 {device} / {path} rw,relatime{more} - {type} server:/export rw,{options}\n"
CASES = [
    ("nfs", "nfs4", "vers=4.2,local_lock=none", ""),
    ("nfs", "nfs", "vers=3,nolock,local_lock=none", "it is mounted with nolock"),
    ("nfs", "nfs", "vers=3,local_lock=all", "it is mounted with local_lock=all"),
    ("nfs", "nfs", "vers=3,local_lock=posix", "it is mounted with local_lock=posix"),
    ("nfs", "nfs", "vers=3,local_lock=flock", ""),
    ("cifs", "cifs", "vers=3.1.1,nobrl", "it is mounted with nobrl"),
    ("cifs", "cifs", "vers=3.1.1", "SMB has no locks of this kind"),
    ("gfs2", "gfs2", "lockproto=lock_nolock", "it is mounted with lockproto=lock_nolock"),
    ("gfs2", "gfs2", "", ""),
    ("ocfs2", "ocfs2", "heartbeat=local,cluster_stack=o2cb", ""),
    ("ocfs2", "ocfs2", "heartbeat=local,localflocks", "it is mounted with localflocks"),
    ("lustre", "lustre", "flock,lazystatfs", ""),
    ("lustre", "lustre", "lazystatfs", "it is mounted without flock"),
    ("afs", "afs", "", "AFS locks whole files only"),
    ("ceph", "ceph", "acl", ""),
    ("", "ext4", "nolock", ""),
]


@pytest.mark.parametrize("case", CASES)
def test_whether_locks_reach_other_hosts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: tuple[str, str, str, str]
) -> None:
    name, kind, options, why = case
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        device = f"{os.major(os.fstat(fd).st_dev)}:{os.minor(os.fstat(fd).st_dev)}"
        mounts = tmp_path / "mounts"
        mounts.write_text(
            LINE.format(device="0:999", path="/other", more="", type="nfs", options="nolock")
            + LINE.format(device=device, path="/srv/x\\040y", more=" shared:5", type=kind, options=options)
        )
        monkeypatch.setattr(filesystem, "MOUNTS", str(mounts))
        monkeypatch.setattr(filesystem, "shared_as", lambda fd: name)
        assert filesystem.locks_stay_here(fd) == why
    finally:
        os.close(fd)


def test_a_file_system_of_this_host_is_not_shared(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        assert filesystem.shared_as(fd) == "" == filesystem.locks_stay_here(fd)
    finally:
        os.close(fd)
