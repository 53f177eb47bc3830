"""One daemon per scope, and a socket that is right from the moment it exists."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from kvik.daemon.instance import InstanceLock, bind_socket, private_directory
from kvik.errors import ConnectError, ResourceBusy


def test_a_second_daemon_is_refused_and_told_which_runs(tmp_path: Path) -> None:
    first, second = InstanceLock(tmp_path / "pid"), InstanceLock(tmp_path / "pid")
    first.acquire()
    with pytest.raises(ResourceBusy, match=f"pid {os.getpid()}"):
        second.acquire()
    first.release()
    second.acquire()
    second.release()


def test_a_left_over_pid_file_does_not_matter(tmp_path: Path) -> None:
    (tmp_path / "pid").write_text("1\n")
    lock = InstanceLock(tmp_path / "pid")
    lock.acquire()
    assert (tmp_path / "pid").read_text() == f"{os.getpid()}\n"
    lock.release()


def test_a_symbolic_link_as_pid_file_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "pid").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic"):
        InstanceLock(tmp_path / "pid").acquire()
    assert not (tmp_path / "elsewhere").exists()


def test_the_socket_is_private_and_replaces_a_dead_daemons(tmp_path: Path) -> None:
    path = tmp_path / "s"
    bind_socket(path, 5).close()  # dead: its name stays
    listener = bind_socket(path, 5)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
    listener.close()
    assert [entry.name for entry in tmp_path.iterdir()] == ["s"]


def test_a_path_too_long_for_the_kernel_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ConnectError, match="too long"):
        bind_socket(tmp_path / ("x" * 120), 5)


def test_a_run_directory_that_others_may_write_to_is_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    run.chmod(0o777)
    with pytest.raises(ResourceBusy, match="chmod go-w"):
        private_directory(run)
    private_directory(tmp_path / "new")
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700
