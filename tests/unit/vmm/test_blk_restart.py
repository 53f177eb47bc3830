"""kvik-blk that is killed and started again: no request of the guest is lost, and none is answered twice."""

from __future__ import annotations

import os
import random
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvik.errors import HostError, OperationInvalid
from kvik.image.create import create
from kvik.vmm.blk.inflight import Inflight, inflight_memory
from kvik.vmm.faults import GuestFault
from kvik.vmm.layout import MIB
from kvik.vmm.memory import HostMemory
from kvik.vmm.virtio import blk
from kvik.vmm.virtio.queue import INDIRECT_DESC
from kvik.vmm.virtio.vhost_user_blk import VhostUserBlk

from .blk_process import LAUNCHER, SECTOR, Served
from .ring import FakeMachine

SIZE = 8 * MIB
CLUSTER = 65536
KILLED = Path(__file__).with_name("blk_killed.py")


class Disk:
    """An image, one kvik-blk after another for it, and the guest's driver in front of them."""

    def __init__(self, directory: Path, form: str = "qcow2", options: tuple[str, ...] = ()) -> None:
        self.path, self.redo, self.options, self.form = directory / "disk", directory / "redo", options, form
        if form == "qcow2":
            create(str(self.path), form, SIZE)
        else:
            self.path.write_bytes(bytes(SIZE))
        self.process: subprocess.Popen[str] | None = None
        self.lives: list[socket.socket] = []
        fd, life = self.spawn(0)
        device = VhostUserBlk("disk0", fd, 1, life_fd=life)
        machine = FakeMachine(32 * MIB, host=HostMemory(shared=True))
        self.driver = Served(device, device.features | INDIRECT_DESC, machine=machine)
        self.device = device

    def spawn(self, line: int) -> tuple[int, int]:
        """Another process; our ends of its connection and of its life line."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
        ours, theirs = socket.socketpair()
        our_life, life = socket.socketpair()
        fds = [os.open(self.path, os.O_RDWR), os.open(self.redo, os.O_RDWR | os.O_CREAT, 0o600)]
        words = [f"--image={fds[0]},{self.form}", f"--redo={fds[1]}", f"--socket={theirs.fileno()}"]
        words += [f"--life={life.fileno()}", *self.options]
        program = [sys.executable, "-I", "-S", str(LAUNCHER)] if not line else [sys.executable, str(KILLED), str(line)]
        passed = (*fds, theirs.fileno(), life.fileno())
        self.process = subprocess.Popen([*program, *words], pass_fds=passed, stderr=subprocess.PIPE, text=True)
        for fd in fds:
            os.close(fd)
        theirs.close()
        life.close()
        return ours.detach(), our_life.detach()

    def lost(self) -> None:
        """Until the device has seen that its back end is gone."""
        assert self.process is not None
        self.process.wait(20)
        for _ in range(200):
            if self.device.waiting or self.device.broken:
                return
            self.driver.machine.loop.run_once(0.1)
        raise TimeoutError("nobody noticed")

    def again(self, line: int = 0) -> None:
        self.device.connect_anew(*self.spawn(line))

    def post(self, kind: int, sector: int, data: bytes = b"", room: int = 0) -> Posted:
        return Posted(self.driver, kind, sector, data, room)

    def end(self) -> None:
        self.driver.close()
        assert self.process is not None
        _, said = self.process.communicate(timeout=20)
        assert self.process.returncode == 0, said

    def close(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.communicate()
        self.driver.close()
        self.driver.machine.loop.close()
        self.driver.memory.close()


class Posted:
    """A request that was put into the ring."""

    def __init__(self, driver: Served, kind: int, sector: int, data: bytes, room: int) -> None:
        self.driver, self.size = driver, room
        header = driver.space(16, struct.pack("<IIQ", kind, 0, sector))
        self.status = driver.space(1, b"\xee")
        parts = [(header, 16, False)]
        if data:
            parts.append((driver.space(len(data), data), len(data), False))
        if room:
            self.room = driver.space(room)
            parts.append((self.room, room, True))
        driver.put_table(0, [*parts, (self.status, 1, True)])
        self.head = (driver.free[0] - 1) % driver.device.queues[0].size

    @property
    def code(self) -> int:
        return self.driver.memory.read(self.status, 1)[0]

    @property
    def data(self) -> bytes:
        return self.driver.memory.read(self.room, self.size)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[..., Disk]]:
    made: list[Disk] = []

    def make(*given: Any) -> Disk:
        made.append(Disk(tmp_path, *given))
        return made[-1]

    yield make
    for item in made:
        item.close()


def kick(driver: Served) -> None:
    queue = driver.device.queues[0]
    driver.memory.put_u16(queue.avail + 4 + 2 * queue.size, driver.used[0] & 0xFFFF)
    os.eventfd_write(driver.transport.kicks[0], 1)


def assert_whole(path: Path) -> None:
    if shutil.which("qemu-img"):
        said = subprocess.run(["qemu-img", "check", "-f", "qcow2", path], capture_output=True, text=True, check=False)
        assert not said.returncode, said.stdout


@pytest.mark.parametrize("form", ["qcow2", "raw"])
def test_killed_at_every_point_of_a_request(form: str, disk: Callable[..., Disk]) -> None:
    """Bursts of writes, reads and flushes, and a process that ends before some line of what serves them."""
    served = disk(form)
    driver, dice = served.driver, random.Random(form)
    content = bytearray(SIZE)
    deaths = 0
    line = 40
    served.process.kill()
    served.lost()
    for turn in range(14):
        served.again(line)
        driver.next_data = 0x20_0000
        posted: list[Posted] = []
        reads: list[tuple[Posted, int, int]] = []
        offsets = dice.sample(range(SIZE // CLUSTER), 6)  # no two requests on the same bytes: their order is free
        for number, cluster in enumerate(offsets):
            offset = cluster * CLUSTER + dice.randrange(CLUSTER // SECTOR - 24) * SECTOR
            length = dice.choice([1, 8, 24]) * SECTOR
            if number % 3 == 2:
                posted.append(served.post(blk.T_IN, offset // SECTOR, room=length))
                reads.append((posted[-1], offset, length))
            else:
                data = bytes([1 + (7 * turn + number) % 255]) * length
                content[offset : offset + length] = data
                posted.append(served.post(blk.T_OUT, offset // SECTOR, data))
        posted.append(served.post(blk.T_FLUSH, 0))
        kick(driver)
        answered: list[int] = []
        end = time.monotonic() + 60
        while len(answered) < len(posted):
            assert time.monotonic() < end, f"turn {turn}: {len(answered)} of {len(posted)}"
            answered += [head for head, _ in driver.take(0)]
            driver.machine.loop.run_once(0.01)
            if served.device.waiting:
                deaths += 1
                served.again()
        time.sleep(0.01)
        answered += [head for head, _ in driver.take(0)]
        assert sorted(answered) == sorted(item.head for item in posted)  # each once
        assert {item.code for item in posted} == {blk.S_OK}
        for item, offset, length in reads:
            assert item.data == content[offset : offset + length]
        if not served.device.waiting:
            served.process.kill()
            served.lost()
        line = line * 3 // 2
    served.again()
    assert deaths > 3
    for offset in range(0, SIZE, 16 * CLUSTER):
        assert driver.read(offset, 16 * CLUSTER) == content[offset : offset + 16 * CLUSTER]
    served.end()
    if form == "qcow2":
        assert_whole(served.path)
    else:
        assert served.path.read_bytes() == content


def test_answered_and_not_flushed_is_there_after_a_kill(disk: Callable[..., Disk]) -> None:
    served = disk()
    for number in range(20):
        served.driver.write(5 * number * CLUSTER, bytes([number + 1]) * 4096)
    assert served.driver.segment(blk.T_WRITE_ZEROES, 5 * CLUSTER, CLUSTER) == blk.S_OK
    served.process.kill()
    served.lost()
    served.again()
    for number in range(20):
        assert served.driver.read(5 * number * CLUSTER, 4096) == bytes([0 if number == 1 else number + 1]) * 4096
    served.end()
    assert_whole(served.path)


def test_a_disk_waits_and_then_goes_on_or_is_given_up(disk: Callable[..., Disk]) -> None:
    served = disk()
    device, machine = served.device, served.driver.machine
    served.driver.write(0, b"a" * 512)
    with pytest.raises(OperationInvalid, match="does not wait"):
        device.give_up("no reason")
    served.process.kill()
    served.lost()
    assert machine.events == [("VHOST_USER_DISCONNECTED", machine.events[0][1])]
    assert machine.events[0][1]["waiting"] is True
    assert not device.broken and served.driver.transport.resets == 0
    device.pause()
    with pytest.raises(OperationInvalid, match="waits for its back end"):
        device.state()
    request = served.post(blk.T_IN, 0, room=512)
    served.again()
    with pytest.raises(OperationInvalid, match="not answered"):  # where the rings are, only the new one can tell
        device.state()
    assert not served.driver.take(0)
    device.resume()
    served.driver.wait()
    assert request.data == b"a" * 512
    device.pause()
    assert device.state()["queues"][0]["next_avail"] == 2
    device.resume()
    served.process.kill()
    served.lost()
    device.give_up("it ended too often")
    assert device.broken == "it ended too often" and served.driver.transport.resets == 1
    assert machine.events[-1] == ("VHOST_USER_DISCONNECTED", {"device": "disk0", "reason": "it ended too often"})
    assert not device.waiting and device.back_end is None


def test_a_driver_that_resets_a_waiting_disk_begins_anew(disk: Callable[..., Disk]) -> None:
    served = disk()
    driver, device = served.driver, served.device
    driver.write(0, b"a" * 512)
    served.process.kill()
    served.lost()
    served.post(blk.T_OUT, 0, b"b" * 512)  # never seen: the rings are the driver's own again
    device.stop()
    driver.start(device.features | INDIRECT_DESC)
    assert device.active and device.waiting
    served.again()
    assert driver.read(0, 512) == b"a" * 512
    served.end()


def test_notes_of_another_image_are_refused(tmp_path: Path, disk: Callable[..., Disk]) -> None:
    served = disk()
    served.driver.write(0, b"a" * 512)
    served.process.kill()
    served.lost()
    served.path.rename(tmp_path / "old")
    create(str(served.path), "qcow2", SIZE)
    fd, life = served.spawn(0)
    assert served.process is not None
    _, said = served.process.communicate(timeout=20)
    assert served.process.returncode == 1 and "is not the image that the process before this one wrote to" in said
    with pytest.raises(HostError):
        served.device.connect_anew(fd, life)
    assert served.device.waiting


# The memory where requests in flight are noted ------------------------------------------------------------------


def rings(size: int = 8) -> tuple[int, Inflight]:
    fd = inflight_memory(2, size)
    return fd, Inflight(fd, os.fstat(fd).st_size, 0, 2, size)


def test_requests_are_found_in_the_order_in_which_they_were_taken() -> None:
    fd, memory = rings()
    ring = memory.ring(1, 8)
    assert ring.recover(500) is None  # a ring that is new
    for head in (3, 1, 7):
        ring.take(head)
    ring.untake(1)
    assert memory.ring(0, 8).recover(0) is None
    again = Inflight(fd, memory.length, 0, 2, 8).ring(1, 8)
    assert again.recover(500) == [3, 7]
    again.take(2)
    assert again.recover(500) == [3, 7, 2]
    os.close(fd)


@pytest.mark.parametrize("steps", range(5))
def test_answers_are_shown_or_not_wherever_it_ends(steps: int) -> None:
    fd, memory = rings()
    ring = memory.ring(0, 8)
    assert ring.recover(65534) is None
    for head in (3, 1, 7, 5):
        ring.take(head)
    ring.show([1])
    ring.shown([1], 65535)
    used = 65535
    if steps >= 1:
        ring.show([7, 3])
    if steps >= 2:
        used = 1  # the driver sees both
    if steps == 3:
        ring._bytes[16 + 16 * 7] = 0
    if steps >= 4:
        ring.shown([7, 3], used)
    assert memory.ring(0, 8).recover(used) == ([3, 7, 5] if steps < 2 else [5])
    os.close(fd)


def test_a_burst_clears_no_marks() -> None:
    fd, memory = rings()
    ring = memory.ring(0, 8)
    ring.recover(0)
    ring.take(4)
    ring.show([])
    ring.shown([], 0)
    ring.take(5)
    ring.show([4])
    ring.shown([4], 1)
    ring.show([])  # three that were never marked
    assert memory.ring(0, 8).recover(4) == [5]
    os.close(fd)


def test_what_the_vmm_writes_there_is_checked() -> None:
    fd, memory = rings()
    ring = memory.ring(0, 8)
    ring.recover(0)
    ring._words[6] = 60000  # a list that begins nowhere
    assert memory.ring(0, 8).recover(100) == []
    for head in range(8):  # one that loops
        ring._words[(16 + 16 * head + 6) >> 1] = head
        ring.take(head)
    ring._words[6] = 2
    assert memory.ring(0, 8).recover(3) == [0, 1, 3, 4, 5, 6, 7]
    with pytest.raises(GuestFault, match="of a ring of 8"):
        memory.ring(0, 4).recover(0)
    with pytest.raises(HostError):
        memory.ring(2, 8)
    with pytest.raises(HostError):
        Inflight(fd, memory.length, 0, 3, 8)
    with pytest.raises(HostError):
        Inflight(fd, 1 << 20, 1 << 40, 2, 8)
    with pytest.raises(OSError, match="not permitted"):
        os.ftruncate(fd, 0)  # a read of it never fails
    os.close(fd)


def test_a_front_end_can_hold_its_own_file(disk: Callable[..., Disk]) -> None:
    """QEMU's does: what GET_INFLIGHT_FD gave is told again by SET_INFLIGHT_FD, with a length and an offset."""
    served = disk()
    held = served.device._inflight
    assert held is not None
    length, offset, queues, size = struct.unpack("=QQHH4x", held.place)
    assert (offset, queues, size) == (0, 1, 256) and length >= 16 + 16 * 256
    assert os.fstat(held.fd).st_size >= length
