"""Two hosts with the same disks: OCFS2 on one, GFS2 on another, and NFS between them. What one host's machine has open,
the other host's is kept from, unless both share it or only read."""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from kvik.host.process import find_program
from lab import gfs2_cluster
from lab.conftest import Labs
from lab.harness import REPOSITORY, Lab, LabOptions
from lab.shared_host import DISKS, HOSTS

MODULES = ("virtio_blk", "ocfs2", "ocfs2_stack_o2cb", "ocfs2_dlm", "nfsd", "nfsv4", *gfs2_cluster.MODULES)
TOOLS = ("mkfs.ocfs2", "o2cb", "rpc.nfsd", *gfs2_cluster.TOOLS)
DEADLINE = 280.0  # seconds; about 35 on a quiet host


def options(disks: list[Path], network: socket.socket) -> LabOptions:
    shared: list[str] = []
    for number, disk in enumerate(disks):
        drive = f"file={disk},format=raw,if=none,id=shared{number},cache=unsafe,file.locking=off"
        shared += ("-drive", drive, "-device", f"virtio-blk-pci,drive=shared{number},share-rw=on")
    return LabOptions(
        memory_mib=1024,
        modules=MODULES,
        nics=(f"socket,fd={network.fileno()}",),
        pass_fds=(network.fileno(),),
        arguments=tuple(shared),
    )


@pytest.fixture
def hosts(labs: Labs, tmp_path: Path) -> Iterator[list[Lab]]:
    if gone := [tool for tool in TOOLS if find_program(tool) is None]:
        pytest.skip(f"not on this host: {', '.join(gone)}")
    disks = [tmp_path / f"disk{number}" for number in range(len(DISKS))]
    for disk in disks:
        with disk.open("wb") as file:
            file.truncate(256 << 20)
    with ExitStack() as stack:
        ends = [stack.enter_context(end) for end in socket.socketpair()]
        made = labs.beside(*(options(disks, end) for end in ends))
        for lab in made:
            stack.callback(labs.discard, lab)
        yield made


@pytest.mark.lab(deadline=DEADLINE)
def test_two_hosts_and_one_disk(hosts: list[Lab]) -> None:
    tree = f"{REPOSITORY}/src:{REPOSITORY}/tests"
    running = [
        lab.spawn([sys.executable, "-m", "lab.shared_host", name], 3 * DEADLINE, {"PYTHONPATH": tree})
        for name, lab in zip(HOSTS, hosts, strict=True)
    ]
    formatted = [lab.share / "formatted" for lab in hosts]
    end = time.monotonic() + 90
    while not formatted[0].exists() and time.monotonic() < end:
        time.sleep(0.1)
    formatted[1].touch()
    done = [each.wait() for each in running]
    for name, lab, one in zip(HOSTS, hosts, done, strict=True):
        progress = (lab.share / "progress").read_text()
        print(name, progress)
        assert one.code == 0 and one.stdout.endswith("well\n"), f"{name}: {progress}\n{one.stdout}\n{one.stderr}"
