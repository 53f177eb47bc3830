"""What a virtio-net device asks of the host's side of its network: packets in, packets out, never blocking.

A packet is a frame behind virtio's 12-byte header (struct virtio_net_hdr_v1), read and written as a list of buffers,
straight from and to guest memory. One backend serves all queue pairs of its device.
"""

from __future__ import annotations

import errno
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

HEADER = 12  # bytes of struct virtio_net_hdr_v1; the last two are num_buffers
MAX_FRAME = 65536 + 14 + 4  # what offloads allow: 64 KiB of IP behind Ethernet's header and a VLAN tag
MAX_PACKET = HEADER + MAX_FRAME


class BackendGone(Exception):
    """The host's side is no more: the tap was deleted, the socket's peer closed it."""


class NetBackend:
    """Base of the backends. `pairs`: queue pairs; `offloads`: virtio feature bits that it lets a device offer."""

    kind = "none"
    pairs = 1
    offloads = 0
    mtu = 0  # bytes; 0: not known
    carrier = True  # somebody is at the other end

    def fd(self, pair: int) -> int:
        """What to wait on for packets, and for room."""
        raise NotImplementedError

    def receive(self, pair: int, buffers: Sequence[memoryview]) -> int:
        """Read one packet; its bytes, 0 if one was dropped. BlockingIOError: none is there. BackendGone."""
        raise NotImplementedError

    def send(self, pair: int, buffers: Sequence[memoryview]) -> None:
        """Write one packet. BlockingIOError: no room, try again when the descriptor is writable; OSError: this packet
        is refused. BackendGone."""
        raise NotImplementedError

    @property
    def unsent(self) -> bool:
        """Whether a part of a packet that `send` took still waits for room: call `flush` when there is."""
        return False

    def flush(self) -> None:
        """Go on with what is `unsent`. BlockingIOError: still no room. BackendGone."""

    def set_offload(self, features: int) -> None:
        """The offloads that the driver agreed to (feature bits GUEST_*): what `receive` may then return."""

    def set_pairs(self, count: int) -> None:
        """Deliver packets to the first `count` pairs only."""

    def ended(self) -> str:
        """Why the backend has ended, as far as it can be told without a packet; empty if it has not."""
        return ""

    def successor(self) -> NetBackend | None:
        """Of one that has ended: what takes its place, if anything does."""
        return None

    def close(self) -> None:
        """Close the descriptors, but those of a successor that was asked for."""


class NoBackend(NetBackend):
    """A cable in nothing: no packet comes, none is taken."""

    def __init__(self, pairs: int = 1) -> None:
        self.pairs = pairs
        self._never = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def fd(self, pair: int) -> int:
        return self._never

    def receive(self, pair: int, buffers: Sequence[memoryview]) -> int:
        raise BlockingIOError

    def send(self, pair: int, buffers: Sequence[memoryview]) -> None:
        raise OSError(errno.ENETDOWN, os.strerror(errno.ENETDOWN))

    def close(self) -> None:
        if self._never >= 0:
            os.close(self._never)
            self._never = -1


def scatter(data: memoryview, buffers: Sequence[memoryview]) -> int:
    """Copy `data` over `buffers`; the bytes that fitted."""
    done = 0
    for buffer in buffers:
        count = min(len(buffer), len(data) - done)
        buffer[:count] = data[done : done + count]
        done += count
        if done == len(data):
            break
    return done


def adopt(fd: int) -> int:
    """Take over a descriptor that somebody passed: not inherited, never blocking. OSError if it is none."""
    os.set_inheritable(fd, False)
    os.set_blocking(fd, False)
    return fd


def gone(error: OSError) -> bool:
    """Whether an error of a descriptor means that what it stood for has ended."""
    return error.errno in (errno.EBADFD, errno.ENODEV, errno.ENXIO, errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN)
