"""Snapshots of a real QEMU that runs: what the guest wrote before and after, also when the daemon is killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from fault_harness import Host, disk_xml, eventually
from kill_points import points_of, share, traced

from kvik.client import snapshot
from kvik.errors import KvikError
from kvik.image.create import create
from kvik.image.opening import Opener
from kvik.storage import overlays

DISK_ONLY = 1 << 4
BLOCK = 64 << 10
WHOLE = os.environ.get("KVIK_SWEEP") == "full"


def define(host: Host, disks: int = 2) -> list[Path]:
    """A machine `m` with qcow2 disks vda, vdb."""
    paths = [host.root / f"d{number}.qcow2" for number in range(disks)]
    for path in paths:
        create(str(path), "qcow2", 1 << 20)
    devices = "".join(disk_xml(path, f"vd{'ab'[n]}", format="qcow2") for n, path in enumerate(paths))
    host.define("m", devices)
    return paths


def guest_writes(host: Host, pattern: int, disk: int = 0, at: int = 0) -> None:
    """As the guest would: through the disk's own block backend."""
    qdev = f"/machine/peripheral/virtio-disk{disk}/virtio-backend"
    said = host.connection.domain("m").monitor_command(f'qemu-io -d {qdev} "write -P {pattern} {at} {BLOCK}"', hmp=True)
    assert not said, said  # what qemu-io says goes to QEMU's own output; a refusal comes back


def byte(path: Path | str, at: int = 0, format: str = "qcow2") -> int:
    """The first byte of a block, through the chain; beside a QEMU that has it open."""
    with Opener(share=True, lock=False).open(str(path), format) as image:
        data = image.read(at, BLOCK)
    assert len(set(data)) == 1
    return data[0]


def sources(host: Host, *, inactive: bool = False) -> list[str]:
    from xml.etree import ElementTree

    text = host.connection.domain("m").xml(2 if inactive else 0)
    return [item.get("file", "") for item in ElementTree.fromstring(text).findall("./devices/disk/source")]


def take(host: Host, name: str) -> None:
    snapshot.create(host.connection.domain("m"), f"<domainsnapshot><name>{name}</name></domainsnapshot>", DISK_ONLY)


def test_what_the_guest_writes_goes_to_the_new_images_of_all_disks(host: Host) -> None:
    paths = define(host)
    domain = host.connection.domain("m")
    domain.start()
    guest_writes(host, 1)
    guest_writes(host, 1, disk=1)
    said = host.kvik("snapshot-create-as", "m", "s1", "--disk-only", "--atomic")
    assert "Domain snapshot s1 created" in said and "held up for at most" in said
    guest_writes(host, 2)
    guest_writes(host, 2, disk=1)
    assert [byte(path) for path in paths] == [1, 1]
    news = [host.root / f"d{number}.s1" for number in range(2)]
    assert sources(host) == sources(host, inactive=True) == [str(path) for path in news]
    take(host, "s2")
    guest_writes(host, 3)
    host.restart()
    guest_writes(host, 4)
    take(host, "s3")
    assert [byte(host.root / f"d0.{name}") for name in ("s1", "s2", "s3")] == [2, 4, 4]
    assert host.connection.domain("m").is_active()
    answer = json.loads(host.connection.domain("m").monitor_command('{"execute": "query-block"}'))
    for entry in answer["return"]:
        if entry.get("inserted") and "virtio-disk0" in entry.get("qdev", ""):
            assert entry["inserted"]["backing_file_depth"] == 3


def test_images_are_merged_while_the_guest_writes_to_them(host: Host) -> None:
    paths = define(host)
    host.connection.domain("m").start()
    pid = host.pid("m")
    for number, name in enumerate(("s1", "s2", "s3"), 1):
        guest_writes(host, number)
        guest_writes(host, number, disk=1, at=BLOCK * number)
        take(host, name)
    guest_writes(host, 9, at=BLOCK)
    for name in ("s2", "s1", "s3"):
        snapshot.lookup(host.connection.domain("m"), name).delete()
        assert [byte(sources(host)[0]), byte(sources(host)[0], BLOCK)] == [3, 9]
        for item in snapshot.snapshots(host.connection.domain("m")):
            assert byte(kept_in(item.xml())) == int(item.name[1]), (name, item.name)
        if name == "s2":
            host.kvik("blockcommit", "m", "vda", "--active", "--pivot", fails="keeps snapshot 's3' of machine 'm'")
    assert sources(host) == sources(host, inactive=True) == [str(path) for path in paths]
    assert not list(host.root.glob("d*.s*"))
    guest_writes(host, 7)
    assert host.pid("m") == pid and byte(paths[0]) == 7
    assert [byte(paths[1], BLOCK * number) for number in (1, 2, 3)] == [1, 2, 3]


def kept_in(xml: str) -> str:
    from xml.etree import ElementTree

    found = ElementTree.fromstring(xml).find("./domain/devices/disk/source")
    assert found is not None
    return found.get("file", "")


def test_going_back_while_it_runs_and_starting_from_there(host: Host) -> None:
    define(host, 1)
    domain = host.connection.domain("m")
    domain.start()
    guest_writes(host, 1)
    take(host, "s1")
    guest_writes(host, 2)
    take(host, "s2")
    guest_writes(host, 3)
    host.kvik("snapshot-revert", "m", "s1", "--running")
    assert domain.is_active()
    assert byte(sources(host)[0]) == 1
    guest_writes(host, 9)
    host.kvik("snapshot-revert", "m", "s2", "--running")
    assert byte(sources(host)[0]) == 2


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace (apt install strace)")
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to trace a daemon that runs")
def test_the_daemon_is_killed_at_each_step_of_a_live_snapshot(host: Host) -> None:
    """Whichever step it is, the guest goes on writing to its disk, and base and snapshots show what they did."""
    (path,) = define(host, 1)
    host.connection.domain("m").start()
    guest_writes(host, 1)
    pid = host.pid("m")
    host.connection  # noqa: B018 - connected before the trace begins
    with traced(host.daemon) as trace:
        take(host, "first")
    points = share(points_of(trace[0]), WHOLE)[:: 1 if WHOLE else 7]
    assert points
    kept = {"first": overlays_digest(path)}
    for number, point in enumerate(points):
        name = f"n{number}"
        guest_writes(host, number % 200 + 2)
        before = byte(sources(host)[0])
        with traced(host.daemon, point):
            try:
                take(host, name)
            except KvikError:
                pass
        host.restart(signal.SIGKILL)
        assert host.pid("m") == pid, point
        names = {item.name for item in snapshot.snapshots(host.connection.domain("m"))}
        assert byte(sources(host)[0]) == before, point
        guest_writes(host, 1)
        assert byte(sources(host)[0]) == 1, point
        if name in names:
            kept[name] = overlays_digest(backing_of(sources(host)[0]))
        assert set(kept) == names, point
        for image in [path, *host.root.glob("d0.*")]:
            assert overlays.look(str(image), "qcow2").path, point


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace (apt install strace)")
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to trace a daemon that runs")
def test_the_daemon_is_killed_while_a_running_machine_goes_back(host: Host) -> None:
    """Whichever step it is, base and snapshots show what they did, and going back can be done again."""
    (path,) = define(host, 1)
    domain = host.connection.domain("m")
    domain.start()
    for number in (1, 2):
        guest_writes(host, number)
        take(host, f"s{number}")
    guest_writes(host, 3)
    with traced(host.daemon) as trace:
        snapshot.lookup(domain, "s1").revert(1)  # and runs
    points = share(points_of(trace[0]), WHOLE)
    assert len(points) > 20
    for number, point in enumerate(points[:: 1 if WHOLE else len(points) // 6]):
        name, shown = (("s2", 2), ("s1", 1))[number % 2]
        guest_writes(host, 9)
        qdev = "/machine/peripheral/virtio-disk0/virtio-backend"
        host.connection.domain("m").monitor_command(f'qemu-io -d {qdev} "flush"', hmp=True)
        with traced(host.daemon, point):
            try:
                snapshot.lookup(host.connection.domain("m"), name).revert(1)
            except KvikError:
                pass
        host.restart(signal.SIGKILL)
        domain = host.connection.domain("m")
        found = {item.name: byte(kept_in(item.xml())) for item in snapshot.snapshots(domain)}
        assert found == {"s1": 1, "s2": 2} and byte(path) == 1, point
        assert byte(sources(host)[0]) in (9, shown), point
        snapshot.lookup(domain, name).revert(1)
        assert byte(sources(host)[0]) == shown, point
        needed = {path, *(Path(kept_in(item.xml())) for item in snapshot.snapshots(domain)), Path(sources(host)[0])}
        eventually(
            lambda needed=needed: {path, *host.root.glob("d0.*")} == needed, f"no file that nothing needs: {point}"
        )


def backing_of(path: str) -> str:
    found = overlays.look(path, "qcow2").backing
    assert found is not None
    return found


def overlays_digest(path: Path | str) -> int:
    return byte(path)
