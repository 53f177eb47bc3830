"""A stock Debian kernel on kvik-vmm whose network changes while it runs: link, tap, hot-plug, vsock."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lab.conftest import Labs
from lab.harness import REPOSITORY, Lab, LabOptions
from lab.vmm_guest import initramfs
from lab.vmm_net_live import SHELL

pytestmark = pytest.mark.lab(deadline=280)

NET = ("virtio_pci", "virtio_net")
VSOCK = ("virtio_pci", "vsock", "vmw_vsock_virtio_transport")


def compiled(tmp_path: Path, source: Path) -> bytes:
    if shutil.which("gcc") is None:
        pytest.skip("no gcc for the guest's program")
    out = tmp_path / "program"
    subprocess.run(["gcc", "-O2", "-static", "-o", out, source], check=True)
    return out.read_bytes()


def play(lab: Lab, scenario: str, *words: str) -> None:
    """Run a scenario inside the lab."""
    tree = f"PYTHONPATH={REPOSITORY}/src:{REPOSITORY}/tests"
    command = ["env", tree, sys.executable, "-m", "lab.vmm_net_scenarios", scenario, str(lab.kernel.image), *words]
    done = lab.run(command, timeout=200)
    assert done.code == 0 and f"{scenario}: well" in done.stdout, done.stdout[-6000:] + done.stderr[-3000:]


@pytest.mark.parametrize("options", ["vhost=off", "vhost=on"])
def test_link_down_and_up_and_a_tap_that_is_deleted(lab: Lab, options: str) -> None:
    lab.load("tun", "vhost_net")
    (lab.share / "initrd").write_bytes(initramfs(SHELL, NET))
    play(lab, "link_and_end", options)


def test_a_card_comes_and_goes_over_qmp(lab: Lab) -> None:
    lab.load("tun", "vhost_net")
    (lab.share / "initrd").write_bytes(initramfs(SHELL, NET))
    play(lab, "hot_plug", "on")


@pytest.mark.parametrize("kind", ["own", "vhost"])
def test_vsock(lab: Lab, tmp_path: Path, kind: str) -> None:
    lab.load("vhost_vsock")
    program = compiled(tmp_path, REPOSITORY / "tests/lab/vsock_guest.c")
    (lab.share / "initrd").write_bytes(initramfs(SHELL, VSOCK, {"vsock": program}))
    play(lab, "vsock", kind)


def test_small_round_trips_never_stall_on_a_saturated_host(labs: Labs, tmp_path: Path) -> None:
    """Four busy loops beside it; a round trip that gets no answer within a second counts as lost.

    On two CPUs: with one, the loops alone keep a thread from running for that long now and then.
    """
    lab = labs.get(LabOptions(vcpus=2))
    lab.load("tun")
    program = compiled(tmp_path, REPOSITORY / "benchmarks/vmm_net_guest.c")
    (lab.share / "load").write_bytes(program)
    (lab.share / "initrd").write_bytes(initramfs(SHELL, NET, {"load": program}))
    play(lab, "saturated", "3000")
