"""virtio-vsock (virtio 1.2, 5.10) over Unix sockets: streams between the guest and the host without a network.

Host to guest: connect to `path`, send `CONNECT port\\n`; `OK port\\n` comes back when a guest's program accepted, or
the connection ends. Guest to host: a connection to port N reaches who listens on the Unix socket `path_N`.

Every stream has credit (5.10.6.3): neither side sends more than the other has room for. What the guest sends beyond it
resets that stream, so nothing here grows without bound.
"""

from __future__ import annotations

import os
import socket
from collections import deque
from struct import Struct

from kvik.errors import HostError, InvalidArgument
from kvik.vmm.faults import GuestFault
from kvik.vmm.virtio.config import Field
from kvik.vmm.virtio.device import VirtioDevice
from kvik.vmm.virtio.vsockstream import HEADER_SIZE, HOST_CID, Header, Stream

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from kvik.vmm.device import State
    from kvik.vmm.virtio.queue import Chain

RX, TX, EVENT = range(3)
REQUEST, RESPONSE, RST, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST = range(1, 8)
_STREAM = 1  # VIRTIO_VSOCK_TYPE_STREAM
_TRANSPORT_RESET = Struct("<I").pack(0)
_MAX_RESETS = 256  # answers to packets of no stream that may wait; more are not sent
_FIRST_PORT = 1 << 30
_BUDGET = 256


class VsockDevice(VirtioDevice):
    """A socket device over the listening Unix socket `listener`, which it owns; `path` is where that is."""

    kind = "virtio-vsock"
    device_id = 19
    pci_class = 0x078000
    queue_sizes = (128, 128, 16)
    config_fields = (Field("guest_cid", 0, 8),)

    def __init__(
        self, name: str, cid: int, path: str, listener: socket.socket | None = None, *, max_streams: int = 512
    ) -> None:
        check_cid(name, cid)
        self.path = path
        self.max_streams = max_streams
        self.streams: dict[tuple[int, int], Stream] = {}  # (guest's port, host's port)
        self.shaking: dict[int, Stream] = {}  # by descriptor: connected, but no CONNECT line yet
        self.resets: deque[Header] = deque()
        self.starved = False
        self._ready: deque[Stream] = deque()  # streams that have something for the guest
        self._next_port = _FIRST_PORT
        self._paused = False
        self._tell_reset = False
        self._listening = False
        self.rx_bytes = self.tx_bytes = self.refused = self.total = 0
        self.listener = listener or listen(path)
        self.listener.setblocking(False)
        super().__init__(name)
        self.config["guest_cid"] = cid
        self.cid = cid

    # --- life

    def activate(self) -> None:
        self.starved = False
        self._run_soon(self._start)

    def _run_soon(self, work: Callable[[], None]) -> None:
        def guarded() -> None:
            self.guarded(work)

        self.loop.call_soon(guarded)

    def _start(self) -> None:
        if self.machine is not None and self.machine.still:
            self._paused = True
            return
        if not self._listening:
            self._listening = True
            self.loop.add_reader(self.listener.fileno(), self._accept)
        if self._tell_reset:
            self._announce_reset()
        self._transmit()
        self._receive()

    def deactivate(self) -> None:
        self._stop_listening()
        for stream in [*self.streams.values(), *self.shaking.values()]:
            stream.close()
        self.streams.clear()
        self.shaking.clear()
        self._ready.clear()
        self.resets.clear()

    def _stop_listening(self) -> None:
        if self._listening:
            self._listening = False
            self.loop.remove_reader(self.listener.fileno())

    def reset(self) -> None:
        super().reset()
        self.deactivate()

    def pause(self) -> None:
        with self.lock:
            self._paused = True
            self._stop_listening()
            for stream in self.streams.values():
                stream.unwatch()

    def resume(self) -> None:
        with self.lock:
            if self._paused:
                self._paused = False
                if self.active:
                    self._run_soon(self._start)
                    for stream in self.streams.values():
                        self._run_soon(stream.watch)

    def close(self) -> None:
        super().close()
        self.deactivate()
        self.listener.close()

    def guarded(self, work: Callable[[], None]) -> None:
        """Run on the loop what a host's socket asks for; a guest's fault stops the device."""
        with self.lock:
            if self.active and not self._paused:
                try:
                    work()
                except GuestFault as fault:
                    self.needs_reset(str(fault))

    def queue_kicked(self, index: int) -> None:
        if self._paused:
            return
        if index == TX:
            self._transmit()
            self._receive()
        elif index == RX:
            if self.starved:
                self.starved = False
                for stream in self.streams.values():
                    stream.watch()
            self._receive()
        elif self._tell_reset:
            self._announce_reset()

    # --- from the guest

    def _transmit(self) -> None:
        queue = self.queues[TX]
        if not queue.ready:
            return
        while True:
            queue.disable_notifications()
            for _ in range(_BUDGET):
                chain = queue.pop()
                if chain is None:
                    break
                header = Header.unpack(chain.take_front(HEADER_SIZE))
                if header.length != chain.readable_size:
                    raise GuestFault(f"a vsock packet of {chain.readable_size} bytes says {header.length}")
                self._packet(header, chain)
                queue.push(chain, 0)
            else:
                queue.flush()
                self._run_soon(self._transmit)
                return
            queue.flush()
            if not queue.enable_notifications():
                return

    def _packet(self, header: Header, chain: Chain) -> None:
        if header.source_cid != self.cid or header.target_cid != HOST_CID:
            return  # 5.10.6.2: of another guest, or for nobody here
        stream = self.streams.get((header.source_port, header.target_port))
        if header.kind != _STREAM:
            self._refuse(header)
        elif stream is None:
            if header.op == REQUEST:
                self._connect(header)
            elif header.op != RST:
                self._refuse(header)
        else:
            stream.credit(header)
            self._stream_packet(stream, header, chain)

    def _stream_packet(self, stream: Stream, header: Header, chain: Chain) -> None:
        op = header.op
        if op == RW and stream.established:
            self.tx_bytes += header.length
            if not stream.take(chain.readable, header.length):
                self.drop(stream)  # more than it has credit for, or the host's end is gone
        elif op == RESPONSE and not stream.established:
            stream.accepted()
        elif op == SHUTDOWN:
            if stream.guest_shut(header.flags):
                self.drop(stream)
        elif op == RST:
            self.drop(stream, tell=False)
        elif op == CREDIT_REQUEST:
            stream.owe_credit = True
            self.wake(stream)
        elif op != CREDIT_UPDATE:
            self.drop(stream)

    def _refuse(self, header: Header) -> None:
        self.refused += 1
        if len(self.resets) < _MAX_RESETS:
            self.resets.append(header.answer(RST))

    def _connect(self, header: Header) -> None:
        """The guest connects to a port of the host."""
        if len(self.streams) >= self.max_streams:
            self._refuse(header)
            return
        peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        try:
            peer.connect(f"{self.path}_{header.target_port}")
        except OSError:  # nobody listens, or its queue is full
            peer.close()
            self._refuse(header)
            return
        stream = Stream(self, peer, header.source_port, header.target_port)
        stream.credit(header)
        stream.established = True
        stream.owe = RESPONSE
        self._add(stream)

    # --- from the host

    def _accept(self) -> None:
        self.guarded(self._accept_one)

    def _accept_one(self) -> None:
        try:
            peer, _ = self.listener.accept()
        except OSError:
            return  # it went away meanwhile, or there is no descriptor left
        if len(self.streams) + len(self.shaking) >= self.max_streams:
            peer.close()
            return
        peer.setblocking(False)
        stream = Stream(self, peer, 0, 0)
        self.shaking[peer.fileno()] = stream
        stream.watch()

    def shaken(self, stream: Stream, port: int | None) -> None:
        """The host's program told which port of the guest it wants; None: it told nonsense, or left."""
        del self.shaking[stream.socket.fileno()]
        if port is None:
            stream.close()
            return
        while (port, self._next_port) in self.streams:
            self._next_port = _FIRST_PORT + (self._next_port + 1 - _FIRST_PORT) % (1 << 30)
        stream.guest_port, stream.host_port = port, self._next_port
        self._next_port = _FIRST_PORT + (self._next_port + 1 - _FIRST_PORT) % (1 << 30)
        stream.owe = REQUEST
        self._add(stream)
        self._receive()

    def _add(self, stream: Stream) -> None:
        self.streams[stream.guest_port, stream.host_port] = stream
        self.total += 1
        self.wake(stream)
        stream.watch()

    def drop(self, stream: Stream, *, tell: bool = True) -> None:
        """End a stream; `tell` the guest."""
        if self.streams.pop((stream.guest_port, stream.host_port), None) is not None:
            stream.close()
            if tell and len(self.resets) < _MAX_RESETS:
                self.resets.append(stream.header(RST))

    # --- to the guest

    def wake(self, stream: Stream) -> None:
        """The stream has something for the guest."""
        if not stream.queued:
            stream.queued = True
            self._ready.append(stream)

    def pump(self) -> None:
        """Hand over what waits, from a host socket's callback."""
        self._receive()

    def _receive(self) -> None:
        queue = self.queues[RX]
        if not queue.ready or self.starved:
            return
        queue.disable_notifications()
        while self.resets or self._ready:
            chain = queue.pop()
            if chain is None:
                if queue.enable_notifications():
                    queue.disable_notifications()
                    if not queue.pending():
                        raise GuestFault("the receive queue's index went back")
                    continue
                self.starved = True
                for stream in self.streams.values():
                    stream.unwatch_reader()
                break
            if chain.readable or chain.writable_size < HEADER_SIZE:
                raise GuestFault(f"a vsock receive buffer of {chain.writable_size} writable bytes")
            written = self._fill(chain)
            if written:
                queue.push(chain, written)
            else:
                queue.undo_pop(chain)
        queue.flush()

    def _fill(self, chain: Chain) -> int:
        """Put one packet into the chain; its bytes, 0 if there was none after all."""
        if self.resets:
            return chain.write(self.resets.popleft().pack())
        stream = self._ready.popleft()
        stream.queued = False
        if self.streams.get((stream.guest_port, stream.host_port)) is not stream:
            return 0
        header = stream.next_packet(chain)
        if header is None:
            return 0
        if stream.has_more():
            self.wake(stream)
        if header.op == RST:
            self.drop(stream, tell=False)
        self.rx_bytes += header.length
        return chain.write(header.pack()) + header.length

    def _announce_reset(self) -> None:
        """5.10.6.7: all streams are gone (the machine was restored)."""
        queue = self.queues[EVENT]
        chain = queue.pop() if queue.ready else None
        if chain is not None:
            self._tell_reset = False
            queue.push(chain, chain.write(_TRANSPORT_RESET))
            queue.flush()

    # --- state

    def restore(self, state: State) -> None:
        """Streams do not outlive a snapshot: the guest is told that all are reset."""
        super().restore(state)
        self.config["guest_cid"] = self.cid
        self._tell_reset = self.active

    def stats(self) -> dict[str, int]:
        return {
            **super().stats(),
            "streams": len(self.streams),
            "streams_total": self.total,
            "refused": self.refused,
            "rx_bytes": self.rx_bytes,
            "tx_bytes": self.tx_bytes,
        }


def check_cid(name: str, cid: int) -> None:
    """InvalidArgument if no guest may have the address: 0 to 2 and 2^32-1 are reserved (5.10.4)."""
    if not 3 <= cid < 0xFFFFFFFF:
        raise InvalidArgument(f"{name}: the guest's CID {cid}: 3 to 4294967294 are possible")


def listen(path: str) -> socket.socket:
    """A listening Unix socket at `path`, mode 0600. HostError if that cannot be."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    old = os.umask(0o177)
    try:
        listener.bind(path)
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise HostError(
            f"cannot listen on {path} for vsock: {error.strerror}",
            errno=error.errno or 0,
            remedy="choose another path, or remove what a machine that is gone has left there",
        ) from error
    finally:
        os.umask(old)
    return listener
