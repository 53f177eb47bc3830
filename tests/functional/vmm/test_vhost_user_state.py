"""State of a machine whose disk another process serves: what that one writes into RAM is in no log of KVM's."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from blk_guest import BlkDriver, wait_key
from guests import needs_kvm
from tiny_kernel import IDLE, elf, say

from kvik.errors import OperationUnsupported
from kvik.host.process import find_program
from kvik.vmm import vhost_user
from kvik.vmm.build import build
from kvik.vmm.config import BootConfig, CharConfig, MachineConfig, MemoryConfig, VhostUserBlkConfig
from kvik.vmm.layout import MIB
from kvik.vmm.machine import Machine
from kvik.vmm.state.migration import await_incoming, migration_of
from kvik.vmm.state.rewind import Checkpoint

pytestmark = [
    needs_kvm,
    pytest.mark.skipif(
        not find_program("qemu-storage-daemon"), reason="needs qemu-storage-daemon (apt install qemu-system-common)"
    ),
]
BUFFERS, COUNTER, SECTORS = 0x300_0000, 0x380_0000, 16
CONTENT = b"".join(bytes([number + 1]) * 512 for number in range(2 * SECTORS))


def guest() -> bytes:
    """At each key reads the next sectors, each into a page of its own that nobody touches before. Counts in RAM while
    it waits, so that no migration ends before it is let."""
    driver = BlkDriver(5)
    code = driver.start()
    for half, word in enumerate((b"one", b"two")):
        code += wait_key(COUNTER)
        for sector in range(half * SECTORS, (half + 1) * SECTORS):
            code += driver.read(sector, BUFFERS + 4096 * sector)
        code += say(word)
    return code + IDLE


class Side:
    def __init__(self, machine: Machine, line: socket.socket) -> None:
        self.machine, self.line, self.text = machine, line, b""

    def until(self, condition: Callable[[], object]) -> None:
        end = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < end, self.text
            self.machine.loop.run_once(0.005)

    def said(self, word: bytes) -> bool:
        try:
            self.text += self.line.recv(4096)
        except BlockingIOError:
            pass
        return word in self.text

    def read_on(self, word: bytes) -> None:
        self.line.send(b"x")
        self.until(lambda: self.said(word))

    def has(self, first: int, last: int) -> bool:
        """Whether the pages hold these sectors."""
        return all(
            self.machine.memory.read(BUFFERS + 4096 * sector, 512) == CONTENT[512 * sector :][:512]
            for sector in range(first, last)
        )


@contextmanager
def served(directory: Path, name: str) -> Iterator[VhostUserBlkConfig]:
    """A back end for one machine; several share the image, which nobody writes."""
    (directory / "disk.raw").write_bytes(CONTENT)
    place = directory / f"{name}.sock"
    daemon = subprocess.Popen(
        [
            *("qemu-storage-daemon", "--blockdev", f"file,node-name=f,read-only=on,filename={directory / 'disk.raw'}"),
            *("--export", f"vhost-user-blk,id=e,node-name=f,addr.type=unix,addr.path={place}"),
        ]
    )
    try:
        end = time.monotonic() + 30
        while not place.exists():
            assert daemon.poll() is None and time.monotonic() < end
            time.sleep(0.01)
        yield VhostUserBlkConfig(socket=str(place), id="disk0", slot=5)
    finally:
        daemon.kill()
        daemon.wait()


@contextmanager
def machine(directory: Path, incoming: str = "", restored: str = "") -> Iterator[Side]:
    (directory / "kernel").write_bytes(elf(guest()))
    with served(directory, "there" if incoming or restored else "here") as disk:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        serials = [CharConfig(backend=f"fd={theirs.detach()}")]
        config = MachineConfig(
            memory=MemoryConfig(size=64 * MIB, shared=True),
            boot=BootConfig(kernel=str(directory / "kernel")),
            serials=serials,
            vhost_user_blk=[disk],
        )
        if restored:
            made = Machine.restore(restored, MachineConfig(serials=serials, vhost_user_blk=[disk]))
        else:
            made = build(config, boot=not incoming)
        with made, ours:
            if incoming:
                await_incoming(made, incoming)
            else:
                made.start()
            yield Side(made, ours)


def test_what_the_back_end_writes_while_the_machine_moves_arrives(tmp_path: Path) -> None:
    uri = f"unix:{tmp_path}/there"
    with machine(tmp_path) as here, machine(tmp_path, uri) as there:
        here.until(lambda: here.machine.memory.u32(COUNTER))
        migration = migration_of(here.machine)
        migration.set_parameters({"downtime-limit": 0})  # never content: rounds go on
        migration.start(uri)

        def both(condition: Callable[[], object]) -> None:
            def turn() -> object:
                there.machine.loop.run_once(0.005)
                return condition()

            here.until(turn)

        both(lambda: migration.report()["ram"]["dirty-sync-count"] >= 2)
        here.line.send(b"x")
        both(lambda: here.said(b"one"))
        rounds = migration.report()["ram"]["dirty-sync-count"]
        both(lambda: migration.report()["ram"]["dirty-sync-count"] > rounds)
        migration.set_parameters({"downtime-limit": 2000})
        both(lambda: migration.report()["status"] in ("completed", "failed"))
        assert migration.report()["status"] == "completed", migration.report()
        both(lambda: there.machine.status == "running")
        assert there.has(0, SECTORS)
        there.read_on(b"two")  # the ring goes on where it was, at another back end
        assert there.has(0, 2 * SECTORS) and not here.has(SECTORS, SECTORS + 1)


def test_a_checkpoint_takes_back_what_the_back_end_wrote(tmp_path: Path) -> None:
    with machine(tmp_path) as here:
        here.until(lambda: here.machine.find("disk0").active)
        checkpoint = Checkpoint(here.machine)
        try:
            for _ in range(2):
                here.read_on(b"one")
                assert here.has(0, SECTORS)
                assert checkpoint.rewind() > SECTORS
                assert not any(here.machine.memory.read(BUFFERS, SECTORS * 4096))
                here.text = b""
            here.read_on(b"one")
            assert here.has(0, SECTORS)
        finally:
            checkpoint.close()
        here.read_on(b"two")
        assert here.has(0, 2 * SECTORS)


def test_a_restored_machine_goes_on_at_another_back_end(tmp_path: Path) -> None:
    with machine(tmp_path) as here:
        here.read_on(b"one")
        here.machine.save(str(tmp_path / "saved"))
        here.read_on(b"two")  # saving harmed nothing
    with machine(tmp_path, restored=str(tmp_path / "saved")) as there:
        assert there.has(0, SECTORS) and not there.has(SECTORS, SECTORS + 1)
        there.read_on(b"two")
        assert there.has(0, 2 * SECTORS)


def test_post_copy_is_refused_for_its_back_end_would_not_wait_for_pages(tmp_path: Path) -> None:
    with machine(tmp_path) as here:
        migration = migration_of(here.machine)
        migration.set_capability("postcopy-ram", True)
        with pytest.raises(OperationUnsupported, match=r"disk0.*post-copy"):
            migration.start(f"unix:{tmp_path}/there")
        here.read_on(b"one")


def test_a_back_end_that_does_not_tell_is_refused_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vhost_user, "P_LOG_SHMFD", 0)
    with machine(tmp_path) as here:
        with pytest.raises(OperationUnsupported, match="disk0"):
            Checkpoint(here.machine)
        with pytest.raises(OperationUnsupported, match="disk0") as refused:
            migration_of(here.machine).start(f"unix:{tmp_path}/there")
        assert "unplug" in refused.value.remedy
        here.read_on(b"one")
        assert here.machine.memory.dirty_log is None
