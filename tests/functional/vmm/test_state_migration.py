"""Live migration between two machines on this host's KVM, with guests that write while they move."""

from __future__ import annotations

import os
import random
import signal
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from restored import booted_only, either_way
from state_guest import ERRORS, PATTERN, WRITER, Guest, awaiting, running

from kvik.errors import HostError, InvalidArgument, OperationInvalid, OperationUnsupported
from kvik.vmm.layout import MIB, VMGENID
from kvik.vmm.state import stream
from kvik.vmm.state.migration import migration_of
from kvik.vmm.virtio.rng import Rng

pytestmark = [pytest.mark.functional, either_way]


def until(condition: Callable[[], object], *guests: Guest, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, [migration_of(guest.machine).report() for guest in guests]
        for guest in guests:
            guest.machine.loop.run_once(0.005)


def finished(guest: Guest) -> bool:
    return migration_of(guest.machine).report().get("status") in ("completed", "failed", "cancelled")


def move(source: Guest, there: Guest, uri: str, **parameters: int) -> dict[str, Any]:
    migration = migration_of(source.machine)
    migration.set_parameters({name.replace("_", "-"): value for name, value in parameters.items()})
    migration.set_capability("multifd", "multifd_channels" in parameters)
    migration.start(uri)
    until(lambda: finished(source), source, there)
    if migration.report()["status"] == "completed":
        until(lambda: migration_of(there.machine).report()["status"] == "completed", there)
    return migration.report()


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("shared", [False, True], ids=["private", "shared"])
def test_a_guest_that_writes_all_the_time_loses_nothing(tmp_path: Path, channels: int, shared: bool) -> None:
    uri = f"unix:{tmp_path}/there"
    with running(tmp_path, code=WRITER, shared=shared) as source, awaiting(tmp_path, uri, code=WRITER) as there:
        source.machine.memory.write(PATTERN, random.Random(5).randbytes(3 * MIB))
        until(lambda: source.counter() > 10, source)
        report = move(source, there, uri, multifd_channels=channels)
        assert report["status"] == "completed", report
        assert source.machine.status == "postmigrate" and there.machine.status == "running"
        before = there.counter()
        assert before >= 10
        until(lambda: there.counter() > before + 20, there)
        assert there.machine.memory.u32(ERRORS) == 0
        assert there.machine.memory.read(PATTERN, 3 * MIB) == random.Random(5).randbytes(3 * MIB)
        assert source.counter() <= before  # and it stands still
        ram = report["ram"]
        assert ram["normal"] >= 3 * 256 + 512 and ram["total"] == 64 * MIB
        assert ram["duplicate"] > 10000 or shared  # a memfd's holes are not even looked at
        assert ram["transferred"] < 40 * MIB and report["downtime"] >= 0
        assert not (tmp_path / "there").exists()


def test_devices_and_the_generation_id_come_along(tmp_path: Path) -> None:
    uri = f"unix:{tmp_path}/there"
    with running(tmp_path) as source, awaiting(tmp_path, uri) as there:
        source.check()
        report = move(source, there, uri)
        assert report["status"] == "completed", report
        there.check()
        same = [guest.machine.memory.read(VMGENID, 16) for guest in (source, there)]
        assert same[0] == same[1]  # a migration is no new generation
        with pytest.raises(OperationInvalid, match="has left"):
            migration_of(source.machine).start(uri)
        there.machine.reset()
        there.check()


def test_it_can_come_back(tmp_path: Path) -> None:
    one, two = f"unix:{tmp_path}/one", f"unix:{tmp_path}/two"
    with running(tmp_path, code=WRITER) as a, awaiting(tmp_path, one, code=WRITER) as b:
        assert move(a, b, one)["status"] == "completed"
        with awaiting(tmp_path, two, code=WRITER) as c:
            assert move(b, c, two)["status"] == "completed"
            before = c.counter()
            until(lambda: c.counter() > before + 20, c)
            assert c.machine.memory.u32(ERRORS) == 0


def test_a_guest_that_is_paused_arrives_paused(tmp_path: Path) -> None:
    uri = f"unix:{tmp_path}/there"
    with running(tmp_path) as source, awaiting(tmp_path, uri) as there:
        source.check()
        source.machine.pause()
        assert move(source, there, uri)["status"] == "completed"
        assert there.machine.status == "paused" and there.counter() == source.counter()
        there.machine.resume()
        there.check()


def test_what_this_process_and_a_discard_write_arrives(tmp_path: Path) -> None:
    """KVM's log knows nothing of either; pages that became zero meanwhile must be zero there."""
    uri = f"unix:{tmp_path}/there"
    with running(tmp_path, code=WRITER) as source, awaiting(tmp_path, uri, code=WRITER) as there:
        memory = source.machine.memory
        memory.write(PATTERN, bytes([7]) * MIB)
        migration = migration_of(source.machine)
        migration.set_parameters({"downtime-limit": 0})  # never content: rounds go on
        migration.start(uri)
        until(lambda: migration.report()["ram"]["dirty-sync-count"] >= 3, source, there)
        memory.write(PATTERN + 5000, b"written by the VMM")
        memory.discard(PATTERN + 16 * 4096, 16 * 4096)
        migration.set_parameters({"downtime-limit": 2000})
        until(lambda: finished(source), source, there)
        until(lambda: there.machine.status == "running", there)
        assert there.machine.memory.read(PATTERN, MIB) == memory.read(PATTERN, MIB)
        assert there.machine.memory.read(PATTERN + 5000, 18) == b"written by the VMM"
        assert not any(there.machine.memory.read(PATTERN + 16 * 4096, 16 * 4096))


def test_by_tcp_and_by_descriptor(tmp_path: Path) -> None:
    with running(tmp_path) as source, awaiting(tmp_path, "tcp:127.0.0.1:0") as there:
        incoming = migration_of(there.machine).incoming
        assert incoming is not None
        assert move(source, there, f"tcp:127.0.0.1:{incoming.address[1]}")["status"] == "completed"
        a, b = socket.socketpair()
        with a, b, awaiting(tmp_path, f"fd:{b.fileno()}") as third:
            assert move(there, third, f"fd:{a.fileno()}")["status"] == "completed"
            third.check()


def test_a_limit_of_bandwidth_holds_and_cancel_lets_the_guest_go_on(tmp_path: Path) -> None:
    uri = f"unix:{tmp_path}/there"
    with running(tmp_path, code=WRITER) as source, awaiting(tmp_path, uri, code=WRITER) as there:
        source.machine.memory.write(PATTERN, random.Random(6).randbytes(8 * MIB))
        migration = migration_of(source.machine)
        migration.set_parameters({"max-bandwidth": MIB})
        migration.start(uri)
        until(lambda: migration.report()["ram"]["transferred"] > 0, source, there)
        began, sent = time.monotonic(), migration.report()["ram"]["transferred"]
        until(lambda: time.monotonic() > began + 1, source, there)
        assert migration.report()["ram"]["transferred"] - sent < 8 * MIB  # 5 MiB of RAM were to go at 1 MiB/s
        with pytest.raises(OperationInvalid, match="in progress"):
            migration.start(uri)
        migration.cancel()
        assert migration.report()["status"] == "cancelled" and source.machine.status == "running"
        until(lambda: there.machine.outcome == "migration-failed", there)
        before = source.counter()
        until(lambda: source.counter() > before + 5, source)
        assert source.machine.memory.u32(ERRORS) == 0
        migration.set_parameters({"max-bandwidth": 0})
        with awaiting(tmp_path, f"{uri}2", code=WRITER) as other:
            assert move(source, other, f"{uri}2")["status"] == "completed"


def test_a_sender_that_is_killed_or_a_destination_that_ends_costs_the_guest_nothing(tmp_path: Path) -> None:
    before = children()
    uri = f"unix:{tmp_path}/there"
    with running(tmp_path, code=WRITER) as source:
        migration = migration_of(source.machine)
        for number, kind in enumerate(("sender", "destination")):
            with awaiting(tmp_path, f"{uri}{number}", code=WRITER) as there:
                migration.set_parameters({"downtime-limit": 0})
                outgoing = migration.start(f"{uri}{number}")
                until(lambda: migration.report()["ram"]["dirty-sync-count"] >= 2, source, there)
                if kind == "sender":
                    os.kill(outgoing._senders[0][0], signal.SIGKILL)
                else:
                    there.machine.close()
                until(lambda: finished(source), source)
                report = migration.report()
                assert report["status"] == "failed" and report["error-desc"], report
                assert source.machine.status == "running"
                goal = source.counter() + 5
                until(lambda goal=goal: source.counter() > goal, source)
    assert children() <= before


def children() -> set[int]:
    return {int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda machine: machine.add(Rng("other")), "'other' only here"),
        (lambda machine: machine.remove("rng0"), "'rng0' only there"),
    ],
    ids=["a device more", "a device less"],
)
def test_a_destination_that_differs_says_so_before_a_page_is_sent(
    tmp_path: Path, change: Callable[[Any], None], message: str
) -> None:
    uri = f"unix:{tmp_path}/there"
    with running(tmp_path) as source, awaiting(tmp_path, uri) as there:
        change(there.machine)
        report = move(source, there, uri)
        assert report["status"] == "failed" and message in report["error-desc"]
        assert report["ram"]["transferred"] == 0
        source.check()


def test_a_device_whose_back_end_writes_unseen_stays_where_it_is(tmp_path: Path) -> None:
    with running(tmp_path) as source:
        source.machine.find("rng0").writes_unseen = True  # type: ignore[attr-defined]  # as vhost-user devices say
        with pytest.raises(OperationUnsupported, match=r"rng0.*not logged.*unplug"):
            migration_of(source.machine).start(f"unix:{tmp_path}/there")
        assert source.machine.status == "running"
        source.check()


def test_addresses_that_lead_nowhere_are_errors(tmp_path: Path) -> None:
    before = children()
    with running(tmp_path) as source:
        for uri, error in (
            (f"unix:{tmp_path}/nobody", HostError),
            ("tcp:127.0.0.1:port", InvalidArgument),
            ("exec:cat", InvalidArgument),
            ("fd:9999", HostError),
        ):
            with pytest.raises(error):
                migration_of(source.machine).start(uri)
        assert source.machine.status == "running" and children() <= before
        source.check()


# What a hostile source can send ------------------------------------------------------------------------------------

HEAD = stream.greeting(0, 1, bytes(16))


def header(guest: Guest) -> bytes:
    from kvik.vmm.state.outgoing import header as header_of
    from kvik.vmm.state.values import encode

    data = encode(header_of(guest.machine))
    return stream.frame(stream.HEADER, len(data)) + data


@booted_only
@pytest.mark.parametrize(
    ("greeted", "data", "message"),
    [
        (b"GET / HTTP/1.1\r\n".ljust(32), b"", "no migration of kvik-vmm"),
        (struct.pack("<8sHHH2x16s", b"KVIKMIGR", 9, 0, 1, b""), b"", "version 9"),
        (stream.greeting(3, 2, bytes(16)), b"", "channel 3 of 2"),
        (HEAD, stream.frame(stream.PAGES, 4096, 0) + bytes(4096), "not with its header"),
        (HEAD, stream.frame(stream.HEADER, 1 << 31), "most there can be"),
        (HEAD, stream.frame(stream.HEADER, 2) + b"[]", "is damaged"),
        (HEAD, None, "this one has 64"),
    ],
    ids=[
        "a stranger",
        "a later version",
        "a channel too many",
        "pages first",
        "a huge header",
        "no object",
        "less RAM",
    ],
)
def test_a_stream_that_begins_wrong(
    tmp_path: Path, greeted: bytes, data: bytes | None, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with awaiting(tmp_path, f"unix:{tmp_path}/there") as there, socket.socket(socket.AF_UNIX) as sock:
        sock.connect(f"{tmp_path}/there")
        if data is None:
            head = b'{"regions": [[0, 4096]]}'
            data = stream.frame(stream.HEADER, len(head)) + head
        sock.sendall(greeted + data)
        text = ""

        def said() -> bool:
            nonlocal text
            text += capfd.readouterr().err
            return message in text

        until(said, there)
        if not data:  # a stranger: it goes on listening
            assert there.machine.status == "inmigrate"


@booted_only
@pytest.mark.parametrize(
    "data",
    [
        stream.frame(stream.PAGES, 4096, 64 * MIB) + bytes(4096),
        stream.frame(stream.PAGES, 4096, 1 << 63) + bytes(4096),
        stream.frame(stream.PAGES, 4096, 100) + bytes(4096),
        stream.frame(stream.PAGES, 4 * MIB, 0),
        stream.frame(stream.PAGES, 0, 0),
        stream.frame(stream.ZERO, 513, 0),
        stream.frame(stream.ZERO, 512, 64 * MIB - 4096),
        stream.frame(stream.STATE, 2) + b"{}",
        stream.frame(stream.RUN),
        stream.frame(99),
        stream.frame(stream.END) + stream.frame(stream.PAGES, 4096, 0) + bytes(4096),
        stream.frame(stream.END) + stream.frame(stream.STATE, (64 << 20) + 1),
        stream.frame(stream.END) + stream.frame(stream.STATE, 9) + b'{"cpu":1}',
        stream.frame(stream.END) + stream.frame(stream.STATE, 4) + b"\xff\xff\xff\xff",
    ],
)
def test_frames_that_cannot_be_end_the_migration_and_nothing_else(tmp_path: Path, data: bytes) -> None:
    with awaiting(tmp_path, f"unix:{tmp_path}/there") as there, socket.socket(socket.AF_UNIX) as sock:
        sock.connect(f"{tmp_path}/there")
        sock.sendall(HEAD + header(there) + data)
        until(lambda: there.machine.outcome, there)
        assert there.machine.outcome == "migration-failed" and there.machine.exit_code == 1
        sock.settimeout(5)
        kind, _, _ = stream.receive_frame(sock)
        assert kind == stream.READY
        kind, size, _ = stream.receive_frame(sock)
        assert kind == stream.FAILED and 0 < size < 5000


def test_the_monitor_migrates_saves_and_rewinds(tmp_path: Path) -> None:
    """QEMU's commands, and ours."""
    from test_control import Monitor

    uri = f"unix:{tmp_path}/there"
    with running(tmp_path) as source, awaiting(tmp_path, uri) as there:
        monitor = Monitor(source.machine, tmp_path)
        assert monitor.ask("query-migrate") == {}
        monitor.ask("x-kvik-snapshot-save", directory=str(tmp_path / "saved"), compression="zlib")
        assert (tmp_path / "saved/state.json").exists()
        monitor.ask("x-kvik-snapshot-load", directory=str(tmp_path / "saved"))
        monitor.ask("x-kvik-checkpoint")
        source.check()
        monitor.ask("x-kvik-reset-to-snapshot")
        source.check()
        monitor.ask("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])
        monitor.ask("migrate-set-parameters", downtime_limit=500, max_bandwidth=0)
        assert monitor.ask("query-migrate-parameters")["downtime-limit"] == 500
        assert {"capability": "events", "state": True} in monitor.ask("query-migrate-capabilities")
        monitor.ask("migrate", uri=uri)
        until(lambda: finished(source), source, there)
        assert monitor.ask("query-migrate")["status"] == "completed"
        assert monitor.ask("query-status")["status"] == "postmigrate"
        told = [event["data"]["status"] for event in monitor.events if event["event"] == "MIGRATION"]
        assert told == ["setup", "active", "device", "completed"]
        until(lambda: there.machine.status == "running", there)
        there.check()


def test_a_guest_that_writes_too_fast_is_slowed_down_until_it_can_be_sent(tmp_path: Path) -> None:
    uri = f"unix:{tmp_path}/there"
    with running(tmp_path, code=WRITER) as source, awaiting(tmp_path, uri, code=WRITER) as there:
        until(lambda: source.counter() > 3, source)
        migration = migration_of(source.machine)
        migration.set_capability("auto-converge", True)
        migration.set_parameters({"max-bandwidth": 32 * MIB, "downtime-limit": 40})  # its 2 MiB take 60 ms
        migration.set_parameters({"cpu-throttle-initial": 50, "cpu-throttle-increment": 49})
        migration.start(uri)
        seen: set[int] = set()

        def slowed() -> bool:
            report = migration.report()
            seen.add(report.get("cpu-throttle-percentage", 0))
            return max(seen) == 99 or report["status"] == "completed"

        until(slowed, source, there)
        assert {0, 50} <= seen
        source.machine.pause()  # while it sleeps, or not
        source.machine.resume()
        migration.set_parameters({"downtime-limit": 200})
        until(lambda: finished(source), source, there)
        assert migration.report()["status"] == "completed"
        until(lambda: there.machine.status == "running", there)
        before = there.counter()
        until(lambda: there.counter() > before + 20, there)
        assert there.machine.memory.u32(ERRORS) == 0


def test_a_slowed_guest_is_as_fast_as_before_when_its_migration_is_cancelled(tmp_path: Path) -> None:
    uri = f"unix:{tmp_path}/there"
    with running(tmp_path, code=WRITER) as source, awaiting(tmp_path, uri, code=WRITER) as there:
        migration = migration_of(source.machine)
        migration.set_capability("auto-converge", True)
        migration.set_parameters({"max-bandwidth": 8 * MIB, "downtime-limit": 0, "cpu-throttle-initial": 90})
        migration.start(uri)
        until(lambda: "cpu-throttle-percentage" in migration.report(), source, there)
        migration.cancel()
        assert "cpu-throttle-percentage" not in migration.report()
        assert not any(thread._request for thread in source.machine.vcpus)
        goal = source.counter() + 20
        until(lambda: source.counter() > goal, source)


def test_a_guest_that_rests_moves_whatever_the_limit_of_downtime(tmp_path: Path) -> None:
    uri = f"unix:{tmp_path}/there"
    with running(tmp_path) as source, awaiting(tmp_path, uri) as there:
        source.machine.pause()
        assert move(source, there, uri, downtime_limit=1)["status"] == "completed"
