"""Leases: who has one keeps everybody else out, until the last descriptor is closed; a file's own content is safe."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from kvik.conf.devices.other import Lease, LeaseTarget
from kvik.errors import ConfigError, HostError, KvikError, ResourceBusy
from kvik.manager.leases import open_leases

UUID = "55806c7d-8e93-456f-829b-607d8c198367"


def lease(path: Path | str, offset: int | None = None) -> Lease:
    return Lease(lockspace="shop", key="db", target=LeaseTarget(path=str(path), offset=offset))


def test_the_second_is_told_who_has_it(tmp_path: Path) -> None:
    place = tmp_path / "leases"
    with ExitStack() as first:
        taken = open_leases([lease(place), lease(place, 4096)], "web", UUID, first)
        assert list(taken) == ["lease:0", "lease:1"] and place.stat().st_mode & 0o777 == 0o600
        with (
            ExitStack() as second,
            pytest.raises(ResourceBusy, match="lease 'db' of lockspace 'shop' is held by machine 'web' on"),
        ):
            open_leases([lease(place, 4096)], "other", UUID, second)
        with ExitStack() as third:
            open_leases([lease(place, 8192)], "other", UUID, third)
    with ExitStack() as after:
        open_leases([lease(place)], "other", UUID, after)


def test_it_is_held_for_as_long_as_a_process_that_inherited_it_lives(tmp_path: Path) -> None:
    with ExitStack() as ours:
        (fd,) = open_leases([lease(tmp_path / "l")], "web", UUID, ours).values()
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[fd])
    with ExitStack() as other, pytest.raises(ResourceBusy):
        open_leases([lease(tmp_path / "l")], "other", UUID, other)
    child.kill()
    child.wait(10)
    assert child.stdin is not None
    child.stdin.close()
    with ExitStack() as other:
        open_leases([lease(tmp_path / "l")], "other", UUID, other)


def test_what_is_no_place_for_a_lease_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    data, sanlock, fifo, link = (tmp_path / name for name in ("data", "sanlock", "fifo", "link"))
    data.write_bytes(b"precious")
    sanlock.write_bytes(struct.pack("<I", 0x06152010) + bytes(508))
    os.mkfifo(fifo)
    link.symlink_to(data)
    cases: list[tuple[Lease, type[KvikError], str]] = [
        (lease(data), ConfigError, "holds something else at byte 0"),
        (lease(sanlock), ConfigError, "holds something else at byte 0"),
        (lease(fifo), ConfigError, "neither a file nor a block device"),
        (lease(link), HostError, "link"),
        (lease(tmp_path / "none/l"), HostError, "none/l"),
        (lease("relative"), ConfigError, "needs a <key>"),
        (Lease(key="k"), ConfigError, "needs a <key>"),
        (lease(data, 1 << 62), ConfigError, "beyond any file"),
    ]
    for wanted, kind, why in cases:
        with ExitStack() as held, pytest.raises(kind, match=why):
            open_leases([wanted], "web", UUID, held)
    assert data.read_bytes() == b"precious"


def test_a_record_of_somebody_else_is_a_hint_and_harms_nobody(tmp_path: Path) -> None:
    place = tmp_path / "l"
    with ExitStack() as first:
        (fd,) = open_leases([lease(place)], "web", UUID, first).values()
        for record in (b"kvik lease 1\n\x1b[2J\n", b"kvik lease 1", b"\xff" * 600, b""):
            os.pwrite(fd, record.ljust(600, b"\0"), 0)
            with ExitStack() as second, pytest.raises(ResourceBusy, match="held by another program"):
                open_leases([lease(place)], "other", UUID, second)
