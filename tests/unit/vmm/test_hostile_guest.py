"""What a guest once did, or could have done, to its machine: a test for each finding."""

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
from kvik.vmm.virtio.queue import INDIRECT_DESC, RING_PACKED, VERSION_1
from kvik.vmm.virtio.split import SplitQueue
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


def test_a_vcpu_may_say_things_while_the_loop_sends_what_waits():
    """The buffer grew while it was being written: a BufferError on the vCPU's thread, which ended the guest."""
    import _thread
    import socket

    from kvik.vmm.backends.char import Chardev

    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    loop, errors = EventLoop(), []
    loop.on_error = errors.append
    chardev = Chardev(f"fd={ours.detach()}")
    chardev.open(loop, lambda data: None)
    ended, sent = _thread.allocate_lock(), []
    ended.acquire()

    def vcpu():
        try:
            for _ in range(20_000):
                sent.append(chardev.write(b"0123456789abcdef"))
        except BaseException as error:
            errors.append(error)
        ended.release()

    _thread.start_new_thread(vcpu, ())
    got = 0
    while not ended.acquire(timeout=0):
        loop.run_once(0)
        try:
            got += len(theirs.recv(1 << 16))
        except BlockingIOError:
            pass
    for _ in range(1000):
        loop.run_once(0)
        try:
            got += len(theirs.recv(1 << 16))
        except BlockingIOError:
            break
    assert not errors and len(sent) == 20_000
    chardev.close()
    while data := theirs.recv(1 << 16):
        got += len(data)
    assert got == sum(sent)
    theirs.close()
    loop.close()


def test_views_of_memory_that_was_taken_away_are_harmless():
    """A guest may put its rings into memory that is hot-unplugged afterwards; a request may still be in flight."""
    from kvik.vmm.memory import HostMemory

    memory = GuestMemory.allocate(2 << 20, hotplug=1 << 30)
    start = memory.layout.hotplug[0]
    region = memory.add_ram(start, 2 << 20, HostMemory())
    view = memory.view(start, 4096)
    view[:] = b"x" * 4096
    memory.remove(region)
    assert bytes(view[:8]) == bytes(8)
    view[:8] = b"harmless"
    with pytest.raises(GuestFault):
        memory.view(start, 1)
    memory.close()


def test_a_doorbell_that_kvm_has_no_room_for_rings_by_an_exit():
    import errno

    from kvik.kvm.descriptor import KvmError
    from kvik.vmm.interrupts import Doorbells

    class Full:
        def ioeventfd(self, *_, **__):
            raise KvmError(errno.ENOSPC, "IOEVENTFD")

    bells = Doorbells(Full())
    bells.add(0x1000, 2, 5)
    bells.remove(0x1000, 2)
    assert not bells.rung


def test_a_network_whose_reads_only_fail_ends_instead_of_spinning(machine):
    class Failing(NoBackend):
        def receive(self, pair, buffers):
            raise OSError(5, "Input/output error")

    device = NetDevice("net0", Failing(), "52:54:00:12:34:56")
    driver = machine.add_virtio(device)
    driver.start(size=16)
    driver.queues[0].add([], [2048])
    driver.kick(0)
    machine.turn(20)
    assert device.gone and not device.link and device.active


def test_a_log_line_is_lost_rather_than_waited_for():
    from kvik.vmm.log import Log

    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    try:
        while True:
            os.write(writer, bytes(4096))
    except BlockingIOError:
        os.set_blocking(writer, True)
    Log(writer).write("warning", "nobody reads this")  # returns
    os.close(reader)
    Log(writer).write("warning", "nobody will")
    os.close(writer)


def test_a_thread_that_could_not_be_confined_is_an_error_of_whoever_starts_it():
    from kvik.vmm.loop import IoThread

    def refuses():
        raise PermissionError("no")

    thread = IoThread("disk0")
    thread.on_start = refuses
    with pytest.raises(PermissionError):
        thread.start()


def test_a_crowded_loop_says_so():
    loop = EventLoop()
    for _ in range(5000):
        loop.call_soon(lambda: None)
    assert loop.crowded
    loop.run_once(0)
    assert not loop.crowded
    loop.close()
