"""Encrypted images with `--object secret`: what qemu-img does with them, each command of kvik img does; nothing else is
opened, and the secret is seen nowhere."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from functional.image.conftest import Done, kvik_img, qemu_img
from kvik.host import jail
from kvik.host.tools import Completed

SIZE = 2 << 20
SECRET = "a very secret passphrase"
KEY = ("--object", "secret,id=key,file=passphrase")
QUICK = "key-secret=key,iter-time=10"
INSIDE = "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10"
LUKS, QCOW2 = "driver=luks,key-secret=key,file.filename=a.luks", "driver=qcow2,encrypt.key-secret=key,file.filename={}"
A = QCOW2.format("a.qcow2")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made once: QEMU takes seconds to find out how fast it derives a key."""
    directory = tmp_path_factory.mktemp("encrypted")
    data = random.Random(3).randbytes(SIZE // 2) + bytes(SIZE // 2)
    (directory / "a.raw").write_bytes(data)
    (directory / "passphrase").write_text(SECRET)
    with contextlib.chdir(directory):
        done = kvik_img("convert", *KEY, "-f", "raw", "-O", "luks", "-o", QUICK, "a.raw", "a.luks")
        assert (done.code, done.out, done.err) == (0, "", "")
        words = ["-f", "qcow2", "-o", INSIDE + ",cluster_size=4k", "-b", "a.raw", "-F", "raw"]
        done = kvik_img("create", *KEY, *words, "top", "2M")
        assert (done.code, done.err) == (0, "")
        assert done.out == (
            "Formatting 'top', fmt=qcow2 encrypt.format=luks encrypt.key-secret=key encrypt.iter-time=10 "
            "cluster_size=4096 extended_l2=off compression_type=zlib size=2097152 backing_file=a.raw backing_fmt=raw "
            "lazy_refcounts=off refcount_bits=16\n"
        )
        shutil.copyfile("top", "a.qcow2")
        done = kvik_img("rebase", *KEY, "--image-opts", "-b", "", A)  # the disk is its own then
        assert (done.code, done.out, done.err) == (0, "", "")
    return directory


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: Path) -> bytes:
    """In a directory of its own: a.raw, the same disk encrypted as a.luks and a.qcow2, and an encrypted image on top of
    it, all made by kvik; what is on it."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return Path("a.raw").read_bytes()


def read(options: str, *key: str) -> bytes:
    done = qemu_img("convert", *(key or KEY), "--image-opts", "-O", "raw", options, "read")
    assert done.code == 0, done.err
    return Path("read").read_bytes()


def test_what_is_made_is_what_qemu_makes(disk: bytes, same: Callable[..., Done]) -> None:
    assert read(LUKS) == read(A) == read(QCOW2.format("top")) == disk
    for name in ("a.luks", "a.qcow2", "top"):
        assert disk[:4096] not in Path(name).read_bytes()
        same("info", *KEY, name)


@pytest.mark.parametrize(
    "words",
    [
        ["check", A],
        ["check", LUKS],
        ["check", "--output=json", A],
        ["map", "--output=json", A],
        ["map", LUKS],
        ["compare", A, LUKS],
        ["compare", "-q", LUKS, "driver=raw,file.filename=a.raw"],
        ["compare", A, "driver=raw,file.filename=passphrase"],
        ["measure", "-O", "qcow2", A],
        ["measure", "--output=json", LUKS],
        ["snapshot", "-l", A],
        ["resize", LUKS, "+1M"],
        ["resize", "--shrink", A, "1M"],
        ["amend", "-o", "lazy_refcounts=on", A],
        ["convert", "-O", "raw", LUKS, A, "out"],
        ["convert", "-O", "qcow2", "-c", A, "out"],
        ["dd", "bs=64k", "count=3", f"if={LUKS}", "of=out"],
        ["commit", A],
        ["check", A.replace("=key", "=nokey")],
        ["compare", A, "driver=luks,key-secret=key,file.filename=a.raw"],
    ],
    ids=lambda words: " ".join(words).replace("file.filename=", "").replace("driver=", ""),
)
def test_commands_do_as_qemu_img_does(disk: bytes, same: Callable[..., Done], words: list[str]) -> None:
    before = [Path(name).read_bytes() for name in ("a.luks", "a.qcow2")]
    theirs = qemu_img(words[0], "--image-opts", *KEY, *words[1:])
    left = Path("out").read_bytes() if Path("out").exists() else None
    disks = [read(LUKS), read(A)]
    for name, data in zip(("a.luks", "a.qcow2"), before, strict=True):
        Path(name).write_bytes(data)
    Path("out").unlink(missing_ok=True)
    ours = kvik_img(words[0], "--image-opts", *KEY, *words[1:])
    assert (ours.out, ours.code) == (theirs.out, theirs.code), ours.err
    assert (Path("out").read_bytes() if Path("out").exists() else None) == left
    assert [read(LUKS), read(A)] == disks
    assert bool(ours.err) is bool(theirs.err)


def test_a_chain_is_rebased_and_committed(disk: bytes) -> None:
    """An encrypted image on a plain one, which another replaces: the disk stays; then it is written down."""
    other = bytes(65536) + disk[65536:]
    Path("other").write_bytes(other)
    there = Path.cwd()
    top = QCOW2.format("top")
    assert read(top) == disk
    assert kvik_img("rebase", *KEY, "--image-opts", "-b", there / "other", "-F", "raw", top).code == 0
    assert qemu_img("info", "--output=json", "top").json["backing-filename"] == str(there / "other")
    assert read(top) == disk
    done = kvik_img("commit", *KEY, "--image-opts", top)
    assert (done.code, done.out) == (0, "Image committed.\n")
    assert Path("other").read_bytes() == disk and Path("a.raw").read_bytes() == disk


@pytest.mark.parametrize("options", [LUKS, A], ids=["luks", "qcow2"])
def test_key_slots(disk: bytes, options: str) -> None:
    prefix = "" if options == LUKS else "encrypt."
    new = ("--object", f"secret,id=new,data={SECRET} 2")
    words = [f"{prefix}{one}" for one in ("state=active", "new-secret=new", "iter-time=10")]
    assert kvik_img("amend", *KEY, *new, "--image-opts", "-o", ",".join(words), options).code == 0
    only_new = ("--object", f"secret,id=key,data={SECRET} 2")
    assert read(options) == read(options, *only_new) == disk
    words = [f"{prefix}{one}" for one in ("state=inactive", "old-secret=key")]
    assert (
        kvik_img("amend", *KEY, *new, "--image-opts", "-o", ",".join(words), options.replace("=key", "=new")).code == 0
    )
    assert qemu_img("convert", *KEY, "--image-opts", "-O", "raw", options, "out").code == 1
    assert read(options, *only_new) == disk


@pytest.mark.parametrize("given", ["data", "file", "pipe", "base64", "json", "encrypted"])
def test_the_secret_is_seen_nowhere(disk: bytes, monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    """However it is given: not on a command line, in an environment or in what is said, right or wrong."""
    seen: list[str] = []
    real = jail.run

    def run(argv: Sequence[str], **options: Any) -> Completed:
        seen.extend([*argv, *map(str, options["env"].items())])
        return real(argv, **options)

    monkeypatch.setattr(jail, "run", run)
    reader, writer = os.pipe()

    def feed() -> None:
        with os.fdopen(writer, "w") as stream:
            stream.write(SECRET)

    thread = threading.Thread(target=feed)
    thread.start()
    Path("iv").write_bytes(bytes(16))
    words = {
        "data": [f"secret,id=key,data={SECRET}"],
        "file": ["secret,id=key,file=passphrase"],
        "pipe": [f"secret,id=key,file=/dev/fd/{reader}"],
        "base64": ["secret,id=key,format=base64,data=YSB2ZXJ5IHNlY3JldCBwYXNzcGhyYXNl"],
        "json": ['{"qom-type": "secret", "id": "key", "data": "' + SECRET + '"}'],
        "encrypted": [  # AES-256-CBC of it with the key of 32 zero bytes
            "secret,id=master,format=base64,data=" + "A" * 43 + "=",
            "secret,id=key,keyid=master,iv=AAAAAAAAAAAAAAAAAAAAAA==,format=base64,"
            "data=L7m+EavRVKdNf4/Z7RbQzfs6CesfrgZJUhQUNLvC3Jo=",
        ],
    }[given]
    objects = [word for one in words for word in ("--object", one)]
    done = kvik_img("compare", *objects, "--image-opts", LUKS, "driver=raw,file.filename=a.raw")
    thread.join()
    os.close(reader)
    assert (done.code, done.out, done.err) == (0, "Images are identical.\n", "")
    wrong = kvik_img("compare", "--object", f"secret,id=key,data=no-{SECRET}", "--image-opts", LUKS, A)
    assert wrong.code == 2 and "Invalid password" in wrong.err
    everything = "\n".join([*seen, wrong.err])
    assert "qemu-img" in everything and SECRET not in everything and "YSB2ZXJ5" not in everything


@pytest.mark.parametrize(
    "words",
    [
        "secret,id=key",
        "secret,file=passphrase",
        "secret,id=key,file=passphrase,data=hidden",
        "secret,id=key,file=missing",
        "secret,id=key,dato=hidden",
        "secret,id=key,data=hidden,hidden",
        "tls-creds-x509,id=key",
        '{"qom-type": "secret", "id": "key", "data": "hidden"',
        '{"qom-type": "secret", "id": "key", "data": ["hidden"]}',
    ],
)
def test_objects_that_cannot_be(disk: bytes, words: str) -> None:
    for command in (["info", "a.raw"], ["convert", "-O", "raw", "a.luks", "out"]):
        done = kvik_img(command[0], "--object", words, *command[1:])
        assert done.code == 1 and done.err and "hidden" not in done.err
    assert not Path("out").exists()


def test_what_fails_leaves_nothing_new(disk: bytes) -> None:
    Path("there").write_bytes(b"precious" * 512)
    for target in ("out", "there"):
        for words in (
            ["-O", "luks", "-o", "key-secret=nokey", "a.raw"],
            ["-O", "raw", "--image-opts", LUKS.replace("=key", "=nokey")],
        ):
            done = kvik_img("convert", *KEY, *words, target)
            assert done.code == 1 and "deleting" not in done.err, done.err
    assert not Path("out").exists()
    done = kvik_img("create", *KEY, "-f", "luks", "-o", "key-secret=nokey", "out", "1M")
    assert done.code == 1 and not Path("out").exists()


def test_only_the_images_that_are_named_are_opened(disk: bytes) -> None:
    """What an image says that it sits on is opened if it is a file, and as nothing else."""
    Path("secret-file").write_bytes(b"root:hash" + bytes(503))
    inner = '{"driver": "raw", "file": {"driver": "file", "filename": "secret-file"}}'
    for name in (f"json:{inner}", "nbd:localhost:1"):
        assert qemu_img("rebase", "-u", *KEY, "--image-opts", "-b", name, "-F", "raw", QCOW2.format("top")).code == 0
        done = kvik_img("convert", *KEY, "--image-opts", "-O", "raw", QCOW2.format("top"), "out")
        assert done.code == 1 and "no plain file" in done.err and not Path("out").exists()
    assert kvik_img("rebase", "-u", *KEY, "--image-opts", "-b", "a.raw", "-F", "raw", QCOW2.format("top")).code == 0
    done = kvik_img("convert", "--alone", *KEY, "--image-opts", "-O", "raw", QCOW2.format("top"), "out")
    assert done.code == 1 and "a.raw" in done.err and not Path("out").exists()


def test_without_a_secret_it_is_said_how(disk: bytes) -> None:
    for words in (["convert", "-O", "raw", "a.luks", "out"], ["map", "a.qcow2"], ["compare", "a.luks", "a.raw"]):
        done = kvik_img(*words)
        assert done.code == (2 if words[0] == "compare" else 1)
        assert "its secret was not given" in done.err and "--object secret" in done.err
    assert not Path("out").exists()
