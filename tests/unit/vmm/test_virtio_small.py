"""Random numbers, the balloon, the console and growing memory, each against a hand-made driver."""

from __future__ import annotations

import os
import random
import socket
import struct
from collections.abc import Callable
from typing import Any

import pytest

from kvik.errors import InvalidArgument
from kvik.vmm.backends.char import Chardev
from kvik.vmm.layout import MIB
from kvik.vmm.virtio import balloon as b
from kvik.vmm.virtio import console as c
from kvik.vmm.virtio import mem as m
from kvik.vmm.virtio.balloon import Balloon
from kvik.vmm.virtio.console import Console, Port
from kvik.vmm.virtio.device import VirtioDevice
from kvik.vmm.virtio.mem import Mem
from kvik.vmm.virtio.rng import Rng

from .ring import Driver, FakeMachine

# Random numbers ------------------------------------------------------------------------------------------------------


def test_rng_fills_what_it_says_it_filled() -> None:
    driver = Driver(Rng("rng0"))
    room = driver.space(4096)
    driver.put(0, [(room, 100, True), (room + 1000, 28, True)])
    driver.kick(0)
    assert driver.take(0) == [(0, 128)]
    assert driver.memory.read(room, 100) != bytes(100)
    assert driver.memory.read(room + 100, 900) == bytes(900)
    assert driver.device.stats()["bytes"] == 128
    driver.close()


def test_rng_keeps_its_rate() -> None:
    driver = Driver(Rng("rng0", rate=1000))
    room = driver.space(4096)
    for _ in range(3):
        driver.put(0, [(room, 500, True)])
    driver.kick(0)
    assert len(driver.take(0)) == 2
    for _ in range(100):
        driver.machine.loop.run_once(0.1)
        if driver.take(0):
            break
    else:
        pytest.fail("the third request was never answered")
    assert driver.device.stats()["throttled"] >= 1
    driver.close()


# The balloon ---------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["private", "shared"])
def machine(request: Any) -> FakeMachine:
    from kvik.vmm.memory import HostMemory

    return FakeMachine(32 * MIB, host=HostMemory(shared=request.param == "shared"))


def test_balloon_gives_inflated_pages_back_and_leaves_their_neighbours(machine: FakeMachine) -> None:
    driver = Driver(Balloon("balloon0"), machine=machine)
    base = 16 * MIB
    machine.memory.write(base, b"x" * 8 * 4096)
    frames = [base // 4096 + n for n in (1, 2, 5, 2)]
    driver.put(0, [(driver.space(16, struct.pack("<4I", *frames)), 16, False)])
    driver.kick(0)
    assert driver.take(0) == [(0, 0)]
    left = [machine.memory.read(base + n * 4096, 4096) == b"x" * 4096 for n in range(8)]
    assert left == [True, False, False, True, True, False, True, True]
    assert machine.memory.read(base + 4096, 4096) == bytes(4096)
    assert driver.device.stats()["inflated_bytes"] == 3 * 4096
    driver.close()


def test_balloon_discards_nothing_while_somebody_needs_every_page(machine: FakeMachine) -> None:
    device = Balloon("balloon0")
    driver = Driver(device, machine=machine)
    device.discards = False
    machine.memory.write(16 * MIB, b"x" * 4096)
    driver.put(0, [(driver.space(4, struct.pack("<I", 16 * MIB // 4096)), 4, False)])
    driver.kick(0)
    assert machine.memory.read(16 * MIB, 4096) == b"x" * 4096
    driver.close()


@pytest.mark.parametrize("frame", [32 * MIB // 4096, 0xFFFFFFFF])
def test_balloon_takes_no_page_that_is_no_memory(machine: FakeMachine, frame: int) -> None:
    driver = Driver(Balloon("balloon0"), machine=machine)
    driver.put(0, [(driver.space(4, struct.pack("<I", frame)), 4, False)])
    driver.kick(0)
    assert driver.device.broken
    assert driver.transport.resets == 1
    driver.close()


def test_balloon_takes_free_pages_that_are_reported(machine: FakeMachine) -> None:
    driver = Driver(Balloon("balloon0"), machine=machine)
    machine.memory.write(16 * MIB, b"x" * 4 * 4096)
    # Only whole pages go: the second buffer begins and ends in the middle of one
    driver.put(3, [(16 * MIB, 4096, True), (16 * MIB + 4096 + 100, 2 * 4096, True)])
    driver.kick(3)
    assert driver.take(3) == [(0, 0)]
    content = machine.memory.read(16 * MIB, 4 * 4096)
    assert content[:4096] == bytes(4096)
    assert content[4096:8192] == b"x" * 4096
    assert content[8192:12288] == bytes(4096)
    assert content[12288:] == b"x" * 4096
    assert driver.device.stats()["reported_bytes"] == 2 * 4096
    driver.close()


def test_balloon_without_statistics_has_its_report_queue_earlier(machine: FakeMachine) -> None:
    driver = Driver(Balloon("balloon0"), features=b.PAGE_REPORTING, machine=machine)
    machine.memory.write(16 * MIB, b"x" * 4096)
    driver.put(2, [(16 * MIB, 4096, True)])
    driver.kick(2)
    assert machine.memory.read(16 * MIB, 4096) == bytes(4096)
    driver.close()


def test_balloon_counts_what_the_machine_began_with(machine: FakeMachine) -> None:
    """As QEMU does: what virtio-mem brings comes and goes by its own request."""
    from kvik.vmm.memory import HostMemory

    device = Balloon("balloon0")
    driver = Driver(device, machine=machine)
    machine.memory.add_ram(1 << 32, 64 * MIB, HostMemory())
    assert device.actual == 32 * MIB
    device.set_target(24 * MIB)
    assert device.config["num_pages"] == 8 * MIB // 4096
    driver.close()


def test_balloon_target_actual_and_statistics(machine: FakeMachine) -> None:
    device = Balloon("balloon0")
    driver = Driver(device, machine=machine)
    device.set_target(24 * MIB)
    assert device.config["num_pages"] == 8 * MIB // 4096
    assert driver.transport.config_changes == 1
    device.config.write(4, 4, 1024)
    device.config_written(4, 4)
    assert machine.events == [("BALLOON_CHANGE", {"actual": 28 * MIB})]
    with pytest.raises(InvalidArgument):
        device.set_target(0)
    stats = struct.pack("<HQHQHQ", 4, 123, 5, 456, 999, 7)
    room = driver.space(len(stats), stats)
    driver.put(2, [(room, len(stats), False)])
    driver.kick(2)
    assert device.guest_stats == {"stat-free-memory": 123, "stat-total-memory": 456}
    assert driver.take(2) == []  # held, until somebody asks
    device.pause()
    assert device.state()["queues"][2]["next_avail"] == 0  # nothing is in flight in a state
    device.resume()
    driver.spin()
    device.ask_for_stats()
    assert driver.take(2) == [(0, 0)]
    driver.close()


def test_statistics_that_linux_puts_before_it_is_ready_are_seen(machine: FakeMachine) -> None:
    """Its init_vqs fills and kicks the queue before DRIVER_OK."""
    device = Balloon("balloon0")
    driver = Driver(device, machine=machine)
    device.stop()
    stats = struct.pack("<HQ", 4, 123)
    room = driver.space(len(stats), stats)

    def early() -> None:
        driver.put(2, [(room, len(stats), False)])
        driver.kick(2)
        driver.spin()
        assert device.guest_stats == {}

    driver.start(before=early)
    driver.spin()
    assert device.guest_stats == {"stat-free-memory": 123}
    device.ask_for_stats()
    assert driver.take(2) == [(0, 0)]
    driver.close()


# The console ---------------------------------------------------------------------------------------------------------


class Terminals:
    """A console with one terminal and the guest agent's channel, each over a socket pair."""

    def __init__(self) -> None:
        pairs = [socket.socketpair() for _ in range(2)]
        self.ends = [pair[0] for pair in pairs]
        self.rooms: dict[int, int] = {}
        for end in self.ends:
            end.settimeout(5)
        ports = [
            Port(Chardev(f"fd={pairs[0][1].detach()}", "con"), console=True),
            Port(Chardev(f"fd={pairs[1][1].detach()}", "ga"), name="org.qemu.guest_agent.0", alias="channel0"),
        ]
        self.device = Console("console0", ports)
        self.driver = Driver(self.device)

    def control(self, number: int, event: int, value: int) -> None:
        driver = self.driver
        driver.put(3, [(driver.space(8, struct.pack("<IHH", number, event, value)), 8, False)])
        driver.kick(3)
        driver.take(3)

    def heard(self) -> list[tuple[int, int, int, bytes]]:
        """Control messages for as many buffers as it takes."""
        driver, out = self.driver, []
        while True:
            room = driver.space(64)
            self.rooms[driver.put(2, [(room, 64, True)])] = room  # the last one stays with the device
            driver.kick(2)
            got = driver.take(2)
            if not got:
                return out
            data = driver.memory.read(self.rooms[got[0][0]], got[0][1])
            out.append((*struct.unpack_from("<IHH", data), data[8:]))

    def open(self) -> None:
        self.control(0, c.DEVICE_READY, 1)
        for number in range(2):
            self.control(number, c.PORT_READY, 1)
            self.control(number, c.PORT_OPEN, 1)
        self.heard()

    def send(self, queue: int, data: bytes) -> None:
        self.driver.put(queue, [(self.driver.space(len(data), data), len(data), False)])
        self.driver.kick(queue)

    def close(self) -> None:
        self.driver.close()
        for end in self.ends:
            end.close()


def test_console_tells_its_ports_by_the_protocol() -> None:
    con = Terminals()
    con.control(0, c.DEVICE_READY, 1)
    con.control(0, c.PORT_READY, 1)
    con.control(1, c.PORT_READY, 1)
    assert con.heard() == [
        (0, c.DEVICE_ADD, 1, b""),
        (1, c.DEVICE_ADD, 1, b""),
        (0, c.CONSOLE_PORT, 1, b""),
        (0, c.RESIZE, 0, struct.pack("<HH", 80, 25)),
        (0, c.PORT_OPEN, 1, b""),
        (1, c.PORT_NAME, 1, b"org.qemu.guest_agent.0\0"),
        (1, c.PORT_OPEN, 1, b""),
    ]
    con.control(1, c.PORT_OPEN, 1)
    con.control(1, c.PORT_OPEN, 0)
    events = [data for name, data in con.driver.machine.events if name == "VSERPORT_CHANGE"]
    assert events == [{"id": "channel0", "open": True}, {"id": "channel0", "open": False}]
    con.control(77, c.PORT_OPEN, 1)  # no such port: nothing
    con.close()


def test_console_carries_bytes_both_ways() -> None:
    con = Terminals()
    con.open()
    con.send(1, b"hello")
    con.send(5, b"agent")
    assert con.ends[0].recv(100) == b"hello"
    assert con.ends[1].recv(100) == b"agent"
    room = con.driver.space(100)
    con.driver.put(4, [(room, 100, True)])
    con.ends[1].send(b"ping")
    con.driver.spin()
    assert con.driver.take(4) == [(0, 4)]
    assert con.driver.memory.read(room, 4) == b"ping"
    con.close()


def test_console_input_waits_for_the_guests_buffers_and_is_bounded() -> None:
    con = Terminals()
    con.open()
    con.ends[0].setblocking(False)
    sent = 0
    for _ in range(1000):
        try:
            sent += con.ends[0].send(b"i" * 4096)
        except BlockingIOError:
            break
        con.driver.spin(1)
    assert len(con.device.ports[0].pending) <= 4096
    got = 0
    for _ in range(10000):
        room = con.driver.space(4096)
        con.driver.next_data = room
        con.driver.put(0, [(room, 4096, True)])
        con.driver.kick(0)
        con.driver.spin(2)
        got += sum(written for _, written in con.driver.take(0))
        if got == sent:
            break
    assert got == sent
    con.close()


def test_console_output_waits_for_a_slow_reader_and_loses_nothing() -> None:
    con = Terminals()
    con.open()
    block = os.urandom(32 << 10)
    for _ in range(40):
        con.send(1, block)
    waiting = 40 - len(con.driver.take(1))
    assert waiting > 0  # the rest stays in the ring: the guest waits
    got = b""
    while len(got) < 40 * len(block):
        con.driver.spin(1)
        con.ends[0].setblocking(False)
        try:
            got += con.ends[0].recv(1 << 20)
        except BlockingIOError:
            continue
    assert got == block * 40
    con.close()


def test_console_moves_with_what_it_holds() -> None:
    con = Terminals()
    con.open()
    con.ends[0].send(b"typed before the snapshot")
    con.driver.spin()
    con.device.pause()
    state = con.device.state()
    other = Terminals()
    other.device.restore(state)
    assert other.device.ports[0].pending == b"typed before the snapshot"
    assert [port.guest_open for port in other.device.ports] == [True, True]
    con.close()
    other.close()


def test_console_resize_and_early_bytes() -> None:
    con = Terminals()
    con.open()
    con.device.resize(132, 50)
    con.driver.spin()
    assert con.heard() == [(0, c.RESIZE, 0, struct.pack("<HH", 132, 50))]
    assert con.driver.transport.config_changes == 1
    con.device.config.write(8, 4, ord("!"))
    con.device.config_written(8, 4)
    assert con.ends[0].recv(10) == b"!"
    con.close()


def test_console_control_storm_is_bounded() -> None:
    con = Terminals()
    for _ in range(500):
        con.control(0, c.PORT_READY, 1)
    assert len(con.device._control) <= c.MAX_CONTROL
    con.close()


# Growing memory ------------------------------------------------------------------------------------------------------


class Grown:
    def __init__(self) -> None:
        self.machine = FakeMachine(32 * MIB, hotplug=1 << 30)
        self.device = Mem("mem0", 64 * MIB, requested=8 * MIB)
        self.driver = Driver(self.device, machine=self.machine)
        self.base = self.device.config["addr"]

    def ask(self, kind: int, address: int = 0, blocks: int = 0) -> tuple[int, int]:
        driver = self.driver
        request = driver.space(24, m._REQUEST.pack(kind, address, blocks))
        answer = driver.space(10)
        driver.put(0, [(request, 24, False), (answer, 10, True)])
        driver.kick(0)
        assert [written for _, written in driver.take(0)] == [10]
        kind, state = m._RESPONSE.unpack(driver.memory.read(answer, 10))
        return kind, state


def test_mem_plugs_up_to_what_is_requested_and_no_more() -> None:
    grown = Grown()
    base, step = grown.base, 2 * MIB
    assert grown.machine.regions == [grown.device.region]
    assert grown.ask(m.PLUG, base, 3) == (m.ACK, 0)
    assert grown.ask(m.PLUG, base + 3 * step, 2) == (m.NACK, 0)
    assert grown.ask(m.PLUG, base, 1) == (m.ERROR, 0)  # it is plugged
    assert grown.ask(m.STATE, base, 3) == (m.ACK, m.PLUGGED)
    assert grown.ask(m.STATE, base, 4) == (m.ACK, m.MIXED)
    assert grown.ask(m.STATE, base + 3 * step, 1) == (m.ACK, m.UNPLUGGED)
    for address, blocks in (
        (base - step, 1),
        (base + 1, 1),
        (base, 0),
        (base + 64 * MIB, 1),
        (base, 65535),
        ((1 << 64) - step, 1),
    ):
        assert grown.ask(m.PLUG, address, blocks) == (m.ERROR, 0)
    assert grown.device.config["plugged_size"] == 3 * step
    assert grown.machine.events[-1][1]["size"] == 3 * step
    grown.machine.memory.write(base + step, b"full")
    assert grown.ask(m.UNPLUG, base + step, 1) == (m.ACK, 0)
    assert grown.machine.memory.read(base + step, 4) == bytes(4)
    assert grown.ask(m.UNPLUG, base, 2) == (m.ERROR, 0)
    grown.device.request(2 * MIB)
    assert grown.driver.transport.config_changes == 1
    assert grown.ask(m.UNPLUG_ALL) == (m.ACK, 0)
    assert grown.device.config["plugged_size"] == 0
    grown.driver.close()
    assert grown.machine.regions == []


def test_mem_moves_and_refuses_a_state_that_does_not_fit() -> None:
    grown = Grown()
    grown.ask(m.PLUG, grown.base, 2)
    state = grown.device.state()
    other = Grown()
    other.device.restore(state)
    assert other.device.state()["plugged"] == b"\1\1" + bytes(30)
    assert other.device.config["plugged_size"] == 4 * MIB
    with pytest.raises(ValueError, match="blocks"):
        other.device.restore({**state, "plugged": b"\1"})
    for size, requested in ((MIB, 0), (64 * MIB, MIB), (64 * MIB, 128 * MIB)):
        with pytest.raises(InvalidArgument):
            Mem("m", size, requested=requested)
    with pytest.raises(InvalidArgument, match="room"):
        Driver(Mem("m", 64 * MIB))  # a machine without room for memory that comes later
    grown.driver.close()
    other.driver.close()


# Anything ------------------------------------------------------------------------------------------------------------

MAKERS: list[Callable[[], VirtioDevice]] = [
    lambda: Rng("r"),
    lambda: Balloon("b"),
    lambda: Console("c", [Port(Chardev("null"), console=True), Port(Chardev("null"), name="x")]),
    lambda: Mem("m", 64 * MIB, requested=8 * MIB),
]


@pytest.mark.parametrize("make", MAKERS, ids=["rng", "balloon", "console", "mem"])
def test_random_chains_are_answered_or_put_the_device_to_needs_reset(make: Callable[[], VirtioDevice]) -> None:
    dice = random.Random(3)
    machine = FakeMachine(32 * MIB, hotplug=1 << 30)
    driver = Driver(make(), machine=machine)
    for _ in range(800):
        index = dice.randrange(len(driver.device.queues))
        content = driver.space(64, dice.choice([bytes(64), dice.randbytes(64)]))
        parts = []
        for writable in sorted(dice.random() < 0.5 for _ in range(dice.randrange(1, 5))):
            address = dice.choice([content, content, content + 3, 31 * MIB, 32 * MIB - 8, dice.getrandbits(64)])
            parts.append((address, dice.choice([1, 8, 10, 24, 64, 0, 4096, 1 << 20, (1 << 32) - 1]), writable))
        driver.put(index, parts)
        driver.kick(index)
        driver.next_data = content
        if driver.device.broken:
            driver.device.stop()
            driver.start()
    driver.spin(1)
    assert machine.memory.size >= 32 * MIB
    driver.close()
