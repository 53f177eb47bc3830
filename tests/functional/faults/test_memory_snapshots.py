"""Snapshots of a real QEMU with its memory: a guest of 14 bytes that counts, and what it wrote to its disks."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
from fault_harness import Host, disk_xml, eventually
from kill_points import points_of, share, traced

from functional.vmm.tiny_kernel import elf
from kvik.client import saved, snapshot
from kvik.errors import KvikError
from kvik.image.create import create

from .test_snapshots import byte, guest_writes, sources

COUNTER = 0x300_0000
# mov esi, COUNTER; 1: add dword [esi], 1; adc dword [esi + 4], 0; jmp 1b
COUNTING = bytes.fromhex("be00000003 830601 83560400 ebf7".replace(" ", ""))
RAN, PAUSED, OFF = 1, 3, 5
WHOLE = os.environ.get("KVIK_SWEEP") == "full"


TPM = "<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>" if shutil.which("swtpm") else ""


def define(host: Host, disks: int = 1, more: str = "") -> list[Path]:
    paths = [host.root / f"d{number}.qcow2" for number in range(disks)]
    for path in paths:
        create(str(path), "qcow2", 1 << 20)
    (host.root / "counting").write_bytes(elf(COUNTING))
    devices = "".join(disk_xml(path, f"vd{'ab'[n]}", format="qcow2") for n, path in enumerate(paths))
    host.define("m", devices + more, kernel=str(host.root / "counting"), memory=64)
    return paths


def count(host: Host) -> int:
    """What the guest has counted, in its memory."""
    said = host.connection.domain("m").monitor_command(f"xp /2wx {COUNTER:#x}", hmp=True)
    low, high = (int(word, 16) for word in said.split(":")[1].split())
    return high << 32 | low


def counting(host: Host) -> None:
    before = count(host)
    eventually(lambda: count(host) > before, "the guest counts")


def take(host: Host, name: str, memory: str = "", flags: int = 0) -> None:
    xml = f"<domainsnapshot><name>{name}</name>{memory}</domainsnapshot>"
    snapshot.create(host.connection.domain("m"), xml, flags)


def test_a_guest_goes_back_with_its_memory(host: Host) -> None:
    paths = define(host, 2, TPM)
    domain = host.connection.domain("m")
    domain.start()
    counting(host)
    guest_writes(host, 1)
    guest_writes(host, 1, disk=1)
    file = host.root / "memory"
    before = count(host)
    said = host.kvik("snapshot-create-as", "m", "s1", "--memspec", f"file={file},snapshot=external")
    assert "Domain snapshot s1 created" in said and "held up for at most" in said
    assert file.stat().st_mode & 0o777 == 0o600
    assert not TPM or list(host.paths.snapshots.glob("m/s1.tpm/*.permall"))
    assert domain.state().state == RAN
    counting(host)
    after = count(host)
    guest_writes(host, 2)
    guest_writes(host, 2, disk=1)
    assert [byte(path) for path in paths] == [1, 1]
    assert "running" in host.kvik("snapshot-list", "m")
    pid = host.pid("m")
    # without a word: with memory, too; while the guest runs
    host.kvik("snapshot-create-as", "m", "s2", "--live")
    assert host.pid("m") == pid and domain.state().state == RAN
    guest_writes(host, 3)
    # back, with the counter of then
    snapshot.lookup(domain, "s1").revert(2)
    assert domain.state().state == PAUSED
    stood = count(host)
    assert before <= stood < after
    assert stood == count(host), "it stands still"
    assert [byte(path) for path in sources(host)] == [1, 1]
    domain.resume()
    counting(host)
    snapshot.lookup(domain, "s2").revert()
    assert domain.state().state == RAN and domain.state().reason == 4
    assert [byte(path) for path in sources(host)] == [2, 2]
    counting(host)
    host.restart()
    counting(host)
    # memory goes with its snapshot, and nothing is left in the end
    for name in ("s1", "s2"):
        snapshot.lookup(host.connection.domain("m"), name).delete()
    assert not file.exists() and not list(host.paths.snapshots.glob("m/*.mem"))
    counting(host)


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace (apt install strace)")
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to trace a daemon that runs")
@pytest.mark.parametrize("what", ["snapshot", "save"])
def test_the_daemon_is_killed_while_memory_is_written(host: Host, what: str) -> None:
    """Whichever step it is: the guest counts on, or is off and its file has all that it knew."""
    define(host)
    domain = host.connection.domain("m")
    domain.start()
    counting(host)
    guest_writes(host, 1)
    file = host.root / "memory"

    def act() -> None:
        try:
            if what == "save":
                saved.save(host.connection.domain("m"), str(file))
            else:
                take(host, "new", f"<memory snapshot='external' file='{file}'/>")
        except KvikError:
            pass

    with traced(host.daemon) as trace:
        act()
    points = share(points_of(trace[0]), WHOLE)[:: 1 if WHOLE else 23]
    assert points
    for point in points:
        if not host.connection.domain("m").is_active():
            saved.restore(host.connection, str(file))
        for item in snapshot.snapshots(host.connection.domain("m")):
            item.delete()
        file.unlink(missing_ok=True)
        before = count(host)
        with traced(host.daemon, point):
            act()
        host.restart(signal.SIGKILL)
        domain = host.connection.domain("m")
        names = [item.name for item in snapshot.snapshots(domain)]
        if domain.is_active():
            eventually(lambda domain=domain: domain.state().state == RAN, f"{point}: it runs")
            counting(host)
            assert count(host) >= before, point
        else:
            assert what == "save" and file.exists(), point
        if what == "snapshot":
            assert file.exists() == (names == ["new"]), point
        assert not list(host.root.glob(".*saving")), point
