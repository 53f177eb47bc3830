"""Live migration, the source: rounds of pages while the guest runs, then the rest while it stands still.

    setup       connect, fork the senders, log dirty pages, let the destination look at the header
    active      round after round: what was written meanwhile; until the rest would be through within `downtime_limit`
    device      the guest stands still: last pages, then all other state
    completed   the destination has everything; this machine never runs again (status "postmigrate")
    cancelling, cancelled, failed: the guest runs here as before

Everything happens in callbacks of the machine's loop: a round costs this process an ioctl a memory slot. What reads RAM
and sends it are other processes (`sender`).
"""

from __future__ import annotations

import ctypes
import os
import signal
import struct
import time
from typing import TYPE_CHECKING, Any

import kvik
from kvik.errors import HostError, InvalidArgument, KvikError, OperationInvalid, OperationUnsupported
from kvik.vmm.layout import PAGE
from kvik.vmm.state import sender as s
from kvik.vmm.state.capture import capture
from kvik.vmm.state.dirty import DirtyPages
from kvik.vmm.state.memory_file import present
from kvik.vmm.state.stream import DONE, FAILED, HEADER, MAX_CHANNELS, READY, connect, frame, greeting
from kvik.vmm.state.values import encode

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from kvik.vmm.machine import Machine
    from kvik.vmm.memory import Region

__all__ = ["Outgoing", "header"]

_MADV_DONTFORK, _MADV_DOFORK = 10, 11
OVERHEAD = 0.02  # seconds of downtime beside the pages: pausing, state, the destination's restore
RUNNING = ("setup", "active", "device", "cancelling")


def header(machine: Machine) -> dict[str, Any]:
    """What the destination compares itself with before a page is sent."""
    return {
        "kvik": kvik.__version__,
        "name": machine.config.name,
        "regions": [[region.start, region.size] for region in machine.memory.regions],
        "devices": {name: {"kind": device.kind} for name, device in machine.devices.items()},
        "vcpus": [{"cpuid": bytes(thread.vcpu.cpuid())} for thread in machine.vcpus],
    }


def _refuse_unseen_writers(machine: Machine) -> None:
    """What another process writes into RAM without telling would be lost on the way."""
    for name in machine.devices:
        device = machine.find(name)
        if getattr(device, "writes_unseen", False):
            raise OperationUnsupported(
                f"a machine with {name} ({device.kind}) cannot migrate: what its back end writes is not logged",
                remedy="unplug it first (device_del)",
            )


class Outgoing:
    """One migration. `status` is QEMU's MigrationStatus word; `error` says why it failed.

    `downtime_limit` in seconds, `bandwidth` in bytes a second (0: no limit); both may change while it runs.
    """

    def __init__(
        self,
        machine: Machine,
        uri: str,
        *,
        channels: int = 1,
        bandwidth: int = 0,
        downtime_limit: float = 0.3,
        on_change: Callable[[str], None] | None = None,
    ) -> None:
        if not 1 <= channels <= MAX_CHANNELS:
            raise InvalidArgument(f"{channels} connections: 1 to {MAX_CHANNELS} are possible")
        if channels > 1 and uri.startswith(("fd:", "fd=")):
            raise InvalidArgument("a descriptor is one connection", remedy="migrate with one channel")
        _refuse_unseen_writers(machine)
        self.machine, self.uri, self.downtime_limit = machine, uri, downtime_limit
        self.status, self.error = "setup", ""
        self.on_change = on_change
        self.rounds = self.remaining = self.dirty_rate = 0
        self.rate = 0.0  # bytes a second on the wire, of the last round
        self.began = time.monotonic()
        self.setup_time = self.downtime = self.total_time = 0.0
        self._stopped_at = 0.0
        self._was = ""
        self._held = False
        self._round_began, self._round_sent = self.began, 0
        self._dirty = DirtyPages(machine)
        self._senders: list[tuple[int, socket.socket, int]] = []
        self._waiting = 0
        self._next: Callable[[], None] = self._first_round
        machine.forget_checkpoint()
        self._board = s.Board(list(machine.memory.regions), channels)
        self._board.set_limit(bandwidth)
        self._state = os.memfd_create("kvik-state", os.MFD_CLOEXEC)
        machine.on_close.append(self.close)
        try:
            self._open(channels)
        except BaseException as error:
            self._fail(str(error))
            raise

    def _own_memory(self) -> int:
        if self.machine.self_memory >= 0:
            return os.dup(self.machine.self_memory)
        try:
            return os.open("/proc/self/mem", os.O_RDONLY | os.O_CLOEXEC)
        except PermissionError as error:
            raise HostError(
                "this machine's sandbox does not let it migrate",
                errno=error.errno or 0,
                remedy="start it with --migratable, and migrate over a descriptor (getfd, fd:NAME)",
            ) from error

    def _open(self, channels: int) -> None:
        token = os.urandom(16)
        memory = self._own_memory()
        sockets: list[socket.socket] = []
        try:
            for channel in range(channels):
                sock = connect(self.uri)
                sockets.append(sock)
                sock.setblocking(True)
                sock.sendall(greeting(channel, channels, token))
            with self.machine.paused():  # a vCPU that runs answers no ioctl
                head = encode(header(self.machine))
            sockets[0].sendall(frame(HEADER, len(head)) + head)
            self._advise(_MADV_DONTFORK)
            for channel, sock in enumerate(sockets):
                self._senders.append(s.fork_sender(self._board, channel, sock, memory, self._state))
        except OSError as error:
            if isinstance(error, KvikError):
                raise
            raise HostError(f"cannot migrate to {self.uri}: {error.strerror}", errno=error.errno or 0) from error
        finally:
            self._advise(_MADV_DOFORK)
            os.close(memory)
            for sock in sockets:
                sock.close()
        for number, (_, orders, _) in enumerate(self._senders):
            orders.setblocking(True)
            self.machine.loop.add_reader(orders.fileno(), lambda number=number: self._heard(number))  # type: ignore[misc]
        self._waiting = 1
        self._senders[0][1].sendall(b"h")  # wait for READY

    def _advise(self, advice: int) -> None:
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        for region in self.machine.memory.regions:
            madvise(region.address, region.size, advice)

    # What the senders say ----------------------------------------------------------------------------------------

    def _heard(self, number: int) -> None:
        orders = self._senders[number][1]
        try:
            word = orders.recv(1)
            if word == b"a":
                kind, size = struct.unpack("<BI", _exactly(orders, 5))
                self._answered(kind, _exactly(orders, size))
                return
            if word == b"e":
                (size,) = struct.unpack("<I", _exactly(orders, 4))
                self._fail(_exactly(orders, size).decode(errors="replace"))
                return
        except (OSError, EOFError):
            word = b""
        if word != b"r":
            self._fail("a sender process ended unexpectedly")
            return
        self._waiting -= 1
        if not self._waiting:
            self._step()

    def _answered(self, kind: int, data: bytes) -> None:
        if kind == FAILED:
            self._fail(f"the destination says: {data.decode(errors='replace')[:2000]}")
        elif (kind == READY and self.status == "setup") or (kind == DONE and self.status == "device"):
            self._waiting = 0
            self._step()
        else:
            self._fail(f"the destination answered {kind} amid {self.status}")

    def _step(self) -> None:
        try:
            self._next()
        except Exception as error:
            self._fail(str(error) or type(error).__name__)

    def _order(self, order: bytes, then: Callable[[], None]) -> None:
        self._waiting, self._next = len(self._senders), then
        for _, orders, _ in self._senders:
            orders.sendall(order)

    # The rounds --------------------------------------------------------------------------------------------------

    def _change(self, status: str) -> None:
        self.status = status
        if self.on_change is not None:
            self.on_change(status)

    def _first_round(self) -> None:
        self.setup_time = time.monotonic() - self.began
        self._dirty.start()
        for index, region in enumerate(self._board.regions):
            self.remaining += _fill(self._board.bitmap(index), region)
        self._change("active")
        self._begin_round(s.ROUND_FRESH)

    def _begin_round(self, order: bytes) -> None:
        self.rounds += 1
        self._round_began, self._round_sent = time.monotonic(), self._board.sent
        self._order(order, self._round_done)

    def _take(self) -> int:
        """Bytes that were written since the last time, now on the board."""
        if self._dirty.changed_layout:
            raise OperationInvalid("memory came or went during the migration")
        pages = 0
        for index, (_, bitmap) in enumerate(self._dirty.take()):
            self._board.bitmap(index)[:] = bitmap
            pages += int.from_bytes(bitmap, "little").bit_count()
        return pages * PAGE

    def _round_done(self) -> None:
        seconds = max(time.monotonic() - self._round_began, 1e-6)
        sent = self._board.sent - self._round_sent
        if sent > PAGE:
            self.rate = sent / seconds
        self.remaining = self._take()
        self.dirty_rate = int(self.remaining / seconds / PAGE)
        if self.expected_downtime <= self.downtime_limit or not self.machine.vcpus:
            self._stop()
        else:
            self._begin_round(s.ROUND)

    @property
    def expected_downtime(self) -> float:
        """Seconds, if the guest stopped now."""
        return OVERHEAD + self.remaining / self.rate if self.rate else OVERHEAD

    def _stop(self) -> None:
        """The guest stands still from here on."""
        machine = self.machine
        self._was, self._stopped_at = machine.status, time.monotonic()
        machine.pause("finish-migrate")
        machine.hold()
        self._held = True
        self._change("device")
        # Pausing ended requests and took vhost's rings back: both wrote to RAM.
        state = encode({**capture(machine), "status": self._was})
        carried = [bytes(self._board.bitmap(index)) for index in range(len(self._board.regions))]
        self._take()
        for index, old in enumerate(carried):
            _merge(self._board.bitmap(index), old)
        os.pwrite(self._state, state, 0)
        self._order(s.LAST, self._send_state)

    def _send_state(self) -> None:
        self._waiting, self._next = 1, self._commit
        self._senders[0][1].sendall(s.SEND_STATE)

    def _commit(self) -> None:
        """The destination could run. From here on this machine does not."""
        self.machine.status = "postmigrate"
        self._waiting, self._next = 1, self._completed
        self._senders[0][1].sendall(s.SEND_RUN)

    def _completed(self) -> None:
        now = time.monotonic()
        self.downtime, self.total_time, self.remaining = now - self._stopped_at, now - self.began, 0
        self._finish()
        self._change("completed")

    # The other ends ----------------------------------------------------------------------------------------------

    def set_bandwidth(self, bytes_per_second: int) -> None:
        self._board.set_limit(bytes_per_second)

    def cancel(self) -> None:
        """Give up; the guest goes on here. Too late once the destination has been told to run."""
        if self.status in RUNNING and self.machine.status != "postmigrate":
            self._change("cancelling")
            self._end_without("cancelled")

    def _fail(self, text: str) -> None:
        if self.status not in RUNNING:
            return
        self.error = text
        if self.machine.status == "postmigrate":
            # RUN may have arrived or not. Never two: this one stays stopped, a person decides.
            self.error += "; the destination may or may not run: if it does not, `cont` there, or here if it is gone"
        self._end_without("failed")

    def _end_without(self, status: str) -> None:
        machine = self.machine
        self.total_time = time.monotonic() - self.began
        self._finish()
        if machine.status == "finish-migrate":
            machine.status = "paused"
            machine.resume()
        self._change(status)

    def _finish(self) -> None:
        """Senders end, nothing is logged any more."""
        senders, self._senders = self._senders, []
        for pid, orders, pidfd in senders:
            self.machine.loop.remove_reader(orders.fileno())
            orders.close()
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            os.close(pidfd)
            os.waitpid(pid, 0)
        if self._state >= 0:
            os.close(self._state)
            self._state = -1
        self._dirty.stop()
        if self._held:
            self._held = False
            self.machine.release()

    def close(self) -> None:
        """The machine ends."""
        if self.status in RUNNING:
            self.status = "failed"
            self._held = False
            self._finish()

    def report(self) -> dict[str, Any]:
        """QEMU's MigrationInfo (qapi/migration.json)."""
        now = time.monotonic()
        board, going = self._board, self.status in RUNNING
        info: dict[str, Any] = {
            "status": self.status,
            "total-time": int(1000 * ((now - self.began) if going else self.total_time)),
            "setup-time": int(1000 * self.setup_time),
            "ram": {
                "transferred": board.sent,
                "remaining": self.remaining,
                "total": sum(region.size for region in board.regions),
                "duplicate": board.zero,
                "skipped": 0,
                "normal": board.normal,
                "normal-bytes": board.normal * PAGE,
                "dirty-pages-rate": self.dirty_rate,
                "mbps": self.rate * 8 / 1e6,
                "dirty-sync-count": self.rounds,
                "postcopy-requests": 0,
                "page-size": PAGE,
                "multifd-bytes": board.sent if board.channels > 1 else 0,
                "pages-per-second": int(self.rate / PAGE),
                "precopy-bytes": board.sent,
                "downtime-bytes": 0,
                "postcopy-bytes": 0,
            },
        }
        if self.status == "completed":
            info["downtime"] = int(1000 * self.downtime)
        else:
            info["expected-downtime"] = int(1000 * self.expected_downtime)
        if self.error:
            info["error-desc"] = self.error
        return info


def _exactly(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = sock.recv(size - len(data))
        if not part:
            raise EOFError
        data += part
    return data


def _fill(bitmap: memoryview, region: Region) -> int:
    """Mark what may hold data; the bytes of it."""
    total = 0
    for start, end in present(region):
        first, last = start // PAGE, end // PAGE
        total += end - start
        while first < last and first % 8:
            bitmap[first // 8] |= 1 << first % 8
            first += 1
        whole = (last - first) // 8
        bitmap[first // 8 : first // 8 + whole] = b"\xff" * whole
        for page in range(first + 8 * whole, last):
            bitmap[page // 8] |= 1 << page % 8
    return total


def _merge(bitmap: memoryview, other: bytes) -> None:
    """Bits of either."""
    merged = int.from_bytes(bitmap, "little") | int.from_bytes(other, "little")
    bitmap[:] = merged.to_bytes(len(bitmap), "little")
