"""What kvik-vmm's disk needs of a machine, where there is only the disk: memory of another process, a loop, a monitor.

One VMM at a time: others wait in the socket's queue until it has gone. After it has gone the image is whole on disk.
"""

from __future__ import annotations

import os
import socket
import sys

from kvik.errors import KvikError
from kvik.vmm.blk.back_end import BackEnd, RingTransport
from kvik.vmm.blk.image import flush
from kvik.vmm.blk.inflight import TrackedQueue, inflight_memory
from kvik.vmm.blk.memory import SharedMemory
from kvik.vmm.log import Log, LogLimit
from kvik.vmm.loop import EventLoop

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from kvik.vmm.blk.backups import Backups
    from kvik.vmm.blk.overlay import Overlays
    from kvik.vmm.state.protection import Protection
    from kvik.vmm.virtio.blk import Blk

__all__ = ["BlkHost"]

NAME = "kvik-blk"


class BlkHost:
    """`run` until `quit`, the VMM's end, or an error that leaves nothing to serve."""

    status = "running"

    def __init__(self) -> None:
        self.loop = EventLoop()
        self.memory = SharedMemory()
        self.devices: dict[str, Any] = {}
        self.listeners: list[Callable[[str, dict[str, Any]], None]] = []
        self.code = 0
        self._log = LogLimit(Log(name=NAME))
        self._listener: socket.socket | None = None
        self._back_end: BackEnd | None = None
        self.life: socket.socket | None = None  # kept open
        self.overlays: Overlays | None = None  # of the device
        self.inflight_fd = -1  # memory for requests in flight: a VMM holds it longer than we may live
        self.backups: Backups | None = None
        self.protection: Protection | None = None  # of the VMM's memory, which is being saved
        self.loop.on_error = self._failed

    # What a device and a monitor ask of a machine

    def find(self, name: str) -> Any:
        return self.devices[name]

    def emit(self, name: str, data: dict[str, Any] | None = None) -> None:
        for listener in self.listeners:
            listener(name, data or {})

    def log(self, text: str) -> None:
        self._log.write("warning", text)

    # The VMM

    def serve(self, device: Blk, sock: socket.socket) -> None:
        """`device` to whoever connects to `sock`, or to its other end if it is a connection already."""
        self.devices[device.name] = device
        device.split_queue = TrackedQueue
        self.inflight_fd = inflight_memory(len(device.queue_sizes), max(device.queue_sizes))
        device.transport = self._transport = RingTransport(len(device.queue_sizes))
        device.attach(self)  # type: ignore[arg-type]  # quacks like a machine
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            sock.setblocking(False)
            self._listener = sock
            self.loop.add_reader(sock.fileno(), lambda: self._accept(device))
        else:
            self._begin(device, sock)

    def ring_starts(self) -> None:
        """From here on the guest may write: an image that was put on top is there to stay."""
        if self.overlays is not None:
            self.overlays.keep()

    def _accept(self, device: Blk) -> None:
        assert self._listener is not None
        try:
            sock, _ = self._listener.accept()
        except OSError:
            self.loop.hold_reader(self._listener.fileno())
            return
        self.loop.remove_reader(self._listener.fileno())  # until this one has gone
        self._begin(device, sock)

    def _begin(self, device: Blk, sock: socket.socket) -> None:
        self._back_end = BackEnd(self, device, self._transport, sock, lambda reason: self._ended(device, reason))

    def _ended(self, device: Blk, reason: str) -> None:
        self._back_end = None
        if reason:
            self.log(f"{device.name}: {reason}")
        if device.image.in_flight:  # the kernel still writes into that memory
            self.code = 1
            self.loop.stop()
            return
        self.memory.close()
        try:
            flush(device)
        except (OSError, KvikError) as error:
            self.log(f"{device.name}: what the guest wrote last may be lost: {error}")
        if self._listener is None:
            self.loop.stop()
        else:
            self.loop.add_reader(self._listener.fileno(), lambda: self._accept(device))

    # The end

    def _failed(self, error: BaseException) -> None:
        """A fault of ours: the disk ends rather than to go on with what may be wrong in memory."""
        print(f"{NAME}: ended by a fault of its own: {error!r}", file=sys.stderr)
        sys.excepthook(type(error), error, error.__traceback__)
        sys.stderr.flush()
        os._exit(3)

    def quit(self) -> None:
        """End in order: `run` returns."""
        self.loop.stop()

    def run(self) -> int:
        self.loop.run()
        return self.code

    def close(self) -> None:
        """Let go of the VMM; close the devices, which completes their images."""
        if self._back_end is not None:
            self._back_end.close("")
        if self.backups is not None:
            self.backups.close()
        if self.overlays is not None:
            self.overlays.close()
        for device in self.devices.values():
            device.close()
        if self._listener is not None:
            self._listener.close()
        if self.inflight_fd >= 0:
            os.close(self.inflight_fd)
