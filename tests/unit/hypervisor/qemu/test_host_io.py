"""Which images QEMU is to read through io_uring: files of local file systems, where the kernel and QEMU have it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest

from kvik.host import facilities, filesystem
from kvik.host.facilities import Facility
from kvik.hypervisor.qemu import host_io
from kvik.hypervisor.qemu.argv.build import build
from kvik.hypervisor.qemu.capabilities import QemuCapabilities

sys.path.insert(0, str(Path(__file__).parent))
from golden import capabilities, complete_domain

DOCUMENT = """<domain type='qemu'><name>one</name><memory>65536</memory>
<os><type arch='x86_64' machine='q35'>hvm</type></os><devices>
<disk type='file' device='disk'><driver name='qemu' type='raw'{io}/><source file='/images/a.raw'/>
<target dev='vda' bus='virtio'/></disk></devices></domain>"""
IMAGE = "disk:virtio-disk0:0"


@pytest.fixture
def fds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """An image, a device, and a file that is no disk; the kernel has io_uring, the file system is ext4."""
    monkeypatch.setattr(facilities, "io_uring", lambda: Facility(0xFFFF))
    monkeypatch.setattr(filesystem, "type_name", lambda fd: "ext4")
    paths = {IMAGE: tmp_path / "image", "disk:virtio-disk1:0": Path("/dev/null"), "log:serial0": tmp_path / "log"}
    with ExitStack() as close:
        opened = {name: os.open(path, os.O_RDWR | os.O_CREAT) for name, path in paths.items()}
        for fd in opened.values():
            close.callback(os.close, fd)
        yield opened


def having(*, io_uring: bool) -> QemuCapabilities:
    return msgspec.structs.replace(capabilities(), io_uring=io_uring)


def test_a_file_is_and_a_device_is_not(fds: dict[str, int]) -> None:
    assert host_io.by_io_uring(having(io_uring=True), fds) == {IMAGE}


@pytest.mark.parametrize("name", ["nfs4", "cifs", "fuse.sshfs", "zfs", ""])
def test_not_on_other_file_systems(fds: dict[str, int], monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(filesystem, "type_name", lambda fd: name)
    assert not host_io.by_io_uring(having(io_uring=True), fds)


def test_not_where_qemu_has_none(fds: dict[str, int]) -> None:
    assert not host_io.by_io_uring(having(io_uring=False), fds)


@pytest.mark.parametrize(
    "kernel", [Facility(0, "it is switched off"), Facility(host_io.IORING_FEAT_NATIVE_WORKERS - 1)]
)
def test_not_where_the_kernel_forbids_it_or_is_too_old(
    fds: dict[str, int], monkeypatch: pytest.MonkeyPatch, kernel: Facility
) -> None:
    monkeypatch.setattr(facilities, "io_uring", lambda: kernel)
    assert not host_io.by_io_uring(having(io_uring=True), fds)


@pytest.mark.parametrize(("written", "chosen"), [("", "io_uring"), (" io='threads'", "threads")])
def test_the_document_has_the_last_word(written: str, chosen: str) -> None:
    known = having(io_uring=True)
    domain = complete_domain(DOCUMENT.format(io=written), known)
    argv = build(domain, known, {IMAGE: 30}, by_io_uring={IMAGE}).argv
    nodes = [json.loads(argv[place + 1]) for place, word in enumerate(argv) if word == "-blockdev"]
    assert [node["aio"] for node in nodes if node["driver"] == "file"] == [chosen]
    assert "io_uring" not in json.dumps([node for node in nodes if node["driver"] != "file"])


def test_the_file_system_is_found_by_its_mount(tmp_path: Path) -> None:
    with (tmp_path / "image").open("wb") as file:
        assert filesystem.type_name(file.fileno()) in Path("/proc/filesystems").read_text().split()
    read, write = os.pipe()
    try:
        assert filesystem.type_name(read) == ""
    finally:
        os.close(read)
        os.close(write)


def test_what_the_kernel_says_of_itself() -> None:
    """On any kernel that has it at all, the features that every one since 5.4 has."""
    found = facilities.io_uring()
    assert not found or found.value & 1, found  # IORING_FEAT_SINGLE_MMAP
