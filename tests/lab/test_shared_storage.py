"""Two hosts with the same disks: OCFS2 on one, GFS2 on another, and NFS between them. What one host's machine has open,
the other host's is kept from, unless both share it or only read; until that host is dead, and known to be."""

from __future__ import annotations

import os
import signal
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
DEADLINE = 280.0  # seconds; about 65 on a quiet host


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
    a, b = hosts
    until(hosts, b.share / "dying")
    if (b.share / "dying").exists():
        os.kill(b.pid, signal.SIGKILL)
        until(hosts[:1], a.share / "fence")
        assert not b.alive
        assert not said_in(a, "went on"), "it did not wait until the other host was known to be dead"
        (a.share / "fenced").touch()
        done = [running[0].wait()]
    else:  # one of them has failed: both say so
        done = [each.wait() for each in running]
    for name, lab, one in zip(HOSTS, hosts, done, strict=False):
        assert one.code == 0 and one.stdout.endswith("well\n"), (
            f"{name}: {progress(lab)}\n{one.stdout}\n{one.stderr}\nthe other: {progress(b)}"
        )
    print(progress(a), progress(b))
    assert said_in(a, "went on")


def until(hosts: list[Lab], flag: Path) -> None:
    """A host has made it, or has ended."""
    end = time.monotonic() + DEADLINE
    while not flag.exists() and not any((lab.share / "ended").exists() for lab in hosts):
        assert time.monotonic() < end, [progress(lab) for lab in hosts]
        time.sleep(0.1)


def progress(lab: Lab) -> str:
    return (lab.share / "progress").read_text()


def said_in(lab: Lab, what: str) -> bool:
    return f" {what}\n" in progress(lab)
