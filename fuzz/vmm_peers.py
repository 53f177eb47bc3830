"""Hostile speakers on the host's side: QMP clients, debuggers, network peers, vhost-user back ends.

    fuzz/run qmp --operations 1000000 --seed 5

A QMP client gets an answer to each command, never "internal error"; a peer that lies costs its own connection.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import struct
import tempfile
from pathlib import Path
from typing import Any

from vmm_devices import GROWTH, ROUND, STUCK, _stuck, resident

from kvik.errors import KvikError
from kvik.vmm.backends.net import MAX_PACKET, BackendGone
from kvik.vmm.backends.netsocket import StreamBackend
from kvik.vmm.config import MachineConfig
from kvik.vmm.monitor import schema
from kvik.vmm.monitor.commands import COMMANDS
from kvik.vmm.monitor.mock import MonitoredMock
from kvik.vmm.monitor.server import MonitorServer
from kvik.vmm.vhost_user import VhostUser
from kvik.vmm.virtio.mock_machine import MockMachine

# All but those that need a machine with KVM below; these have their own tests.
WITH_KVM = ("migrate", "migrate-incoming", "x-kvik-snapshot-save", "x-kvik-save-stream")
COMMAND_NAMES = [name for name in COMMANDS if name not in WITH_KVM]
TARGETS = ("qmp", "qmp-bytes", "gdb", "stream-peer", "vhost-user")


class PeerMachine(MonitoredMock, MockMachine):
    """With a device of each kind that a monitor changes."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        from kvik.vmm.backends.block import BlockImage
        from kvik.vmm.backends.net import NoBackend
        from kvik.vmm.virtio.balloon import Balloon
        from kvik.vmm.virtio.blk import Blk
        from kvik.vmm.virtio.net import NetDevice
        from kvik.vmm.virtio.rng import Rng

        self.prepare("fuzzed")
        self.error: BaseException | None = None
        self.loop.on_error = self._failed
        disk = directory / "disk"
        disk.write_bytes(bytes(1 << 16))
        for device in (
            Blk("disk0", BlockImage(str(disk), locking=False)),
            NetDevice("net0", NoBackend(), "52:54:00:12:34:56"),
            Rng("rng0"),
            Balloon("balloon0"),
        ):
            self.add_virtio(device)

    def _failed(self, error: BaseException) -> None:
        self.error = error


WORDS = ("", "x", "disk0", "net0", "rng0", "balloon0", "fd:", "a", "/dev/fdset/0", "/machine/net0", "\ud800", "ä" * 300,
         "virtio-blk-pci", "virtio-net-pci", "memory-backend-ram", "tap", "raw", "file", "info registers", "x/9999xg 0",
         "xp /3i 0x10", "info mtree", "9" * 400, "\n", "id=x,file=y", "guest-stats", "type")  # fmt: skip
NUMBERS = (0, 1, -1, 2, 512, 4096, 2**31, 2**32, 2**53, 2**63 - 1, -(2**63), 2**64, 10**300)


def anything(dice: random.Random, depth: int = 0) -> Any:
    kind = dice.randrange(8 if depth < 3 else 5)
    if kind == 0:
        return dice.choice(NUMBERS)
    if kind == 1:
        return dice.choice((True, False, None, 1.5))
    if kind in (2, 3, 4):
        return dice.choice(WORDS)
    if kind in (5, 6):
        return {dice.choice(WORDS) or "k": anything(dice, depth + 1) for _ in range(dice.randrange(4))}
    return [anything(dice, depth + 1) for _ in range(dice.randrange(4))]


def shaped(kind: schema.Type, dice: random.Random, depth: int = 0) -> Any:
    """A value of that type, mostly."""
    if dice.random() < 0.05:
        return anything(dice)
    if isinstance(kind, schema.Struct):
        names = ("id", "driver", "node-name", "file", "filename", "fd", "drive", "netdev", "size", "type", "addr")
        value = {
            name: shaped(member, dice, depth + 1)
            for name, member in kind.members.items()
            if name not in kind.optional or dice.random() < 0.5
        }
        for _ in range(dice.randrange(4) if kind.others else 0):
            value[dice.choice(names)] = anything(dice, 2)
        return value
    if isinstance(kind, schema.List):
        return [shaped(kind.item, dice, depth + 1) for _ in range(dice.randrange(3))]
    if isinstance(kind, schema.Enum):
        return dice.choice(kind.values)
    if isinstance(kind, schema.Bool):
        return dice.random() < 0.5
    if isinstance(kind, schema.Int):
        return dice.choice((kind.low, kind.high, *NUMBERS[:8], dice.randrange(0, 10000)))
    if isinstance(kind, schema.Str):
        return dice.choice(WORDS)
    return anything(dice, depth)


class Qmp:
    """One server; clients that come and go."""

    def __init__(self, directory: Path, seed: int) -> None:
        self.dice = random.Random(seed)
        self.machine = PeerMachine(directory)
        self.server = MonitorServer(self.machine)  # type: ignore[arg-type]  # the fuzzer's own, beside what it is of
        self.path = str(directory / "qmp")
        self.server.listen(self.path)
        self.client: socket.socket | None = None
        self.refused = 0

    def turn(self, rounds: int = 2) -> None:
        self.machine.turn(rounds)
        if self.machine.error is not None:
            raise self.machine.error

    def connect(self, negotiate: bool = True) -> socket.socket:
        if self.client is None:
            self.client = socket.socket(socket.AF_UNIX)
            self.client.setblocking(False)
            self.client.connect(self.path)
            self.turn()
            if negotiate:
                self.send(b'{"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}}\n')
                self.turn()
        return self.client

    def send(self, data: bytes) -> None:
        assert self.client is not None
        try:
            self.client.send(data)
        except OSError:
            self.leave()

    def leave(self) -> None:
        if self.client is not None:
            self.client.close()
            self.client = None

    def read(self) -> bytes:
        if self.client is None:
            return b""
        try:
            data = self.client.recv(1 << 20)
        except BlockingIOError:
            return b""
        except OSError:
            data = b""
        if not data:
            self.leave()
        if b"internal error" in data:
            raise AssertionError(data[:2000])
        self.refused += data.count(b'"error"')
        return data

    def command(self) -> None:
        """A command whose arguments have the right shape, mostly."""
        dice = self.dice
        self.connect()
        name = dice.choice(COMMAND_NAMES)
        message: dict[str, Any] = {"exec-oob" if dice.random() < 0.05 else "execute": name}
        if dice.random() < 0.95:
            message["arguments"] = shaped(COMMANDS[name].arguments, dice)
        if dice.random() < 0.3:
            message["id"] = anything(dice)
        data = json.dumps(message).encode() + b"\n"
        if dice.random() < 0.03 and self.client is not None:
            fd = os.memfd_create("sent")
            try:
                socket.send_fds(self.client, [data], [fd])
            except OSError:
                self.leave()
            os.close(fd)
        else:
            self.send(data)
        self.turn()
        if dice.random() < 0.9:
            self.read()
        if dice.random() < 0.005:
            self.leave()
        if self.machine.status != "running" and dice.random() < 0.2:
            self.machine.status = "running"

    def bytes(self) -> None:
        """Anything."""
        dice = self.dice
        self.connect(negotiate=dice.random() < 0.7)
        kind = dice.randrange(6)
        if kind == 0:
            data = dice.randbytes(dice.randrange(1, 200))
        elif kind == 1:
            data = b"[" * dice.randrange(1, 60000) + b"\n"
        elif kind == 2:
            data = b'{"execute": "query-status"}\n' * dice.randrange(1, 500)
        elif kind == 3:
            line = bytearray(b'{"execute": "query-name", "arguments": {}, "id": 1}\n')
            for _ in range(dice.randrange(1, 4)):
                line[dice.randrange(len(line))] = dice.randrange(256)
            data = bytes(line)
        elif kind == 4:
            data = b'"' + b"\\ud800" * dice.randrange(1, 100) + b'"\n'
        else:
            data = b'{"execute": "x", "arguments": ' + dice.choice((b"1e999", b"-0", b"NaN", b"9" * 5000)) + b"}\n"
        self.send(data)
        self.turn(1)
        if dice.random() < 0.7:
            self.read()
        if dice.random() < 0.05:
            self.leave()

    def close(self) -> None:
        self.leave()
        self.turn(4)
        self.server.close()
        self.machine.close()


def _qmp(name: str, operations: int, seed: int, directory: Path) -> int:
    target = Qmp(directory, seed)
    act = target.command if name == "qmp" else target.bytes
    start = 0
    try:
        for number in range(operations):
            if number % ROUND == 0:
                signal.alarm(STUCK)
                if number == 20 * ROUND:
                    start = resident()
                elif start and resident() - start > GROWTH:
                    raise MemoryError(f"{(resident() - start) >> 20} MiB more after {number} operations")
            act()
        return target.refused
    finally:
        target.close()


def _gdb(operations: int, seed: int) -> int:
    """Needs /dev/kvm: a tiny machine that stands still, and a debugger that means it ill."""
    from kvik.errors import HostError
    from kvik.vmm.gdb import GdbSession
    from kvik.vmm.machine import Machine

    dice = random.Random(seed)
    config = MachineConfig(name="fuzzed")
    config.memory.size = 2 << 20
    try:
        machine = Machine(config)
    except HostError:
        raise
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    errors: list[BaseException] = []
    answered = 0
    with machine:
        machine.loop.on_error = errors.append
        machine.add_vcpu(0).vcpu.set_cpuid(machine.system.supported_cpuid())
        machine.start(paused=True)
        session = GdbSession(machine, ours)
        for number in range(operations):
            if number % ROUND == 0:
                signal.alarm(STUCK)
            letter = dice.choice("?gGpPmMXZzHTqQvHqQD!ADbBdiIrRtsS")
            if letter in "sSD":
                letter = "?"  # it must stand still: what runs is the functional tests' matter
            number_text = dice.choice(("0", "1", "ffffffffffffffff", "10000000000000000", "-1", "", "zz", "1000", "7"))
            rest = dice.choice(
                (
                    *(
                        "",
                        f"{number_text},{number_text}",
                        f"{number_text}={number_text}",
                        f"{number_text},1:00",
                        number_text,
                    ),
                    *("Supported:x", "Xfer:features:read:target.xml:0,ffff", "Cont?", "Cont;q", "Rcmd,696e666f", "C"),
                    *(f"1,{number_text},4", f"0,{number_text},1", f"4,{number_text},8", "StartNoAckMode", "g1", "g-1"),
                    *("\x7f\x80}", "ThreadExtraInfo,1", "qemu.PhyMemMode:1", "qemu.PhyMemMode:0", "fThreadInfo"),
                )
            )
            body = (letter + rest).encode("latin-1")
            packet = b"$" + body + b"#%02x" % (sum(body) & 0xFF)
            if dice.random() < 0.05:
                packet = dice.randbytes(dice.randrange(1, 50)).replace(b"\x03", b"")
            try:
                theirs.send(packet)
            except OSError:
                pass
            machine.loop.run_once(0)
            if errors:
                raise errors[0]
            try:
                answered += len(theirs.recv(1 << 20)) > 0
            except OSError:
                pass
            if session.closed:
                theirs.close()
                ours, theirs = socket.socketpair()
                theirs.setblocking(False)
                session = GdbSession(machine, ours)
        session.close(resume=False)
    theirs.close()
    return answered


def _stream_peer(operations: int, seed: int) -> int:
    """How often the connection was ended for a lie."""
    dice, ended = random.Random(seed), 0
    room = bytearray(MAX_PACKET + 100)
    backend: StreamBackend | None = None
    peer: socket.socket | None = None
    for number in range(operations):
        if number % ROUND == 0:
            signal.alarm(STUCK)
        if backend is None:
            ours, peer = socket.socketpair()
            peer.setblocking(False)
            backend = StreamBackend(ours.detach())
        assert peer is not None
        size = dice.choice(
            (
                1,
                60,
                1500,
                65550,
                dice.randrange(1, 3000),
                dice.choice((0, 70000, 0xFFFFFFFF)) if dice.random() < 0.05 else 9,
            )
        )
        data = size.to_bytes(4, "big") + bytes(min(size, 70000))
        try:
            peer.send(data[: dice.choice((len(data), 1, 3, 5, 2000))] if dice.random() < 0.2 else data)
        except OSError:
            pass
        if dice.random() < 0.001:
            peer.close()
        cut = dice.choice((1, 5, 12, 13, 1000))
        try:
            for _ in range(4):
                got = backend.receive(0, [memoryview(room)[:cut], memoryview(room)[cut:]])
                assert 12 < got <= MAX_PACKET
            if dice.random() < 0.2:
                backend.send(0, [memoryview(room)[:12], memoryview(room)[12 : dice.randrange(14, 60000)]])
        except BlockingIOError:
            pass
        except BackendGone:
            ended += 1
            backend.close()
            peer.close()
            backend = None
    if backend is not None and peer is not None:
        backend.close()
        peer.close()
    return ended


def _vhost_user(operations: int, seed: int) -> int:
    """A back end whose answers are given before the questions; how many connections ended with an error."""
    dice, refused = random.Random(seed), 0
    requests = (1, 15, 17, 11, 24, 5, 9, 0, 255)
    for number in range(operations):
        if number % ROUND == 0:
            signal.alarm(STUCK)
        ours, peer = socket.socketpair()
        answers = b""
        for request in (1, 15, 17, 24, 11, 11):
            value = dice.choice((0, 1 << 30 | 1 << 32, (1 << 64) - 1, dice.getrandbits(64)))
            payload = struct.pack("=Q", value) if request != 24 else bytes(12 + dice.choice((8, 60, 256)))
            if dice.random() < 0.2:
                request, payload = dice.choice(requests), dice.randbytes(dice.choice((0, 7, 8, 12, 300)))
            length = len(payload) if dice.random() < 0.9 else dice.choice((0, 4096, 4097, 0xFFFFFFFF))
            answers += struct.pack("=III", request, dice.choice((5, 5, 5, 1, 0xFFFFFFFF)), length) + payload
        peer.send(answers[: dice.randrange(len(answers) + 1)] if dice.random() < 0.3 else answers)
        peer.shutdown(socket.SHUT_WR)
        try:
            back_end = VhostUser(ours.detach())
            try:
                back_end.set_features(dice.getrandbits(64))
                back_end.get_config(dice.choice((8, 60, 256)))
                back_end.stop_queue(0)
                back_end.hung_up()
            finally:
                back_end.close()
        except KvikError as error:
            assert str(error)
            refused += 1
        peer.close()
    return refused


def fuzz(name: str, operations: int, seed: int) -> int:
    """How much was refused. Raises what should have been dealt with."""
    before = signal.signal(signal.SIGALRM, _stuck)
    here = Path.cwd()
    try:
        with tempfile.TemporaryDirectory() as directory:
            os.chdir(directory)
            if name.startswith("qmp"):
                return _qmp(name, operations, seed, Path(directory))
            if name == "gdb":
                return _gdb(operations, seed)
            return _stream_peer(operations, seed) if name == "stream-peer" else _vhost_user(operations, seed)
    finally:
        os.chdir(here)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


__all__ = ["TARGETS", "fuzz"]
