"""A pool of images of a real Ceph cluster, by the daemon, and a machine that runs from them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvik.host.process import find_program

from .ceph_cluster import TOOLS
from .conftest import SOURCE

NAMESPACES = ("unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
TESTS = Path(__file__).parent.parent.parent
BLOCK = Path("/usr/lib/x86_64-linux-gnu/qemu/block-rbd.so")

pytestmark = [
    pytest.mark.skipif(os.getuid() != 0, reason="needs root"),
    pytest.mark.skipif(not Path("/dev/fuse").exists(), reason="needs /dev/fuse"),
    pytest.mark.skipif(not BLOCK.exists(), reason="needs QEMU's client of Ceph (apt install qemu-block-extra)"),
]


def test_a_pool_of_a_ceph_cluster(image: Any, tmp_path: Path) -> None:
    if gone := [tool for tool in TOOLS if find_program(tool) is None]:
        pytest.skip(f"not on this host: {', '.join(gone)} (apt install ceph-mon ceph-osd ceph-mgr ceph-common)")
    environ = {**os.environ, "PYTHONPATH": f"{SOURCE}:{TESTS}"}
    words = [*NAMESPACES, sys.executable, Path(__file__).with_name("ceph_host.py"), tmp_path / "root"]
    with (tmp_path / "said").open("wb") as said:  # what the scene starts would keep a pipe open
        done = subprocess.run(words, stdout=said, stderr=said, env=environ, check=False, timeout=300)
    text = (tmp_path / "said").read_text()
    print(text)
    assert done.returncode == 0 and text.endswith("well\n"), text
