"""A hostile guest for each virtio and PCI device: registers, configuration space, BARs and rings at random.

    fuzz/run blk                                        # 20,000 operations
    fuzz/run blk --operations 1000000 --seed 5

A device may break (needs reset), nothing else: an exception that reaches the machine ends the run, with the seed that
brings it back; so does a callback that never returns, a loop that finds no rest while the guest does nothing, and
memory that grows. Once it broke, and after every thousand operations, the machine is reset, and the device must start
again and take a kick.

A new device is a line in TARGETS: a name and a function that makes it (it may keep files in `directory`). What the
host's side does meanwhile (packets that arrive, clients that leave) is a function in HOST.
"""

from __future__ import annotations

import random
import signal
import socket
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvik.vmm import layout
from kvik.vmm.pci.device import Bar, PciDevice
from kvik.vmm.virtio import transport as t
from kvik.vmm.virtio.device import VirtioDevice
from kvik.vmm.virtio.mock_machine import MockMachine, VirtioDriver
from kvik.vmm.virtio.queue import (
    DESC_INDIRECT,
    DESC_NEXT,
    DESC_WRITE,
    EVENT_IDX,
    IN_ORDER,
    INDIRECT_DESC,
    RING_PACKED,
    RING_RESET,
    VERSION_1,
)

MEMORY = 16 << 20
RINGS = 0x10000
AREA = 1 << 18
ROUND = 1000  # operations between two resets
REGISTERS = (*range(0, 40, 4), 16, 20, 20, 20, 22, 22, 24, 26, 28, 28, 32, 36, 40, 48, 58)
STUCK = 60  # seconds after which an operation is taken to hang
REST = 5000  # rounds of the loop after which a device that nobody disturbs must be at rest
GROWTH = 96 << 20  # bytes that the process may grow by after its first rounds; guest memory is 16 MiB of it


class Plain(PciDevice):
    """A PCI device with every kind of BAR."""

    kind, device_id = "plain", 0x0001
    bars = (Bar(0, 4096), Bar(1, 64, "io"), Bar(2, 1 << 16, "mem64"))
    msix_vectors, intx, express = 4, True, True

    def write_bar(self, bar: int, offset: int, size: int, value: int) -> None:
        self.msix.signal(value & 7)


def rng(directory: Path) -> VirtioDevice:
    from kvik.vmm.virtio.rng import Rng

    return Rng("fuzzed")


def blk(directory: Path, **options: Any) -> VirtioDevice:
    from kvik.vmm.backends.block import BlockImage
    from kvik.vmm.virtio.blk import Blk

    disk = directory / "disk.raw"
    disk.write_bytes(bytes(1 << 20))
    return Blk("fuzzed", BlockImage(str(disk), locking=False, **options), queues=2)


def blk_threads(directory: Path) -> VirtioDevice:
    return blk(directory, aio="threads", cache="none")


def balloon(directory: Path) -> VirtioDevice:
    from kvik.vmm.virtio.balloon import Balloon

    return Balloon("fuzzed")


def net(directory: Path) -> VirtioDevice:
    from kvik.vmm.backends.netsocket import StreamBackend
    from kvik.vmm.virtio.net import NetDevice

    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    device = NetDevice("fuzzed", StreamBackend(ours.detach()), "52:54:00:12:34:56", mtu=1500)
    device.peer = theirs  # type: ignore[attr-defined]  # the fuzzer's own, beside what it is of
    return device


def net_dgram(directory: Path) -> VirtioDevice:
    from kvik.vmm.backends.netsocket import DatagramBackend
    from kvik.vmm.virtio.net import NetDevice

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.setblocking(False)
    device = NetDevice("fuzzed", DatagramBackend(ours.detach()), "52:54:00:12:34:56")
    device.peer = theirs  # type: ignore[attr-defined]  # the fuzzer's own, beside what it is of
    return device


def net_multiqueue(directory: Path) -> VirtioDevice:
    from kvik.vmm.backends.net import NoBackend
    from kvik.vmm.virtio.net import NetDevice

    return NetDevice("fuzzed", NoBackend(4), "52:54:00:12:34:56")


def console(directory: Path) -> VirtioDevice:
    from kvik.vmm.backends.char import Chardev
    from kvik.vmm.virtio.console import Console, Port

    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    path = directory / "channel"
    device = Console(
        "fuzzed",
        [
            Port(Chardev(f"fd={ours.detach()}", "console0"), console=True),
            Port(Chardev(f"unix:{path}", "channel0"), name="org.example.0"),
            Port(Chardev("null", "channel1"), name="org.example.1"),
        ],
    )
    device.peer, device.path, device.client = theirs, path, None  # type: ignore[attr-defined]  # the fuzzer's own, beside what it is of
    return device


def mem(directory: Path) -> VirtioDevice:
    from kvik.vmm.virtio.mem import Mem

    return Mem("fuzzed", 64 << 20, requested=16 << 20)


def plain(directory: Path) -> PciDevice:
    return Plain("fuzzed")


def vsock(directory: Path) -> VirtioDevice:
    from kvik.vmm.virtio.vsock import VsockDevice

    device = VsockDevice("fuzzed", 3, str(directory / "vsock"), max_streams=16)
    device.clients = []  # type: ignore[attr-defined]  # the fuzzer's own, beside what it is of
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(directory / "vsock_80"))
    listener.listen(8)
    listener.setblocking(False)
    device.server = listener  # type: ignore[attr-defined]  # the fuzzer's own, beside what it is of
    return device


def watchdog(directory: Path) -> PciDevice:
    from kvik.vmm.devices.watchdog import Watchdog

    return Watchdog("fuzzed", "none")


TARGETS: dict[str, Callable[[Path], VirtioDevice | PciDevice]] = {
    "rng": rng,
    "blk": blk,
    "blk-threads": blk_threads,
    "balloon": balloon,
    "net": net,
    "net-dgram": net_dgram,
    "net-multiqueue": net_multiqueue,
    "console": console,
    "mem": mem,
    "vsock": vsock,
    "pci": plain,
    "watchdog": watchdog,
}
NO_RINGS = ("pci", "watchdog")


# What the host's side does meanwhile ---------------------------------------------------------------------------------


def _drain(peer: socket.socket) -> None:
    try:
        peer.recv(1 << 18)
    except OSError:
        pass


def _packets(device: Any, dice: random.Random) -> None:
    frame = dice.randbytes(dice.choice((1, 14, 60, 1500, 9000, 65535)))
    try:
        if device.peer.type == socket.SOCK_STREAM:
            device.peer.send(len(frame).to_bytes(4, "big") + frame)
        else:
            device.peer.send(frame)
    except OSError:
        pass
    if dice.random() < 0.3:
        _drain(device.peer)


def _link(device: Any, dice: random.Random) -> None:
    device.set_link(dice.random() < 0.7)
    device.announce()


def _input(device: Any, dice: random.Random) -> None:
    try:
        device.peer.send(dice.randbytes(dice.randrange(1, 3000)))
    except OSError:
        pass
    if dice.random() < 0.3:
        _drain(device.peer)


def _channel(device: Any, dice: random.Random) -> None:
    if device.client is not None:
        try:
            device.client.send(dice.randbytes(100))
            device.client.recv(4096)
        except OSError:
            pass
        if dice.random() < 0.3:
            device.client.close()
            device.client = None
        return
    device.client = socket.socket(socket.AF_UNIX)
    device.client.setblocking(False)
    try:
        device.client.connect(str(device.path))
    except OSError:
        device.client.close()
        device.client = None


def _columns(device: Any, dice: random.Random) -> None:
    device.resize(dice.randrange(1, 300), dice.randrange(1, 300))


def _target(device: Any, dice: random.Random) -> None:
    device.set_target(dice.randrange(1, MEMORY))
    device.ask_for_stats()


def _requested(device: Any, dice: random.Random) -> None:
    device.request(dice.randrange(device.size // device.block + 1) * device.block)


def _client(device: Any, dice: random.Random) -> None:
    """Programs on the host that connect to the guest, and those that the guest connects to."""
    if len(device.clients) < 8 and dice.random() < 0.5:
        client = socket.socket(socket.AF_UNIX)
        client.setblocking(False)
        try:
            client.connect(device.path)
            client.send(dice.choice((b"CONNECT 80\n", b"CONNECT 4294967296\n", b"CONNECT x\n", b"\n", b"C" * 100)))
            device.clients.append(client)
        except OSError:
            client.close()
    try:
        device.clients.append(device.server.accept()[0])
        device.clients[-1].setblocking(False)
    except OSError:
        pass
    for client in list(device.clients):
        try:
            client.send(dice.randbytes(dice.randrange(1, 3000)))
            client.recv(1 << 16)
        except OSError:
            pass
        if dice.random() < 0.1:
            client.close()
            device.clients.remove(client)


def _disk_size(device: Any, dice: random.Random) -> None:
    device.resize(dice.choice((1 << 20, 1 << 19, 512)))


def _limits(device: Any, dice: random.Random) -> None:
    rate = dice.choice((0, 0, 1 << 30))
    device.set_limits(total=(rate, 0, rate, 0))


HOST: dict[str, tuple[Callable[[Any, random.Random], None], ...]] = {
    "blk": (_disk_size, _limits),
    "blk-threads": (_disk_size,),
    "balloon": (_target,),
    "net": (_packets, _packets, _link),
    "net-dgram": (_packets, _packets, _link),
    "net-multiqueue": (_link,),
    "console": (_input, _channel, _channel, _columns),
    "mem": (_requested,),
    "vsock": (_client,),
}


def _headers(name: str, dice: random.Random) -> bytes:
    """The first bytes of a request that the device understands, mostly."""
    if name == "mem":
        address = layout.RAM_HIGH + dice.randrange(64) * (2 << 20)
        return struct.pack("<HxxxxxxQHxxxxxx", dice.randrange(5), address, dice.choice((0, 1, 8, 0xFFFF)))
    if name == "vsock":  # src_cid, dst_cid, src_port, dst_port, len, type, op, flags, buf_alloc, fwd_cnt
        return struct.pack(
            *(
                "<QQIIIHHIII",
                dice.choice((3, 3, 3, 2, 1 << 63)),
                dice.choice((2, 2, 2, 3)),
                dice.choice((80, 1025, 1026)),
            ),
            *(
                dice.choice((80, 80, 1024, 0x40000000)),
                dice.choice((0, 4, 4000, 0xFFFFFFFF)),
                dice.choice((1, 1, 1, 2)),
            ),
            *(dice.randrange(9), dice.randrange(4), dice.choice((0, 1, 65536, 0xFFFFFFFF)), dice.getrandbits(32)),
        )
    if name == "console":
        return struct.pack("<IHH", dice.choice((0, 1, 2, 3, 0xFFFFFFFF)), dice.randrange(10), dice.randrange(3))
    if name.startswith("net"):
        return bytes((dice.randrange(7), dice.randrange(3))) + dice.randbytes(30)
    if name == "balloon":
        return struct.pack("<4I", *(dice.choice((0, 1, 0x80, 0xFFF, 0xFFFFFFFF)) for _ in range(4)))
    return struct.pack("<IIQ", dice.choice((0, 1, 4, 8, 11, 13, dice.getrandbits(32))), 0, dice.randrange(4096))


class HostileGuest:
    """One device in one machine, and a guest that does to it what comes to its mind."""

    def __init__(self, name: str, directory: Path, seed: int) -> None:
        self.name = name
        self.dice = random.Random(seed)
        self.machine = MockMachine(MEMORY, hotplug=1 << 30)
        self.machine.loop.on_error = self._failed
        device = TARGETS[name](directory)
        self.driver: VirtioDriver | None = None
        if isinstance(device, VirtioDevice):
            self.driver = self.machine.add_virtio(device)
            self.pci = self.driver.pci
        else:
            self.machine.add(device)
            self.pci = device
        self.place = layout.ECAM + (self.pci.slot << 15)
        self.error: BaseException | None = None
        self.faults = 0

    def _failed(self, error: BaseException) -> None:
        self.error = error

    def run(self, operations: int) -> None:
        """Raises what the device raised."""
        actions: list[Callable[[], None]] = [self.registers, self.configuration, self.bar, self.moves]
        if self.driver is not None:
            actions += [
                *(self.rings, self.rings, self.chain, self.chain, self.chain, self.craft, self.craft),
                *(self.usual, self.usual, self.usual, self.usual),
                *(self.kick, self.kick, self.kick, self.registers, self.one_queue, self.holds),
            ]
        if self.name in HOST:
            actions += [self.host, self.host]
        start = 0
        for number in range(operations):
            if number % ROUND == 0:
                signal.alarm(STUCK)
                self.again()
                if number == 20 * ROUND:
                    start = resident()
                elif start and resident() - start > GROWTH:
                    raise MemoryError(f"{(resident() - start) >> 20} MiB more after {number} operations")
            self.dice.choice(actions)()
            if self.error is not None:
                raise self.error
            if self.driver is not None and not self.pci.device.active and self.dice.random() < 0.1:  # type: ignore[attr-defined]  # the fuzzer's own, beside what it is of
                self.again()
        self.again()

    def rest(self) -> None:
        """The guest does nothing any more: so must the device, soon."""
        loop = self.machine.loop
        for _ in range(REST):
            if not loop._soon and not loop._epoll.poll(0):
                return
            loop.run_once(0)
            self.check()
        raise AssertionError(f"no rest after {REST} rounds of the loop")

    def check(self) -> None:
        if self.error is not None:
            raise self.error

    def again(self) -> None:
        """Power-on; what broke before must work now."""
        self.rest()
        self.machine.pci.reset()
        self.machine.mmio.write(self.place + 4, 2, 0x406)
        if self.driver is None:
            return
        device = self.pci.device  # type: ignore[attr-defined]  # the fuzzer's own, beside what it is of
        device.resume()
        self.faults = device.faults
        chosen = self.driver.offered() & ~(RING_PACKED | IN_ORDER | EVENT_IDX | INDIRECT_DESC | RING_RESET)
        for feature in (RING_PACKED, IN_ORDER, EVENT_IDX, INDIRECT_DESC, RING_RESET):
            if self.dice.random() < 0.5:
                chosen |= self.driver.offered() & feature
        size = min(self.dice.choice((4, 16, 64)), *device.queue_sizes)
        self.driver.start(chosen | VERSION_1, size=size, base=RINGS, area=AREA)
        assert device.active, f"it does not come back after a reset: {device.broken}"
        self.driver.kick(0)

    # --- what it does

    def _value(self, size: int) -> int:
        dice = self.dice
        value = dice.choice(
            (0, 1, 2, 3, 4, 8, 15, 0xFF, 0xFFFF, 0xFFFFFFFF, dice.getrandbits(16), dice.getrandbits(64))
        )
        return value & (1 << 8 * size) - 1

    def registers(self) -> None:
        bar = self.pci.bar_address(0)
        size = self.dice.choice((1, 2, 4, 4, 8))
        offset = self.dice.choice((*REGISTERS, self.dice.randrange(0x8000)))
        if self.dice.random() < 0.9:
            self.machine.mmio.write(bar + offset, size, self._value(size))
        else:
            self.machine.mmio.read(bar + offset, size)

    def configuration(self) -> None:
        size = self.dice.choice((1, 2, 4))
        offset = self.dice.choice((0x04, 0x10, 0x3C, self.dice.randrange(0x100), self.dice.randrange(4096)))
        self.machine.mmio.write(self.place + offset, size, self._value(size))
        self.machine.mmio.read(self.place + offset, size)

    def bar(self) -> None:
        start, size, _ = self.dice.choice(self.machine.mmio.ranges())
        width = self.dice.choice((1, 2, 4, 8))
        self.machine.mmio.write(start + self.dice.randrange(size), width, self._value(width))

    def moves(self) -> None:
        """The BAR elsewhere, and mostly back where it is found."""
        place = self.dice.choice((layout.PCI32, layout.PCI32 + 0x100000, 0xD0000000, 0, layout.ECAM))
        self.machine.mmio.write(self.place + 0x10, 4, place)
        self.machine.mmio.write(self.place + 4, 2, self.dice.choice((0x406, 0x6, 0x2, 0x407)))

    def rings(self) -> None:
        """Anything anywhere in the first queue's rings."""
        assert self.driver is not None
        queue = self.dice.choice(self.driver.queues)
        place = self.dice.randrange(queue.desc, queue.buffers - 8)
        self.machine.memory.write(place, struct.pack("<Q", self._value(8)))

    def chain(self) -> None:
        """A request that is nearly right."""
        assert self.driver is not None
        dice, queue = self.dice, self.dice.choice(self.driver.queues)
        parts = []
        for _ in range(dice.randrange(1, 6)):
            address = dice.choice((queue.buffers, queue.buffers + dice.randrange(4096), dice.randrange(MEMORY + 4096)))
            length = dice.choice(
                (1, 8, 16, 512, 4096, dice.randrange(1, 1 << 16), 0xFFFFFFFF if dice.random() < 0.1 else 4)
            )
            parts.append((address, length, dice.choice((0, 2, 2))))
        if dice.random() < 0.9:
            parts.sort(key=lambda part: part[2])
        self.machine.memory.write(queue.buffers, _headers(self.name, dice))
        try:
            queue.add_raw(parts)
        except (ValueError, IndexError):
            queue.rewind()  # the driver's own view of its ring is worn out

    def usual(self) -> None:
        """What an honest driver writes, nearly always: the ways that were made short for it are to be attacked too."""
        assert self.driver is not None
        dice, queue, memory = self.dice, self.driver.queues[0], self.machine.memory
        place, sizes = queue.buffers + 4096 * dice.randrange(1, 8), (512, 1024, 4096)
        parts = [(place + 4096 * number, dice.choice(sizes), DESC_WRITE) for number in range(dice.choice((1, 1, 3)))]
        if self.name.startswith("blk"):
            kind = dice.choice((0, 1))
            memory.write(queue.buffers, struct.pack("<IIQ", kind, 0, dice.randrange(64)))
            parts = [(address, size, 0 if kind else DESC_WRITE) for address, size, _ in parts]
            parts = [(queue.buffers, 16, 0), *parts, (queue.buffers + 64, 1, DESC_WRITE)]
        elif not self.name.startswith("net"):
            self.chain()
            return
        if dice.random() < 0.05:
            number = dice.randrange(len(parts))
            parts[number] = dice.choice(((MEMORY - 1, *parts[number][1:]), (parts[number][0], self._value(4), 2)))
        try:
            queue.add_raw(parts)
        except (ValueError, IndexError):
            queue.rewind()
        self.driver.kick(0)
        self.check()

    def craft(self) -> None:
        """Descriptors as no driver writes them: loops, indirect tables in indirect tables, lengths of 4 GiB."""
        assert self.driver is not None
        dice, queue, memory = self.dice, self.dice.choice(self.driver.queues), self.machine.memory
        table = queue.buffers + 0x1000
        for slot in range(dice.randrange(1, 9)):
            flags = dice.choice((0, DESC_NEXT, DESC_NEXT, DESC_WRITE, DESC_WRITE | DESC_NEXT, DESC_INDIRECT, 7, 0xFFFF))
            where = dice.choice((queue.buffers, table, queue.desc, queue.used, MEMORY - 4, 1 << 63, (1 << 64) - 1))
            length = dice.choice((0, 1, 16, 32, 16 * queue.size, 16 * queue.size + 16, 0xFFFFFFFF))
            inner = struct.pack("<QIHH", where, length, flags, dice.randrange(queue.size + 2))
            memory.write(table + 16 * slot, inner)
            at = (queue._at + slot) % queue.size if queue.packed else dice.randrange(queue.size)
            if queue.packed:  # address, length, id, flags: available
                flags |= 1 << 7 if queue._wrap else 1 << 15
                memory.write(queue.desc + 16 * at, struct.pack("<QIHH", where, length, dice.randrange(99), flags))
            else:
                memory.write(queue.desc + 16 * at, inner)
        if not queue.packed:
            index = memory.u16(queue.avail + 2)
            memory.put_u16(queue.avail + 4 + 2 * (index % queue.size), dice.randrange(queue.size + 1))
            memory.put_u16(queue.avail + 2, index + dice.choice((1, 1, 1, queue.size, queue.size + 1, 0x8000)) & 0xFFFF)

    def kick(self) -> None:
        assert self.driver is not None
        index = self.dice.randrange(len(self.driver.queues))
        self.machine.mmio.write(self.pci.bar_address(0) + t.NOTIFY + 4 * index, self.dice.choice((2, 2, 4)), index)
        self.machine.turn(1)

    def one_queue(self) -> None:
        """Reset one queue while the device runs, and enable it again, perhaps of another size or elsewhere."""
        assert self.driver is not None
        driver, dice = self.driver, self.dice
        index = dice.randrange(len(driver.queues))
        queue = driver.queues[index]
        bar = self.pci.bar_address(0)
        write = self.machine.mmio.write
        write(bar + t.QUEUE_SELECT, 2, index)
        write(bar + t.QUEUE_RESET, 2, 1)
        if dice.random() < 0.3:
            self.machine.turn(1)
        write(bar + t.QUEUE_SIZE, 2, dice.choice((queue.size, 4, 0, 3, 0xFFFF)) if dice.random() < 0.3 else queue.size)
        if dice.random() < 0.8:
            queue.rewind()
            for offset, address in (
                (t.QUEUE_DESC, queue.desc),
                (t.QUEUE_DRIVER, queue.avail),
                (t.QUEUE_DEVICE, queue.used),
            ):
                write(bar + offset, 4, address & 0xFFFFFFFF if dice.random() < 0.97 else self._value(4))
                write(bar + offset + 4, 4, address >> 32)
        write(bar + t.QUEUE_ENABLE, 2, 1)

    def holds(self) -> None:
        """The machine stands still for a moment, as for a snapshot."""
        device = self.pci.device  # type: ignore[attr-defined]  # the fuzzer's own, beside what it is of
        device.pause()
        if self.dice.random() < 0.5:
            device.state()
        device.resume()

    def host(self) -> None:
        """Something happens on the host's side."""
        device = self.pci.device  # type: ignore[attr-defined]  # the fuzzer's own, beside what it is of
        self.dice.choice(HOST[self.name])(device, self.dice)
        self.machine.turn(1)


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def _stuck(number: int, frame: object) -> None:
    raise TimeoutError(f"an operation hangs: nothing came of it for {STUCK} seconds")


def fuzz(name: str, operations: int, seed: int) -> int:
    """Faults that the device reported. Raises what it should have caught."""
    before = signal.signal(signal.SIGALRM, _stuck)
    with tempfile.TemporaryDirectory() as directory:
        guest = HostileGuest(name, Path(directory), seed)
        try:
            guest.run(operations)
            return guest.faults
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)
            guest.machine.close()
