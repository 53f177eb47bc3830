"""Hostile qcow2 images under every verb that changes them: an error that names the place, and nothing changed."""

from __future__ import annotations

import os
import random
import sys
import time
from pathlib import Path

import pytest

from kvik.cli.context import Context
from kvik.cli.main import run_verb
from kvik.errors import KvikError
from kvik.image.create import create
from kvik.image.opening import Opener
from kvik.image.qcow2.reader import Qcow2Reader
from kvik.image.qcow2.snapshotting import apply_snapshot, create_snapshot, delete_snapshot
from kvik.image.qcow2.writer import Qcow2Writer
from kvik.image.rebase import rebase

FUZZ = Path(__file__).parents[3] / "fuzz"
if str(FUZZ) not in sys.path:
    sys.path.insert(0, str(FUZZ))

import image_qcow2  # noqa: E402  # behind the path

SIZE = 1 << 20


@pytest.mark.parametrize("verb", image_qcow2.VERBS)
def test_every_verb_ends_with_an_answer(verb: str) -> None:
    dice, images = random.Random(verb), image_qcow2.seeds()
    open_files = len(os.listdir("/proc/self/fd"))
    refused = sum(image_qcow2.attempt(verb, image_qcow2.mutated(*dice.choice(images), dice)) for _ in range(120))
    assert refused
    assert len(os.listdir("/proc/self/fd")) <= open_files + 2  # what is refused is closed
    assert not all(image_qcow2.attempt(verb, data) for data, _ in images)  # as they were made, it works


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """An image with data and two snapshots."""
    path = tmp_path / "a.qcow2"
    create(str(path), "qcow2", SIZE, cluster_size=4096)
    with Opener().open(str(path), "qcow2", writable=True) as image:
        assert isinstance(image, Qcow2Writer)
        for name in ("one", "two"):
            image.write(0, name.encode() * 30000)
            create_snapshot(image, name)
        image.write(0, b"now" * 30000)
    return path


def patch(path: Path, offset: int, value: int, size: int = 8) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(value.to_bytes(size, "big"))


def places(path: Path) -> tuple[int, list[int], list[int], Qcow2Reader]:
    """(offset of the snapshot table, L1 tables of the snapshots, places of their entries in the table, the image)"""
    with Opener().open(str(path), "qcow2") as image:
        assert isinstance(image, Qcow2Reader)
        entries, at = [], image.header.snapshots_offset
        for snapshot in image.snapshots:
            entries.append(at)
            at += snapshot.room
        return image.header.snapshots_offset, [one.l1_offset for one in image.snapshots], entries, image


def change_all(path: Path) -> list[str]:
    """Every snapshot verb on it; what each was refused with."""
    said = []
    for verb in ("create", "apply", "delete"):
        before = path.read_bytes()
        try:
            with Opener().open(str(path), "qcow2", writable=True) as image:
                assert isinstance(image, Qcow2Writer)
                if verb == "create":
                    create_snapshot(image, "three")
                elif verb == "apply":
                    apply_snapshot(image, "one")
                else:
                    delete_snapshot(image, image.snapshots[0])
        except KvikError as error:
            assert path.read_bytes() == before
            said.append(str(error))
        else:
            path.write_bytes(before)
    return said


@pytest.mark.parametrize("target", ["header", "refcount table", "active table", "other snapshot", "snapshot table"])
def test_snapshots_tables_that_overlap_others(path: Path, target: str) -> None:
    table, l1s, entries, image = places(path)
    patch(
        path,
        entries[0],
        {
            "header": 0,
            "refcount table": image.header.refcount_table_offset,
            "active table": image.header.l1_offset,
            "other snapshot": l1s[1],
            "snapshot table": table,
        }[target],
    )
    said = change_all(path)
    assert len(said) == 3 and all("overlap" in text or "out of bounds" in text for text in said), said


@pytest.mark.parametrize("target", ["header", "refcounts", "itself", "the active table", "nowhere", "an odd place"])
def test_entries_of_snapshots_that_lead_anywhere(path: Path, target: str) -> None:
    _, l1s, _, image = places(path)
    patch(
        path,
        l1s[0],
        {
            "header": 1 << 63,  # a flag alone: no table
            "refcounts": image.header.refcount_table_offset,
            "itself": l1s[0],
            "the active table": image.header.l1_offset,
            "nowhere": 1 << 50,
            "an odd place": l1s[0] + 512,
        }[target],
    )
    said = change_all(path)
    assert len(said) >= (0 if target == "header" else 2), said


def test_a_snapshot_table_that_claims_too_much(path: Path) -> None:
    """65,536 snapshots, all with the biggest table there can be at one place."""
    table, _, _, image = places(path)
    entry = image.header.l1_offset.to_bytes(8, "big") + (4 << 20).to_bytes(4, "big") + bytes(28)
    with path.open("r+b") as file:
        file.truncate(64 << 20)
        file.seek(48 << 20)
        file.write(entry * 65536)
    patch(path, 60, 65536, 4)
    patch(path, 64, 48 << 20)
    assert table
    began = time.process_time()
    said = change_all(path)
    assert len(said) == 3
    assert time.process_time() - began < 20


def kvik_img(*words: str) -> tuple[int, str]:
    import io

    out, err = io.StringIO(), io.StringIO()
    code = run_verb(Context(stdout=out, stderr=err, colour=False), ["img", *words])
    return code, err.getvalue()


VERBS = (
    ["commit", "top"],
    ["rebase", "-b", "", "top"],
    ["rebase", "-b", "other", "-F", "raw", "top"],
    ["amend", "-o", "lazy_refcounts=on", "top"],
    ["convert", "-O", "raw", "top", "out"],
    ["compare", "top", "other"],
)


@pytest.mark.parametrize("reference", ["json:{}", "nbd://host/x", "nbd:host:1", "http://x/y", "loop", "deep"])
def test_references_are_not_followed_by_any_verb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("other").write_bytes(bytes(SIZE))
    name = {"loop": "below", "deep": "c0"}.get(reference, reference)
    create("top", "qcow2", SIZE, backing_file=name, backing_format="qcow2")
    create("below", "qcow2", SIZE, backing_file="./top", backing_format="qcow2")
    for number in range(300 if reference == "deep" else 0):
        create(f"c{number}", "qcow2", SIZE, backing_file=f"c{number + 1}", backing_format="qcow2")
    before = Path("top").read_bytes()
    for words in VERBS:
        code, err = kvik_img(*words)
        assert code and ("no plain file" in err or "loop" in err or "deeper than" in err), (words, err)
        assert Path("top").read_bytes() == before
    for words in (["snapshot", "-c", "x", "top"], ["bitmap", "--add", "top", "b"], ["rebase", "-u", "-b", "", "top"]):
        assert kvik_img(*words)[0] == 0  # which need nothing below


@pytest.mark.parametrize("reference", ["json:{}", "nbd://host/x", "/dev/tty", "absent"])
def test_data_files_are_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: str) -> None:
    monkeypatch.chdir(tmp_path)
    create("top", "qcow2", SIZE, data_file=reference)
    for words in (["amend", "-o", "lazy_refcounts=on"], ["resize", "-f", "qcow2"], ["rebase", "-u", "-b", ""]):
        code, err = kvik_img(*words, "top", *(["2M"] if words[0] == "resize" else []))
        assert code == 1 and ("data file" in err or "neither a file" in err), (words, err)


@pytest.mark.parametrize("kind", ["backing", "data"])
def test_alone_no_file_of_the_host_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.chdir(tmp_path)
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret" * 1000)
    if kind == "backing":
        create("evil", "qcow2", SIZE, backing_file=str(secret), backing_format="raw")
    else:
        create("evil", "qcow2", SIZE, data_file=str(secret), data_file_raw=True)
    Path("other").write_bytes(bytes(SIZE))
    words = (["convert", "evil", "out"], ["dd", "if=evil", "of=out"], ["compare", "evil", "other"], ["map", "evil"])
    for verb, *rest in words:
        code, err = kvik_img(verb, "--alone", *rest)
        assert code and "secret', which was not opened" in err, (verb, err)
        assert not Path("out").exists()
    assert kvik_img("info", "--alone", "evil")[0] == kvik_img("info", "--alone", "--backing-chain", "evil")[0] == 0
    assert kvik_img("convert", "--alone", "-f", "raw", "other", "out")[0] == 0


def test_a_missing_file_is_named_with_what_it_is_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert kvik_img("info", "absent") == (
        1,
        "error: cannot open 'absent': No such file or directory\nhint: see whether its name is right\n",
    )
    code, err = kvik_img("create", "-f", "qcow2", "-b", "absent", "-F", "raw", "new")
    assert code == 1 and "new: its backing file absent cannot be opened" in err
    code, err = kvik_img("create", "-u", "-f", "qcow2", "-b", "absent", "-F", "raw", "new")
    assert code == 1 and "needs a size" in err
    create("top", "qcow2", SIZE, backing_file="absent", backing_format="raw")
    for verb in ("map", "check", "info"):
        code, err = kvik_img(verb, "top")
        assert code == (verb == "map") and ("its backing file absent cannot be opened" in err) == (verb == "map"), err


def test_a_raw_disk_that_holds_a_qcow2_header_stays_raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guest wrote it: with the format stated, no verb takes it for more than bytes."""
    monkeypatch.chdir(tmp_path)
    Path("secret").write_bytes(b"secret" * 1000)
    create("evil", "qcow2", SIZE, backing_file="secret", backing_format="raw")
    header = Path("evil").read_bytes()
    disk = header + bytes(SIZE - len(header))
    for name in ("base", "other"):
        Path(name).write_bytes(disk)
    create("top", "qcow2", SIZE, backing_file="base", backing_format="raw")
    with Opener().open("top", "qcow2", writable=True) as image:
        image.write(SIZE - 512, b"\7" * 512)
    rebase("top", "other", "raw")
    with Opener().open("top", "qcow2") as image:
        assert image.read(0, SIZE) == disk[:-512] + b"\7" * 512
    assert kvik_img("commit", "top")[0] == 0
    assert Path("other").read_bytes() == disk[:-512] + b"\7" * 512
    with pytest.raises(KvikError):
        rebase("top", "other", None)  # never guessed
