"""Backups, snapshots and saved memory of one machine: what goes together does, and what does not is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvik.client import checkpoint as client
from kvik.errors import CheckpointInconsistent

from .conftest import Kvikd, Make
from .test_backup import MIB, Guest, machine, nothing_left, ok, over, place, pull, push, run, start_backup, virsh

__all__ = ["place"]  # a fixture
CLUSTER = 65536


def changed(kvikd: Kvikd, guest: Guest, place: Path, since: str, based_on: bytes) -> set[int]:
    """The 64 KiB clusters of an incremental backup, which makes the disk of `based_on` (and is thrown away)."""
    path = place / f"since-{since}.qcow2"
    start_backup(kvikd, guest.name, push(path, since))
    assert over(kvikd, guest.name) == "completed"
    told = json.loads(run("qemu-img", "map", "--output=json", str(path)))
    path.unlink()
    found = {
        number
        for item in told
        if item["data"]
        for number in range(item["start"] // CLUSTER, (item["start"] + item["length"]) // CLUSTER)
    }
    made = bytearray(based_on)
    for number in found:
        made[number * CLUSTER : (number + 1) * CLUSTER] = guest.holds[0][number * CLUSTER : (number + 1) * CLUSTER]
    assert made == guest.holds[0], f"a backup since {since} lacks something"
    return found


def test_bitmaps_go_on_in_snapshots_taken_while_it_is_off(kvikd: Kvikd, make: Make, place: Path) -> None:
    domain = machine(kvikd, make, place, "sleeper")
    guest = Guest(kvikd, "sleeper")

    def write(number: int) -> None:
        guest.write(0x40 + number, number * CLUSTER, CLUSTER)

    def while_off(*words: str) -> None:
        domain.destroy()
        ok(kvikd, *words)
        domain.start()

    guest.write(0x11, 0, 2 * MIB)
    start_backup(kvikd, "sleeper", push(place / "full.qcow2"), "old")
    assert over(kvikd, "sleeper") == "completed"
    full = bytes(guest.holds[0])
    write(3)
    while_off("snapshot-create-as", "sleeper", "s1")
    write(4)
    assert changed(kvikd, guest, place, "old", full) == {3, 4}
    kept = bytes(guest.holds[0])
    while_off("snapshot-create-as", "sleeper", "s2")
    client.create(domain, "<domaincheckpoint><name>new</name></domaincheckpoint>")
    write(5)
    assert changed(kvikd, guest, place, "new", kept) == {5}
    # What lies between is merged, in either direction.
    while_off("snapshot-delete", "sleeper", "s1")
    write(6)
    assert changed(kvikd, guest, place, "old", full) >= {3, 4, 5, 6}
    assert changed(kvikd, guest, place, "new", kept) == {5, 6}
    # Back to s2: all of it since `old`, nothing is known since `new`, which is younger.
    while_off("snapshot-revert", "sleeper", "s2")
    guest.holds[0][:] = kept
    write(7)
    assert changed(kvikd, guest, place, "old", full) >= {3, 4, 7}
    with pytest.raises(CheckpointInconsistent, match="'new'"):
        start_backup(kvikd, "sleeper", push(place / "lacking.qcow2", "new"))
    while_off("snapshot-delete", "sleeper", "s2")
    assert changed(kvikd, guest, place, "old", full) >= {3, 4, 7}


def test_what_would_break_a_backup_off_is_refused(kvikd: Kvikd, make: Make, place: Path) -> None:
    domain = machine(kvikd, make, place, "torn")
    guest = Guest(kvikd, "torn")
    guest.write(0x11, 0, 2 * MIB)
    ok(kvikd, "snapshot-create-as", "torn", "before", "--disk-only")
    for mode in ("pull", "push"):
        start_backup(kvikd, "torn", pull(place) if mode == "pull" else push(place / "pushed.qcow2"), mode)
        if mode == "push":
            break
        then = bytes(guest.holds[0])
        for words in (
            ("save", "torn", str(place / "saved")),
            ("managedsave", "torn"),
            ("snapshot-create-as", "torn", "s"),
            ("snapshot-create-as", "torn", "s", "--live", "--memspec", f"file={place}/memory"),
            ("snapshot-create-as", "torn", "s", "--memspec", "snapshot=internal"),
            ("snapshot-create-as", "torn", "s", "--disk-only"),
            ("snapshot-revert", "torn", "before"),
        ):
            done = kvikd.kvik(*words)
            assert done.returncode == 1, words
            assert "has a backup under way" in done.stderr and "kvik domjobabort torn" in done.stderr, done.stderr
        assert "has a backup under way" in kvikd.virsh("save", "torn", str(place / "saved")).stderr
        assert sorted(path.name for path in place.iterdir()) == ["0.before", "0.qcow2", "nbd", "scratch"]
        assert domain.state().state == 1  # runs
        guest.write(0x22, MIB, CLUSTER)
        guest.is_in(f"nbd+unix:///vda?socket={place / 'nbd'}", then=then, kind="raw")
        virsh(kvikd, "domjobabort", "torn")
        assert over(kvikd, "torn") == "completed"
        nothing_left(kvikd, "torn", place / "nbd", place / "scratch")
    assert over(kvikd, "torn") == "completed"
    # With that over, all of it works; and a checkpoint goes with the machine through its saved memory.
    held = bytes(guest.holds[0])
    ok(kvikd, "managedsave", "torn")
    ok(kvikd, "start", "torn")
    guest.write(0x33, 0, 512)
    assert changed(kvikd, guest, place, "push", held) == {0}
    ok(kvikd, "snapshot-create-as", "torn", "memory")
    guest.write(0x44, 2 * MIB, 512)
    assert changed(kvikd, guest, place, "push", held) == {0, 2 * MIB // CLUSTER}
    ok(kvikd, "snapshot-revert", "torn", "memory")
    guest.holds[0][2 * MIB : 2 * MIB + 512] = held[2 * MIB : 2 * MIB + 512]
    guest.write(0x55, 3 * MIB, 512)
    assert changed(kvikd, guest, place, "push", held) >= {0, 3 * MIB // CLUSTER}
