"""Pools on real servers, each in namespaces of its own: nothing of it is seen from outside, and all ends with it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import kvik
from kvik.host.process import find_program

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="needs root")
NAMESPACES = ("unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")


def play(scenario: str, directory: Path, *tools: str) -> None:
    if gone := [tool for tool in ("unshare", *tools) if find_program(tool) is None]:
        pytest.skip(f"not on this host: {', '.join(gone)}")
    script = Path(__file__).with_name(scenario)
    environ = {**os.environ, "PYTHONPATH": str(Path(kvik.__file__).parent.parent)}
    words = [*NAMESPACES, sys.executable, script, directory / "root"]
    # Into a file: what the scenario starts would keep a pipe open.
    with (directory / "said").open("wb") as said:
        done = subprocess.run(words, stdout=said, stderr=said, env=environ, check=False, timeout=120)
    text = (directory / "said").read_text()
    assert done.returncode == 0 and text.endswith("well\n"), text


@pytest.mark.skipif(not Path("/dev/fuse").exists(), reason="needs /dev/fuse")
def test_a_gluster_server(tmp_path: Path) -> None:
    play("gluster_host.py", tmp_path, "glusterd", "gluster", "mount.glusterfs")


@pytest.mark.skipif(not Path("/dev/fuse").exists(), reason="needs /dev/fuse")
def test_an_iscsi_target(tmp_path: Path) -> None:
    play("iscsi_host.py", tmp_path, "tgtd", "tgtadm", "iscsi-ls", "qemu-img", "qemu-storage-daemon")
