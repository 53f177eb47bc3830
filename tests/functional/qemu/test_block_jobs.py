"""Block jobs of a real QEMU: each kind run to its end, cancelled, refused, failed, and found by another daemon."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvik.errors import MonitorError, OperationFailed, OperationInvalid, OperationTimeout
from kvik.hypervisor.qemu import block_jobs
from kvik.hypervisor.qemu.block_jobs import Job, find_job, run_job
from kvik.hypervisor.qemu.machine import QemuMachine

sys.path.insert(0, str(Path(__file__).parent))
from test_machine import disk, document

SIZE = 4 << 20


def image(path: Path, *options: str, data: bytes = b"", size: int = SIZE) -> Path:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *options, str(path), str(size)], check=True)
    if data:
        write = f"write -P 0x{data.hex()} 0 {size}"
        subprocess.run(["qemu-io", "-f", "qcow2", "-c", write, str(path)], check=True, capture_output=True)
    return path


@pytest.fixture
async def machine(lab: Any, place: Path) -> QemuMachine:
    """vda: base <- middle <- top; vdb: a full image; vdc: an image that QEMU finds no room to copy."""
    base = image(place / "base.qcow2", data=b"a")
    middle = image(place / "middle.qcow2", "-b", str(base), "-F", "qcow2", data=b"b")
    top = image(place / "top.qcow2", "-b", str(middle), "-F", "qcow2")
    full = image(place / "full.qcow2", data=b"f")
    started: QemuMachine = await lab.start(document(disk(top) + disk(full, "vdb")), paused=True)
    return started


async def add_target(machine: QemuMachine, path: Path, name: str, **more: Any) -> None:
    image(path)
    file = {"driver": "file", "filename": str(path)}
    await machine.execute("blockdev-add", {"driver": "qcow2", "node-name": name, "file": file, "backing": None, **more})


async def make_writable(machine: QemuMachine, name: str, path: Path) -> None:
    sets = await machine.execute("query-fdsets")
    (number,) = [item["fdset-id"] for item in sets if name in [fd.get("opaque") for fd in item["fds"]]]
    fd = os.open(path, os.O_RDWR)
    await machine.execute("add-fd", {"fdset-id": number, "opaque": name}, fds=[fd])
    os.close(fd)


async def drive_node(machine: QemuMachine, alias: str) -> str:
    for item in await machine.execute("query-block"):
        if item["qdev"].startswith(f"/machine/peripheral/{alias}/"):
            return str(item["inserted"]["node-name"])
    raise AssertionError(alias)


async def test_each_kind_runs_to_its_end(machine: QemuMachine, place: Path) -> None:
    seen: list[Job] = []
    alias = "virtio-disk0"
    nodes = [f"{alias}-{number}-format" for number in (2, 3, 4)]
    # The middle into the base, while the top stays where it is.
    await make_writable(machine, f"disk:{alias}:2", place / "base.qcow2")
    lower = {"device": nodes[0], "top-node": nodes[1], "base-node": nodes[2]}
    job = await run_job(machine, "commit-vda", "block-commit", lower, progress=seen.append)
    assert (job.type, job.status, job.error) == ("commit", "concluded", "")
    assert job.current == job.total == SIZE == seen[-1].current
    # What is below into the top.
    await run_job(machine, "pull-vda", "block-stream", {"device": nodes[0]})
    # The top of a chain (an active commit) and a copy become ready, and are completed.
    await add_target(machine, place / "copy.qcow2", "copy")
    mirror = {"device": "virtio-disk1-1-format", "target": "copy", "sync": "full"}
    job = await run_job(machine, "copy-vdb", "blockdev-mirror", mirror, progress=seen.append)
    assert job.type == "mirror" and any(item.id == "copy-vdb" for item in seen)
    assert await drive_node(machine, "virtio-disk1") == "copy"
    assert await block_jobs.list_jobs(machine) == {}  # each was dismissed
    await machine.quit()
    for name, byte in (("base", "62"), ("top", "62"), ("copy", "66")):
        reads = f"read -P 0x{byte} 0 {SIZE}"
        path = str(place / f"{name}.qcow2")
        result = subprocess.run(
            ["qemu-io", "-f", "qcow2", "-c", reads, path], check=False, capture_output=True, text=True
        )
        assert "verification failed" not in result.stdout and result.returncode == 0, result.stdout


async def test_what_cannot_be_done_is_said(machine: QemuMachine, place: Path) -> None:
    with pytest.raises(MonitorError, match="nowhere"):
        await run_job(machine, "copy-vdb", "blockdev-mirror", {"device": "nowhere", "target": "x", "sync": "full"})
    assert await block_jobs.list_jobs(machine) == {}
    # A target whose writes fail.
    with (place / "bad.raw").open("wb") as raw:
        raw.truncate(SIZE)
    no_space = {"event": "write_aio", "errno": 28, "once": False, "immediately": True}
    file = {"driver": "file", "filename": str(place / "bad.raw")}
    bad = {"driver": "blkdebug", "node-name": "bad-file", "image": file, "inject-error": [no_space]}
    await machine.execute("blockdev-add", bad)
    await machine.execute("blockdev-add", {"driver": "raw", "node-name": "bad", "file": "bad-file"})
    mirror = {"device": "virtio-disk1-1-format", "target": "bad", "sync": "full"}
    with pytest.raises(OperationFailed, match=r"copy-vdb failed: .*(No space|size)"):
        await run_job(machine, "copy-vdb", "blockdev-mirror", mirror)
    assert await block_jobs.list_jobs(machine) == {}
    assert await drive_node(machine, "virtio-disk1") == "virtio-disk1-1-format"
    # Too slow: cancelled at the deadline, and nothing stays.
    await add_target(machine, place / "slow.qcow2", "slow")
    mirror |= {"target": "slow", "speed": 65536}
    with pytest.raises(OperationTimeout, match="was cancelled"):
        await run_job(machine, "copy-vdb", "blockdev-mirror", mirror, deadline=0.3)
    assert await block_jobs.list_jobs(machine) == {}
    # Cancelled by somebody else: whoever ran it is told.
    running = asyncio.create_task(run_job(machine, "copy-vdb", "blockdev-mirror", mirror))
    while await find_job(machine, "copy-vdb") is None:
        await asyncio.sleep(0.01)
    await block_jobs.cancel_job(machine, "copy-vdb")
    with pytest.raises(OperationFailed, match="cancel"):
        await running
    # The machine ends amid a job.
    running = asyncio.create_task(run_job(machine, "copy-vdb", "blockdev-mirror", mirror))
    while await find_job(machine, "copy-vdb") is None:
        await asyncio.sleep(0.01)
    await machine.quit(0)
    with pytest.raises(OperationInvalid, match="not running"):
        await running


async def test_the_next_daemon_goes_on_with_a_job(lab: Any, machine: QemuMachine, place: Path) -> None:
    await add_target(machine, place / "copy.qcow2", "copy")
    mirror = {"device": "virtio-disk1-1-format", "target": "copy", "sync": "full", "speed": 65536}
    running = asyncio.create_task(run_job(machine, "copy-vdb", "blockdev-mirror", mirror))
    while await find_job(machine, "copy-vdb") is None:
        await asyncio.sleep(0.01)
    running.cancel()  # as a daemon that ends does
    with contextlib.suppress(asyncio.CancelledError):
        await running
    handle, domain = machine.handle(), machine.domain
    machine.detach()
    found = await lab.driver.attach(domain, lab.directory, handle, lab.events.append)
    assert isinstance(found, QemuMachine)
    lab.machines.append(found)
    job = await find_job(found, "copy-vdb")
    assert job is not None and job.status == "running" and job.total == SIZE
    await block_jobs.set_job_speed(found, "copy-vdb", 0)
    await run_job(found, "copy-vdb", "blockdev-mirror", mirror)
    assert await drive_node(found, "virtio-disk1") == "copy"
    # One that ended while no daemon was there waits with its result.
    await add_target(found, place / "again.qcow2", "again")
    await block_jobs.start_job(found, "pull-vda", "block-stream", {"device": "virtio-disk0-2-format"})
    await block_jobs.conclude(found, "pull-vda")
    assert (await run_job(found, "pull-vda", "block-stream", {})).current > 0
    assert await block_jobs.list_jobs(found) == {}
