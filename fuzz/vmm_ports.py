"""A hostile guest at the platform's ports: clock, serial lines, ACPI and hot-plug registers, PCI ports, panic port.

    fuzz/run ports --operations 1000000 --seed 5

Accesses of any width at any offset, mostly where somebody answers; the host's side (input, hot-plug, pauses, timers
that are due) in between. Nothing may raise, nothing may grow, and the loop must find rest.
"""

from __future__ import annotations

import heapq
import random
import signal
import socket
from collections.abc import Callable
from typing import Any

from vmm_devices import GROWTH, REST, ROUND, STUCK, _stuck, resident

from kvik.vmm import layout
from kvik.vmm.backends.char import Chardev
from kvik.vmm.devices.acpi_events import AcpiEvents, CpuHotplug
from kvik.vmm.devices.debugcon import Debugcon
from kvik.vmm.devices.pvpanic import Pvpanic
from kvik.vmm.devices.rtc import Rtc
from kvik.vmm.devices.serial import Serial
from kvik.vmm.virtio.mock_machine import MockMachine
from kvik.vmm.virtio.rng import Rng

TARGETS = ("ports", "rtc", "serial")
TIMERS = 200  # that may be in the loop's list at once


class _Config:
    on_panic = "none"


class Ports:
    """The machine, and its guest."""

    def __init__(self, name: str, seed: int) -> None:
        self.dice = random.Random(seed)
        self.machine = machine = MockMachine()
        self.error: BaseException | None = None
        machine.loop.on_error = self._failed
        for word in ("hold_caller", "request_shutdown", "request_reset", "request_stop"):
            setattr(machine, word, lambda *_, **__: None)
        machine.config = _Config()  # type: ignore[attr-defined]  # the fuzzer's own, beside what it is of
        self.events = AcpiEvents()
        self.cpus = CpuHotplug(self.events, 2, 8)
        ours, self.peer = socket.socketpair()
        self.peer.setblocking(False)
        devices: list[Any] = [Rtc(), Serial("serial0", Chardev(f"fd={ours.detach()}"), 0)]
        if name == "rtc":
            devices = devices[:1]
        elif name == "serial":
            devices = devices[1:]
        else:
            devices += [self.events, self.cpus, Pvpanic(), Serial("serial1", Chardev("null"), 1)]
            devices += [Debugcon("debug0", Chardev("null"))]
            machine.add_virtio(Rng("rng0"))
        for device in devices:
            machine.add(device)
        self.devices = devices

    def _failed(self, error: BaseException) -> None:
        self.error = error

    def access(self) -> None:
        dice = self.dice
        if dice.random() < 0.98:
            start, size, _ = dice.choice(self.machine.ports.ranges())
            port = start + dice.randrange(size)
        else:
            port = dice.randrange(0x10000)
        width = dice.choice((1, 1, 1, 2, 4))
        value = dice.choice((0, 1, 0x20, 0x80, 0xFF, dice.getrandbits(8), dice.getrandbits(32))) & (1 << 8 * width) - 1
        if dice.random() < 0.6:
            self.machine.ports.write(port, width, value)
        else:
            assert 0 <= self.machine.ports.read(port, width) < 1 << 8 * width

    def clock(self) -> None:
        """Index and data of the clock, in pairs."""
        register = self.dice.choice((*range(14), 0x32, 0x7F))
        self.machine.ports.write(layout.RTC_PORT, 1, register)
        if self.dice.random() < 0.7:
            self.machine.ports.write(layout.RTC_PORT + 1, 1, self.dice.getrandbits(8))
        else:
            self.machine.ports.read(layout.RTC_PORT + 1, 1)

    def host(self) -> None:
        dice = self.dice
        device = dice.choice(self.devices)
        action = dice.randrange(6)
        if action == 0:
            device.pause()
            device.restore(device.state())
            device.resume()
        elif action == 1:
            device.reset()
        elif action == 2:
            self.events.raise_event(dice.getrandbits(4))
        elif action == 3:
            for call in (self.cpus.plug, self.cpus.request_unplug):
                try:
                    call(dice.randrange(8))
                except Exception as error:  # already there, or not
                    assert "processor" in str(error)
        elif action == 4:
            try:
                self.peer.send(dice.randbytes(dice.randrange(1, 300)))
            except OSError:
                pass
        else:
            try:
                self.peer.recv(1 << 16)
            except OSError:
                pass

    def timers(self) -> None:
        """Time goes by: what waits is due."""
        loop = self.machine.loop
        for timer in loop._timers:
            timer.due = min(timer.due, 0.0) if self.dice.random() < 0.5 else timer.due
        heapq.heapify(loop._timers)

    def rest(self) -> None:
        loop = self.machine.loop
        for _ in range(REST):
            if not loop._soon and not loop._epoll.poll(0):
                return
            loop.run_once(0)
        raise AssertionError(f"no rest after {REST} rounds of the loop")


def fuzz(name: str, operations: int, seed: int) -> int:
    """0. Raises what a device should have dealt with."""
    before = signal.signal(signal.SIGALRM, _stuck)
    ports = Ports(name, seed)
    dice, start = ports.dice, 0
    actions: list[Callable[[], None]] = [ports.access] * 8 + [ports.clock] * (0 if name == "serial" else 3)
    try:
        for number in range(operations):
            if number % ROUND == 0:
                signal.alarm(STUCK)
                if number == 20 * ROUND:
                    start = resident()
                elif start and resident() - start > GROWTH:
                    raise MemoryError(f"{(resident() - start) >> 20} MiB more after {number} operations")
                ports.rest()
                ports.machine.events.clear()
            chance = dice.random()
            if chance < 0.03:
                ports.host()
            elif chance < 0.05:
                ports.machine.turn(1)
                assert len(ports.machine.loop._timers) < TIMERS, "cancelled timers pile up"
            elif chance < 0.052:
                ports.timers()
            else:
                dice.choice(actions)()
            if ports.error is not None:
                raise ports.error
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        ports.machine.close()
        ports.peer.close()
    return 0


__all__ = ["TARGETS", "fuzz"]
