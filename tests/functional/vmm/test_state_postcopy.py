"""Post-copy between two machines on this host's KVM, with a guest that writes more than the connection carries."""

from __future__ import annotations

import os
import random
import signal
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
from restored import either_way
from state_guest import BIG_WRITER, ERRORS, PATTERN, Guest, awaiting, booted, running
from test_state_migration import HEAD, children, header, until

from kvik.errors import HostError, KvikError, OperationFailed, OperationInvalid, OperationUnsupported
from kvik.vmm.faults import GuestFault
from kvik.vmm.layout import MIB, PAGE
from kvik.vmm.machine import Machine
from kvik.vmm.state import stream
from kvik.vmm.state.dirty import all_set, page_runs
from kvik.vmm.state.migration import migration_of
from kvik.vmm.state.outgoing import Outgoing
from kvik.vmm.state.postcopy import Ability
from kvik.vmm.virtio.vhost_user import VhostUserDevice

pytestmark = pytest.mark.functional

SLOW = 8 * MIB  # bytes a second: the guest writes 16 MiB again and again in a fraction of one


@pytest.fixture(scope="module", autouse=True)
def _possible() -> None:
    ability = Ability()
    if ability.uffd is None:
        pytest.skip(str(ability._error))
    ability.close()


def status(guest: Guest) -> str:
    return str(migration_of(guest.machine).report().get("status"))


def checks_out(guest: Guest) -> None:
    """It goes on, finds all it wrote, and is still checked by what it writes now."""
    before = guest.counter()
    until(lambda: guest.counter() > before + 3, guest)
    assert guest.machine.memory.u32(ERRORS) == 0
    assert guest.machine.memory.read(PATTERN, 6 * MIB) == random.Random(7).randbytes(6 * MIB)


def begin(source: Guest, there: Guest, uri: str, channels: int = 1, **parameters: int) -> Outgoing:
    """Pre-copy goes on and would not end."""
    source.machine.memory.write(PATTERN, random.Random(7).randbytes(6 * MIB))
    until(lambda: source.counter() > 3, source)
    migration = migration_of(source.machine)
    for guest in (source, there):
        migration_of(guest.machine).set_capability("postcopy-ram", True)
    migration.set_capability("multifd", channels > 1)
    values = {"max-bandwidth": SLOW, "downtime-limit": 1, "multifd-channels": channels}
    migration.set_parameters(values | {name.replace("_", "-"): value for name, value in parameters.items()})
    outgoing = migration.start(uri)
    until(lambda: migration.report()["ram"]["transferred"] > MIB, source, there)
    return outgoing


@either_way
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shared", [False, True], ids=["private", "shared"])
def test_a_guest_that_writes_more_than_the_connection_carries_moves_at_once(
    tmp_path: Path, channels: int, shared: bool
) -> None:
    before = children()
    uri = f"unix:{tmp_path}/there"
    with (
        running(tmp_path, code=BIG_WRITER) as source,
        awaiting(tmp_path, uri, code=BIG_WRITER, shared=shared) as there,
    ):
        begin(source, there, uri, channels, max_postcopy_bandwidth=4 * SLOW)
        migration_of(source.machine).start_postcopy()
        until(lambda: status(source) == "completed" and status(there) == "completed", source, there)
        report = migration_of(source.machine).report()
        assert source.machine.status == "postmigrate" and there.machine.status == "running"
        checks_out(there)
        ram = report["ram"]
        assert ram["postcopy-requests"] > 0  # it ran before its memory was there
        assert ram["postcopy-bytes"] >= 4 * MIB and ram["remaining"] == 0
        assert report["total-time"] > report["downtime"] >= 0
        assert there.machine.memory.arrival is None
        assert not (tmp_path / "there").exists()
        with pytest.raises(OperationInvalid, match="it runs at the destination"):
            source.machine.resume()
    assert children() <= before


def slowly(source: Guest, there: Guest, uri: str, channels: int = 1) -> Outgoing:
    """In post-copy, and long not through: little is sent but what is asked for."""
    outgoing = begin(source, there, uri, channels, max_postcopy_bandwidth=64 * 1024)
    migration_of(source.machine).start_postcopy()
    until(lambda: status(source) == "postcopy-active" and status(there) == "postcopy-active", source, there)
    return outgoing


def cut(kind: str, outgoing: Outgoing, there: Guest) -> None:
    postcopy = there.machine.migration.incoming.postcopy
    assert postcopy is not None and postcopy._pager is not None
    if kind == "sender":
        os.kill(outgoing._senders[0][0], signal.SIGKILL)
    elif kind == "pager":
        os.kill(postcopy._pager[0], signal.SIGKILL)
    else:
        migration_of(outgoing.machine).pause_postcopy()


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("kind", ["sender", "pager", "request"])
def test_a_connection_that_is_lost_pauses_the_guest_and_can_be_made_anew(
    tmp_path: Path, kind: str, channels: int
) -> None:
    before = children()
    uri = f"unix:{tmp_path}/there"
    with booted(tmp_path, code=BIG_WRITER) as source, awaiting(tmp_path, uri, code=BIG_WRITER) as there:
        outgoing = slowly(source, there, uri, channels)
        cut(kind, outgoing, there)
        until(lambda: status(source) == status(there) == "postcopy-paused", source, there)
        report = migration_of(there.machine).report()
        assert report["error-desc"] and report["ram"]["remaining"] > 0
        assert there.machine.status == "paused" and source.machine.status == "postmigrate"
        for guest, why in ((source, "runs at the destination"), (there, "still at the source")):
            with pytest.raises(OperationInvalid, match=why):
                guest.machine.resume()
        with pytest.raises(OperationInvalid, match="cannot be cancelled"):
            migration_of(source.machine).cancel()
        with pytest.raises(KvikError, match="still arriving"):
            there.machine.save(str(tmp_path / "saved"))
        migration_of(source.machine).set_parameters({"max-postcopy-bandwidth": 0})
        migration_of(source.machine).resume(uri)
        until(lambda: status(source) == status(there) == "completed", source, there)
        assert there.machine.status == "running" and "error-desc" not in migration_of(there.machine).report()
        checks_out(there)
    assert children() <= before


def test_the_source_may_come_back_to_another_address(tmp_path: Path) -> None:
    with booted(tmp_path, code=BIG_WRITER) as source, awaiting(tmp_path, "tcp:127.0.0.1:0", code=BIG_WRITER) as there:
        incoming = migration_of(there.machine).incoming
        assert incoming is not None
        outgoing = slowly(source, there, f"tcp:127.0.0.1:{incoming.address[1]}", 2)
        with pytest.raises(OperationInvalid, match="postcopy is paused"):
            migration_of(there.machine).recover(f"unix:{tmp_path}/other")
        cut("request", outgoing, there)
        until(lambda: status(there) == "postcopy-paused", source, there)
        migration_of(there.machine).recover(f"unix:{tmp_path}/other")
        with socket.socket(socket.AF_UNIX) as stranger:  # knows no token, and costs nobody anything
            stranger.connect(f"{tmp_path}/other")
            stranger.sendall(stream.greeting(0, 1, bytes(16)))
            stranger.settimeout(10)
            assert stranger.recv(1) == b""
        migration_of(source.machine).set_parameters({"max-postcopy-bandwidth": 0})
        with pytest.raises(KvikError):
            migration_of(source.machine).resume(f"unix:{tmp_path}/nobody")
        assert status(source) == "postcopy-paused"
        migration_of(source.machine).resume(f"unix:{tmp_path}/other")
        until(lambda: status(source) == status(there) == "completed", source, there)
        checks_out(there)
        assert not (tmp_path / "other").exists()


def test_what_our_devices_touch_is_waited_for_and_a_machine_that_ends_waits_no_more(tmp_path: Path) -> None:
    uri = f"unix:{tmp_path}/there"
    with booted(tmp_path, code=BIG_WRITER) as source, awaiting(tmp_path, uri, code=BIG_WRITER) as there:
        outgoing = slowly(source, there, uri)
        memory = there.machine.memory
        board = migration_of(there.machine).incoming.postcopy.board
        first = next(page_runs(board.bitmap(0)))[0] * PAGE
        assert memory.read(first, 16) == source.machine.memory.read(first, 16)
        assert not all_set(board.bitmap(0), first // PAGE, 1)
        cut("request", outgoing, there)
        until(lambda: status(there) == "postcopy-paused", source, there)
        missing = [start * PAGE for start, _ in page_runs(board.bitmap(0))][-1]
        result: list[object] = []

        def touch() -> None:
            try:
                result.append(memory.read(missing, 16))
            except GuestFault as error:
                result.append(error)

        thread = threading.Thread(target=touch)
        thread.start()
        thread.join(0.2)
        assert thread.is_alive() and not result  # and this thread runs all the same
        there.machine.quit()
        thread.join(10)
        assert isinstance(result[0], GuestFault) and "ends before its memory" in str(result[0])
        there.machine.close()


def test_a_destination_that_cannot_go_on_leaves_the_guest_at_the_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until RUN has come, whatever happens there."""
    from kvik.vmm.state import incoming as incoming_module

    before = children()
    real = incoming_module.apply

    def refuse(machine: Machine, *_: Any, **__: Any) -> None:
        assert machine.memory.arrival is not None
        raise OperationFailed("rng0 does not like it")

    def lose(machine: Machine, *arguments: Any, **named: Any) -> None:
        cut("pager", outgoing, there)
        real(machine, *arguments, **named)

    with booted(tmp_path, code=BIG_WRITER) as source:
        for number, (what, message) in enumerate(((refuse, "does not like it"), (lose, "closed"))):
            uri = f"unix:{tmp_path}/there{number}"
            monkeypatch.setattr(incoming_module, "apply", what)
            with awaiting(tmp_path, uri, code=BIG_WRITER) as there:
                outgoing = begin(source, there, uri, 2)
                migration_of(source.machine).start_postcopy()
                until(lambda: status(source) == "failed" and there.machine.outcome, source, there)
                assert there.machine.outcome == "migration-failed" and there.machine.exit_code == 1
                assert message in migration_of(source.machine).report()["error-desc"]
            assert source.machine.status == "running"
            checks_out(source)
        monkeypatch.setattr(incoming_module, "apply", real)
        uri = f"unix:{tmp_path}/there"
        with awaiting(tmp_path, uri, code=BIG_WRITER) as there:
            begin(source, there, uri)
            migration_of(source.machine).start_postcopy()
            until(lambda: status(source) == status(there) == "completed", source, there)
            checks_out(there)
    assert children() <= before


def test_a_host_that_cannot_says_so_when_it_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(device: int) -> int:
        raise HostError("this process may not have one", errno=1, remedy="set vm.unprivileged_userfaultfd")

    monkeypatch.setattr("kvik.vmm.state.userfaultfd._new", none)
    uri = f"unix:{tmp_path}/there"
    with booted(tmp_path, code=BIG_WRITER) as source, awaiting(tmp_path, uri, code=BIG_WRITER) as there:
        with pytest.raises(OperationUnsupported, match=r"may not have one.*unprivileged_userfaultfd"):
            migration_of(there.machine).set_capability("postcopy-ram", True)
        migration = migration_of(source.machine)
        migration.set_capability("postcopy-ram", True)
        migration.start(uri)
        until(lambda: status(source) == "failed", source, there)
        assert "post-copy is not possible here" in migration.report()["error-desc"]
        assert migration.report()["ram"]["transferred"] == 0 and source.machine.status == "running"
        with pytest.raises(OperationInvalid, match="Start of postcopy"):
            migration.start_postcopy()
    monkeypatch.undo()
    with awaiting(tmp_path, uri) as there:
        there.machine.config.memory.hugepages = 2 * MIB
        with pytest.raises(OperationUnsupported, match="huge pages"):
            migration_of(there.machine).set_capability("postcopy-ram", True)
        there.machine.config.memory.hugepages = 0
        there.machine.find("rng0").maps_ram = True  # type: ignore[attr-defined]  # as vhost-user devices say
        with pytest.raises(OperationUnsupported, match=r"rng0.*maps memory by itself"):
            migration_of(there.machine).set_capability("postcopy-ram", True)
        assert VhostUserDevice.maps_ram


def test_the_monitor_speaks_of_post_copy_as_qemu_does(tmp_path: Path) -> None:
    from test_control import Monitor

    uri = f"unix:{tmp_path}/there"
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with booted(tmp_path, code=BIG_WRITER) as source, awaiting(tmp_path, uri, code=BIG_WRITER) as there:
        here, far = Monitor(source.machine, tmp_path / "a"), Monitor(there.machine, tmp_path / "b")
        source.machine.memory.write(PATTERN, random.Random(7).randbytes(6 * MIB))
        on = [{"capability": name, "state": True} for name in ("postcopy-ram", "events")]
        for monitor in (here, far):
            monitor.ask("migrate-set-capabilities", capabilities=on)
        here.ask("migrate-set-parameters", max_bandwidth=SLOW, downtime_limit=1, max_postcopy_bandwidth=1 << 16)
        here.ask("migrate", uri=uri)
        until(lambda: here.ask("query-migrate")["ram"]["transferred"] > MIB, source, there)
        here.ask("migrate-start-postcopy")
        until(lambda: here.ask("query-migrate")["status"] == "postcopy-active", source, there)
        here.ask("migrate-pause")
        until(lambda: far.ask("query-migrate")["status"] == "postcopy-paused", source, there)
        far.ask("migrate-recover", uri=f"unix:{tmp_path}/again")
        here.ask("migrate-set-parameters", max_postcopy_bandwidth=0)
        here.ask("migrate", uri=f"unix:{tmp_path}/again", resume=True)
        until(lambda: status(source) == status(there) == "completed", source, there)
        for monitor in (here, far):
            monitor.ask("query-status")
        words = ["postcopy-active", "postcopy-paused", "postcopy-active", "completed"]
        told = {
            monitor: [event["data"]["status"] for event in monitor.events if event["event"] == "MIGRATION"]
            for monitor in (here, far)
        }
        assert told[here] == ["setup", "active", "device", *words[:2], "postcopy-recover", *words[2:]]
        assert told[far] == ["active", "device", *words]
        checks_out(there)


# What a hostile peer can send --------------------------------------------------------------------------------------

PIECE = 1 << 16
BITMAP = 64 * MIB // PAGE // 8


def missing(first: int, count: int) -> bytes:
    bits = (((1 << count) - 1) << first).to_bytes(BITMAP, "little")
    return stream.frame(stream.MISSING, BITMAP, 0) + bits


@pytest.mark.parametrize(
    "data",
    [
        missing(0, 1),  # before END
        stream.frame(stream.END) + stream.frame(stream.MISSING, BITMAP - 8, 0),
        stream.frame(stream.END) + stream.frame(stream.MISSING, 1 << 31, 0),
        stream.frame(stream.END) + stream.frame(stream.MISSING, BITMAP, 4096) + bytes(BITMAP),
        stream.frame(stream.END) + 2 * missing(0, 1),
        stream.frame(stream.END) + missing(0, 16) + stream.frame(stream.STATE, 2) + b"{}",
        stream.frame(stream.END) + missing(0, 16) + stream.frame(stream.RUN),
        stream.frame(stream.END) + missing(0, 16) + stream.frame(stream.RESUME),
    ],
)
def test_a_map_that_cannot_be_ends_the_migration_and_nothing_else(tmp_path: Path, data: bytes) -> None:
    with awaiting(tmp_path, f"unix:{tmp_path}/there") as there, socket.socket(socket.AF_UNIX) as sock:
        sock.connect(f"{tmp_path}/there")
        sock.sendall(HEAD + header(there) + data)
        until(lambda: there.machine.outcome, there)
        assert there.machine.outcome == "migration-failed" and there.machine.exit_code == 1


class Impostor:
    """A source that speaks for itself, up to the moment where the guest runs at the destination."""

    def __init__(self, guest: Guest, path: Path, state: bytes, *, first: int = 4096, count: int = 1024) -> None:
        self.guest = guest
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(str(path))
        self.sock.settimeout(10)
        self.sock.sendall(HEAD + header(guest))
        self.sock.sendall(stream.frame(stream.END) + missing(first, count) + stream.frame(stream.STATE, len(state)))
        self.sock.sendall(state)
        until(lambda: status(guest) == "device", guest)
        assert [self.kind() for _ in range(2)] == [stream.READY, stream.DONE]

    def kind(self) -> int:
        kind, _, _ = stream.receive_frame(self.sock)
        return kind


@pytest.mark.parametrize(
    "data",
    [
        stream.frame(stream.PAGES, PIECE, 0) + bytes(PIECE),  # not missing
        stream.frame(stream.PAGES, PIECE, 4096 * PAGE + 100) + bytes(PIECE),
        stream.frame(stream.PAGES, PIECE, 1 << 63) + bytes(PIECE),
        stream.frame(stream.PAGES, PIECE, (4096 + 512) * PAGE - PAGE) + bytes(PIECE),  # across two pieces
        stream.frame(stream.PAGES, 2 * PIECE, 4096 * PAGE),
        stream.frame(stream.PAGES, 0, 4096 * PAGE),
        stream.frame(stream.PAGES, 100, 4096 * PAGE) + bytes(100),
        2 * (stream.frame(stream.PAGES, PAGE, 4096 * PAGE) + bytes(PAGE)),  # the same twice
        stream.frame(stream.ZERO, 17, 4096 * PAGE),
        stream.frame(stream.ZERO, 0, 4096 * PAGE),
        stream.frame(stream.ZERO, 2, 4096 * PAGE - PAGE),
        2 * stream.frame(stream.RUN),
        stream.frame(stream.STATE, 2) + b"{}",
        stream.frame(stream.MISSING, BITMAP, 0) + bytes(BITMAP),
        stream.frame(99),
        b"\xff" * 16,
    ],
)
@pytest.mark.parametrize("runs", [False, True], ids=["before RUN", "after RUN"])
def test_frames_that_cannot_be_put_nothing_anywhere(tmp_path: Path, data: bytes, runs: bool) -> None:
    from kvik.vmm.state.capture import capture
    from kvik.vmm.state.values import encode

    with booted(tmp_path) as donor, donor.machine.paused():
        state = encode({**capture(donor.machine), "status": "paused"})
    with awaiting(tmp_path, f"unix:{tmp_path}/there") as there:
        impostor = Impostor(there, tmp_path / "there", state)
        with impostor.sock:
            if runs:
                impostor.sock.sendall(stream.frame(stream.RUN))
                assert impostor.kind() == stream.RUNNING
            impostor.sock.sendall(data)
            if runs or data == 2 * stream.frame(stream.RUN):
                until(lambda: status(there) == "postcopy-paused", there)
                assert there.machine.outcome == ""
            else:
                until(lambda: there.machine.outcome == "migration-failed", there)


def read_to_state(sock: socket.socket) -> None:
    stream.receive_exactly(sock, memoryview(bytearray(32)))  # the greeting
    kind = 0
    while kind != stream.STATE:
        kind, size, _ = stream.receive_frame(sock)
        if kind in (stream.HEADER, stream.PAGES, stream.MISSING, stream.STATE):
            stream.receive_exactly(sock, memoryview(bytearray(size)))


@pytest.mark.parametrize(
    "answer",
    [
        stream.frame(stream.REQUEST, 1, 1 << 63),
        stream.frame(stream.REQUEST, 1, 64 * MIB),
        stream.frame(stream.REQUEST, 1, 100),
        stream.frame(stream.FILLED),  # before it runs
        stream.frame(99),
        b"\xff" * 16,
    ],
)
def test_a_hostile_destination_costs_the_source_nothing(tmp_path: Path, answer: bytes) -> None:
    before = children()
    ours, theirs = socket.socketpair()
    with booted(tmp_path) as source, ours, theirs:
        migration = migration_of(source.machine)
        migration.set_capability("postcopy-ram", True)
        migration.set_parameters({"max-bandwidth": 4096})
        source.machine.memory.write(PATTERN, random.Random(7).randbytes(MIB // 8))
        migration.start(f"fd:{theirs.fileno()}")
        theirs.close()
        ours.sendall(stream.frame(stream.READY))
        until(lambda: status(source) == "active", source)
        migration.start_postcopy()
        ours.settimeout(10)
        thread = threading.Thread(target=read_to_state, args=(ours,))
        thread.start()
        until(lambda: not thread.is_alive(), source)
        ours.sendall(answer)
        until(lambda: status(source) == "failed", source)
        assert source.machine.status == "running"
        source.check()
    assert children() <= before
