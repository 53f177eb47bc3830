"""What a guest once did, or could have done, to its machine: one test for each finding of the review and the fuzzers."""

from __future__ import annotations

import os

import pytest

from kvik.vmm.backends import pool
from kvik.vmm.backends.block import BlockImage
from kvik.vmm.backends.net import NoBackend
from kvik.vmm.backends.request import FLUSH, WRITE, Request
from kvik.vmm.faults import GuestFault
from kvik.vmm.loop import EventLoop
from kvik.vmm.memory import GuestMemory
from kvik.vmm.virtio.balloon import Balloon
from kvik.vmm.virtio.mock import MockDriver
from kvik.vmm.virtio.mock_machine import MockMachine
from kvik.vmm.virtio.net import NetDevice
from kvik.vmm.virtio.queue import INDIRECT_DESC, RING_PACKED, VERSION_1, SplitQueue
from kvik.vmm.virtio.transport import QUEUE_RESET, QUEUE_SELECT, QUEUE_SIZE


@pytest.fixture
def machine():
    made = MockMachine()
    errors = []
    made.loop.on_error = errors.append
    yield made
    made.close()
    assert not errors


def test_timers_that_are_set_and_cancelled_without_end_do_not_pile_up():
    loop = EventLoop()
    for _ in range(10_000):
        loop.call_later(3600, lambda: None).cancel()
    assert len(loop._timers) < 200
    came = []
    loop.call_later(0, lambda: came.append(1))
    loop.run_once(0)
    assert came
    loop.close()


def test_a_chain_is_no_longer_than_its_queue_even_with_a_table_behind_it():
    memory = GuestMemory.allocate(1 << 20)
    queue = SplitQueue(memory, 0, 16)
    driver = MockDriver(memory, queue, features=INDIRECT_DESC, base=0x10000, area=1 << 17)
    table = driver.buffers
    for slot in range(16):
        memory.write(table + 16 * slot, b"".join((
            (driver.buffers + 4096).to_bytes(8, "little"), (8).to_bytes(4, "little"),
            (1 if slot < 15 else 0).to_bytes(2, "little"), (slot + 1).to_bytes(2, "little"),
        )))  # fmt: skip
    for slot, (address, length, flags) in enumerate([(driver.buffers + 4096, 8, 1), (table, 16 * 16, 4)]):
        memory.write(driver.desc + 16 * slot, address.to_bytes(8, "little") + length.to_bytes(4, "little")
                     + flags.to_bytes(2, "little") + (slot + 1).to_bytes(2, "little"))  # fmt: skip
    memory.put_u16(driver.avail + 2, 1)
    with pytest.raises(GuestFault, match="indirect table"):
        queue.pop()
    memory.close()


def test_a_net_that_breaks_in_one_pair_leaves_the_others_alone(machine):
    device = NetDevice("net0", NoBackend(4), "52:54:00:12:34:56")
    driver = machine.add_virtio(device)
    features = driver.offered() & ~(INDIRECT_DESC | RING_PACKED)
    driver.start(features | VERSION_1, size=16)
    for queue in driver.queues:
        machine.memory.put_u16(queue.avail + 2, 0x8000)  # far more than the ring holds
    machine.turn()
    assert device.broken and "ahead" in device.broken


def test_the_balloon_forgets_its_statistics_buffer_with_the_queue(machine):
    device = Balloon("balloon0")
    driver = machine.add_virtio(device)
    driver.start(driver.offered(), size=64)
    driver.queues[2].add([bytes(10)])
    driver.kick(2)
    assert device._held is not None
    driver.common(QUEUE_SELECT, 2, 2)
    driver.common(QUEUE_RESET, 2, 1)
    assert device._held is None
    driver.common(QUEUE_SIZE, 2, 4)
    driver.queues[2].rewind()
    driver.set_queue(driver.queues[2])
    device.ask_for_stats()  # nothing is there to give back
    device.pause()
    device.resume()
    machine.turn()
    assert device.active and not device.broken


@pytest.mark.parametrize("aio", ["auto", "threads"])
def test_a_request_that_was_not_sent_yet_does_not_hold_up_a_drain(tmp_path, aio):
    """A good request before a malformed one: the device stops with the first still in the batch."""
    (tmp_path / "disk").write_bytes(bytes(1 << 16))
    loop, done = EventLoop(), []
    image = BlockImage(str(tmp_path / "disk"), aio=aio, locking=False)
    image.start(loop, private=False)
    data = memoryview(bytearray(512))
    assert not image.submit(Request(WRITE, 0, 512, [data], done.append))
    assert image.drain(5)
    assert [request.result for request in done] == [0]
    image.close()
    loop.close()


def test_disk_i_o_goes_on_where_no_thread_can_be_started(tmp_path, monkeypatch):
    def none(*_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(pool, "start_new_thread", none)
    threads, done = pool.ThreadPool(), []
    with open(tmp_path / "disk", "w+b") as disk:
        request = Request(FLUSH, done=done.append)
        request.fd = disk.fileno()
        threads.submit(request)
        assert threads.wait(5) and done == [request] and not request.result
    threads.close()
    assert os.listdir(tmp_path) == ["disk"]
