"""The kernel's datapaths for virtio queues: vhost-net and vhost-vsock (linux/vhost.h, drivers/vhost/).

The kernel reads kicks from the queue's ioeventfd, works on the rings in this process's memory, and interrupts the
guest through an irqfd: no packet passes user mode. `Vhost` is the ioctl layer, `Rings` starts and stops a device's
queues on it, `VhostNet` and `VhostVsock` are what is special to each.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import struct

from kvik.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvik.vmm.memory import GuestMemory
    from kvik.vmm.virtio.device import VirtioDevice
    from kvik.vmm.virtio.net import NetDevice

_PAGE = 4096  # VHOST_PAGE_SIZE, also the grain of the dirty log
F_LOG_ALL = 1 << 26
_INDIRECT_DESC, _EVENT_IDX, _MRG_RXBUF, _VERSION_1 = 1 << 28, 1 << 29, 1 << 15, 1 << 32
_IN_ORDER, _RING_PACKED, _RING_RESET = 1 << 35, 1 << 34, 1 << 40
_F_LOG = 1  # 1 << VHOST_VRING_F_LOG
_MAX_REGIONS = 64  # drivers/vhost: max_mem_regions


def _iow(number: int, size: int, direction: int = 1) -> int:
    return direction << 30 | size << 16 | 0xAF << 8 | number


_GET_FEATURES, _SET_FEATURES = _iow(0x00, 8, 2), _iow(0x00, 8)
_SET_OWNER = _iow(0x01, 0, 0)
_SET_MEM_TABLE = _iow(0x03, 8)
_SET_LOG_BASE = _iow(0x04, 8)
_SET_VRING_NUM, _SET_VRING_ADDR, _SET_VRING_BASE = _iow(0x10, 8), _iow(0x11, 40), _iow(0x12, 8)
_GET_VRING_BASE = _iow(0x12, 8, 3)
_SET_VRING_KICK, _SET_VRING_CALL, _SET_VRING_ERR = _iow(0x20, 8), _iow(0x21, 8), _iow(0x22, 8)
_NET_SET_BACKEND = _iow(0x30, 8)
_VSOCK_SET_GUEST_CID, _VSOCK_SET_RUNNING = _iow(0x60, 8), _iow(0x61, 4)

_U64, _STATE, _FILE = struct.Struct("=Q"), struct.Struct("=II"), struct.Struct("=Ii")
_ADDR = struct.Struct("=IIQQQQ")
_REGION = struct.Struct("=QQQQ")


class Vhost:
    """One open vhost device, `fd` if it was passed. Every method raises OSError with the ioctl's name when the kernel
    refuses."""

    def __init__(self, path: str, fd: int = -1) -> None:
        try:
            self.fd = fd if fd >= 0 else os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            module = path.rpartition("/")[2].replace("-", "_")
            raise HostError(
                f"cannot open {path}: {error.strerror}", errno=error.errno or 0, remedy=f"load it: modprobe {module}"
            ) from error
        try:
            self._ioctl(_SET_OWNER, None, "SET_OWNER")
        except OSError:
            self.close()
            raise

    def _ioctl(self, request: int, data: bytes | bytearray | None, name: str) -> bytes:
        try:
            if data is None:
                fcntl.ioctl(self.fd, request)
                return b""
            return fcntl.ioctl(self.fd, request, bytes(data))
        except OSError as error:
            raise OSError(error.errno, f"VHOST_{name}: {error.strerror}") from None

    def features(self) -> int:
        return int(_U64.unpack(self._ioctl(_GET_FEATURES, bytes(8), "GET_FEATURES"))[0])

    def set_features(self, features: int) -> None:
        self._ioctl(_SET_FEATURES, _U64.pack(features), "SET_FEATURES")

    def set_memory(self, memory: GuestMemory) -> None:
        """All RAM: where it lies for the guest, and here."""
        if len(memory.regions) > _MAX_REGIONS:
            raise OSError(errno.E2BIG, f"vhost takes {_MAX_REGIONS} pieces of memory, the machine has more")
        table = struct.pack("=II", len(memory.regions), 0)
        for region in memory.regions:
            table += _REGION.pack(region.start, region.size, region.address, 0)
        # The request number tells 8 bytes, so the kernel copies the rest by the count: a buffer of its own.
        buffer = bytearray(table.ljust(1032, b"\0"))  # above 1024 bytes fcntl.ioctl passes the buffer itself
        try:
            fcntl.ioctl(self.fd, _SET_MEM_TABLE, buffer)
        except OSError as error:
            raise OSError(error.errno, f"VHOST_SET_MEM_TABLE: {error.strerror}") from None

    def set_log(self, address: int) -> None:
        """Where the bitmap of written pages lies in this process."""
        self._ioctl(_SET_LOG_BASE, _U64.pack(address), "SET_LOG_BASE")

    def set_ring_size(self, ring: int, size: int) -> None:
        self._ioctl(_SET_VRING_NUM, _STATE.pack(ring, size), "SET_VRING_NUM")

    def set_ring_base(self, ring: int, base: int) -> None:
        self._ioctl(_SET_VRING_BASE, _STATE.pack(ring, base), "SET_VRING_BASE")

    def ring_base(self, ring: int) -> int:
        """The next available index that the kernel would look at."""
        return int(_STATE.unpack(self._ioctl(_GET_VRING_BASE, _STATE.pack(ring, 0), "GET_VRING_BASE"))[1])

    def set_ring_addresses(self, ring: int, desc: int, used: int, avail: int, *, log: int = -1) -> None:
        """Addresses in this process; `log`: the used ring's guest-physical address, if writes are to be logged."""
        flags = _F_LOG if log >= 0 else 0
        self._ioctl(_SET_VRING_ADDR, _ADDR.pack(ring, flags, desc, used, avail, max(log, 0)), "SET_VRING_ADDR")

    def set_ring_kick(self, ring: int, fd: int) -> None:
        self._ioctl(_SET_VRING_KICK, _FILE.pack(ring, fd), "SET_VRING_KICK")

    def set_ring_call(self, ring: int, fd: int) -> None:
        self._ioctl(_SET_VRING_CALL, _FILE.pack(ring, fd), "SET_VRING_CALL")

    def set_ring_error(self, ring: int, fd: int) -> None:
        """An eventfd that is written when the kernel meets a ring it cannot use: the guest's fault."""
        self._ioctl(_SET_VRING_ERR, _FILE.pack(ring, fd), "SET_VRING_ERR")

    def set_net_backend(self, ring: int, fd: int) -> None:
        """The tap of a ring; -1 stops it."""
        self._ioctl(_NET_SET_BACKEND, _FILE.pack(ring, fd), "NET_SET_BACKEND")

    def set_guest_cid(self, cid: int) -> None:
        self._ioctl(_VSOCK_SET_GUEST_CID, _U64.pack(cid), "VSOCK_SET_GUEST_CID")

    def set_vsock_running(self, running: bool) -> None:
        self._ioctl(_VSOCK_SET_RUNNING, struct.pack("=i", running), "VSOCK_SET_RUNNING")

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class DirtyLog:
    """A bitmap of one bit a page, in memory that the kernel writes, or with `memfd` another process. Taken by
    exchange, so no bit is lost. `end`: of guest memory; `size` in bytes."""

    def __init__(self, end: int, *, memfd: bool = False) -> None:
        self.size = (end // _PAGE // 8 + 8) // 8 * 8 + 8
        self._fds = [os.memfd_create("kvik-dirty-log", os.MFD_CLOEXEC) for _ in range(2)] if memfd else []
        for fd in self._fds:
            os.ftruncate(fd, self.size)
        self._maps = [mmap.mmap(fd, self.size) for fd in self._fds or (-1, -1)]
        self._pins = [ctypes.c_char.from_buffer(part) for part in self._maps]
        self._current = 0

    @property
    def address(self) -> int:
        return ctypes.addressof(self._pins[self._current])

    @property
    def fd(self) -> int:
        """The memfd that is written to now."""
        return self._fds[self._current]

    def close(self) -> None:
        for fd in self._fds:
            os.close(fd)
        self._fds = []

    def take(self, use: Callable[[int], None], touched: Callable[[int, int], None]) -> int:
        """Let the kernel write to the other bitmap (`use` gets its address), then report and clear this one.

        `touched(address, size)` is called for each run of pages of one word. The pages reported are returned.
        """
        done = self._maps[self._current]
        self._current ^= 1
        use(self.address)
        pages = 0
        view = memoryview(done).cast("Q")
        for index, word in enumerate(view):
            if not word:
                continue
            view[index] = 0
            pages += word.bit_count()
            while word:
                low = (word & -word).bit_length() - 1
                run = ((~(word >> low)) & -(~(word >> low))).bit_length() - 1
                touched((index * 64 + low) * _PAGE, run * _PAGE)
                word &= ~(((1 << run) - 1) << low)
        view.release()
        return pages


class Rings:
    """The queues of a device on one or more vhost descriptors: `places` tells for each queue (descriptor, ring)."""

    def __init__(self, device: VirtioDevice, places: dict[int, tuple[Vhost, int]]) -> None:
        self.device = device
        self.places = places
        self.vhosts = list(dict.fromkeys(vhost for vhost, _ in places.values()))
        self.log: DirtyLog | None = None
        self.running = False
        self.on_error: Callable[[], None] = self._broken
        self._started: list[int] = []
        self._calls: dict[int, int] = {}  # eventfds of queues without an irqfd, which the loop reads
        self._errors: dict[Vhost, int] = {}

    def start(self, features: int) -> None:
        """Hand the ready queues to the kernel. OSError when it refuses; call `stop` then."""
        device = self.device
        for vhost in self.vhosts:
            vhost.set_features(features | (F_LOG_ALL if self.log else 0))
            vhost.set_memory(device.memory)
            if self.log is not None:
                vhost.set_log(self.log.address)
            error = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            self._errors[vhost] = error
            device.loop.add_reader(error, self._failed)
        for index, (vhost, ring) in self.places.items():
            if device.queues[index].ready:
                self._started.append(index)
                self._start_ring(index, vhost, ring)
        self.running = True
        if self._memory_changed not in device.memory.on_change:
            device.memory.on_change.append(self._memory_changed)

    def _start_ring(self, index: int, vhost: Vhost, ring: int) -> None:
        queue = self.device.queues[index]
        vhost.set_ring_size(ring, queue.size)
        vhost.set_ring_base(ring, int(queue.state()["next_avail"]))
        self._set_addresses(index, vhost, ring)
        vhost.set_ring_error(ring, self._errors[vhost])
        self._set_call(index, vhost, ring)
        vhost.set_ring_kick(ring, self.device.transport.notifier_fd(index))

    def _set_addresses(self, index: int, vhost: Vhost, ring: int) -> None:
        queue, memory = self.device.queues[index], self.device.memory
        vhost.set_ring_addresses(
            ring,
            memory.host_address(queue.desc, 16 * queue.size),
            memory.host_address(queue.used, 6 + 8 * queue.size),
            memory.host_address(queue.avail, 6 + 2 * queue.size),
            log=queue.used if self.log else -1,
        )

    def _set_call(self, index: int, vhost: Vhost, ring: int) -> None:
        """The irqfd, or an eventfd of ours where the guest has no MSI-X vector for the queue."""
        fd = self.device.transport.interrupt_fd(index)
        if fd is None:
            fd = self._calls.get(index)
            if fd is None:
                fd = self._calls[index] = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
                self.device.loop.add_reader(fd, lambda: self._called(index))
        vhost.set_ring_call(ring, fd)

    def _called(self, index: int) -> None:
        with self.device.lock:
            if index not in self._calls:
                return
            try:
                os.eventfd_read(self._calls[index])
            except BlockingIOError:
                return
            self.device.transport.signal_queue(index)

    def _failed(self) -> None:
        for fd in self._errors.values():
            try:
                os.eventfd_read(fd)
            except BlockingIOError:
                pass
        self.on_error()

    def _broken(self) -> None:
        self.device.needs_reset("the kernel's vhost met a ring that it cannot use")

    def interrupt_changed(self, index: int) -> None:
        """The queue's vector changed."""
        if self.running and index in self._started:
            self._set_call(index, *self.places[index])

    def _memory_changed(self) -> None:
        if self.running:
            for vhost in self.vhosts:
                vhost.set_memory(self.device.memory)

    def stop(self) -> None:
        """Take the queues back: their positions are the kernel's last. Backends must have been stopped before."""
        device = self.device
        for index in self._started:
            vhost, ring = self.places[index]
            queue = device.queues[index]
            try:
                base = vhost.ring_base(ring) & 0xFFFF  # also stops the ring
                vhost.set_ring_kick(ring, -1)
                vhost.set_ring_call(ring, -1)
                if queue.ready:
                    used = device.memory.u16(queue.used + 2)
                    queue.restore(
                        {**queue.state(), "next_avail": base, "next_used": used, "signalled": used}, device.acked
                    )
            except OSError as error:
                if device.machine is not None:
                    device.machine.log(f"{device.name}: queue {index}: {error}")
            device.transport.release_notifier(index)
        self._started.clear()
        if self.log is not None:
            self.take_log()
        for index, fd in self._calls.items():
            device.loop.remove_reader(fd)
            try:
                os.eventfd_read(fd)
            except BlockingIOError:
                pass
            else:
                device.transport.signal_queue(index)  # an interrupt that was on its way
            os.close(fd)
        self._calls.clear()
        for fd in self._errors.values():
            device.loop.remove_reader(fd)
            os.close(fd)
        self._errors.clear()
        self.running = False
        if self._memory_changed in device.memory.on_change:
            device.memory.on_change.remove(self._memory_changed)

    def start_log(self) -> None:
        """From now on note which pages the kernel writes for the guest (live migration)."""
        if self.log is not None:
            return
        self.log = DirtyLog(max(region.end for region in self.device.memory.regions))
        self._relog(F_LOG_ALL)

    def stop_log(self) -> None:
        if self.log is not None:
            log, self.log = self.log, None
            self._relog(0)
            log.take(lambda address: None, self.device.memory.touched)

    def _relog(self, flag: int) -> None:
        if not self.running:
            return
        for vhost in self.vhosts:
            if self.log is not None:
                vhost.set_log(self.log.address)
            vhost.set_features(self._features() | flag)
        for index in self._started:
            self._set_addresses(index, *self.places[index])

    def _features(self) -> int:
        return self.device.acked & (self.vhosts[0].features() if self.vhosts else 0)

    def take_log(self) -> int:
        """Tell the machine's dirty log of all pages written since the last call; how many."""
        if self.log is None:
            return 0

        def use(address: int) -> None:
            for vhost in self.vhosts:
                if vhost.fd >= 0:
                    vhost.set_log(address)

        return self.log.take(use, self.device.memory.touched)

    def close(self) -> None:
        if self.running or self._started:
            self.stop()
        for vhost in self.vhosts:
            vhost.close()


class VhostNet:
    """A network card's queue pairs in the kernel: one descriptor a pair, ring 0 receives, ring 1 transmits."""

    # What needs the kernel's consent when it is the datapath; all else is the tap's or the device's own business.
    HANDLED = _MRG_RXBUF | _INDIRECT_DESC | _EVENT_IDX | _VERSION_1 | _IN_ORDER | _RING_PACKED | _RING_RESET

    def __init__(self, device: NetDevice, pairs: int, fds: Sequence[int] = ()) -> None:
        """`fds`: of /dev/vhost-net, one a pair, if somebody opened them. HostError where there is no vhost-net."""
        self.device = device
        vhosts: list[Vhost] = []
        try:
            for pair in range(pairs):
                vhosts.append(Vhost("/dev/vhost-net", fds[pair] if pair < len(fds) else -1))
            self.features = vhosts[0].features()
        except OSError as error:
            for vhost in vhosts:
                vhost.close()
            raise HostError(f"vhost-net: {error.strerror}", errno=error.errno or 0) from error
        except HostError:
            for vhost in vhosts:
                vhost.close()
            raise
        # A ring's reset while others run would need work on half a descriptor: not offered.
        self.ring_features = ~self.HANDLED | self.features & (_INDIRECT_DESC | _EVENT_IDX | _VERSION_1)
        places = {2 * pair + ring: (vhost, ring) for pair, vhost in enumerate(vhosts) for ring in (0, 1)}
        self.rings = Rings(device, places)
        self.rings.on_error = self._failed

    def _failed(self) -> None:
        """The kernel wrote to the error eventfd: a ring is broken, or the tap is gone."""
        device = self.device
        with device.lock:
            if not self.running:
                return
            if reason := device.backend.ended():
                device.backend_ended(reason)
            else:
                device.needs_reset("the kernel's vhost met a ring that it cannot use")

    @property
    def running(self) -> bool:
        return self.rings.running

    def start(self) -> None:
        device = self.device
        self.rings.start(device.acked & self.features & self.HANDLED)
        for index in self.rings._started:
            vhost, ring = self.rings.places[index]
            vhost.set_net_backend(ring, device.backend.fd(index // 2))

    def stop(self) -> None:
        for index in self.rings._started:
            vhost, ring = self.rings.places[index]
            try:
                vhost.set_net_backend(ring, -1)
            except OSError:
                pass  # it never got one
        if self.rings.running or self.rings._started or self.rings._errors:
            self.rings.stop()

    def interrupt_changed(self, index: int) -> None:
        self.rings.interrupt_changed(index)

    def close(self) -> None:
        self.stop()
        self.rings.close()
