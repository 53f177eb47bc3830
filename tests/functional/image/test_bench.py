"""`bench`, and how far a command is: as qemu-img prints it."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from functional.image.conftest import kvik_img, qemu_img

SIZE = 4 << 20
COMMAND = [sys.executable, "-c", "from kvik.cli.img import main; main()"]
_SECONDS = re.compile(r"in \d+\.\d{3} seconds")
_SHARE = re.compile(r" {4}\((\d+\.\d\d)/100%\)\r?")


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """a.qcow2 and a.raw; what is on them."""
    monkeypatch.chdir(tmp_path)
    data = random.Random(1).randbytes(SIZE)
    Path("a.raw").write_bytes(data)
    assert qemu_img("convert", "-f", "raw", "-O", "qcow2", "a.raw", "a.qcow2").code == 0
    return data


@pytest.mark.parametrize(
    "words",
    [
        "-c 10",
        "-c 10 -d 3 -s 8k -S 16k -o 64k -w --pattern 5 --flush-interval 4",
        "-c 10 -w --flush-interval 4 --no-drain",
        "-c 10 -w -d 2 --flush-interval 1",
        "-c 0",
        "-c 0x10 -q",
        "-c 10 --flush-interval 4",
        "-c 10 -w -t writethrough",
        "-c 10 -t none -i native",
        "-c 10 -i threads -U",
        "-c 10 -i native",
        "-c 10 -n",
        "-c 10 -i foo",
        "-c 10 -t foo",
        "-c 10 -o 16M",
        "-c 10 -s 3G",
        "-c 10 -s x",
        "-c -1",
        "-c x",
        "-w --pattern 300",
    ],
)
def test_the_same_words_and_codes(disk: bytes, words: str) -> None:
    theirs, ours = qemu_img("bench", *words.split(), "a.qcow2"), kvik_img("bench", *words.split(), "a.qcow2")
    assert (ours.code, _SECONDS.sub("", ours.out)) == (theirs.code, _SECONDS.sub("", theirs.out)), ours.err
    assert bool(ours.err) is bool(theirs.err)


@pytest.mark.parametrize("name", ["a.raw", "a.qcow2"])
def test_what_is_written(disk: bytes, name: str) -> None:
    format = name.partition(".")[2]
    words = ["-w", "-c", "5", "-S", "64k", "-o", "1M", "--pattern", "0x41", "--flush-interval", "64"]
    done = kvik_img("bench", "-f", format, *words, name)
    assert done.code == 0, done.err
    wanted = bytearray(disk)
    for number in range(5):
        at = (1 << 20) + number * 65536
        wanted[at : at + 4096] = b"A" * 4096
    assert qemu_img("convert", "-f", format, "-O", "raw", name, "out").code == 0
    assert Path("out").read_bytes() == wanted
    assert kvik_img("bench", "-f", format, "-c", "3000", name).code == 0  # over its end, too
    assert Path("out").read_bytes() == wanted


@pytest.mark.parametrize(
    "words",
    [
        ["convert", "-p", "-O", "raw", "a.qcow2", "out"],
        ["compare", "-p", "a.qcow2", "a.raw"],
        ["amend", "-p", "-o", "lazy_refcounts=on", "a.qcow2"],
        ["rebase", "-p", "-b", "", "a.qcow2"],
        ["convert", "-p", "-q", "-O", "raw", "a.qcow2", "out"],
        ["compare", "-p", "-q", "a.qcow2", "a.raw"],
    ],
    ids=" ".join,
)
def test_progress(disk: bytes, words: list[str]) -> None:
    """From 0 to 100 in its form, and all else as without."""
    done = subprocess.run(["qemu-img", *words], stdout=subprocess.PIPE, check=True)
    theirs, ours = done.stdout.decode(), kvik_img(*words)
    assert (ours.code, _SHARE.sub("", ours.out)) == (0, _SHARE.sub("", theirs))
    shares = [float(share) for share in _SHARE.findall(ours.out)]
    assert shares == sorted(shares)
    expected = [float(share) for share in _SHARE.findall(theirs)]
    assert shares[:1] == expected[:1] and shares[-1:] == expected[-1:]


def test_a_signal_asks_how_far_it_is(disk: bytes) -> None:
    words = ["convert", "-r", "4M", "-O", "raw", "a.qcow2", "out"]
    process = subprocess.Popen(
        [*COMMAND, *words], stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": ":".join(sys.path)}
    )
    assert process.stderr is not None
    while not Path("out").exists() or not Path("out").stat().st_blocks:
        assert process.poll() is None
    process.send_signal(signal.SIGUSR1)
    said = process.stderr.readline().decode()
    assert _SHARE.fullmatch(said.rstrip("\n")), said
    assert process.wait(60) == 0
    process.stderr.close()
    assert Path("out").read_bytes() == disk
