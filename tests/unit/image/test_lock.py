"""Locks where other hosts see those on files only (OCFS2), by a list of mounts that says so of the test's directory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvik.errors import ResourceBusy
from kvik.image import lock

Open = Callable[[], int]


@pytest.fixture
def image(tmp_path: Path) -> Iterator[Open]:
    path = tmp_path / "image"
    path.write_bytes(bytes(4096))
    opened: list[int] = []

    def once_more() -> int:
        opened.append(os.open(path, os.O_RDWR))
        return opened[-1]

    yield once_more
    for fd in opened:
        os.close(fd)


def mounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: str) -> None:
    device = tmp_path.stat().st_dev
    mounts = tmp_path / "mounts"
    mounts.write_text(
        f"30 1 0:999 / /other rw - ocfs2 /dev/sdx rw,localflocks\n"
        f"44 29 {os.major(device)}:{os.minor(device)} / / rw,relatime - ocfs2 /dev/vda rw,{options}\n"
    )
    monkeypatch.setattr(lock, "_MOUNTS", str(mounts))


def test_a_writer_is_alone_and_readers_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, image: Open) -> None:
    mounted(tmp_path, monkeypatch, "heartbeat=local")
    first, second, third = image(), image(), image()
    lock.lock_for_hosts(first, "x", write=True)
    lock.lock_for_hosts(first, "x", write=True)  # its own is not in its way
    for write, share in ((False, False), (True, False), (True, True)):
        with pytest.raises(ResourceBusy, match="image x is in use by another process"):
            lock.lock_for_hosts(second, "x", write=write, share_write=share)
    lock.lock_for_hosts(first, "x", write=True, share_write=True)
    lock.lock_for_hosts(second, "x", write=True, share_write=True)
    lock.lock_for_hosts(third, "x", write=False)
    with pytest.raises(ResourceBusy):
        lock.lock_for_hosts(third, "x", write=True)


def test_tools_hold_it_too_and_give_back_what_they_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, image: Open
) -> None:
    mounted(tmp_path, monkeypatch, "heartbeat=local")
    first, second, third = image(), image(), image()
    lock.lock_for_hosts(first, "x", write=True)  # as of another host: its locks on bytes are not seen here
    with pytest.raises(ResourceBusy):
        lock.lock_image(second, "x", write=True)
    monkeypatch.setattr(lock, "_MOUNTS", os.devnull)
    lock.lock_image(third, "x", write=True)  # nothing of the second is left


@pytest.mark.parametrize("options", ["heartbeat=local,localflocks", ""])
def test_elsewhere_files_are_not_locked_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, image: Open, options: str
) -> None:
    mounted(tmp_path, monkeypatch, options)
    if not options:
        monkeypatch.setattr(lock, "_MOUNTS", "/proc/self/mountinfo")
    first, second = image(), image()
    lock.lock_for_hosts(first, "x", write=True)
    lock.lock_for_hosts(second, "x", write=True)


def test_asking_takes_nothing(image: Open) -> None:
    first, second, third = image(), image(), image()
    lock.check_image(second, "x", write=True)
    lock.lock_image(first, "x", write=True)
    with pytest.raises(ResourceBusy, match="image x is in use by another process"):
        lock.check_image(second, "x", write=False)
    lock.unlock_image(first)
    lock.check_image(second, "x", write=True)
    lock.lock_image(third, "x", write=True)
