"""A disk that is full, a quota, a limit, a device that fails: a clear error, and no half image."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import kvik
from functional.image.conftest import Done, assert_clean, kvik_img, qemu_img, qemu_io
from functional.image.test_convert import mixed

SOURCES = Path(kvik.__file__).parent.parent
COMMAND = [sys.executable, "-S", "-c", "from kvik.cli.img import main; main()"]


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mixed(tmp_path_factory.mktemp("source") / "source.raw", 6 << 20)


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    if os.geteuid():
        pytest.skip("needs root: mounts a tmpfs")
    place = tmp_path / "full"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M", "none", place], check=True)
    yield place
    subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize(
    "words", [["-O", "raw"], ["-O", "qcow2"], ["-O", "qcow2", "-c"], ["-O", "raw", "-C"]], ids=" ".join
)
def test_no_space_for_a_conversion(full: Path, raw: Path, words: list[str]) -> None:
    target = full / "target"
    done = kvik_img("convert", *words, raw, target)
    assert done.code == 1 and f"cannot convert '{target}': No space left on device" in done.err, done.err
    assert not target.exists()
    target.write_bytes(b"an image that was here")
    assert kvik_img("convert", *words, raw, target).code == 1
    assert target.read_bytes() == b""  # begun, and neither the old image nor half of the new one


@pytest.mark.parametrize(
    "words",
    [
        ["-f", "raw", "-o", "preallocation=falloc"],
        ["-f", "raw", "-o", "preallocation=full"],
        ["-f", "qcow2", "-o", "preallocation=falloc"],
        ["-f", "qcow2", "-o", "preallocation=full"],
        ["-f", "qcow2", "-o", "cluster_size=2M"],
    ],
    ids=" ".join,
)
def test_no_space_for_a_new_image(full: Path, words: list[str]) -> None:
    done = kvik_img("create", *words, full / "target", "9M")
    assert done.code == 1 and "No space left on device" in done.err
    assert not (full / "target").exists()


def test_no_space_to_grow(full: Path) -> None:
    for format in ("raw", "qcow2"):
        image = full / "image"
        qemu_img("create", "-f", format, image, "1M")
        qemu_io(image, "write -P 1 0 300k", format=format)
        for mode in ("falloc", "full"):
            done = kvik_img("resize", "-f", format, f"--preallocation={mode}", image, "9M")
            assert done.code == 1 and f"cannot resize '{image}': No space left on device" in done.err
            qemu_io(image, "read -P 1 0 300k", "read -P 0 300k 724k", format=format)
            assert qemu_img("info", "--output=json", image).json["virtual-size"] == 1 << 20
        if format == "qcow2":
            assert_clean(image)
        image.unlink()


def assert_clean_but_for_leaks(image: Path) -> None:
    assert qemu_img("check", image).code in (0, 3)


def test_what_was_there_with_n_stays_an_image(full: Path, raw: Path) -> None:
    target = full / "target"
    qemu_img("create", "-f", "qcow2", target, "6M")
    done = kvik_img("convert", "-n", "-O", "qcow2", raw, target)
    assert done.code == 1 and "No space left on device" in done.err
    assert_clean_but_for_leaks(target)


def run(*words: str | Path, tracer: list[str] | None = None, file_limit: int = 0) -> Done:
    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))

    done = subprocess.run(
        [*(tracer or ()), *COMMAND, *map(str, words)],
        env={**os.environ, "PYTHONPATH": str(SOURCES)},
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=limit if file_limit else None,
        check=False,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def test_a_limit_on_file_sizes(tmp_path: Path, raw: Path) -> None:
    for format in ("raw", "qcow2"):
        done = run("convert", "-O", format, raw, tmp_path / "target", file_limit=1 << 20)
        assert done.code == 1 and "File too large" in done.err
        assert not (tmp_path / "target").exists()


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
@pytest.mark.parametrize("error", ["EIO", "EDQUOT", "ENOSPC"])
@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_writes_that_fail(tmp_path: Path, raw: Path, error: str, format: str) -> None:
    target = tmp_path / "target"
    for when in (1, 3):
        tracer = [
            "strace",
            "-qq",
            "-o",
            "/dev/null",
            "-P",
            str(target),
            "-e",
            f"inject=pwrite64:error={error}:when={when}+",
        ]
        done = run("convert", "-O", format, raw, target, tracer=tracer)
        text = os.strerror({"EIO": 5, "EDQUOT": 122, "ENOSPC": 28}[error])
        assert done.code == 1 and text in done.err, done.err
        assert not target.exists()


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_a_source_that_cannot_be_read(tmp_path: Path, raw: Path) -> None:
    target = tmp_path / "target"
    tracer = ["strace", "-f", "-qq", "-o", "/dev/null", "-P", str(raw), "-e", "inject=preadv,preadv2:error=EIO:when=2"]
    done = run("convert", "-O", "qcow2", raw, target, tracer=tracer)
    assert done.code == 1 and f"'{raw}': Input/output error" in done.err and not target.exists()
    # The part that failed is read again by sectors, of which the third fails, too.
    tracer[-1] = "inject=preadv,preadv2:error=EIO:when=2..4+2"
    done = run("convert", "--salvage", "-O", "qcow2", raw, target, tracer=tracer)
    assert done.code == 0 and "error while reading offset" in done.err
    assert_clean(target)


# -- devices


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Path]:
    """A block device of 16 MiB that is full of something."""
    if os.geteuid() or shutil.which("losetup") is None:
        pytest.skip("needs root and losetup")
    file = tmp_path / "device"
    file.write_bytes(b"\xa5" * (16 << 20))
    done = subprocess.run(["losetup", "-f", "--show", file], capture_output=True, text=True, check=False)
    if done.returncode or not Path(done.stdout.strip()).is_block_device():
        pytest.skip(f"needs loop devices: {done.stderr.strip() or 'there is no node'}")
    yield Path(done.stdout.strip())
    subprocess.run(["losetup", "-d", done.stdout.strip()], check=True)


def test_images_on_a_device(tmp_path: Path, raw: Path, device: Path) -> None:
    assert kvik_img("convert", "-O", "qcow2", raw, device).code == 0
    assert qemu_img("compare", "-f", "raw", "-F", "qcow2", raw, device).code == 0
    assert_clean(device)
    assert kvik_img("convert", "-f", "raw", "-O", "raw", raw, device).code == 0
    assert device.read_bytes()[: 6 << 20] == raw.read_bytes()  # zeros, too, where something else was
    assert kvik_img("create", "-f", "qcow2", "-o", "preallocation=full", device, "12M").code == 0
    assert_clean(device)
    assert kvik_img("create", "-f", "raw", device, "16M").code == 0
    for words in (["create", device, "17M"], ["create", "-f", "qcow2", "-o", "preallocation=full", device, "17M"]):
        done = kvik_img(*words)
        assert done.code == 1 and ("fewer than" in done.err or "No space left" in done.err)
    assert kvik_img("resize", "-f", "raw", device, "17M").code == 1
