"""Live migration, the source: rounds of pages while the guest runs, then the rest while it stands still.

    setup       connect, fork the senders, log dirty pages, let the destination look at the header
    active      round after round: what was written meanwhile; until the rest would be through within `downtime_limit`
    device      the guest stands still: last pages, then all other state
    completed   the destination has everything; this machine never runs again (status "postmigrate")
    cancelling, cancelled, failed: the guest runs here as before

With post-copy (`start_postcopy`) a round is broken off, `device` sends a map of what is missing in place of the pages:

    postcopy-active     the guest runs there; senders serve it, this process only waits
    postcopy-paused     the connection was lost; `recover` connects anew (postcopy-recover) and goes on

Everything happens in callbacks of the machine's loop: a round costs this process an ioctl a memory slot. What reads RAM
and sends it are other processes (`sender`).
"""

from __future__ import annotations

import os
import struct
import time

import kvik
from kvik.errors import HostError, InvalidArgument, KvikError, OperationInvalid, OperationUnsupported
from kvik.vmm.layout import PAGE
from kvik.vmm.state import sender as s
from kvik.vmm.state.capture import capture
from kvik.vmm.state.dirty import DirtyPages
from kvik.vmm.state.helper import end_helper, not_inherited
from kvik.vmm.state.memory_file import present
from kvik.vmm.state.stream import (
    DONE,
    FAILED,
    FILLED,
    HEADER,
    MAX_CHANNELS,
    READY,
    RESUME,
    RUNNING,
    connect,
    frame,
    greeting,
)
from kvik.vmm.state.values import encode

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable
    from typing import Any

    from kvik.vmm.machine import Machine
    from kvik.vmm.memory import Region
    from kvik.vmm.state.throttle import Throttle

__all__ = ["AFTER", "GOING", "Outgoing", "header", "refuse_unseen_writers"]

OVERHEAD = 0.02  # seconds of downtime beside the pages: pausing, state, the destination's restore
BEFORE = ("setup", "active", "device", "cancelling")  # until then the guest is here
AFTER = ("postcopy-active", "postcopy-paused", "postcopy-recover")  # it is there, and not all of its memory
GOING = BEFORE + AFTER


def header(machine: Machine, *, postcopy: bool = False) -> dict[str, Any]:
    """What the destination compares itself with before a page is sent."""
    return {
        "postcopy": postcopy,  # it may come to that: can you?
        "kvik": kvik.__version__,
        "name": machine.config.name,
        "regions": [[region.start, region.size] for region in machine.memory.regions],
        "devices": {name: {"kind": device.kind} for name, device in machine.devices.items()},
        "vcpus": [{"index": thread.index, "cpuid": bytes(thread.vcpu.cpuid())} for thread in machine.vcpus],
    }


def refuse_unseen_writers(machine: Machine, *, postcopy: bool = False) -> None:
    """What another process writes into RAM without telling would be lost on the way. And with post-copy it would read
    zeroes where a page has not come yet: its mapping of the memfd is not ours, whose faults wait."""
    for name in machine.devices:
        device = machine.find(name)
        if getattr(device, "writes_unseen", False):
            raise OperationUnsupported(
                f"a machine with {name} ({device.kind}) cannot migrate: what its back end writes is not logged",
                remedy="unplug it first (device_del)",
            )
        if postcopy and getattr(device, "maps_ram", False):
            raise OperationUnsupported(
                f"a machine with {name} ({device.kind}) cannot migrate by post-copy: its back end waits for no page",
                remedy="migrate without the capability postcopy-ram, or unplug it first (device_del)",
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
        postcopy: bool = False,
        postcopy_bandwidth: int = 0,
        throttle: Throttle | None = None,
        on_change: Callable[[str], None] | None = None,
    ) -> None:
        if not 1 <= channels <= MAX_CHANNELS:
            raise InvalidArgument(f"{channels} connections: 1 to {MAX_CHANNELS} are possible")
        if channels > 1 and uri.startswith(("fd:", "fd=")):
            raise InvalidArgument("a descriptor is one connection", remedy="migrate with one channel")
        refuse_unseen_writers(machine, postcopy=postcopy)
        self.machine, self.uri, self.downtime_limit = machine, uri, downtime_limit
        self.may_postcopy, self.postcopy_bandwidth = postcopy, postcopy_bandwidth
        self.postcopy = False  # asked for
        self._throttle = throttle
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
        self._token = os.urandom(16)
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
        with self.machine.paused():  # a vCPU that runs answers no ioctl
            head = encode(header(self.machine, postcopy=self.may_postcopy))
        self._connect(channels, frame(HEADER, len(head)) + head)
        self._waiting = 1
        self._senders[0][1].sendall(b"h")  # wait for READY

    def _connect(self, channels: int, first: bytes) -> None:
        """As many connections, a sender for each. `first` is what channel 0 begins with."""
        memory = self._own_memory()
        sockets: list[socket.socket] = []
        try:
            for channel in range(channels):
                sock = connect(self.uri)
                sockets.append(sock)
                sock.setblocking(True)
                sock.sendall(greeting(channel, channels, self._token) + (b"" if channel else first))
            with not_inherited(self.machine.memory.regions):
                for channel, sock in enumerate(sockets):
                    self._senders.append(s.fork_sender(self._board, channel, sock, memory, self._state))
        except OSError as error:
            if isinstance(error, KvikError):
                raise
            raise HostError(f"cannot migrate to {self.uri}: {error.strerror}", errno=error.errno or 0) from error
        finally:
            os.close(memory)
            for sock in sockets:
                sock.close()
        for number, (_, orders, _) in enumerate(self._senders):
            orders.setblocking(True)
            self.machine.loop.add_reader(orders.fileno(), lambda number=number: self._heard(number))  # type: ignore[misc]

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
        elif kind == RUNNING and self.postcopy and self.machine.status == "postmigrate" and self.status == "device":
            self._runs_there()
        elif kind == FILLED and self.status in AFTER:
            self._completed()
        elif self.status != "completed":  # FILLED comes on every channel
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
        if self.postcopy:
            self._stop()
            return
        self.remaining = self._take()
        self.dirty_rate = int(self.remaining / seconds / PAGE)
        if self._throttle is not None:
            self._throttle.round_done(sent, self.remaining)
        # A limit that is shorter than what the rest takes anyway must not make rounds go on for ever; one of 0 does.
        content = self.pages_time <= max(self.downtime_limit - OVERHEAD, self.downtime_limit / 2)
        if (content and self.downtime_limit) or not self.machine.vcpus:
            self._stop()
        else:
            self._begin_round(s.ROUND)

    @property
    def pages_time(self) -> float:
        """Seconds to send what is left, if the guest stopped now."""
        return self.remaining / self.rate if self.rate else 0.0

    @property
    def expected_downtime(self) -> float:
        """The same with all else that a stop costs."""
        return OVERHEAD + self.pages_time

    def _stop(self) -> None:
        """The guest stands still from here on."""
        machine = self.machine
        self._end_throttle()
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
        if self.postcopy:
            self.remaining = self._board.pages * PAGE
            self._order(s.END_ROUNDS, self._send_map)
        else:
            self._order(s.LAST, self._send_state)

    def _send_state(self) -> None:
        self._waiting, self._next = 1, self._commit
        self._senders[0][1].sendall(s.SEND_STATE)

    def _commit(self) -> None:
        """The destination could run. From here on this machine does not."""
        self.machine.status = "postmigrate"
        self._waiting, self._next = 1, self._completed  # after post-copy it is RUNNING that answers
        for _, orders, _ in self._senders if self.postcopy else self._senders[:1]:
            orders.sendall(s.SEND_RUN)

    # Post-copy ---------------------------------------------------------------------------------------------------

    def start_postcopy(self) -> None:
        """Let the guest go on at the destination now, or as soon as that is there, and its memory follow."""
        if not self.may_postcopy:
            raise OperationInvalid("Enable postcopy with migrate_set_capability before the start of migration")
        if self.status not in ("setup", "active"):
            raise OperationInvalid("Start of postcopy without migration: it has ended, or is about to")
        if not self.postcopy:
            self.postcopy = True
            self.set_bandwidth(0)  # the piece that is being sent is to be through soon
            self._board.break_off()

    def _send_map(self) -> None:
        """What is missing and the state; from here on each sender serves what the destination asks for."""
        self.set_bandwidth(self.postcopy_bandwidth)
        self._waiting, self._next = 1, self._commit
        for number, (_, orders, _) in enumerate(self._senders):
            orders.sendall(s.SERVE if number else s.SEND_MAP)

    def _runs_there(self) -> None:
        self.downtime = time.monotonic() - self._stopped_at
        self.machine.may_not_run = "it runs at the destination of its migration"
        self._change("postcopy-active")

    def _pause_postcopy(self, text: str) -> None:
        """The connection is lost. Nothing of the guest is: what the destination misses is all here."""
        self.error = text
        self._finish()
        self._change("postcopy-paused")

    def pause_postcopy(self) -> None:
        """Break the connections off, as if they were lost: to go on by another way."""
        if self.status != "postcopy-active":
            raise OperationInvalid("migrate-pause is currently only supported during postcopy-active")  # QEMU's words
        self._pause_postcopy("it was interrupted on request")

    def recover(self, uri: str) -> None:
        """Connect anew, to the destination that knows this migration. On an error all stays as it is."""
        if self.status != "postcopy-paused" or self.machine.status != "postmigrate":
            raise OperationInvalid("Cannot resume if there is no paused migration")  # QEMU's words
        if self._board.channels > 1 and uri.startswith(("fd:", "fd=")):
            raise InvalidArgument("a descriptor is one connection", remedy="give unix:PATH or tcp:HOST:PORT")
        self.uri = uri
        try:
            self._connect(self._board.channels, frame(RESUME))
        except BaseException:
            self._finish()
            raise
        self._change("postcopy-recover")
        self._waiting, self._next = 1, self._recovered
        self._senders[0][1].sendall(s.RECEIVE_MAP)

    def _recovered(self) -> None:
        self.error = ""
        self.machine.may_not_run = "it runs at the destination of its migration"
        for _, orders, _ in self._senders:
            orders.sendall(s.STREAM)
        self._change("postcopy-active")

    # The end -----------------------------------------------------------------------------------------------------

    def _completed(self) -> None:
        now = time.monotonic()
        self.total_time, self.remaining = now - self.began, 0
        if not self.postcopy:
            self.downtime = now - self._stopped_at
        self._finish()
        self._change("completed")

    # The other ends ----------------------------------------------------------------------------------------------

    def set_bandwidth(self, bytes_per_second: int) -> None:
        self._board.set_limit(bytes_per_second)

    def cancel(self) -> None:
        """Give up; the guest goes on here. Too late once the destination has been told to run."""
        if self.status in AFTER:
            raise OperationInvalid("the guest runs at the destination: post-copy cannot be cancelled")
        if self.status in BEFORE and self.machine.status != "postmigrate":
            self._change("cancelling")
            self._end_without("cancelled")

    def _fail(self, text: str) -> None:
        if self.status in AFTER:
            self._pause_postcopy(text)
            return
        if self.status not in BEFORE:
            return
        self.error = text
        if self.machine.status == "postmigrate":
            # RUN may have arrived or not. Never two: this one stays stopped, a person decides.
            if self.postcopy:
                self._pause_postcopy(f"{text}; the destination may or may not run: only if it is gone, `cont` here")
                return
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

    def _end_throttle(self) -> None:
        if self._throttle is not None:
            self._throttle.stop()

    def _finish(self) -> None:
        """Senders end, nothing is logged any more."""
        self._end_throttle()
        senders, self._senders = self._senders, []
        for pid, orders, pidfd in senders:
            self.machine.loop.remove_reader(orders.fileno())
            orders.close()
            end_helper(pid, pidfd)
        if self._state >= 0:
            os.close(self._state)
            self._state = -1
        self._dirty.stop()
        if self._held:
            self._held = False
            self.machine.release()

    def close(self) -> None:
        """The machine ends."""
        if self.status in GOING:
            self.status = "failed"
            self._held = False
            self._finish()

    def report(self) -> dict[str, Any]:
        """QEMU's MigrationInfo (qapi/migration.json)."""
        now = time.monotonic()
        board, going = self._board, self.status in GOING
        if self.status in AFTER:
            self.remaining = board.pages * PAGE
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
                "postcopy-requests": board.requests,
                "page-size": PAGE,
                "multifd-bytes": board.sent if board.channels > 1 else 0,
                "pages-per-second": int(self.rate / PAGE),
                "precopy-bytes": board.sent - board.postcopy,
                "downtime-bytes": 0,
                "postcopy-bytes": board.postcopy,
            },
        }
        if self.status == "completed" or self.status in AFTER:
            info["downtime"] = int(1000 * self.downtime)
        else:
            info["expected-downtime"] = int(1000 * self.expected_downtime)
        if self._throttle is not None and self._throttle.percentage and going:
            info["cpu-throttle-percentage"] = self._throttle.percentage
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
