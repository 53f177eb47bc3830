"""`kvik proxy`: bytes between standard input and output and the daemon's socket."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path
from typing import Any

from kvik.cli.proxy import carry


def test_bytes_go_both_ways_until_either_end_closes() -> None:
    ours, theirs = socket.socketpair()
    in_read, in_write = os.pipe()
    out_read, out_write = os.pipe()
    thread = threading.Thread(target=carry, args=(in_read, out_write, ours.fileno()))
    thread.start()
    big = b"x" * 3_000_000
    os.write(in_write, b"hello")
    assert theirs.recv(10) == b"hello"
    sender = threading.Thread(target=theirs.sendall, args=(big,))
    sender.start()
    got = 0
    while got < len(big):
        got += len(os.read(out_read, 1 << 20))
    sender.join(10)
    theirs.close()
    thread.join(10)
    assert not thread.is_alive()
    for fd in (in_read, in_write, out_read, out_write):
        os.close(fd)
    ours.close()


def test_scopes_exclude_each_other(kvik: Any) -> None:
    assert kvik("proxy", "--system", "--session") == 1
    assert "mutually exclusive" in kvik.err


def test_a_socket_nobody_listens_on(kvik: Any, tmp_path: Path) -> None:
    assert kvik("proxy", "--session", "--socket", str(tmp_path / "none.sock")) == 1
    assert "none.sock" in kvik.err
