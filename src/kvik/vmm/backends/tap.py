"""A tap interface: the host's kernel is at the other end (Documentation/networking/tuntap.rst, linux/if_tun.h).

One descriptor for each queue pair, opened by the caller or here. Packets carry virtio's header (IFF_VNET_HDR), so
checksums and segmentation are left to whoever needs them, often to nobody.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

from kvik.errors import HostError
from kvik.vmm.backends.net import HEADER, BackendGone, NetBackend, adopt, gone

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

_TUNSETIFF, _TUNGETIFF, _TUNSETOFFLOAD = 0x400454CA, 0x800454D2, 0x400454D0
_TUNSETVNETHDRSZ, _TUNSETQUEUE = 0x400454D8, 0x400454D9
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR, _IFF_MULTI_QUEUE = 0x0002, 0x1000, 0x4000, 0x0100
_IFF_ATTACH_QUEUE, _IFF_DETACH_QUEUE = 0x0200, 0x0400
_IFREQ = struct.Struct("@16sH22x")

TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6, TUN_F_TSO_ECN, TUN_F_UFO, TUN_F_USO4, TUN_F_USO6 = 1, 2, 4, 8, 16, 32, 64
# The driver's wish (virtio 1.2, 5.1.3: GUEST_*) -> what the kernel may hand us.
_FLAGS = ((1, TUN_F_CSUM), (7, TUN_F_TSO4), (8, TUN_F_TSO6), (9, TUN_F_TSO_ECN), (54, TUN_F_USO4), (55, TUN_F_USO6))
_CSUM, _HOST_TSO4, _HOST_TSO6, _HOST_ECN, _HOST_USO = 1 << 0, 1 << 11, 1 << 12, 1 << 13, 1 << 56
_BASIC = 1 << 1 | 1 << 7 | 1 << 8 | 1 << 9 | _CSUM | _HOST_TSO4 | _HOST_TSO6 | _HOST_ECN
_USO = 1 << 54 | 1 << 55 | _HOST_USO


class TapBackend(NetBackend):
    """The tap behind `fds`, which this object owns from now on. HostError if they are no taps with virtio headers."""

    kind = "tap"

    def __init__(self, fds: Sequence[int]) -> None:
        self.fds = list(fds)
        self.pairs = len(self.fds)
        self._attached = self.pairs
        try:
            self._prepare()
        except OSError as error:
            self.close()
            raise HostError(
                f"cannot use descriptor {fds[0]} as a tap: {error.strerror}",
                errno=error.errno or 0,
                remedy="pass the descriptors of a tap (one a queue pair) that was made with IFF_VNET_HDR",
            ) from error
        except BaseException:
            self.close()
            raise

    def _prepare(self) -> None:
        for fd in self.fds:
            adopt(fd)
            request = bytearray(_IFREQ.size)
            fcntl.ioctl(fd, _TUNGETIFF, request)
            name, flags = _IFREQ.unpack(request)
            self.name = name.partition(b"\0")[0].decode()
            if not flags & _IFF_VNET_HDR or not flags & _IFF_TAP or not flags & _IFF_NO_PI:
                raise HostError(
                    f"{self.name} is not a tap with virtio's header",
                    errno=errno.EINVAL,
                    remedy="make it with IFF_TAP | IFF_NO_PI | IFF_VNET_HDR (ip tuntap add ... vnet_hdr)",
                )
            fcntl.ioctl(fd, _TUNSETVNETHDRSZ, struct.pack("i", HEADER))
        self.offloads = _BASIC
        try:  # USO came with Linux 6.2
            fcntl.ioctl(self.fds[0], _TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_USO4 | TUN_F_USO6)
            self.offloads |= _USO
        except OSError:
            pass
        self.set_offload(0)

    @classmethod
    def open(cls, name: str, pairs: int = 1) -> TapBackend:
        """Attach to the persistent tap `name`, or make one of that name, which goes with this process."""
        if not name or len(name.encode()) > 15 or "/" in name:
            raise HostError(f"{name!r} is no name of a tap", errno=errno.EINVAL)
        flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR | (_IFF_MULTI_QUEUE if pairs > 1 else 0)
        fds: list[int] = []
        try:
            for _ in range(pairs):
                fds.append(os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK))
                fcntl.ioctl(fds[-1], _TUNSETIFF, bytearray(_IFREQ.pack(name.encode(), flags)))
        except OSError as error:
            for fd in fds:
                os.close(fd)
            remedy = "run as root or with CAP_NET_ADMIN, or use a backend that needs no tap: user"
            if error.errno == errno.EBUSY:
                remedy = "another process uses this tap: choose another, or end that process"
            elif error.errno == errno.EINVAL:
                remedy = f"make the tap with vnet_hdr{' and multi_queue' if pairs > 1 else ', without multi_queue'}"
            raise HostError(
                f"cannot open tap {name}: {error.strerror}", errno=error.errno or 0, remedy=remedy
            ) from error
        return cls(fds)

    def fd(self, pair: int) -> int:
        return self.fds[pair]

    def receive(self, pair: int, buffers: Sequence[memoryview]) -> int:
        try:
            return os.readv(self.fds[pair], buffers)
        except BlockingIOError:
            raise
        except OSError as error:
            if gone(error):
                raise BackendGone(f"tap {self.name} was deleted") from error
            if error.errno == errno.EIO:  # the interface is down
                raise BlockingIOError from None
            raise

    def send(self, pair: int, buffers: Sequence[memoryview]) -> None:
        try:
            os.writev(self.fds[pair], buffers)
        except BlockingIOError:
            raise
        except OSError as error:
            if gone(error):
                raise BackendGone(f"tap {self.name} was deleted") from error
            raise  # EIO: the interface is down; EINVAL: a header that the kernel refuses; ENOBUFS

    def set_offload(self, features: int) -> None:
        flags = 0
        for bit, flag in _FLAGS:
            if features & 1 << bit:
                flags |= flag
        if not flags & TUN_F_CSUM:
            flags = 0  # segments without partial checksums do not exist (virtio 1.2, 5.1.3.1)
        for fd in self.fds:
            try:
                fcntl.ioctl(fd, _TUNSETOFFLOAD, flags)
            except OSError as error:
                if gone(error):
                    raise BackendGone(f"tap {self.name} was deleted") from error
                raise HostError(
                    f"tap {self.name}: offloads {flags:#x}: {error.strerror}", errno=error.errno or 0
                ) from error

    def set_pairs(self, count: int) -> None:
        for index, fd in enumerate(self.fds):
            attach, attached = index < count, index < self._attached
            if attach != attached:
                request = bytearray(_IFREQ.pack(b"", _IFF_ATTACH_QUEUE if attach else _IFF_DETACH_QUEUE))
                try:
                    fcntl.ioctl(fd, _TUNSETQUEUE, request)
                except OSError as error:
                    raise BackendGone(f"tap {self.name}: queue {index}: {error.strerror}") from error
        self._attached = count

    def ended(self) -> str:
        try:
            fcntl.ioctl(self.fds[0], _TUNGETIFF, bytearray(_IFREQ.size))
        except OSError:
            return f"tap {self.name} was deleted"
        return ""

    def close(self) -> None:
        while self.fds:
            os.close(self.fds.pop())
