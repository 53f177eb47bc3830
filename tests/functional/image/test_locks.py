"""An image has one writer: QEMU's machines and tools, and ours, respect each other's locks, also on data files."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from functional.image.conftest import kvik_img, qemu_img
from kvik.image.opening import Opener


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    """top -> base, both with a snapshot, top with a bitmap; and an image with a data file."""
    base, top = tmp_path / "base", tmp_path / "top"
    qemu_img("create", "-f", "qcow2", base, "1M")
    qemu_img("create", "-f", "qcow2", "-b", "base", "-F", "qcow2", top, "1M")
    qemu_img("snapshot", "-c", "one", base)
    qemu_img("snapshot", "-c", "one", top)
    qemu_img("create", "-f", "qcow2", "-o", f"data_file={tmp_path}/data", tmp_path / "external", "1M")
    return top


VERBS = [
    ["commit", "top"],
    ["rebase", "-b", "", "top"],
    ["rebase", "-u", "-b", "", "top"],
    ["snapshot", "-c", "two", "top"],
    ["snapshot", "-a", "one", "top"],
    ["snapshot", "-d", "one", "top"],
    ["amend", "-o", "lazy_refcounts=on", "top"],
    ["bitmap", "--add", "top", "b"],
    ["resize", "-f", "qcow2", "top", "2M"],
    ["check", "-r", "all", "top"],
    ["snapshot", "-c", "two", "base"],  # which the machine reads
    ["resize", "-f", "raw", "data", "2M"],  # another image's data
]


@pytest.fixture
def machine(chain: Path) -> Iterator[None]:
    """A stopped machine that has all of them open."""
    if shutil.which("qemu-system-x86_64") is None:
        pytest.skip("needs qemu-system-x86")
    drives = [f"if=virtio,file={path},format=qcow2" for path in (chain, chain.parent / "external")]
    process = subprocess.Popen(
        [
            *(
                "qemu-system-x86_64",
                "-S",
                "-M",
                "pc,accel=tcg",
                "-m",
                "1",
                "-display",
                "none",
                "-nodefaults",
                "-monitor",
                "stdio",
            ),
            *(word for drive in drives for word in ("-drive", drive)),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin is not None and process.stdout is not None
    # Its greeting comes when the images are open, and before its devices have locked them: an answer comes after that.
    process.stdin.write(b"info status\n")
    process.stdin.flush()
    while b"VM status" not in process.stdout.readline():
        assert process.poll() is None
    yield
    process.communicate(b"quit\n", timeout=30)


def test_what_a_machine_uses_is_refused_by_name(chain: Path, machine: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(chain.parent)
    before = {name: Path(name).read_bytes() for name in ("top", "base", "data")}
    for words in VERBS:
        done = kvik_img(*words)
        assert done.code == 1, words
        assert "is in use by another process" in done.err and "fuser" in done.err, done.err
        assert any(f"image {name} " in done.err for name in ("top", "base", "data")), done.err
        assert qemu_img(*words).code == 1, words
    assert kvik_img("info", "-U", "top").code == 0
    assert kvik_img("snapshot", "-U", "-l", "top").code == 0
    assert kvik_img("info", "top").code == qemu_img("info", "top").code == 1
    assert before == {name: Path(name).read_bytes() for name in ("top", "base", "data")}


def test_what_we_write_is_refused_by_qemu(chain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(chain.parent)
    with (
        Opener().open("top", "qcow2", writable=True),
        Opener().open("external", "qcow2", writable=True),
    ):
        for words in VERBS:
            done = qemu_img(*words)
            assert done.code == 1 and "lock" in done.err, (words, done.err)
            assert kvik_img(*words).code == 1
    assert qemu_img("resize", "-f", "raw", "data", "2M").code == 0
