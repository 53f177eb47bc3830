"""The disk: what a driver asks for, what a hostile one asks for, and what the host does to it."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvik.errors import InvalidArgument, OperationInvalid
from kvik.vmm.backends.block import BlockImage
from kvik.vmm.loop import IoThread
from kvik.vmm.ratelimit import RateLimiter
from kvik.vmm.virtio import blk
from kvik.vmm.virtio.blk import Blk

from .ring import Driver

MIB = 1 << 20


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(os.urandom(4 * MIB))
    return path


class Disk(Driver):
    """Requests of a disk, waited for."""

    device: Blk

    def request(self, kind: int, sector: int, data: bytes = b"", room: int = 0, index: int = 0) -> tuple[int, bytes]:
        head = self.space(16, struct.pack("<IIQ", kind, 0, sector))
        status = self.space(1, b"\xee")
        parts = [(head, 16, False)]
        if data:
            parts.append((self.space(len(data), data), len(data), False))
        answer = 0
        if room:
            answer = self.space(room)
            parts.append((answer, room, True))
        number = self.put(index, [*parts, (status, 1, True)])
        self.kick(index)
        self.finish()
        assert self.take(index) == [(number, room + 1)]
        self.next_data = head
        return self.memory.read(status, 1)[0], self.memory.read(answer, room) if room else b""

    def finish(self) -> None:
        self.device.pause()  # waits for what is in flight
        self.device.paused = False


@pytest.fixture(params=["threads", "auto"])
def disk(raw: Path, request: Any) -> Iterator[Disk]:
    driver = Disk(Blk("disk0", BlockImage(str(raw), aio=request.param), serial="abc", queues=2, werror="report"))
    yield driver
    driver.close()


def test_it_reads_writes_flushes_and_tells_its_serial(disk: Disk, raw: Path) -> None:
    data = os.urandom(8192)
    assert disk.request(blk.T_OUT, 3, data) == (blk.S_OK, b"")
    assert disk.request(blk.T_FLUSH, 0) == (blk.S_OK, b"")
    assert raw.read_bytes()[3 * 512 :][:8192] == data
    assert disk.request(blk.T_IN, 3, room=8192, index=1) == (blk.S_OK, data)
    assert disk.request(blk.T_GET_ID, 0, room=20) == (blk.S_OK, b"abc".ljust(20, b"\0"))
    assert disk.request(77, 0)[0] == blk.S_UNSUPP
    figures = disk.device.stats()
    assert (figures["rd_bytes"], figures["wr_bytes"], figures["flush_operations"]) == (8192, 8192, 1)
    assert figures["wr_highest_offset"] == 3 * 512 + 8192


def test_a_request_may_be_cut_anywhere(disk: Disk, raw: Path) -> None:
    header = disk.space(16, struct.pack("<IIQ", blk.T_IN, 0, 1))
    answer = disk.space(4096)
    # The header in three pieces, the data in odd ones, and the status at the end of the last
    parts = [(header, 1, False), (header + 1, 7, False), (header + 8, 8, False)]
    parts += [(answer, 511, True), (answer + 511, 1, True), (answer + 512, 513, True)]
    disk.put(0, parts)
    disk.kick(0)
    disk.finish()
    assert disk.take(0) == [(0, 1025)]
    assert disk.memory.read(answer, 1025) == raw.read_bytes()[512 : 512 + 1024] + bytes([blk.S_OK])


@pytest.mark.parametrize(
    ("kind", "sector", "size"),
    [
        (blk.T_IN, 8192, 512),
        (blk.T_IN, 8191, 1024),
        (blk.T_IN, (1 << 64) - 1, 512),
        (blk.T_IN, 1 << 55, 512),
        (blk.T_IN, 0, 100),
        (blk.T_OUT, 8192, 512),
        (blk.T_OUT, 0, 700),
    ],
)
def test_beyond_the_end_or_no_whole_sectors_is_an_error(
    disk: Disk, raw: Path, kind: int, sector: int, size: int
) -> None:
    before = raw.read_bytes()
    out = kind == blk.T_OUT
    assert disk.request(kind, sector, b"x" * size if out else b"", 0 if out else size)[0] == blk.S_IOERR
    assert raw.read_bytes() == before
    assert disk.transport.resets == 0


def test_discard_and_zeroes_also_when_segments_overlap(disk: Disk, raw: Path) -> None:
    segments = struct.pack("<QII", 8, 8, 0) + struct.pack("<QII", 12, 8, 0) + struct.pack("<QII", 8, 8, 0)
    assert disk.request(blk.T_WRITE_ZEROES, 0, segments)[0] == blk.S_OK
    content = raw.read_bytes()
    assert content[8 * 512 : 20 * 512] == bytes(12 * 512)
    assert disk.request(blk.T_DISCARD, 0, segments)[0] == blk.S_OK
    for bad, code in (
        (struct.pack("<QII", 0, 8, 1), blk.S_UNSUPP),  # unmap has no sense in a discard
        (struct.pack("<QII", 8190, 8, 0), blk.S_IOERR),
        (struct.pack("<QII", (1 << 64) - 1, (1 << 32) - 1, 0), blk.S_IOERR),
        (b"short", blk.S_IOERR),
        (struct.pack("<QII", 0, 1, 0) * (blk.MAX_SEGMENTS + 1), blk.S_IOERR),
    ):
        assert disk.request(blk.T_DISCARD, 0, bad)[0] == code
    assert raw.read_bytes()[20 * 512 :] == content[20 * 512 :]


def test_a_malformed_request_puts_this_device_alone_to_needs_reset(disk: Disk) -> None:
    header = disk.space(16, struct.pack("<IIQ", blk.T_IN, 0, 0))
    hostile: list[list[tuple[int, int, bool]]] = [
        [(header, 16, False)],  # no status
        [(header, 15, False), (header + 64, 1, True)],  # no header
        [(header, 16, False), (header + 4096, (1 << 32) - 1, True)],
        [(header, 16, False), ((1 << 64) - 4096, 8192, True)],
        [(header, 16, False), (1 << 40, 512, True), (header + 64, 1, True)],
    ]
    for count, parts in enumerate(hostile, 1):
        disk.put(0, parts)
        disk.kick(0)
        assert disk.device.broken
        assert disk.transport.resets == count
        disk.device.stop()
        disk.start()
    assert disk.request(blk.T_GET_ID, 0, room=20)[0] == blk.S_OK  # and after a reset it serves


def test_a_read_only_disk_refuses_writes(raw: Path) -> None:
    disk = Disk(Blk("cd", BlockImage(str(raw), read_only=True)))
    assert disk.device.features & blk.RO
    assert not disk.device.features & (blk.F_DISCARD | blk.F_WRITE_ZEROES)
    assert disk.request(blk.T_OUT, 0, b"x" * 512)[0] == blk.S_IOERR
    assert disk.request(blk.T_WRITE_ZEROES, 0, struct.pack("<QII", 0, 8, 0))[0] == blk.S_UNSUPP
    assert disk.request(blk.T_FLUSH, 0)[0] == blk.S_OK
    disk.close()


def test_a_resize_is_told_and_used(disk: Disk, raw: Path) -> None:
    assert disk.request(blk.T_IN, 8192, room=512)[0] == blk.S_IOERR
    disk.device.resize(5 * MIB)
    assert (disk.device.config["capacity"], disk.transport.config_changes) == (5 * 2048, 1)
    assert disk.request(blk.T_IN, 8192, room=512) == (blk.S_OK, bytes(512))
    os.truncate(raw, 2 * MIB)
    assert disk.device.refresh_size()
    assert not disk.device.refresh_size()
    assert disk.request(blk.T_IN, 2 * 2048, room=512)[0] == blk.S_IOERR


def test_a_file_cut_short_gives_the_guest_errors_and_the_manager_an_event(disk: Disk, raw: Path) -> None:
    os.truncate(raw, MIB)
    assert disk.request(blk.T_IN, 3 * 2048, room=512)[0] == blk.S_IOERR
    name, data = disk.machine.events[0]
    assert name == "BLOCK_IO_ERROR"
    assert (data["device"], data["operation"], data["action"], data["nospace"]) == ("disk0", "read", "report", False)
    assert disk.device.stats()["failed_rd_operations"] == 1
    assert disk.request(blk.T_IN, 0, room=512)[0] == blk.S_OK


def test_stop_keeps_the_request_and_tries_it_again(raw: Path) -> None:
    disk = Disk(Blk("disk0", BlockImage(str(raw)), rerror="stop"))
    content = raw.read_bytes()
    os.truncate(raw, MIB)
    header = disk.space(16, struct.pack("<IIQ", blk.T_IN, 0, 3 * 2048))
    answer = disk.space(513)
    disk.put(0, [(header, 16, False), (answer, 513, True)])
    disk.kick(0)
    disk.finish()
    assert disk.take(0) == []
    assert disk.machine.stopped == "io-error"
    disk.device.pause()
    with pytest.raises(OperationInvalid):
        disk.device.state()
    raw.write_bytes(content)
    disk.device.resume()
    disk.spin()
    disk.finish()
    assert disk.take(0) == [(0, 513)]
    assert disk.memory.read(answer, 513) == content[3 * MIB :][:512] + bytes([blk.S_OK])
    disk.close()


def test_a_rate_limit_delays_and_loses_nothing(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock of its own: each wait is as long as it must be, and brings one request."""
    now = [0]
    disk = Disk(Blk("disk0", BlockImage(str(raw))))
    disk.device.limits["total"] = RateLimiter(clock=lambda: now[0])
    disk.device.set_limits(total=(0, 0, 50, 2))
    waits: list[tuple[float, Callable[[], None]]] = []
    monkeypatch.setattr(disk.device.loop, "call_later", lambda seconds, callback: waits.append((seconds, callback)))
    header = disk.space(16, struct.pack("<IIQ", blk.T_IN, 0, 0))
    for _ in range(5):
        disk.put(0, [(header, 16, False), (disk.space(513), 513, True)])
    disk.kick(0)
    disk.finish()
    assert len(disk.take(0)) == 2  # the burst
    for _ in range(3):
        seconds, again = waits.pop()
        assert seconds == 0.02 and not waits
        disk.kick(0)  # whatever the driver says meanwhile
        disk.finish()
        assert disk.take(0) == []
        now[0] += round(seconds * 1e9)
        again()
        disk.finish()
        assert len(disk.take(0)) == 1
    assert not waits
    assert disk.device.limits["total"].throttled == 3
    disk.close()


def test_without_flush_every_write_goes_through(raw: Path) -> None:
    for features, through in ((0, True), (blk.F_FLUSH, False), (blk.F_FLUSH | blk.CONFIG_WCE, False)):
        disk = Disk(Blk("disk0", BlockImage(str(raw))), features=features)
        assert disk.device._write_through is through
        if features & blk.CONFIG_WCE:
            disk.device.config.write(32, 1, 0)
            disk.device.config_written(32, 1)
            assert disk.device._write_through
        assert disk.request(blk.T_OUT, 0, bytes(512))[0] == blk.S_OK
        disk.close()


def test_a_state_moves_to_another_device(disk: Disk, raw: Path) -> None:
    disk.request(blk.T_OUT, 0, b"a" * 512)
    disk.device.pause()
    state = disk.device.state()
    disk.device.close()
    other = Blk("disk0", BlockImage(str(raw)), queues=2)
    other.transport = disk.transport
    other.attach(disk.machine)
    other.restore(state)
    for queue in other.queues:
        queue.notify = lambda: None
    other.activate()
    disk.device = other
    assert disk.request(blk.T_IN, 0, room=512) == (blk.S_OK, b"a" * 512)


def test_a_thread_of_its_own_serves_it(raw: Path) -> None:
    thread = IoThread("disk0")
    thread.start()
    disk = Disk(Blk("disk0", BlockImage(str(raw)), loop=thread.loop))
    header = disk.space(16, struct.pack("<IIQ", blk.T_OUT, 0, 8))
    data, status = disk.space(4096, b"z" * 4096), disk.space(1)
    disk.put(0, [(header, 16, False), (data, 4096, False), (status, 1, True)])
    thread.call(lambda: disk.kick(0))
    disk.finish()
    assert disk.take(0) == [(0, 1)]
    assert raw.read_bytes()[4096:8192] == b"z" * 4096
    disk.close()
    thread.stop()
    disk.close()


def test_a_reset_waits_for_the_host_and_answers_nothing_old(raw: Path) -> None:
    disk = Disk(Blk("disk0", BlockImage(str(raw), cache="directsync", aio="threads")))
    header = disk.space(16, struct.pack("<IIQ", blk.T_OUT, 0, 0))
    for _ in range(20):
        disk.put(0, [(header, 16, False), (disk.space(4096), 4096, False), (disk.space(1), 1, True)])
    disk.kick(0)
    disk.device.stop()
    assert disk.device.image.in_flight == 0
    disk.start()
    disk.spin()
    assert disk.take(0) == []
    disk.close()


def test_options_that_make_no_sense_are_refused(raw: Path) -> None:
    image = BlockImage(str(raw))
    for options in ({"rerror": "enospc"}, {"werror": "x"}, {"queues": 0}, {"queue_size": 100}, {"serial": "x" * 21}):
        with pytest.raises(InvalidArgument):
            Blk("disk0", image, **options)
    image.close()


def test_random_requests_never_reach_outside(raw: Path) -> None:
    """A bounded fuzz: random chains; the device answers or needs a reset, and never raises."""
    dice = random.Random(7)
    disk = Disk(Blk("disk0", BlockImage(str(raw)), werror="report"))
    for _ in range(1500):
        kind = dice.choice([0, 1, 4, 8, 11, 13, 5, 0xFFFFFFFF])
        sector = dice.choice([0, 1, 8191, 8192, dice.getrandbits(64), dice.getrandbits(13)])
        header = disk.space(64, struct.pack("<IIQ", kind, 0, sector) + dice.randbytes(48))
        sizes = [16, 0, 1, 15, 512, 513, 4096, 65536, (1 << 32) - 1]
        parts = [(header, dice.choice([16, 16, 16, 15, 17, 32, 48]), False)]
        for writable in sorted(dice.random() < 0.6 for _ in range(dice.randrange(4))):
            address = dice.choice([header, disk.next_data, 31 * MIB, 32 * MIB - 16, dice.getrandbits(64)])
            parts.append((address, dice.choice(sizes), writable))
        disk.put(0, parts)
        disk.kick(0)
        disk.next_data = header
        if disk.device.broken:
            disk.device.stop()
            disk.start()
    disk.finish()
    assert raw.stat().st_size == 4 * MIB
    disk.close()
