"""What a guest writes is kept where it was asked for, and nobody who does not read it holds the guest up."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvik.errors import HostError, InvalidArgument
from kvik.vmm.backends.char import MAX_PENDING, Chardev


def test_output_goes_into_the_log_as_well(tmp_path: Path) -> None:
    chardev = Chardev(f"file:{tmp_path / 'out'}", "serial0", f"file:{tmp_path / 'log'}")
    assert chardev.write(b"hello ") == 6
    assert chardev.write(bytearray(b"there")) == 5
    chardev.close()
    assert (tmp_path / "out").read_bytes() == (tmp_path / "log").read_bytes() == b"hello there"


def test_a_log_is_kept_though_nobody_is_connected(tmp_path: Path) -> None:
    chardev = Chardev("null", "serial0", f"file:{tmp_path / 'log'}")
    chardev.write(b"unseen")
    chardev.close()
    assert (tmp_path / "log").read_bytes() == b"unseen"


def test_a_reader_of_the_log_that_stops_or_goes_does_not_stop_the_guest() -> None:
    reader, writer = os.pipe()
    chardev = Chardev("null", "serial0", f"fd={writer}")
    for _ in range(40):
        assert chardev.write(bytes(8192)) == 8192  # 320 KiB: more than a pipe holds
    os.close(reader)
    assert chardev.write(b"x") == 1
    chardev.close()


def test_a_pty_that_nobody_reads_takes_everything() -> None:
    chardev = Chardev("pty", "serial0")
    assert chardev.filename.startswith("pty:/dev/pts/")
    total = 0
    for _ in range(64):
        assert chardev.write(bytes(4096)) == 4096
        total += 4096
    assert total > MAX_PENDING and chardev.dropped > 0
    chardev.close()


@pytest.mark.parametrize("log", ["fd=", "fd=x", "nonsense", "file:"])
def test_what_is_no_log_is_refused(log: str) -> None:
    with pytest.raises(InvalidArgument, match="file:PATH or fd=N"):
        Chardev("null", "serial0", log)


def test_a_log_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with pytest.raises(HostError, match=r"serial0: cannot log to .*absent/log"):
        Chardev("null", "serial0", f"file:{tmp_path}/absent/log")
