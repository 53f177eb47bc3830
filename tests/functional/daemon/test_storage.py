"""Pools and volumes of a real daemon: through its death, on a full file system, and under virt-install's machine."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import Kvikd

pytestmark = pytest.mark.root

MOUNTED = 'mount -t tmpfs -o size=4m none "$0" && exec "$@"'


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="kvpool"))
    yield directory
    shutil.rmtree(directory)


@pytest.fixture(scope="module")
def storage(place: Path) -> Iterator[Kvikd]:
    """A daemon in a mount namespace of its own, where `small` is a file system of 4 MiB."""
    (place / "small").mkdir()
    daemon = Kvikd("unshare", "--mount", "sh", "-c", MOUNTED, str(place / "small"))
    yield daemon
    assert "failed unexpectedly" not in daemon.messages(), daemon.messages()
    assert daemon.end() == 0
    shutil.rmtree(daemon.root, ignore_errors=True)


def ok(daemon: Kvikd, line: str) -> str:
    done = daemon.virsh(*line.split())
    assert done.returncode == 0, (line, done.stderr)
    return done.stdout


def test_a_pool_lives_through_the_daemons_death(storage: Kvikd, place: Path) -> None:
    pool = place / "life"
    ok(storage, f"pool-define-as life dir --target {pool}")
    for line in ("pool-build life", "pool-start life", "pool-autostart life", "vol-create-as life v 1M"):
        ok(storage, line)
    ok(storage, f"pool-create-as brief dir --target {place}/brief --build")
    before = ok(storage, "vol-dumpxml v life")
    assert storage.end(signal.SIGKILL) == -signal.SIGKILL
    (pool / "other").write_bytes(bytes(1000))  # while nobody looks
    storage.start()
    assert ok(storage, "vol-dumpxml v life") == before
    assert "1000" in ok(storage, "vol-info other life --bytes")
    assert [row.split() for row in ok(storage, "pool-list").splitlines()[2:4]] == [
        ["brief", "active", "no"],
        ["life", "active", "yes"],
    ]
    ok(storage, "pool-destroy life")
    assert storage.end(signal.SIGKILL) == -signal.SIGKILL
    storage.start()  # autostart is once for each boot of the host
    assert "inactive" in ok(storage, "pool-list --all --autostart")
    ok(storage, "pool-start life")
    for name in ("v", "other"):
        ok(storage, f"vol-delete {name} life")
    for line in ("pool-destroy life", "pool-delete life", "pool-undefine life", "pool-destroy brief"):
        ok(storage, line)
    assert not pool.exists()
    assert "brief" not in ok(storage, "pool-list --all")


def test_a_full_pool_has_no_half_volume(storage: Kvikd, place: Path) -> None:
    ok(storage, f"pool-create-as small dir --target {place}/small")
    (place / "big").write_bytes(os.urandom(6 << 20))
    refused = storage.virsh("vol-create-as", "small", "v", "8M")
    assert refused.returncode == 1 and "No space left on device" in refused.stderr
    ok(storage, "vol-create-as small thin 8M --allocation 0")
    refused = storage.virsh("vol-upload", "thin", f"{place}/big", "--pool", "small")
    assert refused.returncode == 1 and "No space left on device" in refused.stderr
    ok(storage, "vol-wipe thin small")
    ok(storage, "vol-delete thin small")
    refused = storage.virsh("vol-create-as", "small", "v", "8M", "--format", "qcow2", "--prealloc-metadata")
    assert refused.returncode == 0, refused.stderr  # places, not blocks
    ok(storage, "vol-delete v small")
    assert ok(storage, "vol-list small").splitlines()[2:] == [""]
    inside = f"/proc/{storage.process.pid}/root{place}/small"
    assert os.listdir(inside) == []
    ok(storage, "pool-destroy small")


def test_what_else_lies_in_a_pool_is_left_alone(storage: Kvikd, place: Path) -> None:
    pool = place / "odd"
    pool.mkdir()
    outside = place / "outside"
    outside.write_bytes(b"not yours")
    os.mkfifo(pool / "fifo")
    (pool / "link").symlink_to(outside)
    os.link(outside, pool / "hard")
    os.mknod(pool / "null", 0o600 | 0o020000, os.makedev(1, 3))
    ok(storage, f"pool-create-as odd dir --target {pool}")
    assert [row.split()[0] for row in ok(storage, "vol-list odd").splitlines()[2:] if row] == ["hard"]
    assert storage.virsh("vol-wipe", "hard", "odd").returncode == 1
    for name in ("../outside", "link", "a/b", "-x", "a\nb"):
        assert storage.virsh("vol-create-as", "odd", "--name", name, "--capacity", "1M").returncode == 1
    ok(storage, "vol-create-as odd victim 1M --allocation 0")
    (pool / "victim").unlink()
    (pool / "victim").symlink_to(outside)  # since it was looked at
    for words in (("vol-wipe",), ("vol-resize", "--capacity", "2M"), ("vol-delete",)):
        assert storage.virsh(words[0], "--vol", "victim", "--pool", "odd", *words[1:]).returncode == 1
    assert outside.read_bytes() == b"not yours" and (pool / "victim").is_symlink()
    ok(storage, "pool-destroy odd")


@pytest.mark.skipif(shutil.which("virt-install") is None, reason="needs virt-install (apt install virtinst)")
def test_virt_install_makes_its_disk_in_a_pool(storage: Kvikd, place: Path) -> None:
    pool = place / "images"
    ok(storage, f"pool-create-as default dir --target {pool} --build")
    words = ["--name", "made", "--memory", "64", "--disk", "pool=default,size=1", "--import", "--network", "none"]
    done = subprocess.run(
        [
            "virt-install",
            "--connect",
            storage.uri,
            *words,
            "--graphics",
            "none",
            "--osinfo",
            "generic",
            "--noautoconsole",
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    try:
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"<source file='{pool}/made.qcow2'" in ok(storage, "dumpxml made")
        for verb in ("vol-delete", "vol-wipe"):
            refused = storage.virsh(verb, "made.qcow2", "default")
            assert refused.returncode == 1 and "machine 'made' is running from it" in refused.stderr
    finally:
        storage.virsh("destroy", "made")
        storage.virsh("undefine", "made")
    ok(storage, "vol-create-as default top 2G --format qcow2 --backing-vol made.qcow2 --backing-vol-format qcow2")
    image = subprocess.run(
        ["qemu-img", "check", str(pool / "top")], capture_output=True, text=True, timeout=60, check=False
    )
    assert image.returncode == 0, image.stdout + image.stderr
    assert storage.virsh("vol-delete", "made.qcow2", "default").returncode == 1  # top shows through to it
    ok(storage, "vol-delete top default")
    ok(storage, "vol-delete made.qcow2 default")
    ok(storage, "pool-destroy default")
