"""Pools on real servers and devices: LVM with thin volumes, NFS (gone and back), SMB, iSCSI by the kernel, SCSI
hosts, multipath maps. One lab, one run of `storage_scenario.py`; a test for each of its scenes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from kvik.host.process import find_program
from lab.conftest import Labs
from lab.harness import REPOSITORY, LabOptions

MODULES = (
    "dm-mod", "dm-thin-pool", "dm-snapshot", "dm-multipath", "dm-round-robin", "nfsd", "nfsv4", "cifs", "ext4",
    "sd_mod", "iscsi_tcp", "iscsi_target_mod", "target_core_file", "scsi_debug",
)  # fmt: skip
TOOLS = ("lvs", "rpc.nfsd", "showmount", "iscsid", "smbd", "mount.cifs", "dmsetup")
SCENES = ("logical", "thin", "nfs", "iscsi", "scsi", "smb")
MIB = 1 << 20
DEADLINE = 240.0  # seconds of all scenes; about 50 on a quiet host


@pytest.fixture(scope="module")
def outcome(labs: Labs, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of every scene: what went wrong."""
    if gone := [tool for tool in TOOLS if find_program(tool) is None]:
        pytest.skip(f"not on this host: {', '.join(gone)}")
    disks = []
    for name in ("one", "two", "three"):
        disk = tmp_path_factory.mktemp("disks") / name
        with disk.open("wb") as file:
            file.truncate(256 * MIB)
        disks.append(disk)
    lab = labs.get(LabOptions(disks=tuple(disks), modules=MODULES, fresh=("/etc/lvm/archive", "/etc/lvm/backup")))
    lab.sh("ip link set lo up")
    script = Path(__file__).with_name("storage_scenario.py")
    # Into files: servers that the scenes start would keep a pipe open.
    words = [sys.executable, str(script), ">/run/lab/outcome", "2>/run/lab/errors", "</dev/null"]
    done = lab.run(["sh", "-c", " ".join(words)], timeout=DEADLINE, cwd=str(REPOSITORY))
    errors, text = (lab.share / "errors").read_text(), (lab.share / "outcome").read_text()
    labs.discard(lab)  # its servers and devices are nobody else's
    assert done.code == 0, errors
    print(errors)
    found: dict[str, str] = json.loads(text.splitlines()[-1])
    return found


@pytest.mark.lab(deadline=DEADLINE + 60)
@pytest.mark.parametrize("scene", SCENES)
def test_pools_on_real_storage(outcome: dict[str, str], scene: str) -> None:
    assert not outcome[scene], outcome[scene]
