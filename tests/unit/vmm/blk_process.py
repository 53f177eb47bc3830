"""A real kvik-blk and kvik-vmm's own front end to it, with guest memory that both map."""

from __future__ import annotations

import json
import os
import select
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import kvik
from kvik.vmm.blk import __main__ as program
from kvik.vmm.layout import MIB
from kvik.vmm.memory import HostMemory
from kvik.vmm.virtio import blk
from kvik.vmm.virtio.queue import DESC_INDIRECT, DESC_NEXT, DESC_WRITE, DESCRIPTOR, INDIRECT_DESC
from kvik.vmm.virtio.vhost_user_blk import VhostUserBlk

from .ring import DATA, Driver, FakeMachine, FakeTransport

LAUNCHER = Path(kvik.__file__).parent / "vmm" / "blk" / "__main__.py"
assert Path(program.__file__) == LAUNCHER
SECTOR = 512
SECONDS = 20.0


class EventfdTransport(FakeTransport):
    """Kicks and interrupts as descriptors."""

    def __init__(self) -> None:
        super().__init__()
        self.kicks: dict[int, int] = {}
        self.calls: dict[int, int] = {}
        self.taken: set[int] = set()

    def notifier_fd(self, index: int) -> int:
        self.taken.add(index)
        return self.kicks.setdefault(index, os.eventfd(0, os.EFD_NONBLOCK))

    def release_notifier(self, index: int) -> None:
        self.taken.discard(index)

    def interrupt_fd(self, index: int) -> int | None:
        return self.calls.setdefault(index, os.eventfd(0, os.EFD_NONBLOCK))


class Served(Driver):
    """A guest's driver in front of a `VhostUserBlk`. One request at a time."""

    transport_class = EventfdTransport
    transport: EventfdTransport
    indirect = False  # requests come as tables (2.7.5.3), as nearly all drivers write them

    def put_table(self, queue: int, parts: list[tuple[int, int, bool]]) -> None:
        table = b""
        for number, (address, length, writable) in enumerate(parts, 1):
            flags = (DESC_WRITE if writable else 0) | (DESC_NEXT if number < len(parts) else 0)
            table += DESCRIPTOR.pack(address, length, flags, number if number < len(parts) else 0)
        slot = self.put(queue, [(self.space(len(table), table), len(table), False)])
        flags_at = self.device.queues[queue].desc + 16 * slot + 12
        self.memory.put_u16(flags_at, DESC_INDIRECT)

    def request(
        self, kind: int, sector: int = 0, data: bytes = b"", room: int = 0, *, cuts: int = 1, queue: int = 0
    ) -> tuple[int, bytes]:
        """Status and what was read. `cuts`: the data lies in so many pieces, each on a page of its own."""
        self.next_data = DATA
        header = self.space(16, struct.pack("<IIQ", kind, 0, sector))
        status = self.space(1, b"\xee")
        parts, read = [(header, 16, False)], []
        size = max(len(data), room)
        step = max(1, -(-size // cuts))
        for at in range(0, size, step):
            piece = data[at : at + step] if data else bytes(min(step, size - at))
            place = self.space(len(piece) + 4096, piece)
            parts.append((place, len(piece), not data))
            read.append((place, len(piece)))
        parts.append((status, 1, True))
        if self.indirect:
            self.put_table(queue, parts)
        else:
            self.put(queue, parts)
        self.wait(queue)
        return self.memory.read(status, 1)[0], b"".join(self.memory.read(*piece) for piece in read if room)

    def wait(self, queue: int = 0) -> list[tuple[int, int]]:
        """Kicks, and what came back. The driver wants to be told of the next answer (used_event, 2.7.7.2)."""
        ring = self.device.queues[queue]
        self.memory.put_u16(ring.avail + 4 + 2 * ring.size, self.used[queue] & 0xFFFF)
        os.eventfd_write(self.transport.kicks[queue], 1)
        for _ in range(int(SECONDS * 10)):
            if done := self.take(queue):
                return done
            if select.select([self.transport.calls[queue]], [], [], 0.1)[0]:
                os.eventfd_read(self.transport.calls[queue])
        raise TimeoutError("the back end never answered")

    def read(self, offset: int, length: int, **more: Any) -> bytes:
        status, data = self.request(blk.T_IN, offset // SECTOR, room=length, **more)
        assert status == blk.S_OK
        return data

    def write(self, offset: int, data: bytes, **more: Any) -> None:
        assert self.request(blk.T_OUT, offset // SECTOR, data, **more)[0] == blk.S_OK

    def flush(self) -> None:
        assert self.request(blk.T_FLUSH)[0] == blk.S_OK

    def segment(self, kind: int, offset: int, length: int, flags: int = 0) -> int:
        return self.request(kind, 0, struct.pack("<QII", offset // SECTOR, length // SECTOR, flags))[0]


class BlkProcess:
    """One of `images`, (path, format) from the top down; or of `fds`: a qcow2 image and a socket that listens.
    `keep`: descriptors that `options` name."""

    def __init__(
        self,
        *images: tuple[Path, str],
        options: tuple[str, ...] = (),
        fds: tuple[int, int] | None = None,
        keep: tuple[int, ...] = (),
    ) -> None:
        self.driver: Served | None = None
        self.events: list[dict[str, Any]] = []
        if fds is not None:
            self._run((f"--image={fds[0]},qcow2", f"--socket={fds[1]}"), fds)
            return
        modes = [os.O_RDONLY if number or "--read-only" in options else os.O_RDWR for number in range(len(images))]
        files = [os.open(path, mode) for (path, _), mode in zip(images, modes, strict=True)]
        self.ours, theirs = socket.socketpair()
        self.life, life = socket.socketpair()
        listening = socket.socket(socket.AF_UNIX)
        listening.bind("")  # an abstract name of the kernel's choice
        listening.listen()
        self.monitor = socket.socket(socket.AF_UNIX)
        self.monitor.connect(listening.getsockname())
        self.monitor.settimeout(SECONDS)
        sockets = (theirs.fileno(), life.fileno(), listening.fileno())
        words = [f"--image={fd},{form}" for fd, (_, form) in zip(files, images, strict=True)]
        words += [f"--{name}={fd}" for name, fd in zip(("socket", "life", "monitor"), sockets, strict=True)]
        self._run((*words, *options), (*files, *sockets, *keep))
        for fd in files:
            os.close(fd)
        for sock in (theirs, life, listening):
            sock.close()
        self._lines = self.monitor.makefile("r")
        self._greeted = False

    def _run(self, words: tuple[str, ...], fds: tuple[int, ...]) -> None:
        argv = [sys.executable, "-I", "-S", str(LAUNCHER), *words]
        self.process = subprocess.Popen(argv, pass_fds=fds, stderr=subprocess.PIPE, text=True)

    def device(self, queues: int = 1) -> VhostUserBlk:
        return VhostUserBlk("disk0", os.dup(self.ours.fileno()), queues)

    def start(self, queues: int = 1) -> Served:
        self.ours_device = self.device(queues)
        self.ours.close()
        features = self.ours_device.features | INDIRECT_DESC
        self.driver = Served(self.ours_device, features, machine=FakeMachine(32 * MIB, host=HostMemory(shared=True)))
        return self.driver

    def ask(self, command: str, **arguments: Any) -> Any:
        """What its monitor answers; `events` has what it told meanwhile."""
        if not self._greeted:
            self._greeted = bool(json.loads(self._lines.readline()))
            self.ask("qmp_capabilities")
        self.monitor.sendall(json.dumps({"execute": command, "arguments": arguments}).encode())
        while "event" in (reply := json.loads(self._lines.readline())):
            self.events.append(reply)
        return reply.get("return", reply.get("error"))

    def kill(self) -> None:
        self.process.kill()
        self.close()

    def end(self) -> tuple[int, str]:
        """The VMM closes; the exit code and what was said."""
        if self.driver is not None:
            self.driver.close()
        self.ours.close()
        self.life.close()
        _, said = self.process.communicate(timeout=SECONDS)
        self.close()
        return self.process.returncode, said

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        if self.process.stderr is not None:
            self.process.stderr.close()
        for name in ("ours", "life", "monitor"):
            if hasattr(self, name):
                getattr(self, name).close()
        driver, self.driver = self.driver, None
        if driver is not None:
            driver.close()
            driver.machine.loop.close()
            driver.memory.close()
