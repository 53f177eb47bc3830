"""Live migration, the destination: a machine that waits, is filled, and goes on where the source stopped.

RAM is written by a thread a channel: no vCPU runs yet, so nobody waits for the interpreter's lock. What comes is
checked before it is used: sizes before they are received, addresses against RAM, the machine against the source's
header before a page is taken, the state by every device that restores it. On an error the source is told and keeps its
guest.

In post-copy the state comes before all of RAM has: from then on `Postcopy` has the connections, and the guest runs
while its pages arrive.
"""

from __future__ import annotations

import _thread
import os
import socket

from kvik.errors import InvalidArgument, KvikError, OperationFailed, OperationInvalid
from kvik.vmm.layout import PAGE
from kvik.vmm.state import stream
from kvik.vmm.state.capture import MALFORMED, apply, check_devices
from kvik.vmm.state.cpucheck import arrange_processors, check_cpu
from kvik.vmm.state.pager import COMPLETE, FAULTED, LOST, RECOVERED, STARTED
from kvik.vmm.state.postcopy import Ability, Postcopy
from kvik.vmm.state.values import MAX_STATE, Fields, decode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from kvik.vmm.machine import Machine

__all__ = ["Incoming"]

WHERE = "the incoming machine"


class Incoming:
    """One incoming migration at `uri`. `status` is QEMU's word; the machine's is "inmigrate" until it has come."""

    def __init__(
        self, machine: Machine, uri: str, ability: Ability, on_change: Callable[[str], None] | None = None
    ) -> None:
        self.machine, self.uri, self.on_change = machine, uri, on_change
        self.ability = ability
        self.postcopy: Postcopy | None = None
        self._missing: dict[int, bytes] = {}  # what the source says is still to come: a bitmap by region
        self.status, self.error = "setup", ""
        self.received = 0
        self._channels: dict[int, socket.socket] = {}
        self._count, self._token = 0, b""
        self._ended = 0
        self._threads: list[tuple[socket.socket, _thread.LockType]] = []  # locks are released when a thread ends
        self._state: dict[str, Any] | None = None
        self._lock = _thread.allocate_lock()
        self._socket: socket.socket | None
        self._socket, listening = stream.listen(uri)
        machine.on_close.append(self.close)
        if listening:
            machine.loop.add_reader(self._socket.fileno(), self._accept)
        else:
            connection, self._socket = self._socket, None
            self._greet(connection)

    @property
    def address(self) -> tuple[str, int]:
        """Where it listens, by TCP."""
        assert self._socket is not None
        name: tuple[str, int] = self._socket.getsockname()[:2]
        return name

    def _accept(self) -> None:
        if self._socket is not None:
            self._greet(self._socket.accept()[0])

    def _greet(self, connection: socket.socket) -> None:
        connection.setblocking(True)
        connection.settimeout(10)  # for the greeting; a stranger must not hold a thread for ever
        done = _thread.allocate_lock()
        done.acquire()
        self._threads.append((connection, done))
        _thread.start_new_thread(self._channel, (connection, done))

    # On a thread a channel ---------------------------------------------------------------------------------------

    def _channel(self, connection: socket.socket, done: _thread.LockType) -> None:
        try:
            self._serve(connection)
        finally:
            done.release()

    def _serve(self, connection: socket.socket) -> None:
        known = False
        try:
            channel, channels, token = stream.receive_greeting(connection)
            with self._lock:
                if self._channels and (channels, token) != (self._count, self._token):
                    raise OperationFailed("a second migration came while one goes on")
                if channel in self._channels:
                    raise OperationFailed(f"channel {channel} came twice")
                self._count, self._token = channels, token
                self._channels[channel] = connection
            known = True
            connection.settimeout(None)
            self._receive(channel, connection)
        except (KvikError, OSError, MemoryError, *MALFORMED) as error:
            text = str(error)
            if known:
                self.machine.loop.call_soon(lambda: self._fail(text))
            else:
                connection.close()
                self.machine.log(f"migration: a connection was refused: {text}")

    def _receive(self, channel: int, sock: socket.socket) -> None:
        memory, ended, seen = self.machine.memory, False, channel != 0
        while True:
            kind, size, address = stream.receive_frame(sock)
            if kind == stream.HEADER and not seen:
                self._check(decode(self._data(sock, size, stream.MAX_HEADER), WHERE))
                seen = True
                sock.sendall(stream.frame(stream.READY))
            elif not seen:
                raise OperationFailed(f"the stream begins with frame {kind}, not with its header")
            elif kind == stream.PAGES and not ended:
                if not 0 < size <= stream.CHUNK or size % PAGE or address % PAGE:
                    raise OperationFailed(f"{size} bytes of pages for address {address:#x} cannot be")
                stream.receive_exactly(sock, memory.view(address, size))
                self.received += size
            elif kind == stream.ZERO and not ended:
                if not 0 < size <= stream.CHUNK // PAGE or address % PAGE:
                    raise OperationFailed(f"{size} pages of zeroes at {address:#x} cannot be")
                memory.discard(address, size * PAGE)
            elif kind == stream.END and not ended:
                ended = True
                with self._lock:
                    self._ended += 1
                if channel:
                    self._maybe()
                    return
            elif kind == stream.MISSING and ended and self._state is None:
                self._take_missing(sock, size, address)
            elif kind == stream.STATE and ended and self._state is None:
                self._state = Fields(decode(self._data(sock, size, MAX_STATE), WHERE), WHERE).members
                postcopy = bool(self._missing)
                self._maybe()
                if postcopy:
                    return  # the pager has the connection from here on
            elif kind == stream.RUN and self.status == "device":
                self.machine.loop.call_soon(self._run)
                return
            else:
                raise OperationFailed(f"frame {kind} does not belong here")

    def _take_missing(self, sock: socket.socket, size: int, address: int) -> None:
        self.ability.check(self.machine)
        for region in self.machine.memory.regions:
            if region.start == address and address not in self._missing and size == -(-region.size // PAGE // 64) * 8:
                self._missing[address] = self._data(sock, size, size)
                return
        raise OperationFailed(f"{size} bytes of what is missing at {address:#x} do not fit this memory")

    def _data(self, sock: socket.socket, size: int, limit: int) -> bytes:
        if size > limit:
            raise OperationFailed(f"{size} bytes, where {limit} are the most there can be")
        data = bytearray(size)
        stream.receive_exactly(sock, memoryview(data))
        return bytes(data)

    def _check(self, header: Any) -> None:
        fields = Fields(header, WHERE)
        regions = [[region.start, region.size] for region in self.machine.memory.regions]
        if fields.items("regions") != regions:
            there, here = sum(size for _, size in fields.items("regions")) >> 20, self.machine.memory.size >> 20
            raise OperationFailed(
                f"{WHERE} has {there} MiB of memory, or places it otherwise; this one has {here}",
                remedy="start the destination with the same memory",
            )
        check_devices(self.machine, fields.object("devices"), WHERE)
        check_cpu(self.machine, fields, fresh=True)
        if fields.members.get("postcopy"):
            self.ability.check(self.machine)
        self.machine.loop.call_soon(lambda: self._change("active"))

    def _maybe(self) -> None:
        """All channels have ended and the state is there: put it in."""
        with self._lock:
            ready = self._state is not None and self._ended == self._count
        if ready:
            self.machine.loop.call_soon(self._restore)

    # On the loop -------------------------------------------------------------------------------------------------

    def _change(self, status: str) -> None:
        self.status = status
        if self.on_change is not None:
            self.on_change(status)

    def _restore(self) -> None:
        if self.status != "active" or self._state is None:
            return
        try:
            cpu = Fields(self._state, WHERE).fields("cpu")
            check_cpu(self.machine, cpu, fresh=True)
            arrange_processors(self.machine, cpu)
            if self._missing:
                self._begin_postcopy()
            apply(self.machine, self._state, WHERE, identity=True, catch_up=True, same=True)
            self._change("device")
            if self.postcopy is not None:
                self.postcopy.say_done()
            else:
                self._channels[0].sendall(stream.frame(stream.DONE))
        except (KvikError, OSError) as error:
            self._fail(str(error))

    def _begin_postcopy(self) -> None:
        """Hand the connections, and the listening socket, to the pager."""
        listener, self._socket = self._socket, None
        if listener is not None:
            self.machine.loop.remove_reader(listener.fileno())
        self.postcopy = Postcopy(
            self.machine,
            self.ability.check(self.machine),
            missing=self._missing,
            token=self._token,
            listener=listener,
            on_event=self._paged,
        )
        self._missing = {}
        sockets = [self._channels[number] for number in sorted(self._channels)]
        self.postcopy.begin(sockets)
        # Their threads have ended, or end: nothing is shut down here, only let go of.
        for sock, done in [item for item in self._threads if item[0] in sockets]:
            done.acquire()
            self._threads.remove((sock, done))
            sock.close()
        self._channels.clear()

    def _paged(self, word: bytes, text: str) -> None:
        """What the pager says."""
        machine = self.machine
        if word == STARTED and self.status == "device":
            self._run("postcopy-active")
        elif word == LOST:
            self.error = text
            machine.log(f"migration: post-copy stands still: {text}; {self._way_back()}")
            machine.may_not_run = "parts of its memory are still at the source: let the migration recover"
            machine.stall()
            self._change("postcopy-paused")
        elif word == RECOVERED:
            self.error = machine.may_not_run = ""
            machine.unstall()
            self._change("postcopy-active")
        elif word == COMPLETE:
            self._close_sockets()
            self._change("completed")
        elif word == FAULTED:
            self._fail(text)

    def _way_back(self) -> str:
        return "`migrate` with resume at the source goes on" + (
            "" if self.postcopy and self.postcopy.listener else (", after `migrate-recover` here")
        )

    def recover(self, uri: str) -> None:
        """Wait for the source there, after the connection of post-copy was lost."""
        if self.postcopy is None or self.status != "postcopy-paused":
            raise OperationInvalid("Migrate recover can only be run when postcopy is paused.")  # QEMU's words
        listener, listening = stream.listen(uri)
        if not listening:
            listener.close()
            raise InvalidArgument("the source must be able to connect", remedy="give unix:PATH or tcp:HOST:PORT")
        self._remove_path()
        self.uri = uri
        self.postcopy.listen(listener)

    def _run(self, status: str = "completed") -> None:
        machine = self.machine
        self._close_sockets()
        if self.postcopy is None:
            self.ability.close()
        self._change(status)
        for device in machine.devices.values():
            if (announce := getattr(getattr(device, "device", device), "announce", None)) is not None:
                announce()
        if Fields(self._state or {}, WHERE).text("status") == "running" and not machine.config.paused:
            machine.resume()
        else:
            machine.status = "paused"

    def _fail(self, text: str) -> None:
        """The source keeps the guest; this process is of no use any more."""
        if self.status in ("failed", "completed"):
            return
        self.error = text
        if self.postcopy is not None:
            self.postcopy.refuse(text)
        elif self.status == "device":
            # The source may have given the guest up already: everything is here, a person may say `cont`.
            self.machine.log(f"migration: the source was lost before it said go: {text}; `cont` starts the guest here")
            self._close_sockets()
            self.machine.status = "paused"
            self._change("failed")
            return
        self.machine.log(f"migration: {text}")
        data = text.encode()[:4096]
        if (sock := self._channels.get(0)) is not None:
            try:
                sock.settimeout(2)
                sock.sendall(stream.frame(stream.FAILED, len(data)) + data)
            except OSError:
                pass
        self._close_sockets()
        self._change("failed")
        self.machine.exit_code = 1
        self.machine.quit("migration-failed")

    def _close_sockets(self) -> None:
        if self._socket is not None:
            self.machine.loop.remove_reader(self._socket.fileno())
            self._socket.close()
            self._socket = None
        if self.postcopy is None or self.postcopy.listener is None:
            self._remove_path()
        for sock, done in self._threads:
            try:
                sock.shutdown(socket.SHUT_RDWR)  # wakes the channel's thread
            except OSError:
                pass
            done.acquire()  # it may hold a view of RAM
            sock.close()
        self._threads.clear()
        self._channels.clear()

    def _remove_path(self) -> None:
        if self.uri.startswith("unix:"):
            try:
                os.unlink(self.uri[5:])  # noqa: PTH108 - pathlib is not imported
            except FileNotFoundError:
                pass
            self.uri = ""

    def close(self) -> None:
        if self.postcopy is not None:
            self.postcopy.close()
        self.ability.close()
        self._close_sockets()

    def report(self) -> dict[str, Any]:
        report: dict[str, Any] = {"status": self.status}
        if self.postcopy is not None:
            board = self.postcopy.board
            report["ram"] = {
                "total": sum(region.size for region in board.regions),
                "remaining": board.pages * PAGE,
                "postcopy-requests": board.requests,
                "postcopy-bytes": board.postcopy,
                "page-size": PAGE,
            }
        return report | ({"error-desc": self.error} if self.error else {})
