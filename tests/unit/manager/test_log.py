"""The logs of a machine stay bounded while others write to them."""

from __future__ import annotations

import os
from pathlib import Path

from kvik.manager.log import cut


def test_the_log_of_a_serial_line_is_cut_while_the_guest_goes_on_writing(tmp_path: Path) -> None:
    path = tmp_path / "serial.log"
    writer = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        os.write(writer, b"old " * 100)
        assert cut(path, limit=100)
        os.write(writer, b"new")
    finally:
        os.close(writer)
    assert path.read_bytes() == b"new"
    assert (tmp_path / "serial.log.1").read_bytes() == b"old " * 25
    assert not cut(path, limit=100)
