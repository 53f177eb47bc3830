"""A disk's usual requests are served by a function of their own: it must do what the long way does, bit for bit."""

from __future__ import annotations

import os
import random
import struct

import pytest

from kvik.vmm.backends.block import BlockImage
from kvik.vmm.virtio import blk
from kvik.vmm.virtio.blk import F_FLUSH, T_IN, T_OUT, Blk
from kvik.vmm.virtio.blkburst import BATCH_BYTES, serve
from kvik.vmm.virtio.mock_machine import MockMachine
from kvik.vmm.virtio.queue import DESC_INDIRECT, DESC_NEXT, DESC_WRITE, EVENT_IDX, INDIRECT_DESC, VERSION_1
from kvik.vmm.virtio.split import SplitQueue

MIB = 1 << 20
MEMORY = 4 * MIB
FEATURES = VERSION_1 | INDIRECT_DESC | EVENT_IDX | F_FLUSH


class Disk:
    """A disk of 1 MiB, and its driver."""

    def __init__(self, path, **image):
        path.write_bytes(random.Random(1).randbytes(MIB))
        self.path = path
        self.machine = MockMachine(MEMORY)
        self.device = Blk("disk", BlockImage(str(path), **image), loop=self.machine.loop, queue_size=64)
        self.guest = self.machine.add_virtio(self.device)
        self.start()

    def start(self):
        self.guest.start(FEATURES, area=2 * MIB)
        self.guest.use_msix(2)
        self.queue = self.guest.queues[0]
        self.request(T_IN, 0, pieces=[512])  # finds the region that all is in

    def close(self):
        self.machine.close()

    def add(self, kind, sector, pieces, fill=b"\x5a"):
        header = struct.pack("<IIQ", kind, 0, sector)
        if kind == T_OUT:
            return self.queue.add([header, *(fill * size for size in pieces)], [1])
        return self.queue.add([header], [*pieces, 1])

    def kick(self):
        """Everything that was added, answered."""
        self.guest.kick(0)
        self.finish()
        return self.queue.collect()

    def finish(self):
        self.device.pause()  # waits for what is in flight
        self.device.paused = False

    def request(self, kind, sector, pieces, fill=b"\x5a"):
        self.add(kind, sector, pieces, fill)
        (done,) = self.kick()
        return done


@pytest.fixture
def count(monkeypatch):
    """How many requests went the short way."""
    counted = [0]

    def counting(*words, **named):
        done = serve(*words, **named)
        counted[0] += done
        return done

    monkeypatch.setattr(blk, "serve", counting)
    return counted


@pytest.fixture
def disk(tmp_path):
    made = Disk(tmp_path / "disk.raw")
    yield made
    made.close()


def test_a_burst_is_answered_in_one_step_with_one_interrupt(count, disk):
    count[0] = 0
    disk.machine.interrupts.sent.clear()
    content = disk.path.read_bytes()
    requests = [disk.add(T_IN, 8 * number, [4096]) for number in range(20)]
    disk.queue.ask(interrupts=True)
    assert disk.kick() == requests
    for number, done in enumerate(requests):
        assert done.data == content[4096 * number :][:4096] + b"\0"
    assert count[0] == 20
    assert len(disk.machine.interrupts.sent) == 1
    figures = disk.device.stats()
    assert (figures["rd_operations"], figures["rd_bytes"]) == (21, 20 * 4096 + 512)


@pytest.mark.parametrize("pieces", [[512], [4096] * 3, [512, 4096, 1024], [4096] * 60, [65536, 512]])
def test_reads_and_writes_of_any_pieces(count, disk, pieces):
    count[0] = 0
    size = sum(pieces)
    assert disk.request(T_OUT, 3, pieces, b"\xa5").data == b"\0"
    content = disk.path.read_bytes()
    assert content[3 * 512 :][:size] == b"\xa5" * size
    done = disk.request(T_IN, 2, pieces)
    assert (done.data, done.written) == (content[2 * 512 :][:size] + b"\0", size + 1)
    assert count[0] == 2
    assert disk.device.stats()["wr_highest_offset"] == 3 * 512 + size


def test_a_driver_sees_the_first_before_much_was_copied(disk, monkeypatch):
    """Else it waits while it could go on."""
    for _ in range(2 * BATCH_BYTES // (64 << 10)):
        disk.add(T_IN, 0, [64 << 10])
    shown = []
    show = SplitQueue.show
    monkeypatch.setattr(SplitQueue, "show", lambda queue, number: (shown.append(number), show(queue, number)))
    assert len(disk.kick()) == 8
    assert shown == [4, 4]


@pytest.mark.parametrize(
    ("kind", "sector", "pieces"),
    [
        (T_IN, 2048, [512]),
        (T_IN, 2047, [1024]),
        (T_IN, 1 << 62, [512]),
        (T_IN, 0, [100]),
        (T_IN, 0, [512, 100]),
        (T_OUT, 2048, [512]),
        (T_OUT, 0, [700]),
        (T_OUT, (1 << 64) - 1, [512]),
        (99, 0, [512]),
    ],
)
def test_what_is_wrong_goes_the_long_way_and_the_next_the_short_one(count, disk, kind, sector, pieces):
    count[0] = 0
    before = disk.path.read_bytes()
    first, wrong, last = disk.add(T_IN, 0, [512]), disk.add(kind, sector, pieces), disk.add(T_IN, 1, [512])
    assert set(disk.kick()) == {first, wrong, last}  # in whatever order: the device need not keep it
    assert (first.data[-1], last.data[-1], count[0]) == (0, 0, 2)
    assert wrong.data[-1] in (1, 2)
    assert disk.path.read_bytes() == before
    assert disk.device.active


def test_a_file_that_was_cut_short_gives_an_error(disk):
    os.truncate(disk.path, 4096)
    assert disk.request(T_IN, 8, [512]).data[-1] == 1
    assert disk.request(T_IN, 0, [512]).data[-1] == 0


def test_a_log_of_dirty_pages_hears_of_every_byte(count, disk):
    count[0] = 0
    heard = []
    disk.machine.memory.dirty_log = lambda address, size: heard.append((address, size))
    done = disk.request(T_IN, 0, [4096])
    assert count[0] == 0
    assert set(done.writable) <= set(heard)


def test_direct_and_synchronous_disks_write_the_long_way(count, tmp_path):
    disk = Disk(tmp_path / "disk.raw", cache="writethrough")
    count[0] = 0
    assert disk.request(T_OUT, 0, [512]).data == b"\0"
    assert count[0] == 0
    assert disk.request(T_IN, 0, [512]).data == b"\x5a" * 512 + b"\0"
    assert count[0] == 1
    disk.close()


def test_a_rate_limit_sees_every_request(count, disk):
    count[0] = 0
    disk.device.set_limits(total=(1 << 20, 0, 0, 0))
    assert disk.request(T_IN, 0, [512]).data[-1] == 0
    assert count[0] == 0


def _tables(rng, disk):
    """Tables that are nearly those of a driver: one thing or two are changed."""
    data, header, status = 0x280000, 0x2E0000, 0x2E1000
    count = rng.choice((1, 1, 1, 2, 5))
    kind = rng.choice((T_IN, T_OUT))
    disk.machine.memory.write(header, struct.pack("<IIQ", kind, 0, rng.choice((0, 1, 5, 2040, 2047, 1 << 60))))
    flags = DESC_NEXT | (DESC_WRITE if kind == T_IN else 0)
    size = rng.choice((512, 512, 4096))
    parts = [[header, 16, DESC_NEXT, 1]]
    parts += [[data + 8192 * number, size, flags, number + 2] for number in range(count)]
    parts += [[status, 1, DESC_WRITE, 0]]
    for _ in range(rng.choice((0, 1, 1, 2))):
        part = rng.choice(parts)
        field = rng.randrange(4)
        if field == 0:
            part[0] = rng.choice((0, MEMORY - 1, MEMORY - 512, MEMORY, 1 << 40, (1 << 64) - 16, part[0] + 1))
        elif field == 1:
            part[1] = rng.choice((0, 1, 15, 17, 511, 1024, 0xFFFFFFFF))
        elif field == 2:
            part[2] = rng.randrange(8)
        else:
            part[3] = rng.choice((0, 1, 2, 3, 60, 0xFFFF))
    table = b"".join(struct.pack("<QIHH", *part) for part in parts)
    length = len(table) + rng.choice((0,) * 8 + (16, -16, 8, 1))
    return table, length, rng.choice((DESC_INDIRECT,) * 12 + (DESC_INDIRECT | DESC_NEXT, DESC_INDIRECT | DESC_WRITE, 0))


def _put(disk, table, length, flags):
    queue, memory = disk.queue, disk.machine.memory
    memory.write(0x2F0000, table + bytes(16))
    memory.write(queue.desc, struct.pack("<QIHH", 0x2F0000, length, flags, 0))
    memory.put_u16(queue.avail + 4 + 2 * (queue._avail_index % queue.size), 0)
    queue._avail_index = (queue._avail_index + 1) & 0xFFFF
    memory.put_u16(queue.avail + 2, queue._avail_index)
    disk.guest.kick(0, turn=False)
    disk.machine.loop.run_once(0)
    disk.finish()


def test_it_does_what_the_long_way_does_with_whatever_a_guest_writes(count, tmp_path, monkeypatch):
    rng = random.Random(7)
    short, long = (Disk(tmp_path / name) for name in ("short", "long"))
    broken = 0
    for number in range(400):
        table, length, flags = _tables(rng, short)
        long.machine.memory.write(0x2E0000, short.machine.memory.read(0x2E0000, 16))
        _put(short, table, length, flags)
        with monkeypatch.context() as patch:
            patch.setattr(blk, "serve", lambda *words, **named: 0)
            _put(long, table, length, flags)
        what = f"table {number}: {table.hex(' ', 8)}, {length} bytes, flags {flags}"
        assert bool(short.device.broken) == bool(long.device.broken), what
        assert short.machine.memory.read(0, MEMORY) == long.machine.memory.read(0, MEMORY), what
        if short.device.broken:
            broken += 1
            assert short.device.broken == long.device.broken
            short.start()
            long.start()
    assert short.path.read_bytes() == long.path.read_bytes()
    assert broken > 50
    assert count[0] > 40
    for disk in (short, long):
        disk.close()


@pytest.mark.parametrize("kind", [T_IN, T_OUT])
@pytest.mark.parametrize("pieces", [[10240] * 60, [512, 65536, *[16384] * 31, 4096]])
def test_large_requests_are_copied_beside_each_other(disk, kind, pieces, monkeypatch):
    """By threads of the kernel, which get the driver's own table as their I/O vectors; or by ours where it has none."""
    vectors = []
    engine = disk.device.image._engine
    submit = engine.submit
    monkeypatch.setattr(engine, "submit", lambda request: (vectors.append(request.vector), submit(request)))
    content, size = disk.path.read_bytes(), sum(pieces)
    requests = [disk.add(kind, sector, pieces, fill) for sector, fill in ((0, b"\x11"), (700, b"\x22"))]
    assert set(disk.kick()) == set(requests)
    for done, sector, fill in zip(requests, (0, 700), (b"\x11", b"\x22"), strict=True):
        if kind == T_IN:
            assert done.data == content[sector * 512 :][:size] + b"\0"
        else:
            assert done.data == b"\0"
            now = disk.path.read_bytes()[sector * 512 :][:size]
            assert now == fill * size or (sector == 0 and now[: 700 * 512] == fill * 700 * 512)
    assert len(vectors) >= 1  # the last one may be copied here
    words = [struct.unpack(f"<{len(vector) // 8}Q", vector) for vector in vectors]
    lengths = [length for word in words for length in word[1::2]]
    assert lengths == pieces * len(vectors)


def test_a_request_that_is_cut_otherwise_has_no_vector_ready(disk):
    header = struct.pack("<IIQ", T_IN, 0, 0)
    for readable, writable in (([header], [4096, 4097]), ([header[:8], header[8:]], [4096, 1]), ([header], [1])):
        disk.queue.add(readable, writable)
        queue = disk.device.queues[0]
        chain = queue.pop()
        assert chain.vector(sum(writable) - 1) == b""
        queue.push(chain, 0)
    disk.queue.collect()
