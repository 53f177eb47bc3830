"""Post-copy, the destination: the guest runs while the rest of its memory arrives.

This process registers what is missing with userfaultfd, forks the process that fills it (`pager`), and from then on
only listens to what that says. The guest, KVM and vhost wait in the kernel for pages that they touch. Our own devices
ask first (`Arrival`): a thread that waited inside the interpreter would keep all others from running.
"""

from __future__ import annotations

import ctypes
import select
import socket
import struct
import time

from kvik.errors import HostError, OperationFailed, OperationUnsupported
from kvik.vmm.faults import GuestFault
from kvik.vmm.layout import PAGE
from kvik.vmm.state import pager
from kvik.vmm.state.dirty import clear_run, page_runs
from kvik.vmm.state.helper import end_helper, not_inherited
from kvik.vmm.state.sender import Board
from kvik.vmm.state.stream import CHUNK
from kvik.vmm.state.userfaultfd import Userfaultfd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from kvik.vmm.machine import Machine
    from kvik.vmm.memory import Region

__all__ = ["Ability", "Arrival", "Postcopy"]

MAX_RANGES = 1024  # pieces of memory that are watched: each splits a mapping, of which Linux allows 65530
_libc = ctypes.CDLL(None)
_libc.memchr.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
_libc.memchr.restype = ctypes.c_void_p


class Ability:
    """Whether this machine could be a destination of post-copy. Found out before the sandbox is entered, where the
    descriptor can no longer be had."""

    def __init__(self) -> None:
        self.uffd: Userfaultfd | None = None
        self._error: HostError | None = None
        try:
            self.uffd = Userfaultfd()
        except HostError as error:
            self._error = error

    def check(self, machine: Machine) -> Userfaultfd:
        """Raises what stands in the way, and what to do about it."""
        if self.uffd is None:
            assert self._error is not None
            raise OperationUnsupported(f"post-copy is not possible here: {self._error}", remedy=self._error.remedy)
        if machine.config.memory.hugepages:
            raise OperationUnsupported(
                "post-copy into explicit huge pages is not possible: a page would arrive in 512 parts",
                remedy="start the destination without hugepages, or migrate without postcopy-ram",
            )
        for name in machine.devices:
            device = machine.find(name)
            if getattr(device, "maps_ram", False):
                raise OperationUnsupported(
                    f"post-copy is not possible with {name} ({device.kind}): its back end maps memory by itself, and "
                    "would see zeroes where pages are missing",
                    remedy="unplug it first (device_del), or migrate without postcopy-ram",
                )
        confined = machine.on_thread_start is not None and machine.config.sandbox == "on"
        if confined and not machine.config.migratable:
            raise OperationUnsupported(
                "this machine's sandbox does not let it fork the process that post-copy needs",
                remedy="start the destination with --migratable",
            )
        return self.uffd

    def close(self) -> None:
        if self.uffd is not None:
            self.uffd.close()
            self.uffd = None


class Arrival:
    """What `GuestMemory.view` asks before this process touches RAM: called with (address, size), it returns when all
    of that is there. Waits without the interpreter's lock. GuestFault when the machine ends first."""

    def __init__(self, machine: Machine, board: Board, want: Callable[[int], None]) -> None:
        self._machine, self._board, self._want = machine, board, want
        # Pages that were seen here: they stay, since nothing is discarded meanwhile.
        self._seen = [memoryview(bytearray(b"\xff" * len(board.bitmap(index)))) for index in range(len(board.regions))]

    def __call__(self, address: int, size: int) -> None:
        for index, region in enumerate(self._board.regions):
            if region.start <= address < region.end:
                offset = address - region.start
                first, end = offset // PAGE, -(-min(offset + size, region.size) // PAGE)
                self._see(index, region, first, end)
                return

    def _see(self, index: int, region: Region, first: int, end: int) -> None:
        missing, unseen = self._board.bitmap(index), self._seen[index]
        for page in range(first, end):
            if not unseen[page >> 3] >> (page & 7) & 1:
                continue
            if missing[page >> 3] >> (page & 7) & 1:
                self._wait(missing, page, region.start + page * PAGE)
            # It is put in, or was never there and comes now, as zeroes: a call outside of the lock.
            _libc.memchr(region.address + page * PAGE, 0, 1)
            clear_run(unseen, page, 1)

    def _wait(self, missing: memoryview, page: int, address: int) -> None:
        asked, pause = -1e9, 0.0001
        while missing[page >> 3] >> (page & 7) & 1:
            if self._machine.ending:
                raise GuestFault(f"the machine ends before its memory at {address:#x} has come")
            if (now := time.monotonic()) > asked + 1:  # again: a connection may have been lost meanwhile
                self._want(address)
                asked = now
            time.sleep(pause)
            pause = min(2 * pause, 0.005)


class Postcopy:
    """The second half of an incoming migration. `on_event` hears pager's words with their texts, on the loop."""

    def __init__(
        self,
        machine: Machine,
        uffd: Userfaultfd,
        *,
        missing: dict[int, bytes],
        token: bytes,
        listener: socket.socket | None,
        on_event: Callable[[bytes, str], None],
    ) -> None:
        self.machine, self.token, self.listener = machine, token, listener
        self._uffd, self._on_event = uffd, on_event
        self.board = Board(list(machine.memory.regions), 1)
        if not pager.bitmaps_fit(self.board.regions, missing):
            raise OperationFailed("what the source says is missing does not fit this memory")
        for index, region in enumerate(self.board.regions):
            self.board.bitmap(index)[:] = missing[region.start]
        self._ranges = self._watched()
        self._running = False
        self._pager: tuple[int, int, socket.socket] | None = None
        self._ours: list[int] = []

    def _watched(self) -> list[tuple[int, int]]:
        """Addresses and sizes here of what holds missing pages, in whole pieces of 2 MiB or more."""
        grain = CHUNK
        while True:
            runs: list[tuple[int, int]] = []
            for index, region in enumerate(self.board.regions):
                last = -1
                for first, count in page_runs(self.board.bitmap(index)):
                    start = first * PAGE // grain * grain
                    end = min(-(-(first + count) * PAGE // grain) * grain, region.size)
                    if start <= last:
                        start = runs.pop()[0] - region.address
                    last = end
                    runs.append((region.address + start, end - start))
            if len(runs) <= MAX_RANGES:
                return runs
            grain *= 2

    def begin(self, sockets: list[socket.socket]) -> None:
        """Watch and drop what is outdated, fork the pager, which is the only one to use `sockets` afterwards."""
        memory = self.machine.memory
        # In this order: what is dropped and not watched, the kernel may fill with zeroes for the sake of a huge page.
        for address, size in self._ranges:
            self._uffd.register(address, size)
        for index, region in enumerate(self.board.regions):
            for first, count in page_runs(self.board.bitmap(index)):
                memory.discard(region.start + first * PAGE, count * PAGE)
        memory.arrival = Arrival(self.machine, self.board, self._want)
        self.machine.before_end.append(self.close)
        self._fork(sockets)

    def _fork(self, sockets: list[socket.socket]) -> None:
        keep = [self._uffd.fd, *(sock.fileno() for sock in sockets)]
        if self.listener is not None:
            keep.append(self.listener.fileno())
        with not_inherited(self.machine.memory.regions):
            pid, pidfd, orders = pager.start(
                lambda orders: pager.Pager(
                    self.board,
                    self._uffd,
                    self._ranges,
                    sockets,
                    token=self.token,
                    orders=orders,
                    listener=self.listener,
                    running=self._running,
                ),
                keep,
            )
        self._pager = pid, pidfd, orders
        self.machine.loop.add_reader(orders.fileno(), self._heard)

    def _tell(self, message: bytes, descriptors: list[int] | None = None) -> None:
        if self._pager is not None:
            try:
                socket.send_fds(self._pager[2], [message], descriptors or [], socket.MSG_DONTWAIT)
            except OSError:
                pass  # it has ended, which `_heard` learns, or has too much to do: then it is asked again

    def _want(self, address: int) -> None:
        self._tell(pager.WANT + struct.pack("<Q", address))

    def say_done(self) -> None:
        """The machine could run."""
        self._tell(pager.SAY_DONE)

    def refuse(self, text: str) -> None:
        """It cannot: the source keeps the guest."""
        if self._pager is not None:
            self._tell(pager.FAIL + text.encode()[: pager.MAX_MESSAGE - 1])
            select.select([self._pager[1]], [], [], 2 * pager.PATIENCE)  # until it has said so, and ended

    def listen(self, listener: socket.socket) -> None:
        """Where the source may come again."""
        if self.listener is not None:
            self.listener.close()
        self.listener = listener
        self._tell(pager.LISTEN, [listener.fileno()])

    def _heard(self) -> None:
        assert self._pager is not None
        message = self._pager[2].recv(pager.MAX_MESSAGE)
        word, text = message[:1], message[1:].decode(errors="replace")
        if not word or (word == pager.FAULTED and self._running):
            self._restart(text or "the process that fills memory ended")
            return
        self._running |= word == pager.STARTED
        if word == pager.COMPLETE:
            self._end()
        self._on_event(word, text)

    def _restart(self, text: str) -> None:
        """It was killed, by whomever: what is missing is known here, and who waits goes on waiting."""
        self._end_pager()
        if not self._running:
            self._on_event(pager.FAULTED, text)
            return
        self._fork([])
        self._on_event(pager.LOST, text)

    def _end_pager(self) -> None:
        if self._pager is not None:
            pid, pidfd, orders = self._pager
            self._pager = None
            self.machine.loop.remove_reader(orders.fileno())
            end_helper(pid, pidfd)
            orders.close()

    def _end(self) -> None:
        """Everything is here: memory is as any."""
        for address, size in self._ranges:
            self._uffd.unregister(address, size)
        self.machine.memory.arrival = None
        self.close()

    def close(self) -> None:
        """The machine ends, or post-copy does. Who waits in the kernel goes on, with zeroes where pages are missing:
        the guest must not, and our own threads do not (`Arrival`)."""
        if self.close in self.machine.before_end:
            self.machine.before_end.remove(self.close)
        self._end_pager()
        self._uffd.close()
        if self.listener is not None:
            self.listener.close()
            self.listener = None
