"""The vhost-user protocol, back end's side (QEMU's docs/interop/vhost-user): a VMM says where rings and memory are.

The VMM is not trusted beyond its own machine: messages are bounded, every number in them is checked, and what it may
not say ends the connection. What the guest does wrong in a ring stops the device until its driver resets it, which the
VMM tells by taking the rings back and starting them again.
"""

from __future__ import annotations

import array
import os
import socket
import struct

from kvik.errors import HostError, KvikError
from kvik.vmm import vhost_user as v
from kvik.vmm.blk.inflight import Inflight, TrackedQueue
from kvik.vmm.blk.memory import DirtyPages
from kvik.vmm.faults import GuestFault
from kvik.vmm.virtio.queue import EVENT_IDX, INDIRECT_DESC, VERSION_1

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from kvik.vmm.blk.host import BlkHost
    from kvik.vmm.virtio.blk import Blk

    Answer = bytes | None

__all__ = ["BackEnd", "RingTransport"]

RESET_OWNER, SET_LOG_FD, SET_VRING_ERR = 4, 7, 14  # beside those that our own front end sends
RING_FEATURES = VERSION_1 | EVENT_IDX | INDIRECT_DESC
PROTOCOL_FEATURES = v.P_MQ | v.P_LOG_SHMFD | v.P_REPLY_ACK | v.P_CONFIG | v.P_INFLIGHT
MAX_FDS = v.MAX_REGIONS
VERSION_MASK = 3
SETTLES = 4.0  # seconds for requests of a ring that is taken back; the VMM waits for 5
WRITEBACK = 32  # the one field of the configuration space that a driver may write

_U64 = struct.Struct("=Q")
_REGIONS = struct.Struct("=II")


class _Ring:
    """What was said of one ring before it runs."""

    __slots__ = ("addresses", "base", "enabled", "kick", "running", "size")

    def __init__(self) -> None:
        self.addresses: tuple[int, int, int] | None = None  # descriptors, used, available: the VMM's
        self.size = self.base = 0
        self.kick = -1
        self.enabled = self.running = False


class RingTransport:
    """What carries the device: an eventfd for each ring, by which its VMM's guest is interrupted."""

    def __init__(self, queues: int) -> None:
        self.calls = [-1] * queues

    def config_changed(self, change: Callable[[], None] | None = None) -> None:
        """The VMM is told by whoever made the change (QMP block_resize), and asks anew."""
        if change is not None:
            change()

    def signal_queue(self, index: int) -> None:
        if self.calls[index] >= 0:
            try:
                os.eventfd_write(self.calls[index], 1)
            except OSError:
                pass  # it is full, or no eventfd: the VMM's own guest waits

    def signal_config(self) -> None: ...

    def notifier_fd(self, index: int) -> int:
        raise NotImplementedError  # nobody else serves these queues

    def release_notifier(self, index: int) -> None: ...

    def interrupt_fd(self, index: int) -> int | None:
        return self.calls[index]

    def needs_reset(self) -> None:
        """The device said it in the log. Its rings stand still."""


class BackEnd:
    """One connection about `device`, which `transport` carries. `closed` is called when it has
    ended, with the reason unless the VMM has just closed it."""

    def __init__(
        self,
        host: BlkHost,
        device: Blk,
        transport: RingTransport,
        sock: socket.socket,
        closed: Callable[[str], None],
    ) -> None:
        self._host, self._device, self._socket, self._closed = host, device, sock, closed
        self._calls = transport.calls
        self._fd = sock.fileno()
        self._data = bytearray()
        self._fds: list[int] = []
        self._features = self._protocol = 0
        self._log: DirtyPages | None = None
        self._inflight: Inflight | None = None
        self._rings = [_Ring() for _ in device.queue_sizes]
        sock.setblocking(False)
        host.loop.add_reader(self._fd, self._readable)

    @property
    def offered(self) -> int:
        return self._device.features | RING_FEATURES | v.F_LOG_ALL | v.F_PROTOCOL_FEATURES

    # Messages ----------------------------------------------------------------------------------------------------

    def _readable(self) -> None:
        try:
            while self._receive():
                pass
        except BlockingIOError:
            return
        except (OSError, KvikError, GuestFault) as error:
            self.close(str(error))

    def _receive(self) -> bool:
        """Take what is there of one message, and deal with it when it is whole. Raises what ends the connection."""
        size = v.HEADER.size
        if len(self._data) >= size:
            size += self._length()
        data, ancillary, _, _ = self._socket.recvmsg(
            size - len(self._data), socket.CMSG_SPACE(MAX_FDS * 4), socket.MSG_CMSG_CLOEXEC
        )
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                numbers = array.array("i")
                numbers.frombytes(payload[: len(payload) - len(payload) % numbers.itemsize])
                self._fds += numbers
        if not data:
            self.close("")
            return False
        self._data += data
        if len(self._fds) > MAX_FDS:
            raise HostError("the VMM sends more descriptors than any message has")
        if len(self._data) < v.HEADER.size or len(self._data) < v.HEADER.size + self._length():
            return True
        request, flags, _ = v.HEADER.unpack_from(self._data)
        payload, fds = bytes(self._data[v.HEADER.size :]), self._fds
        self._data.clear()
        self._fds = []
        self._obey(request, flags, payload, fds)
        return self._fd >= 0

    def _length(self) -> int:
        _, flags, length = v.HEADER.unpack_from(self._data)
        if flags & VERSION_MASK != v.VERSION or length > v.MAX_PAYLOAD:
            raise HostError(f"the VMM sends a message of {length} bytes, with flags {flags:#x}")
        return int(length)

    def _obey(self, request: int, flags: int, payload: bytes, fds: list[int]) -> None:
        handler = _HANDLERS.get(request)
        try:
            if handler is None:
                raise HostError(f"the VMM asks for {request}, which is not known here")
            with self._device.lock:
                answer = handler(self, payload, fds)
        except struct.error as error:
            raise HostError(f"the VMM's message {request} has {len(payload)} bytes") from error
        except (KvikError, GuestFault, OSError) as error:
            if not self._acknowledges(flags):
                raise
            self._host.log(f"the VMM's message {request} was refused: {error}")
            answer = _U64.pack(1)
        else:
            if answer is None and self._acknowledges(flags):
                answer = _U64.pack(0)
        finally:
            for fd in fds:  # those that nobody took
                os.close(fd)
        if answer is not None:
            message = v.HEADER.pack(request, v.VERSION | v.REPLY, len(answer)) + answer
            sent = [self._host.inflight_fd] if request == v.GET_INFLIGHT_FD and len(answer) == v.INFLIGHT.size else []
            if socket.send_fds(self._socket, [message], sent) != len(message):
                raise HostError("the VMM does not read its answers")

    def _acknowledges(self, flags: int) -> bool:
        return bool(flags & v.NEED_REPLY and self._protocol & v.P_REPLY_ACK)

    def _get_features(self, payload: bytes, fds: list[int]) -> Answer:
        return _U64.pack(self.offered)

    def _set_features(self, payload: bytes, fds: list[int]) -> Answer:
        (features,) = _U64.unpack(payload)
        if features & ~self.offered:
            raise HostError(f"the VMM chooses features {features:#x} of {self.offered:#x}")
        if any(ring.running for ring in self._rings) and (features ^ self._features) & ~v.F_LOG_ALL:
            raise HostError("the VMM changes features while rings run")
        self._features = features
        self._set_log()
        return None

    def _get_protocol_features(self, payload: bytes, fds: list[int]) -> Answer:
        return _U64.pack(PROTOCOL_FEATURES)

    def _set_protocol_features(self, payload: bytes, fds: list[int]) -> Answer:
        (self._protocol,) = _U64.unpack(payload)
        if self._protocol & ~PROTOCOL_FEATURES:
            raise HostError(f"the VMM chooses protocol features {self._protocol:#x}")
        return None

    def _nothing(self, payload: bytes, fds: list[int]) -> Answer:
        """SET_OWNER; RESET_OWNER and SET_LOG_FD, which no VMM needs any more."""
        return None

    def _get_queue_num(self, payload: bytes, fds: list[int]) -> Answer:
        return _U64.pack(len(self._rings))

    def _set_mem_table(self, payload: bytes, fds: list[int]) -> Answer:
        count, _ = _REGIONS.unpack_from(payload)
        if count > v.MAX_REGIONS or len(fds) != count or len(payload) != _REGIONS.size + count * v.REGION.size:
            raise HostError(f"the VMM tells {count} pieces of memory with {len(fds)} files")
        entries = [
            (start, size, user, offset) for start, size, user, offset in v.REGION.iter_unpack(payload[_REGIONS.size :])
        ]
        if not self._device.image.drain(SETTLES):
            raise HostError("requests into the old memory have not ended")
        taken, fds[:] = list(fds), []
        self._host.memory.set_table(entries, taken)
        return None

    # Log of written pages

    def _set_log_base(self, payload: bytes, fds: list[int]) -> Answer:
        size, offset = v.LOG.unpack(payload)
        old, self._log = self._log, DirtyPages(_one(fds), size, offset)
        if old is not None:
            old.close()
        self._set_log()
        return _U64.pack(0)

    def _set_log(self) -> None:
        on = self._features & v.F_LOG_ALL and self._log is not None
        self._host.memory.dirty_log = self._log.mark if on and self._log is not None else None

    # Requests in flight

    def _get_inflight_fd(self, payload: bytes, fds: list[int]) -> Answer:
        """New memory for them, for the VMM to hold. There is one piece, made before the sandbox."""
        _, _, queues, size = v.INFLIGHT.unpack(payload)
        if any(ring.running for ring in self._rings):
            raise HostError("the VMM wants new memory for requests in flight while rings run")
        length = os.fstat(self._host.inflight_fd).st_size
        self._inflight = Inflight(self._host.inflight_fd, length, 0, queues, size, fresh=True)
        return v.INFLIGHT.pack(length, 0, queues, size)

    def _set_inflight_fd(self, payload: bytes, fds: list[int]) -> Answer:
        length, offset, queues, size = v.INFLIGHT.unpack(payload)
        if any(ring.running for ring in self._rings):
            raise HostError("the VMM changes the memory for requests in flight while rings run")
        (fd,) = fds if len(fds) == 1 else (-1,)
        if fd < 0 or length > os.fstat(fd).st_size - offset:
            raise HostError(f"the VMM tells {length} bytes for requests in flight with {len(fds)} files")
        self._inflight = Inflight(fd, length, offset, queues, size)
        return None

    # Configuration space

    def _get_config(self, payload: bytes, fds: list[int]) -> Answer:
        offset, size, flags = v.CONFIG.unpack_from(payload)
        if offset + size > v.MAX_CONFIG_SIZE:
            raise HostError(f"the VMM wants {size} bytes of the configuration space at {offset}")
        data = bytes(self._device.config).ljust(v.MAX_CONFIG_SIZE, b"\0")
        return v.CONFIG.pack(offset, size, flags) + data[offset : offset + size]

    def _set_config(self, payload: bytes, fds: list[int]) -> Answer:
        offset, size, _ = v.CONFIG.unpack_from(payload)
        data = payload[v.CONFIG.size :]
        if (offset, size) != (WRITEBACK, 1) or len(data) != 1:
            raise HostError(f"the VMM writes {size} bytes of the configuration space at {offset}")
        self._device.config["writeback"] = data[0]
        self._device.config_written(WRITEBACK, 1)
        return None

    # Rings -------------------------------------------------------------------------------------------------------

    def _ring(self, index: int) -> _Ring:
        if index >= len(self._rings):
            raise HostError(f"the VMM speaks of ring {index} of {len(self._rings)}")
        return self._rings[index]

    def _idle(self, index: int) -> _Ring:
        ring = self._ring(index)
        if ring.running:
            raise HostError(f"the VMM changes ring {index} while it runs")
        return ring

    def _set_vring_num(self, payload: bytes, fds: list[int]) -> Answer:
        index, size = v.STATE.unpack(payload)
        ring = self._idle(index)
        if not 0 < size <= self._device.queue_sizes[index] or size & (size - 1):
            raise HostError(f"the VMM wants a ring of {size} entries")
        ring.size = size
        return None

    def _set_vring_base(self, payload: bytes, fds: list[int]) -> Answer:
        index, base = v.STATE.unpack(payload)
        self._idle(index).base = base & 0xFFFF
        return None

    def _set_vring_addr(self, payload: bytes, fds: list[int]) -> Answer:
        index, _, *addresses, _ = v.ADDR.unpack(payload)
        ring = self._ring(index)
        told = (addresses[0], addresses[1], addresses[2])
        if ring.running and told != ring.addresses:  # the same again: a log of its used ring was switched on or off
            raise HostError(f"the VMM moves ring {index} while it runs")
        ring.addresses = told
        return None

    def _set_vring_kick(self, payload: bytes, fds: list[int]) -> Answer:
        index, fd = self._descriptor(payload, fds)
        ring = self._ring(index)
        self._stop(index)
        self._set_kick(ring, fd)
        self._start_if_told(index)
        return None

    def _set_vring_call(self, payload: bytes, fds: list[int]) -> Answer:
        index, fd = self._descriptor(payload, fds)
        self._ring(index)
        self._set_call(index, fd)
        return None

    def _set_vring_err(self, payload: bytes, fds: list[int]) -> Answer:
        """Nobody listens there: what is wrong is told in the log."""
        return None

    def _set_vring_enable(self, payload: bytes, fds: list[int]) -> Answer:
        index, enabled = v.STATE.unpack(payload)
        self._ring(index).enabled = bool(enabled)
        if enabled:
            self._start_if_told(index)
        else:
            self._stop(index)
        return None

    def _get_vring_base(self, payload: bytes, fds: list[int]) -> Answer:
        index, _ = v.STATE.unpack(payload)
        ring = self._ring(index)
        base = self._stop(index)
        self._set_kick(ring, -1)
        self._set_call(index, -1)
        return v.STATE.pack(index, base)

    @staticmethod
    def _descriptor(payload: bytes, fds: list[int]) -> tuple[int, int]:
        (word,) = _U64.unpack(payload)
        return word & 0xFF, -1 if word & v.NO_FD else _one(fds)

    @staticmethod
    def _set_kick(ring: _Ring, fd: int) -> None:
        old, ring.kick = ring.kick, fd
        if old >= 0:
            os.close(old)

    def _set_call(self, index: int, fd: int) -> None:
        old, self._calls[index] = self._calls[index], fd
        if old >= 0:
            os.close(old)

    def _start_if_told(self, index: int) -> None:
        """A ring runs when its kick's eventfd is there and it is enabled (vhost-user, "Ring states")."""
        ring, device = self._rings[index], self._device
        enabled = ring.enabled or not self._features & v.F_PROTOCOL_FEATURES
        if ring.running or ring.kick < 0 or not enabled:
            return
        if ring.addresses is None or not ring.size:
            raise HostError(f"the VMM starts ring {index} without saying where it is")
        self._host.ring_starts()
        memory, queue = self._host.memory, device.queues[index]
        features = self._features & ~(v.F_LOG_ALL | v.F_PROTOCOL_FEATURES)
        size = queue.size = ring.size
        desc, used, avail = ring.addresses
        queue.desc = memory.guest_address(desc, 16 * size)
        queue.avail = memory.guest_address(avail, 6 + 2 * size)
        queue.used = memory.guest_address(used, 6 + 8 * size)
        queue.start(features)
        answered = memory.u16(queue.used + 2)
        base = ring.base
        if self._inflight is not None and isinstance(queue, TrackedQueue):
            queue.inflight = self._inflight.ring(index, size)
            again = queue.inflight.recover(answered)
            if again is not None:  # what was taken is answered, or one of these
                queue.again, base = again, answered + len(again) & 0xFFFF
        queue._set_position({"next_avail": base, "next_used": answered, "signalled": answered})
        if not device.active:
            device.broken = ""
            device.start(features)
        # Its events are those of an eventfd that nobody reads: edges. One comes now if it was kicked before.
        self._host.loop.add_reader(ring.kick, lambda: device.kick(index), edge=True)
        ring.running = True
        device.kick(index)  # for what the driver put before anybody listened

    def _stop(self, index: int) -> int:
        """Let go of a ring, when its requests are answered; the index of the next available entry."""
        ring, device = self._rings[index], self._device
        if not ring.running:
            return ring.base
        ring.running = False
        self._host.loop.remove_reader(ring.kick)
        queue = device.queues[index]
        if not device.image.drain(SETTLES):
            # The VMM sees by the used index that some are missing, and does not trust this state.
            self._host.log(f"ring {index} was taken back while the host's storage did not answer")
        device._publish()
        queue.ready = False
        ring.base = int(queue._position()["next_avail"])
        if not any(other.running for other in self._rings) and not device.image.in_flight:
            device.stop()
        return ring.base

    # End ---------------------------------------------------------------------------------------------------------

    def close(self, reason: str) -> None:
        if self._fd < 0:
            return
        fd, self._fd = self._fd, -1
        self._host.loop.remove_reader(fd)
        with self._device.lock:
            for index, ring in enumerate(self._rings):
                self._stop(index)
                self._set_kick(ring, -1)
                self._set_call(index, -1)
            if not self._device.image.in_flight:
                self._device.stop()
        self._host.memory.dirty_log = None
        if self._log is not None:
            self._log.close()
        for fd in self._fds:
            os.close(fd)
        self._socket.close()
        self._closed(reason)


def _one(fds: list[int]) -> int:
    if len(fds) != 1:
        raise HostError(f"the VMM sends {len(fds)} descriptors where one is needed")
    return fds.pop()


_HANDLERS: dict[int, Callable[[BackEnd, bytes, list[int]], Answer]] = {
    v.GET_FEATURES: BackEnd._get_features,
    v.SET_FEATURES: BackEnd._set_features,
    v.SET_OWNER: BackEnd._nothing,
    RESET_OWNER: BackEnd._nothing,
    v.SET_MEM_TABLE: BackEnd._set_mem_table,
    v.SET_LOG_BASE: BackEnd._set_log_base,
    SET_LOG_FD: BackEnd._nothing,
    v.SET_VRING_NUM: BackEnd._set_vring_num,
    v.SET_VRING_ADDR: BackEnd._set_vring_addr,
    v.SET_VRING_BASE: BackEnd._set_vring_base,
    v.GET_VRING_BASE: BackEnd._get_vring_base,
    v.SET_VRING_KICK: BackEnd._set_vring_kick,
    v.SET_VRING_CALL: BackEnd._set_vring_call,
    SET_VRING_ERR: BackEnd._set_vring_err,
    v.GET_PROTOCOL_FEATURES: BackEnd._get_protocol_features,
    v.SET_PROTOCOL_FEATURES: BackEnd._set_protocol_features,
    v.GET_QUEUE_NUM: BackEnd._get_queue_num,
    v.SET_VRING_ENABLE: BackEnd._set_vring_enable,
    v.GET_CONFIG: BackEnd._get_config,
    v.SET_CONFIG: BackEnd._set_config,
    v.GET_INFLIGHT_FD: BackEnd._get_inflight_fd,
    v.SET_INFLIGHT_FD: BackEnd._set_inflight_fd,
}
