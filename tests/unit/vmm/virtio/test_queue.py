"""Queues against the mock driver: both rings, every feature, and what a hostile guest puts into them."""

import random
import struct

import pytest

from kvik.vmm.faults import GuestFault
from kvik.vmm.memory import GuestMemory
from kvik.vmm.virtio.mock import MockDriver
from kvik.vmm.virtio.packed import PackedQueue
from kvik.vmm.virtio.queue import EVENT_IDX, IN_ORDER, INDIRECT_DESC, RING_PACKED
from kvik.vmm.virtio.split import SplitQueue

FEATURES = [
    base | ring
    for ring in (0, RING_PACKED)
    for base in (0, EVENT_IDX, INDIRECT_DESC, IN_ORDER, EVENT_IDX | INDIRECT_DESC | IN_ORDER)
]
WRITE, NEXT, INDIRECT = 2, 1, 4


@pytest.fixture
def memory():
    memory = GuestMemory.allocate(4 << 20)
    yield memory
    memory.close()


def make(memory, features=0, size=16):
    queue = (PackedQueue if features & RING_PACKED else SplitQueue)(memory, 0, size)
    return queue, MockDriver(memory, queue, features=features)


@pytest.mark.parametrize("features", FEATURES)
def test_requests_come_and_go_in_many_sizes_around_the_ring(memory, features):
    queue, driver = make(memory, features)
    dice = random.Random(features)
    expected = []
    for _ in range(500):
        if dice.random() < 0.6:
            readable = [bytes([dice.randrange(256)]) * dice.randrange(1, 40) for _ in range(dice.randrange(0, 4))]
            writable = [dice.randrange(1, 40) for _ in range(dice.randrange(1, 3))]
            try:
                expected.append((driver.add(readable, writable), b"".join(readable), sum(writable)))
            except ValueError:
                pass  # full
        else:
            for chain in queue:
                _, sent, room = expected[0]
                assert b"".join(chain.readable) == sent
                assert (chain.readable_size, chain.writable_size) == (len(sent), room)
                queue.push(chain, chain.write(sent))
                [done] = driver.collect()
                assert done is expected[0][0]
                assert done.data == sent[:room]
                assert done.written == min(len(sent), room)
                expected.pop(0)


@pytest.mark.parametrize("features", FEATURES)
def test_completion_out_of_order(memory, features):
    queue, driver = make(memory, features)
    requests = [driver.add([bytes([number])], [1]) for number in range(8)]
    chains = list(queue)
    for chain in reversed(chains):
        chain.write(chain.read_all(1))
        queue.push(chain, 1)
    if features & RING_PACKED and not features & IN_ORDER:
        assert {done.data for done in driver.collect()} == {bytes([number]) for number in range(8)}
    else:
        order = requests if features & IN_ORDER else list(reversed(requests))
        done = driver.collect()
        assert done == order
        assert [one.data for one in done] == [bytes([requests.index(one)]) for one in order]


@pytest.mark.parametrize("features", [EVENT_IDX, EVENT_IDX | RING_PACKED, 0, RING_PACKED])
def test_notifications_are_sent_only_when_wanted(memory, features):
    queue, driver = make(memory, features)
    told = []
    queue.notify = lambda: told.append(1)
    for wanted in (True, False, True, True, False) * 10:
        driver.ask(interrupts=wanted)
        driver.add([], [1])
        queue.push(queue.pop(), 1)
        told.clear()
        queue.flush()
        assert bool(told) == wanted
        queue.flush()
        assert len(told) == wanted  # nothing new: nothing sent
        driver.collect()


@pytest.mark.parametrize("features", [EVENT_IDX, EVENT_IDX | RING_PACKED, 0, RING_PACKED])
def test_kicks_are_asked_for_only_when_the_queue_is_idle(memory, features):
    queue, driver = make(memory, features)
    for _ in range(40):
        assert not queue.enable_notifications()
        driver.wants_kick()
        driver.add([b"1"])
        assert driver.wants_kick()
        queue.disable_notifications()
        chain = queue.pop()
        driver.add([b"2"])
        assert not driver.wants_kick()
        assert queue.enable_notifications()  # more came meanwhile
        queue.push(chain, 0)
        queue.push(queue.pop(), 0)
        driver.collect()


@pytest.mark.parametrize("features", FEATURES)
def test_a_queue_that_was_found_empty_asks_for_a_kick(memory, features):
    """Without a word of the device: whoever pops until None must hear of the next request."""
    queue, driver = make(memory, features)
    for number in range(100):
        for _ in range(number % 3 + 1):
            driver.add([b"x"], [1])
        assert driver.wants_kick()
        for chain in queue:
            queue.push(chain, 1)
        driver.collect()


class Spied:
    """A view whose every store is followed by a look at the ring."""

    def __init__(self, view, look):
        self.view, self.look = view, look

    def __getitem__(self, at):
        return self.view[at]

    def __setitem__(self, at, value):
        self.view[at] = value
        self.look()


@pytest.mark.parametrize("features", FEATURES)
def test_a_driver_sees_all_buffers_of_a_packet_used_or_none(memory, features):
    """5.1.6.4.1: a driver that looks at any moment must not find the first buffer of a packet without the others."""
    queue, driver = make(memory, features)
    seen = []
    for name in ("_used", "_used_ring") if isinstance(queue, SplitQueue) else ("_words", "_flags"):
        setattr(queue, name, Spied(getattr(queue, name), lambda: seen.append(driver.collect())))
    for _ in range(10):  # also where the ring wraps
        requests = [driver.add([], [64]) for _ in range(7)]
        chains = queue.pop_many(3) + queue.pop_many(16)
        assert [chain.writable_size for chain in chains] == [64] * 7 and queue.pop_many(1) == []
        seen.clear()
        queue.push_all(chains, list(range(7)))
        found = [done for done in seen if done]
        assert found == [requests]
        assert [request.written for request in requests] == list(range(7))


@pytest.mark.parametrize("features", FEATURES)
def test_state_is_carried_to_another_queue(memory, features):
    queue, driver = make(memory, features)
    for round_ in range(50):
        driver.add([b"%d" % round_], [8])
        if round_ % 3 == 0:
            other = type(queue)(memory, 0, 16)
            other.restore(queue.state(), features)
            assert other.state() == queue.state()
            queue = other
        chain = queue.pop()
        queue.push(chain, chain.write(chain.read_all(8)))
        assert driver.collect()[0].data == b"%d" % round_


@pytest.mark.parametrize("features", FEATURES)
def test_undo_pop_gives_the_same_request_again(memory, features):
    queue, driver = make(memory, features)
    for number in range(40):
        driver.add([b"%d" % number], [4])
        chain = queue.pop()
        queue.undo_pop(chain)
        assert queue.pending()
        again = queue.pop()
        assert again.read_all(9) == b"%d" % number
        queue.push(again, 0)
        assert len(driver.collect()) == 1


@pytest.mark.parametrize("features", [0, RING_PACKED])
def test_the_dirty_log_hears_of_rings_and_buffers(memory, features):
    queue, driver = make(memory, features)
    request = driver.add([], [10, 10])
    log = []
    memory.dirty_log = lambda address, size: log.append((address, size))
    chain = queue.pop()
    queue.push(chain, chain.write(b"x" * 15))
    (first, _), (second, _) = request.writable
    assert (first, 10) in log and (second, 5) in log
    ring = driver.desc if features else driver.used
    assert any(ring <= address < ring + 16 * 16 for address, _ in log)


def test_framing_is_free(memory):
    queue, driver = make(memory)
    driver.add([b"ab", b"c", b"defgh", b"ij"], [3, 4, 1])
    chain = queue.pop()
    assert chain.take_front(2) == b"ab"
    assert chain.take_front(4) == b"cdef"
    assert chain.take_front(0) == b""
    assert chain.readable_size == 4
    assert chain.read_all(4) == b"ghij"
    with pytest.raises(GuestFault):
        chain.read_all(3)
    with pytest.raises(GuestFault):
        chain.take_front(5)
    status = chain.take_tail()
    status[0] = 7
    assert chain.writable_size == 7
    assert chain.write(b"12345678", 2) == 5
    assert chain.take_tail()[0] == ord("5")
    queue.push(chain, 8)
    assert driver.collect()[0].data[2:] == b"12345\x07"


def test_an_indirect_table_may_be_in_any_order_and_end_a_chain_of_direct_ones(memory):
    queue, driver = make(memory)
    queue.start(INDIRECT_DESC)
    memory.write(0x1000, b"abcdef")
    table = [(0x1000, 1, NEXT, 2), (0x2000, 5, WRITE, 9), (0x1001, 2, NEXT, 1), (0, 0, INDIRECT, 0)]
    memory.write(0x3000, b"".join(struct.pack("<QIHH", *entry) for entry in table))
    driver.add_raw([(0x3000, 64, INDIRECT)])
    driver.add_raw([(0x1003, 3, 0), (0x3000, 64, INDIRECT)])
    for expected in (b"abc", b"defabc"):
        chain = queue.pop()
        assert chain.read_all(99) == expected and chain.readable_size == len(expected)
        assert [len(part) for part in chain.writable] == [5] and chain.writable_size == 5
        assert chain.targets == [(0x2000, 5)]


HOSTILE = {
    "no length": [(0x1000, 0, 0)],
    "outside of RAM": [(4 << 20, 16, 0)],
    "across the end of RAM": [((4 << 20) - 8, 16, WRITE)],
    "the highest address": [((1 << 64) - 8, 16, 0)],
    "length 2^32 - 1": [(0x1000, (1 << 32) - 1, WRITE)],
    "readable behind writable": [(0x1000, 16, WRITE), (0x2000, 16, 0)],
    "indirect not negotiated": [(0x1000, 16, INDIRECT)],
}


def primed(memory, features):
    """A queue that has had a request already: it knows where RAM is, and takes its short ways."""
    queue, driver = make(memory, features)
    driver.add([b"x"], [16])
    queue.push(queue.pop(), 0)
    driver.collect()
    return queue, driver


@pytest.mark.parametrize("features", [0, RING_PACKED])
@pytest.mark.parametrize("parts", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_malformed_chain_is_a_fault(memory, features, parts):
    queue, driver = make(memory, features)
    driver.add_raw(parts)
    with pytest.raises(GuestFault):
        queue.pop()
    queue, driver = primed(memory, features)
    good = driver.add([], [64])
    driver.add_raw(parts)
    [chain] = queue.pop_many(1)
    assert chain.head == good.head
    with pytest.raises(GuestFault):
        queue.pop_many(8)


@pytest.mark.parametrize("features", [INDIRECT_DESC, INDIRECT_DESC | RING_PACKED])
@pytest.mark.parametrize("parts", [*HOSTILE.values(), [(0x1000, 1, 0)] * 17], ids=[*HOSTILE.keys(), "longer"])
def test_a_malformed_indirect_table_is_a_fault(memory, features, parts):
    for start in (make, primed):
        queue, driver = start(memory, features)
        driver.add_raw(parts)
        with pytest.raises(GuestFault):
            queue.pop()


@pytest.mark.parametrize("length", [0, 8, 24, 16 * 17, (1 << 32) - 16])
@pytest.mark.parametrize("features", [0, RING_PACKED])
def test_an_indirect_table_of_odd_length_is_a_fault(memory, features, length):
    queue, driver = make(memory, features)
    queue.start(features | INDIRECT_DESC)
    driver.add_raw([(0x1000, length, INDIRECT)])
    with pytest.raises(GuestFault):
        queue.pop()


def test_loops_end(memory):
    queue, driver = make(memory)
    memory.write(driver.desc, struct.pack("<QIHH", 0x1000, 1, NEXT, 1) + struct.pack("<QIHH", 0x1000, 1, NEXT, 0))
    memory.put_u16(driver.avail + 4, 0)
    memory.put_u16(driver.avail + 2, 1)
    with pytest.raises(GuestFault, match="loops"):
        queue.pop()


def test_a_packed_chain_without_end_is_a_fault(memory):
    queue, driver = make(memory, RING_PACKED)
    for slot in range(16):
        memory.write(driver.desc + 16 * slot, struct.pack("<QIHH", 0x1000, 1, 0, NEXT | 1 << 7))
    with pytest.raises(GuestFault, match="longer than the ring"):
        queue.pop()


@pytest.mark.parametrize(("index", "head"), [(17, 0), (1, 16), (0xFFFF, 0), (1, 0xFFFF)])
def test_bad_indices_are_faults(memory, index, head):
    queue, driver = make(memory)
    memory.put_u16(driver.avail + 4, head)
    memory.put_u16(driver.avail + 2, index)
    with pytest.raises(GuestFault):
        queue.pop()


@pytest.mark.parametrize(
    "registers",
    [
        {"size": 0}, {"size": 17}, {"size": 12}, {"size": 32}, {"desc": 0x1008}, {"avail": 0x2001}, {"used": 0x3002},
        {"desc": 4 << 20}, {"used": (4 << 20) - 8}, {"avail": (1 << 64) - 2},
    ],
)  # fmt: skip
def test_bad_registers_are_faults(memory, registers):
    queue = SplitQueue(memory, 0, 16)
    queue.desc, queue.avail, queue.used = 0x1000, 0x2000, 0x3000
    for name, value in registers.items():
        setattr(queue, name, value)
    with pytest.raises(GuestFault):
        queue.start(0)
    assert not queue.ready


@pytest.mark.parametrize("features", FEATURES)
def test_random_rings_never_do_more_than_fault(memory, features):
    """Every byte of the rings at random, again and again: a chain inside RAM and bounds, nothing, or a GuestFault."""
    dice = random.Random(features + 1)
    size = 16
    faults = chains = 0
    for _ in range(300):
        queue, driver = make(memory, features, size)
        memory.write(driver.desc, dice.randbytes(driver.buffers - driver.desc))
        if dice.random() < 0.9:  # mostly believable, else nothing but faults is reached
            for slot in range(size):
                entry = (
                    dice.choice((0x1000, 0x20000, dice.randrange(1 << 23), driver.desc)),
                    dice.choice((16, 32, 1, dice.randrange(1 << 23))),
                    *(dice.randrange(8), dice.randrange(size + 1)),
                )
                if features & RING_PACKED:
                    entry = (*entry[:2], entry[3], entry[2] | dice.choice((1 << 7, 1 << 7, 1 << 15)))
                memory.write(driver.desc + 16 * slot, struct.pack("<QIHH", *entry))
                if not features & RING_PACKED:
                    memory.put_u16(driver.avail + 4 + 2 * slot, dice.randrange(size + 1))
            memory.put_u16(driver.avail + 2, dice.randrange(size + 2))
        many = dice.random() < 0.5
        try:
            for _ in range(size * 2):
                chain = next(iter(queue.pop_many(1)), None) if many else queue.pop()
                if chain is None:
                    break
                chains += 1
                assert len(chain.readable) + len(chain.writable) <= 2 * size
                assert chain.readable_size == sum(map(len, chain.readable))
                assert chain.writable_size == sum(map(len, chain.writable))
                if chain.writable_size < 1 << 20:
                    queue.push(chain, chain.write(b"\xa5" * 64))
                queue.flush()
        except GuestFault:
            faults += 1
    assert faults and chains
