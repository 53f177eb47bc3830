"""Files: whole or not at all, bounded, private from the start."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from kvik.errors import HostError, ResourceBusy
from kvik.host import files


def names(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


def test_atomic_write_replaces_and_is_private_from_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "machine.xml"
    modes: list[int] = []
    real = os.fsync

    def spy(fd: int) -> None:
        info = os.fstat(fd)
        if stat.S_ISREG(info.st_mode):
            modes.append(stat.S_IMODE(info.st_mode))
        real(fd)

    monkeypatch.setattr(os, "fsync", spy)
    files.atomic_write(target, b"one")
    files.atomic_write(target, b"two")
    assert target.read_bytes() == b"two"
    assert modes == [0o600, 0o600]
    assert names(tmp_path) == ["machine.xml"]


def test_file_and_directory_are_synced_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    real_fsync, real_rename = os.fsync, os.rename

    def fsync(fd: int) -> None:
        steps.append("fsync directory" if stat.S_ISDIR(os.fstat(fd).st_mode) else "fsync file")
        real_fsync(fd)

    def rename(old: str, new: str) -> None:
        steps.append("rename")
        real_rename(old, new)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    files.atomic_write(tmp_path / "a", b"")
    assert steps == ["fsync file", "rename", "fsync directory"]
    steps.clear()
    files.atomic_write(tmp_path / "a", b"", durable=False)
    assert steps == ["rename"]


@pytest.mark.parametrize("call", ["write", "fsync", "rename"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_fault_leaves_the_old_content_and_no_temporary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    target = tmp_path / "machine.xml"
    files.atomic_write(target, b"old")

    def fail(*args: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(HostError, match=r"machine\.xml") as raised:
        files.atomic_write(target, b"new")
    monkeypatch.undo()
    assert raised.value.errno == number
    assert raised.value.remedy == ("free some space on that file system" if number == errno.ENOSPC else "")
    assert target.read_bytes() == b"old"
    assert names(tmp_path) == ["machine.xml"]


@pytest.mark.root
def test_a_full_file_system_keeps_the_old_content(tmp_path: Path) -> None:
    mounted = os.geteuid() == 0 and not subprocess.call(
        ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(tmp_path)], stderr=subprocess.DEVNULL
    )
    if not mounted:
        pytest.skip("needs root: mounts a 16 KiB tmpfs")
    try:
        target = tmp_path / "machine.xml"
        files.atomic_write(target, b"old")
        with pytest.raises(HostError, match="No space left") as raised:
            files.atomic_write(target, b"x" * 65536)
        assert raised.value.errno == errno.ENOSPC
        assert target.read_bytes() == b"old"
        assert names(tmp_path) == ["machine.xml"]
    finally:
        subprocess.check_call(["umount", str(tmp_path)])


@pytest.mark.root
def test_what_is_not_on_a_read_only_file_system_need_not_be_removed(tmp_path: Path) -> None:
    mounted = os.geteuid() == 0 and not subprocess.call(
        ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(tmp_path)], stderr=subprocess.DEVNULL
    )
    if not mounted:
        pytest.skip("needs root: mounts a 16 KiB tmpfs")
    try:
        (tmp_path / "there").write_bytes(b"")
        subprocess.check_call(["mount", "-o", "remount,ro", str(tmp_path)])
        assert not files.remove_file(tmp_path / "gone")
        for name in ("there", "gone"):
            with pytest.raises(HostError, match="Read-only"):
                files.remove_file(tmp_path / name, missing_ok=name == "there")
    finally:
        subprocess.check_call(["umount", str(tmp_path)])


def test_a_symbolic_link_is_replaced_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    link = tmp_path / "link"
    link.symlink_to(victim)
    files.atomic_write(link, b"new")
    assert victim.read_text() == "precious"
    assert not link.is_symlink()


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:3]))
    files.atomic_write(tmp_path / "a", b"0123456789")
    monkeypatch.undo()
    assert (tmp_path / "a").read_bytes() == b"0123456789"


def test_reading_is_bounded_and_refuses_links_fifos_and_directories(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_bytes(b"12345")
    assert files.read_file(plain, limit=5) == b"12345"
    with pytest.raises(HostError) as raised:
        files.read_file(plain, limit=4)
    assert raised.value.errno == errno.EFBIG
    (tmp_path / "link").symlink_to(plain)
    os.mkfifo(tmp_path / "fifo")
    for name in ("link", "fifo", ".", "missing"):
        with pytest.raises(HostError):
            files.read_file(tmp_path / name)
    assert files.try_read_file(tmp_path / "missing") is None
    assert files.try_read_file(plain / "below") is None
    with pytest.raises(HostError):
        files.try_read_file(tmp_path / "link")


def test_a_growing_file_is_bounded_too() -> None:
    # /proc files have size 0 and yet content.
    with pytest.raises(HostError, match="larger than 10 bytes"):
        files.read_file("/proc/self/status", limit=10)


def test_directories_are_private_and_strangers_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = files.ensure_directory(tmp_path / "a/b/c")
    for directory in (made, made.parent, made.parent.parent):
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    made.chmod(0o777)
    files.ensure_directory(made)
    assert stat.S_IMODE(made.stat().st_mode) == 0o755
    (tmp_path / "file").write_text("")
    with pytest.raises(HostError) as raised:
        files.ensure_directory(tmp_path / "file")
    assert raised.value.errno == errno.ENOTDIR
    if os.geteuid() == 0:
        os.chown(made, 12345, -1)
        with pytest.raises(HostError, match="belongs to user 12345"):
            files.ensure_directory(made)


def test_a_lock_excludes_threads_and_processes_and_dies_with_its_holder(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with files.locked(path):
        with pytest.raises(ResourceBusy), files.locked(path):
            pass
        # Closing another descriptor of the file must not drop it (a POSIX lock would be lost).
        path.open("rb").close()
        with pytest.raises(ResourceBusy):
            files.FileLock(path).acquire(timeout=0.02)
    files.FileLock(path).acquire()  # dropped at once, and the lock with it
    script = "import sys; from kvik.host import files; lock = files.FileLock(sys.argv[1]); lock.acquire(); "
    script += "print('held', flush=True); input()"
    other = subprocess.Popen(
        [sys.executable, "-c", script, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(files.__file__).parents[2])},
    )
    assert other.stdout is not None
    assert other.stdout.readline() == b"held\n"
    with pytest.raises(ResourceBusy):
        files.FileLock(path).acquire()
    other.kill()
    other.communicate()
    files.FileLock(path).acquire()


def test_waiting_for_a_lock_gets_it_when_it_is_released(tmp_path: Path) -> None:
    first = files.FileLock(tmp_path / "lock")
    first.acquire()
    timer = threading.Timer(0.05, first.release)
    timer.start()
    with files.locked(tmp_path / "lock", timeout=5) as second:
        assert second.held
    timer.join()


def test_shared_locks_share(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with files.locked(path, shared=True), files.locked(path, shared=True), pytest.raises(ResourceBusy):
        files.FileLock(path).acquire()


def test_leftovers_of_a_crash_are_swept_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / ".kvik-1-0-abcd.tmp").write_text("")
    (tmp_path / "kvik.tmp").write_text("")
    assert files.remove_temporaries(tmp_path) == 0  # too young: may be in use
    assert files.remove_temporaries(tmp_path, older_than=-1) == 1
    assert names(tmp_path) == ["kvik.tmp"]
    assert files.remove_temporaries(tmp_path / "missing") == 0


def test_links_and_removal(tmp_path: Path) -> None:
    files.atomic_symlink("one", tmp_path / "link")
    files.atomic_symlink("two", tmp_path / "link")
    assert (tmp_path / "link").readlink() == Path("two")
    assert files.remove_file(tmp_path / "link")
    assert not files.remove_file(tmp_path / "link")
    with pytest.raises(HostError):
        files.remove_file(tmp_path / "link", missing_ok=False)
    assert names(tmp_path) == []
