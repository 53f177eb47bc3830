"""`kvik img commit` and `rebase`: the disk reads as QEMU says it must, and no data is lost that something needs."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from functional.image.conftest import assert_clean, kvik_img, qemu_img, qemu_io

MB = 1 << 20
KINDS = {
    "plain": "cluster_size=64k",
    "v2": "compat=0.10",
    "extended": "extended_l2=on,cluster_size=16k",
    "one-bit": "refcount_bits=1,cluster_size=4k",
}


def create(path: Path, size: str, options: str = "", backing: Path | None = None, format: str = "qcow2") -> Path:
    words = ["-b", backing.name, "-F", format] if backing is not None else []
    assert qemu_img("create", "-f", "qcow2", *(["-o", options] if options else []), *words, path, size).code == 0
    return path


def scribble(path: Path, seed: int, size: int, count: int = 8, format: str = "qcow2") -> None:
    """Random writes, zeros and discards by QEMU."""
    dice = random.Random(seed)
    commands = []
    for _ in range(count):
        offset = dice.randrange(size - 512) & -512
        length = min(size - offset, dice.choice((512, 4096, 65536, 200 * 1024)))
        what = dice.choice(("write -P {}", "write -P {}", "write -z", "discard"))
        commands.append(f"{what.format(dice.randrange(1, 250))} {offset} {length}")
    qemu_io(path, *commands, format=format)


def contents(path: Path, format: str = "qcow2") -> bytes:
    out = path.with_suffix(".contents")
    done = qemu_img("convert", "-f", format, "-O", "raw", path, out)
    assert done.code == 0, done.err
    return out.read_bytes()


@pytest.fixture(params=KINDS)
def options(request: pytest.FixtureRequest) -> str:
    return KINDS[request.param]


@pytest.mark.parametrize("bottom", ["raw", "qcow2"])
def test_commit_into_the_backing_image(tmp_path: Path, options: str, bottom: str) -> None:
    base, top = tmp_path / "base", tmp_path / "top"
    assert qemu_img("create", "-f", bottom, *(["-o", options] if bottom == "qcow2" else []), base, "2M").code == 0
    scribble(base, 1, 2 * MB, format=bottom)
    create(top, "2M", options, base, bottom)
    scribble(top, 2, 2 * MB)
    before = contents(top)
    done = kvik_img("commit", top)
    assert (done.code, done.out) == (0, "Image committed.\n"), done.err
    assert contents(base, bottom) == contents(top) == before
    assert_clean(top)
    assert all(not extent["present"] or extent["depth"] for extent in kvik_img("map", "--json", top).json)
    if bottom == "qcow2":
        assert_clean(base)
    assert top.stat().st_size <= 6 * 65536


def test_commit_of_a_bigger_image_makes_its_base_grow(tmp_path: Path) -> None:
    for number, (bottom, size) in enumerate((("raw", "1M"), ("qcow2", "1000k"), ("qcow2", "512"))):
        base, top = tmp_path / f"base{number}", tmp_path / f"top{number}"
        qemu_img("create", "-f", bottom, base, size)
        create(top, "600M", "", base, bottom)
        qemu_io(top, "write -P 7 300M 70000", "write -P 8 0 512")
        before = kvik_img("info", "--json", top).json["virtual-size"]
        assert kvik_img("commit", top).code == 0
        assert kvik_img("info", "--json", base).json["virtual-size"] == before == 600 * MB
        qemu_io(base, "read -P 7 300M 70000", "read -P 8 0 512", "read -P 0 301M 299M", format=bottom)
        if bottom == "qcow2":
            assert_clean(base)


def test_a_grown_base_does_not_show_what_is_below_it(tmp_path: Path) -> None:
    """The middle image is shorter than the bottom one: what it did not show before is zero, not the bottom's data."""
    bottom, middle, top = tmp_path / "bottom", tmp_path / "middle", tmp_path / "top"
    bottom.write_bytes(b"\5" * (3 * MB))
    create(middle, "1M", "", bottom, "raw")
    create(top, "4M", "", middle)
    qemu_io(top, "write -P 9 3500k 64k")
    before = contents(top)
    assert kvik_img("commit", top).code == 0
    assert contents(middle) == before
    assert_clean(middle)


@pytest.mark.parametrize("drop", [[], ["-d"]])
def test_commit_of_several_layers(tmp_path: Path, drop: list[str]) -> None:
    base, one, two, three = (tmp_path / name for name in ("base", "one", "two", "three"))
    base.write_bytes(bytes(range(256)) * (2 * MB // 256))
    create(one, "2M", "", base, "raw")
    create(two, "1M", "", one)  # shorter: what is behind its end is zero in the image above
    create(three, "3M", "", two)
    for number, path in enumerate((one, two, three)):
        scribble(path, number, MB)
    before = contents(three)
    done = kvik_img("commit", "-p", *drop, "-b", base.name, three)
    assert done.code == 0 and done.out.endswith("(100.00/100%)\r\nImage committed.\n"), done.err
    assert contents(base, "raw") == before == contents(three)
    assert any(extent["depth"] == 0 and extent["present"] for extent in kvik_img("map", "--json", three).json)
    for path in (one, two, three):
        assert_clean(path)


def test_commit_with_d_keeps_the_image(tmp_path: Path) -> None:
    base, top = create(tmp_path / "base", "1M"), tmp_path / "top"
    create(top, "1M", "", base)
    qemu_io(top, "write -P 3 0 128k")
    before = top.read_bytes()
    assert kvik_img("commit", "-d", "-q", top).out == ""
    assert top.read_bytes() == before
    qemu_io(base, "read -P 3 0 128k")


def test_commit_tells_what_it_cannot_do(tmp_path: Path) -> None:
    base, top = create(tmp_path / "base", "1M"), tmp_path / "top"
    assert kvik_img("commit", base).code == qemu_img("commit", base).code == 1
    create(top, "1M", "", base)
    done = kvik_img("commit", "-b", "nothing", top)
    assert done.code == 1 and "Did not find 'nothing' in the backing chain" in done.err
    assert kvik_img("commit", "-t", "fast", top).code == 1
    assert kvik_img("commit", "-r", "fast", top).code == 1
    assert kvik_img("commit", "-r", "1G", "-t", "none", top).code == 0


def test_a_snapshot_that_needs_the_base_as_it_is_stops_a_commit(tmp_path: Path) -> None:
    base, top = create(tmp_path / "base", "1M"), tmp_path / "top"
    create(top, "1M", "", base)
    qemu_img("snapshot", "-c", "before", top)
    qemu_io(top, "write -P 3 0 128k")
    before = base.read_bytes()
    done = kvik_img("commit", top)
    assert done.code == 1 and "snapshot 'before'" in done.err and "snapshot -d 1" in done.err
    assert base.read_bytes() == before
    qemu_img("snapshot", "-c", "after", top)
    qemu_img("snapshot", "-d", "before", top)
    assert kvik_img("commit", top).code == 0
    qemu_img("snapshot", "-a", "after", top)
    qemu_io(top, "read -P 3 0 128k", "read -P 0 128k 896k")
    assert_clean(top)


@pytest.mark.parametrize("new", ["none", "raw", "qcow2", "bigger", "shorter"])
def test_a_safe_rebase_keeps_what_is_read(tmp_path: Path, options: str, new: str) -> None:
    old, other, top = tmp_path / "old", tmp_path / "other", tmp_path / "top"
    create(old, "2M", options)
    scribble(old, 1, 2 * MB)
    format = "raw" if new == "raw" else "qcow2"
    size = {"bigger": "5M", "shorter": "700k"}.get(new, "2M")
    qemu_img("create", "-f", format, other, size)
    scribble(other, 3, 700 * 1024, format=format)
    if new == "bigger":
        qemu_io(other, "write -P 5 2M 3M")
    create(top, "3M", options, old)
    scribble(top, 2, 3 * MB, count=4)
    before = contents(top)
    words = ["-b", ""] if new == "none" else ["-b", other.name, "-F", format]
    done = kvik_img("rebase", *words, top)
    assert done.code == 0, done.err
    assert contents(top) == before
    assert_clean(top)
    assert kvik_img("info", "--json", top).json.get("backing-filename") == (None if new == "none" else other.name)


def test_an_image_without_backing_file_gets_one(tmp_path: Path, options: str) -> None:
    """What read as zero does so on top of an image that has data there."""
    base, top = create(tmp_path / "base", "2M"), create(tmp_path / "top", "2M", options)
    qemu_io(base, "write -P 5 0 2M")
    qemu_io(top, "write -P 1 3k 3k", "write -P 2 1M 64k", "write -z 1500k 64k")
    before = contents(top)
    assert kvik_img("rebase", "-b", base.name, "-F", "qcow2", top).code == 0
    assert contents(top) == before
    assert_clean(top)


def test_a_rebase_within_the_chain_copies_only_what_is_between(tmp_path: Path) -> None:
    base, middle, top = create(tmp_path / "base", "4M"), tmp_path / "middle", tmp_path / "top"
    qemu_io(base, "write -P 1 0 4M")
    create(middle, "2M", "", base)
    qemu_io(middle, "write -P 2 1M 64k")
    create(top, "4M", "", middle)
    before = contents(top)
    assert kvik_img("rebase", "-p", "-b", base.name, "-F", "qcow2", top).code == 0
    assert contents(top) == before
    data = [(e["start"], e["length"]) for e in kvik_img("map", "--json", top).json if e["data"] and not e["depth"]]
    assert data == [(MB, 65536)]  # and behind the middle's end zeros
    assert_clean(top)
    assert kvik_img("rebase", "-b", middle.name, "-F", "qcow2", top).code == 0
    assert contents(top) == before


def test_an_unsafe_rebase_changes_the_name_alone(tmp_path: Path) -> None:
    old, top = create(tmp_path / "old", "1M"), tmp_path / "top"
    create(top, "1M", "", old)
    assert kvik_img("rebase", "-u", "-b", "moved/away", "-F", "raw", top).code == 0
    found = qemu_img("info", "--output=json", top).json
    assert (found["backing-filename"], found["backing-filename-format"]) == ("moved/away", "raw")
    assert kvik_img("rebase", "-u", top).code == 0
    assert "backing-filename" not in qemu_img("info", "--output=json", top).json
    assert_clean(top)


@pytest.mark.parametrize(
    "words",
    [
        ["-b", "absent", "-F", "qcow2"],
        ["-b", "old"],
        ["-F", "raw"],
        ["-b", "top", "-F", "qcow2"],
        ["-b", "above", "-F", "qcow2"],
        ["-b", "json:{}", "-F", "raw"],
        ["-b", "nbd://host/x", "-F", "raw"],
        ["-b", "x" * 1024, "-F", "raw", "-u"],
    ],
    ids=lambda words: " ".join(words)[:20],
)
def test_a_rebase_that_cannot_be_leaves_the_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    old, top = create(tmp_path / "old", "1M"), tmp_path / "top"
    create(top, "1M", "", old)
    create(tmp_path / "above", "1M", "", top)
    qemu_io(old, "write -P 1 0 64k")
    before = top.read_bytes()
    done = kvik_img("rebase", *words, top)
    assert done.code == 1 and done.err, done.out
    assert top.read_bytes() == before


def test_a_snapshot_that_needs_the_old_base_stops_a_rebase(tmp_path: Path) -> None:
    old, new, top = create(tmp_path / "old", "1M"), create(tmp_path / "new", "1M"), tmp_path / "top"
    qemu_io(old, "write -P 1 0 64k")
    create(top, "1M", "", old)
    qemu_img("snapshot", "-c", "one", top)
    qemu_io(top, "write -P 2 0 64k")
    done = kvik_img("rebase", "-b", new.name, "-F", "qcow2", top)
    assert done.code == 1 and "snapshot 'one'" in done.err
    qemu_io(new, "write -P 1 0 64k")
    assert kvik_img("rebase", "-b", new.name, "-F", "qcow2", top).code == 0
    assert_clean(top)


def test_an_image_without_layers_is_refused(tmp_path: Path) -> None:
    raw = tmp_path / "a.raw"
    raw.write_bytes(bytes(MB))
    done = kvik_img("rebase", "-f", "raw", "-b", "x", "-F", "raw", raw)
    assert done.code == 1 and "cannot have a backing file" in done.err
    assert kvik_img("rebase", raw).code == 1
