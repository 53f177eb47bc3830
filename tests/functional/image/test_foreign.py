"""vmdk, vdi, vpc, vhdx and OVA are read by a confined qemu-img: what they refer to is out of its reach."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from functional.image.conftest import Done, assert_clean, kvik_img, qemu_img
from functional.image.test_convert import assert_same_data, mixed
from kvik.host.jail import run_jailed
from kvik.vmm.sandbox import landlock

pytestmark = pytest.mark.skipif(not landlock.abi(), reason="needs a kernel with Landlock")

SECRET = b"the secret of the host\n" * 100


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return mixed(tmp_path / "source.raw", 5 << 20)


@pytest.mark.parametrize("format", ["vmdk", "vdi", "vpc", "vhdx"])
def test_images_of_others_come_in(tmp_path: Path, raw: Path, format: str, same: Callable[..., Done]) -> None:
    theirs, ours = tmp_path / f"a.{format}", tmp_path / "ours.qcow2"
    words = ["-o", "force_size=on"] if format == "vpc" else []
    assert qemu_img("convert", "-O", format, *words, raw, theirs).code == 0
    same("info", theirs)
    same("info", "--output=json", "-f", format, theirs)
    same("info", "--output=json", "--backing-chain", theirs)
    done = kvik_img("convert", "-c", "-O", "qcow2", theirs, ours)
    assert done.code == 0, done.err
    assert_same_data(ours, raw)
    assert_clean(ours)
    same("compare", theirs, raw)
    figures = [run("measure", "--output=json", "-O", "qcow2", theirs).json for run in (kvik_img, qemu_img)]
    assert figures[0]["fully-allocated"] == figures[1]["fully-allocated"]
    assert figures[0]["required"] <= figures[1]["required"]  # zeros are not reckoned
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([theirs.name, "ours.qcow2", "source.raw"])


def hostile_vmdk(path: Path, extent: str, size: int = 2048, parent: str = "") -> Path:
    lines = ["# Disk DescriptorFile", "version=1", "CID=12345678", f"parentCID={'87654321' if parent else 'ffffffff'}"]
    lines += ['createType="monolithicFlat"', *([f'parentFileNameHint="{parent}"'] if parent else [])]
    lines += [f'RW {size} FLAT "{extent}" 0', 'ddb.adapterType = "ide"']
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("parent", [False, True])
def test_files_of_the_host_do_not_leak(tmp_path: Path, parent: bool) -> None:
    secret, target = tmp_path / "secret", tmp_path / "target"
    secret.write_bytes(SECRET.ljust(1 << 20, b"x"))
    image = hostile_vmdk(tmp_path / "a.vmdk", str(secret), parent=str(secret) if parent else "")
    assert b"secret of the host" in _whole(image, tmp_path)  # an unconfined qemu-img gives it away
    for words in (["convert", image, target], ["convert", "-f", "vmdk", "-O", "qcow2", image, target]):
        done = kvik_img(*words)
        assert done.code == 1 and "confined" in done.err, done.err
        assert not target.exists()
    assert kvik_img("info", image).code == 1
    assert kvik_img("compare", image, secret).code == 2


def _whole(image: Path, tmp_path: Path) -> bytes:
    leaked = tmp_path / "leaked"
    if qemu_img("convert", "-f", "vmdk", "-O", "raw", image, leaked).code:
        return b"the secret of the host"  # the parent is refused by QEMU itself
    data = leaked.read_bytes()
    leaked.unlink()
    return data


@pytest.mark.parametrize(
    "name", ['json:{"driver":"file","filename":"SECRET"}', "nbd://127.0.0.1:1/x", "/proc/1/environ", "/dev/vda"]
)
def test_nothing_else_is_reached(tmp_path: Path, name: str) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(SECRET)
    image = hostile_vmdk(tmp_path / "a.vmdk", name.replace("SECRET", str(secret)))
    assert kvik_img("convert", image, tmp_path / "target").code == 1
    assert not (tmp_path / "target").exists()


def test_what_the_jail_leaves() -> None:
    """No file of the host, no network, no socket, no other process; and limits."""
    script = """
import os, socket, resource, json
def attempt(call):
    try: call(); return "done"
    except OSError as error: return error.strerror
print(json.dumps([
    attempt(lambda: open("/etc/hostname")), attempt(lambda: open("/tmp/k", "w")), attempt(lambda: os.listdir("/")),
    attempt(lambda: socket.socket()), attempt(lambda: os.rename("/tmp/a", "/tmp/b")),
    attempt(lambda: os.chmod("/proc/self/fd/0", 0o777)), attempt(lambda: os.kill(os.getppid(), 0)),
    resource.getrlimit(resource.RLIMIT_FSIZE)[0], resource.getrlimit(resource.RLIMIT_CPU)[0],
]))
"""
    done = run_jailed("python3", ["-I", "-S", "-c", script], seconds=5, size=4096)
    assert done.code == 0, done.err
    answer = json.loads(done.out)
    denied = {"Permission denied", "Function not implemented", "Operation not permitted"}
    assert all(one in denied for one in answer[:7]), (answer, done.err)
    assert answer[7:9] == [4096, 5]


def test_a_file_that_is_too_big_ends_it(tmp_path: Path) -> None:
    with (tmp_path / "out").open("w+b") as stream:
        script = f"f=open('/proc/self/fd/{stream.fileno()}','r+b',0)\nwhile 1: f.write(bytes(4096))"
        done = run_jailed("python3", ["-I", "-S", "-c", script], writable=[stream.fileno()], seconds=5, size=1 << 16)
    assert done.code != 0 and (tmp_path / "out").stat().st_size == 1 << 16


# -- OVA


def ova(path: Path, disks: dict[str, bytes], *, document: str = "", extra: list[tarfile.TarInfo] | None = None) -> Path:
    files = "".join(f'<File ovf:id="f{i}" ovf:href="{name}"/>' for i, name in enumerate(disks))
    rows = "".join(f'<Disk ovf:diskId="d{i}" ovf:fileRef="f{i}" ovf:capacity="9"/>' for i in range(len(disks)))
    document = document or (
        '<?xml version="1.0"?><Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1"'
        ' xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1">'
        f"<References>{files}</References><DiskSection>{rows}</DiskSection></Envelope>"
    )
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in {"machine.ovf": document.encode(), **disks}.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
        for entry in extra or ():
            archive.addfile(entry)
    return path


@pytest.fixture
def stream_vmdk(tmp_path: Path, raw: Path) -> bytes:
    path = tmp_path / "a.vmdk"
    qemu_img("convert", "-O", "vmdk", "-o", "subformat=streamOptimized", raw, path)
    data = path.read_bytes()
    path.unlink()
    return data


def test_an_ova_comes_in(tmp_path: Path, raw: Path, stream_vmdk: bytes) -> None:
    archive, ours = ova(tmp_path / "a.ova", {"disk 1.vmdk": stream_vmdk}), tmp_path / "ours.qcow2"
    assert kvik_img("convert", "-O", "qcow2", archive, ours).code == 0
    assert_same_data(ours, raw)
    assert kvik_img("info", "--output=json", archive).json["virtual-size"] == 5 << 20
    assert "file format: vmdk" in kvik_img("info", archive).out
    two = ova(tmp_path / "b.ova", {"disk1.vmdk": stream_vmdk, "disk2.vmdk": stream_vmdk})
    done = kvik_img("convert", "-O", "qcow2", two, ours)
    assert done.code == 1 and "disk1.vmdk, disk2.vmdk" in done.err
    assert kvik_img("convert", "-O", "qcow2", "-l", "disk2.vmdk", two, ours).code == 0
    assert_same_data(ours, raw)


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, target
    return entry


@pytest.mark.parametrize(
    ("disks", "extra", "word"),
    [
        (["disk.vmdk"], [link("x", "/etc/passwd")], "no plain file"),
        (["disk.vmdk"], [link("x", "machine.ovf", tarfile.LNKTYPE)], "no plain file"),
        (["disk.vmdk"], [link("x", "", tarfile.FIFOTYPE)], "no plain file"),
        (["disk.vmdk"], [link("x", "", tarfile.DIRTYPE)], "no plain file"),
        (["../disk.vmdk"], [], "name"),
        (["/disk.vmdk"], [], "name"),
        (["disk.vmdk"], [tarfile.TarInfo("disk.vmdk")], "two members"),
        (["disk.vmdk"], [tarfile.TarInfo("a,b")], "name"),
        (["disk.vmdk"], [tarfile.TarInfo(f"m{i}") for i in range(70)], "more than 64"),
        ([], [], "has not one disk"),
    ],
    ids=["symlink", "hard-link", "fifo", "directory", "above", "absolute", "twice", "comma", "too-many", "no-disk"],
)
def test_hostile_archives(
    tmp_path: Path, stream_vmdk: bytes, disks: list[str], extra: list[tarfile.TarInfo], word: str
) -> None:
    archive = ova(tmp_path / "a.ova", dict.fromkeys(disks, stream_vmdk), extra=extra)
    done = kvik_img("convert", archive, tmp_path / "target")
    assert done.code == 1 and word in done.err, done.err
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize(
    ("document", "word"),
    [
        ('<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><a>&x;</a>', "entities"),
        ("<a", "damaged"),
        ('<E><File id="f" href="absent.vmdk"/><Disk fileRef="f"/></E>', "not in the archive"),
        ('<E><File id="f" href="../../etc/passwd"/><Disk fileRef="f"/></E>', "not in the archive"),
        ('<E><File id="f" href="disk.vmdk" compression="gzip"/><Disk fileRef="f"/></E>', "compressed"),
        ("x" * (1 << 20) + "x", "more than 1 MiB"),
    ],
    ids=lambda text: text[:30],
)
def test_hostile_documents(tmp_path: Path, stream_vmdk: bytes, document: str, word: str) -> None:
    archive = ova(tmp_path / "a.ova", {"disk.vmdk": stream_vmdk}, document=document)
    done = kvik_img("convert", archive, tmp_path / "target")
    assert done.code == 1 and word in done.err, done.err


def test_a_disk_in_an_archive_that_names_another_file(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(SECRET.ljust(1 << 20, b"x"))
    inner = hostile_vmdk(tmp_path / "inner.vmdk", str(secret)).read_bytes()
    archive = ova(tmp_path / "a.ova", {"disk.vmdk": inner})
    assert kvik_img("convert", archive, tmp_path / "target").code == 1
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("at", [0, 124, 148, 257, 345])
def test_a_damaged_archive(tmp_path: Path, stream_vmdk: bytes, at: int) -> None:
    archive = ova(tmp_path / "a.ova", {"disk.vmdk": stream_vmdk})
    with archive.open("r+b") as stream:
        os.pwrite(stream.fileno(), b"\xff\xff", at)
    done = kvik_img("convert", "-f", "ova", archive, tmp_path / "target")
    assert done.code == 1 and done.err.startswith("error: ")
