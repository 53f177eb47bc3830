"""Documents and the command lines of the daemons that serve their disks; images that are no image of one file."""

from __future__ import annotations

import itertools
import json
import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from kvik.conf.aliases import assign_aliases
from kvik.conf.devices.disk import Disk, IoTune
from kvik.errors import ConfigError, ConfigUnsupported, MissingPackages
from kvik.hypervisor.descriptors import Opened, open_disk
from kvik.hypervisor.sidecars import storage_daemon
from kvik.hypervisor.sidecars.group import Sidecars
from kvik.hypervisor.sidecars.storage_daemon import limits, served, storage_command
from kvik.vmm.sandbox import landlock
from unit.hypervisor.kvik.test_argv import DATA, complete

FDS = {"disk:virtio-disk0:0": 20, "disk:virtio-disk0:1": 21, "disk:virtio-disk1:0": 22}


@pytest.fixture
async def disks(monkeypatch: pytest.MonkeyPatch) -> list[Disk]:
    monkeypatch.setattr(storage_daemon, "program", lambda name: f"/usr/bin/{name}")
    domain = await complete((DATA / "other-formats.xml").read_text())
    assign_aliases(domain)
    return domain.devices.disks


def words(disk: Disk) -> tuple[list[str], list[str]]:
    """What the launcher gets, and what the daemon."""
    images = {name: fd for name, fd in FDS.items() if name.startswith(f"disk:{disk.alias and disk.alias.name}:")}
    command = storage_command(disk, images, life=30, monitor=31, export=32, vcpus=2)
    assert set(command.fds) == {30, 31, 32, *images.values()}
    split = list(command.argv).index("--")
    return list(command.argv[:split]), list(command.argv[split + 1 :])


def options(argv: list[str], name: str) -> list[dict[str, Any]]:
    return [json.loads(value) for option, value in itertools.pairwise(argv) if option == name]


async def test_a_chain_with_everything_said(disks: list[Disk]) -> None:
    launcher, daemon = words(disks[0])
    assert launcher[:3] == [sys.executable, "-I", "-S"] and launcher[3].endswith("/vmm/sandbox/launch.py")
    assert launcher[4:] == ["--life=30", "--write=20", "--read=21"]
    assert daemon[:5] == [
        *("/usr/bin/qemu-storage-daemon", "--chardev", "socket,id=monitor,fd=31,server=on,wait=off"),
        *("--monitor", "chardev=monitor"),
    ]
    base, base_format, top, top_format, drive = options(daemon, "--blockdev")
    cache = {"direct": True, "no-flush": False}
    assert base == {
        "driver": "file", "filename": "/proc/self/fd/21", "node-name": "virtio-disk0-1-storage", "aio": "native",
        "auto-read-only": True, "cache": cache, "discard": "unmap",
    }  # fmt: skip
    assert (base_format["driver"], base_format["backing"]) == ("vmdk", None)
    assert (top["filename"], top["read-only"]) == ("/proc/self/fd/20", False)
    assert top_format["backing"] == base_format["node-name"] and top_format["detect-zeroes"] == "unmap"
    assert (drive["driver"], drive["file"]) == ("throttle", top_format["node-name"])
    (group,) = options(daemon, "--object")
    assert group["id"] == drive["throttle-group"] == "virtio-disk0-limits"
    assert group["limits"]["bps-read"] == 1_000_000 and group["limits"]["iops-total-max"] == 400
    (export,) = options(daemon, "--export")
    assert export == {
        "type": "vhost-user-blk", "id": "virtio-disk0", "node-name": "virtio-disk0-drive", "writable": True,
        "writethrough": False, "num-queues": 3, "addr": {"type": "fd", "str": "32"},
    }  # fmt: skip


async def test_raw_on_request_is_locked_by_the_launcher(disks: list[Disk]) -> None:
    launcher, daemon = words(disks[1])
    assert launcher[4:] == ["--life=30", "--write=22", "--lock=22"]
    storage = options(daemon, "--blockdev")[0]
    assert storage["driver"] == "host_device" and storage["locking"] == "off"
    (export,) = options(daemon, "--export")
    assert export["writethrough"] and export["num-queues"] == 2
    disks[1].shareable = True
    assert "--lock=22" not in words(disks[1])[0]
    disks[1].readonly = True
    disks[1].shareable = False
    launcher, daemon = words(disks[1])
    assert launcher[5:] == ["--read=22", "--lock=22"] and not options(daemon, "--export")[0]["writable"]


async def test_which_disks_have_a_daemon_of_ours(disks: list[Disk]) -> None:
    assert [served(disk) for disk in disks] == [True, True, False, False]


def test_no_limit_is_said_as_zero_so_that_it_can_be_taken_back() -> None:
    assert set(limits(None).values()) == {0} and "bps-total" in limits(None)
    found = limits(IoTune(write_bytes_sec=5, write_bytes_sec_max=9, write_bytes_sec_max_length=3, size_iops_sec=4096))
    assert (found["bps-write"], found["bps-write-max"], found["bps-write-max-length"]) == (5, 9, 3)
    assert found["iops-size"] == 4096


async def test_a_missing_daemon_names_its_package_and_another_way(
    disks: list[Disk], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> str:
        raise MissingPackages(f"{name} is not installed", packages=("p",), remedy="install p")

    monkeypatch.setattr(storage_daemon, "program", missing)
    with pytest.raises(MissingPackages, match=r"disk vda \(qcow2\)") as refused:
        words(disks[0])
    assert refused.value.packages == ("p",)
    assert refused.value.remedy.startswith("install p; or convert it: qemu-img convert -f qcow2")


@pytest.mark.parametrize("head", [b"# Disk DescriptorFile\n", b"KDMV" + bytes(16), b"COWD" + bytes(40), b""])
async def test_a_vmdk_that_names_other_files_is_refused(disks: list[Disk], head: bytes, tmp_path: Path) -> None:
    """Before anything is started."""
    path = tmp_path / "disk.vmdk"
    path.write_bytes(head)
    disk = disks[1]
    assert disk.driver is not None
    disk.type, disk.source, disk.driver.type = "file", type(disks[0].source)(file=str(path)), "vmdk"
    with ExitStack() as close, ExitStack() as undo:
        opened = Opened(close, undo, {})
        open_disk(opened, disk)
        with pytest.raises(ConfigError, match="monolithicSparse"):
            storage_daemon.start(disk, tmp_path, opened, Sidecars("m"), vcpus=1, log_fd=2)
    assert [item.name for item in tmp_path.iterdir()] == ["disk.vmdk"]


async def test_a_layer_that_keeps_its_data_elsewhere_is_refused_wherever_it_is(
    disks: list[Disk], tmp_path: Path
) -> None:
    """The document's own chain is no reason to trust the header of its upper images."""
    header = bytearray(112)
    header[:8] = b"QFI\xfb\0\0\0\3"
    header[79] = 1 << 2  # incompatible feature: external data file
    (tmp_path / "top.qcow2").write_bytes(header)
    disk = disks[0]
    assert disk.source is not None and disk.driver is not None
    disk.source.file = str(tmp_path / "top.qcow2")
    with ExitStack() as close, ExitStack() as undo, pytest.raises(ConfigUnsupported, match="data in another file"):
        open_disk(Opened(close, undo, {}), disk)


def launched(*words: str, fds: tuple[int, ...] = ()) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-I", "-S", str(storage_daemon._LAUNCHER), *words]
    return subprocess.run(argv, pass_fds=fds, capture_output=True, text=True, timeout=30, check=False)


@pytest.mark.skipif(not landlock.abi(), reason="needs a kernel with Landlock")
def test_the_launcher_leaves_only_what_was_passed(tmp_path: Path) -> None:
    mine, other = tmp_path / "mine", tmp_path / "other"
    mine.write_text("passed\n")
    other.write_text("not passed\n")
    ours, theirs = socket.socketpair()
    with ours, theirs, mine.open() as file:
        words = [f"--life={theirs.fileno()}", f"--read={file.fileno()}", "--", "/bin/sh", "-c"]
        fds = (theirs.fileno(), file.fileno())
        script = (
            f"cat /proc/self/fd/{file.fileno()}; cat {other}; echo x > /proc/self/fd/{file.fileno()}; echo x > {other}"
        )
        done = launched(*words, script, fds=fds)
        grep = launched(*words, "grep -e NoNewPrivs -e CapBnd /proc/$$/status; echo", fds=fds)
    assert done.stdout == "passed\n"
    assert done.stderr.lower().count("permission denied") == 3
    assert other.read_text() == "not passed\n"
    assert "NoNewPrivs:\t1" not in grep.stdout  # /proc is closed to it as well


def test_the_launchers_program_ends_with_its_life_line() -> None:
    ours, theirs = socket.socketpair()
    argv = [sys.executable, "-I", "-S", str(storage_daemon._LAUNCHER), f"--life={theirs.fileno()}", "--"]
    process = subprocess.Popen([*argv, "/bin/sleep", "100"], pass_fds=(theirs.fileno(),))
    theirs.close()
    while Path(f"/proc/{process.pid}/comm").read_text() != "sleep\n":
        assert process.poll() is None
        os.sched_yield()
    ours.close()
    assert process.wait(30) == -15


def test_a_life_line_that_was_cut_before_ends_the_launcher() -> None:
    ours, theirs = socket.socketpair()
    ours.close()
    with theirs:
        done = launched(f"--life={theirs.fileno()}", "--", "/bin/echo", "ran", fds=(theirs.fileno(),))
    assert done.returncode == 1 and done.stdout == ""
    assert "has ended" in done.stderr
