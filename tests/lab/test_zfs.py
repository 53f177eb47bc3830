"""Pools of type zfs on a real ZFS: Debian's kernel has none of its modules; `scripts/lab-zfs` builds them once."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from kvik.host.process import find_program
from lab.conftest import Labs
from lab.harness import REPOSITORY, LabOptions, LabUnavailable
from lab.kernel import cache_directory, ensure_kernel

MIB = 1 << 20
DEADLINE = 240.0
MODULES = ("spl", "znvpair", "zavl", "zunicode", "zcommon", "zlua", "icp", "zzstd", "zfs")  # each after what it needs
UDEV = "/lib/systemd/systemd-udevd"


def built() -> Path:
    """ZFS for the lab's kernel: `modules/*.ko`, and its tools below `root/`."""
    try:
        kernel = ensure_kernel()
    except LabUnavailable as error:
        pytest.skip(f"no lab: {error}")
    directory = cache_directory() / f"zfs-{kernel.version}"
    if not directory.is_dir():
        pytest.skip(f"no ZFS for the lab's kernel {kernel.version}: scripts/lab-zfs builds it, in some ten minutes")
    return directory


@pytest.mark.lab(deadline=DEADLINE + 60)
def test_pools_on_zfs(labs: Labs, tmp_path: Path) -> None:
    zfs = built()
    if not Path(UDEV).exists() or find_program("udevadm") is None:
        pytest.skip("needs udev (apt install udev)")
    disk = tmp_path / "disk"
    with disk.open("wb") as file:
        file.truncate(512 * MIB)
    lab = labs.get(LabOptions(disks=(disk,), modules=("ext4",)))
    try:
        shutil.copytree(zfs, lab.share / "zfs", symlinks=True)
        lab.sh("ip link set lo up; cp -a /run/lab/zfs/root/. /; ldconfig")
        lab.sh(f"for name in {' '.join(MODULES)}; do insmod /run/lab/zfs/modules/$name.ko; done")
        lab.sh(f"{UDEV} --daemon; udevadm trigger; udevadm settle")
        words = [sys.executable, "-m", "lab.zfs_scenario"]
        source = f"{REPOSITORY}/src:{REPOSITORY}/tests"
        done = lab.run(words, timeout=DEADLINE, env={"PYTHONPATH": source}, cwd=str(REPOSITORY)).check()
        assert done.stdout.endswith("well\n"), done
    finally:
        labs.discard(lab)
