"""Pools on real servers and devices: LVM with thin volumes, NFS (gone and back), SMB, iSCSI by the kernel, SCSI
hosts, multipath maps. Two labs beside each other, a run of `storage_scenario.py` in each; a test for each scene.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from kvik.host.process import find_program
from lab.conftest import Labs
from lab.harness import REPOSITORY, LabOptions

# One lab for each: the scenes of a lab share its only CPU. The modules that they need.
LABS = {
    ("logical", "thin", "scsi"): (
        "dm-mod", "dm-thin-pool", "dm-snapshot", "dm-multipath", "dm-round-robin", "ext4", "sd_mod", "scsi_debug",
    ),
    ("nfs", "iscsi", "smb"): (
        "nfsd", "nfsv4", "cifs", "ext4", "sd_mod", "iscsi_tcp", "iscsi_target_mod", "target_core_file",
    ),
}  # fmt: skip
TOOLS = ("lvs", "rpc.nfsd", "showmount", "iscsid", "smbd", "mount.cifs", "dmsetup")
SCENES = tuple(scene for scenes in LABS for scene in scenes)
MIB = 1 << 20
DEADLINE = 240.0  # seconds of all scenes; about 35 on a quiet host


def options(place: Path, modules: tuple[str, ...]) -> LabOptions:
    disks = (place / "one", place / "two")
    for disk in disks:
        with disk.open("wb") as file:
            file.truncate(256 * MIB)
    return LabOptions(disks=disks, modules=modules, fresh=("/etc/lvm/archive", "/etc/lvm/backup"))


@pytest.fixture(scope="module")
def outcome(labs: Labs, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of every scene: what went wrong."""
    if gone := [tool for tool in TOOLS if find_program(tool) is None]:
        pytest.skip(f"not on this host: {', '.join(gone)}")
    made = labs.beside(*(options(tmp_path_factory.mktemp("disks"), modules) for modules in LABS.values()))
    script = Path(__file__).with_name("storage_scenario.py")
    running = []
    for lab, scenes in zip(made, LABS, strict=True):
        # Into files: servers that the scenes start would keep a pipe open.
        words = ["exec", sys.executable, str(script), *scenes, ">/run/lab/outcome", "2>/run/lab/errors", "</dev/null"]
        running.append(lab.spawn(["sh", "-c", " ".join(words)], timeout=DEADLINE, cwd=str(REPOSITORY)))
    found: dict[str, str] = {}
    for lab, each in zip(made, running, strict=True):
        code = each.wait().code
        errors, text = (lab.share / "errors").read_text(), (lab.share / "outcome").read_text()
        assert code == 0, errors
        print(errors)
        found |= json.loads(text.splitlines()[-1])
    labs.close()  # their servers and devices are nobody else's
    return found


@pytest.mark.lab(deadline=DEADLINE + 60)
@pytest.mark.parametrize("scene", SCENES)
def test_pools_on_real_storage(outcome: dict[str, str], scene: str) -> None:
    assert not outcome[scene], outcome[scene]
