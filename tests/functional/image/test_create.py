"""What `kvik img create` makes is what qemu-img makes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from functional.image.conftest import Done, assert_clean, kvik_img, qemu_img, qemu_io

# options whose images are the same, byte by byte
SAME = [
    [],
    ["-o", "compat=0.10"],
    ["-o", "cluster_size=4k"],
    ["-o", "cluster_size=2M,refcount_bits=64"],
    ["-o", "refcount_bits=1"],
    ["-o", "lazy_refcounts=on"],
    ["-o", "compression_type=zstd"],
    ["-o", "extended_l2=on,cluster_size=16k"],
    ["-o", "data_file=data.raw"],
    ["-o", "data_file=data.raw,data_file_raw=on"],
    ["-b", "base.raw", "-F", "raw"],
]


@pytest.mark.parametrize("words", SAME, ids=" ".join)
@pytest.mark.parametrize("size", ["64k", "10G"])
def test_the_same_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], size: str) -> None:
    monkeypatch.chdir(tmp_path)
    qemu_img("create", "-f", "raw", "base.raw", "1G")
    theirs = qemu_img("create", "-f", "qcow2", *words, "a", size)
    expected = Path("a").read_bytes()
    Path("a").unlink()
    ours = kvik_img("create", "-f", "qcow2", *words, "a", size)
    assert (ours.code, ours.out) == (theirs.code, theirs.out)
    assert Path("a").read_bytes() == expected
    assert_clean(Path("a"))


def test_the_size_of_the_backing_image(tmp_path: Path) -> None:
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    kvik_img("create", "-f", "qcow2", base, "1.5G")
    assert kvik_img("create", "-f", "qcow2", "-b", base, "-F", "qcow2", top).code == 0
    assert qemu_img("info", "--output=json", top).json["virtual-size"] == 3 << 29
    assert qemu_img("info", "--output=json", top).json["backing-filename"] == str(base)


@pytest.mark.parametrize("clusters", ["512", "4k", "64k", "2M"])
@pytest.mark.parametrize("options", ["preallocation=metadata", "preallocation=falloc", "preallocation=full"])
def test_preallocation(tmp_path: Path, clusters: str, options: str, same: Callable[..., Done]) -> None:
    image = tmp_path / "a.qcow2"
    assert kvik_img("create", "-f", "qcow2", "-o", f"{options},cluster_size={clusters}", image, "9M").code == 0
    assert_clean(image)
    same("map", "--output=json", image)
    qemu_io(image, "read -P 0 0 9M", "write -P 3 1M 1M", "read -P 3 1M 1M")
    assert_clean(image)
    if "metadata" not in options:
        assert image.stat().st_blocks * 512 >= 9 << 20


def test_preallocation_with_subclusters_and_a_backing_file(tmp_path: Path) -> None:
    base, top = tmp_path / "base.raw", tmp_path / "top.qcow2"
    base.write_bytes(b"\5" * (1 << 20))
    words = ["-f", "qcow2", "-b", base, "-F", "raw", "-o", "extended_l2=on,preallocation=metadata"]
    assert kvik_img("create", *words, top, "4M").code == 0
    assert_clean(top)
    qemu_io(top, "read -P 5 0 1M", "read -P 0 1M 3M", "write -P 9 64k 2k", "read -P 5 66k 8k")


@pytest.mark.parametrize("kind", ["off", "falloc", "full"])
def test_raw(tmp_path: Path, kind: str) -> None:
    image = tmp_path / "a.raw"
    assert kvik_img("create", "-o", f"preallocation={kind}", image, "3000001").code == 0
    assert image.stat().st_size == 3000320
    assert (image.stat().st_blocks * 512 >= 3000320) == (kind != "off")


@pytest.mark.parametrize(
    "words",
    [
        ["-o", "cluster_size=3000"],
        ["-o", "cluster_size=4M"],
        ["-o", "refcount_bits=3"],
        ["-o", "compat=0.10,refcount_bits=8"],
        ["-o", "compat=0.10,lazy_refcounts=on"],
        ["-o", "compat=2"],
        ["-o", "extended_l2=on,cluster_size=4k"],
        ["-o", "compression_type=lzma"],
        ["-o", "nonsense=1"],
        ["-o", "preallocation=maybe"],
        ["-o", "data_file_raw=on"],
        ["-o", "cluster_size=512", "--", "a", "200G"],
        ["-b", "absent.qcow2", "-F", "qcow2"],
        ["-b", "base.raw"],
    ],
    ids=" ".join,
)
def test_what_qemu_refuses_is_refused_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("base.raw").write_bytes(bytes(512))
    rest = [] if "--" in words else ["a", "1G"]
    assert qemu_img("create", "-f", "qcow2", *words, *rest).code == 1
    Path("a").unlink(missing_ok=True)
    done = kvik_img("create", "-f", "qcow2", *words, *rest)
    assert done.code == 1 and done.err.startswith("error: ")
    assert not Path("a").exists() or not Path("a").stat().st_size
