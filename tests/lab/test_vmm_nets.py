"""kvik-vmm's network devices with what only the lab's kernel has: vhost-net and vhost-vsock."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.lab(deadline=300)

REPOSITORY = Path(__file__).resolve().parents[2]


def run_inside(lab, *arguments):
    """Run a test file in the lab, where nothing of it may be skipped."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-ra", *arguments]
    done = lab.run(
        ["env", f"PYTHONPATH={REPOSITORY}/src", "sh", "-c", 'cd "$0" && exec "$@"', str(REPOSITORY), *command],
        timeout=280,
    )
    assert done.code == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout, done.stdout[-3000:]
    return done.stdout


def test_the_datapath_in_the_kernel(lab):
    """Both datapaths on a real tap, the same tests: frames, merging, pause, dirty log, link, a tap that is deleted."""
    lab.load("tun", "vhost_net", "af_packet")
    # Twenty machines one after the other run on the host; nested they take minutes.
    run_inside(lab, "tests/functional/vmm/test_net_kernel.py", "-k", "not twenty_machines")


def test_vsock_in_the_kernel(lab):
    lab.load("vhost_vsock", "vsock_loopback")
    run_inside(lab, "tests/functional/vmm/test_vsock_kernel.py")
