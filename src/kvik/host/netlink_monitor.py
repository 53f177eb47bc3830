"""What changes in a network namespace, as the kernel tells it: links, and tables of nftables.

    with NetlinkMonitor("link") as monitor:
        while (changes := monitor.read()) is not None:     # without waiting; `fileno` says when there is something
            ...

The kernel drops what a slow reader leaves lying (ENOBUFS) and says so: an "overrun" asks for a new list of everything.
"""

from __future__ import annotations

import errno
import socket
import struct
from dataclasses import dataclass

from kvik.errors import HostError
from kvik.host.netlink import DELLINK, NEWLINK, Link, parse_link

_HEADER = struct.Struct("=IHHII")  # nlmsghdr
_SO_RCVBUFFORCE = 33
_BUFFER = 1 << 17
_KERNEL_BUFFER = 1 << 20  # what the kernel keeps for us, in bytes, before it drops
_NETLINK_NETFILTER = 12  # linux/netlink.h
_NFNL_SUBSYS_NFTABLES = 10  # linux/netfilter/nfnetlink.h
_NEWTABLE, _DELTABLE = (_NFNL_SUBSYS_NFTABLES << 8 | kind for kind in (0, 2))  # linux/netfilter/nf_tables.h
# What can be watched -> its protocol and multicast group (RTNLGRP_LINK, NFNLGRP_NFTABLES; numbered from 1).
_SOURCES = {"link": (socket.NETLINK_ROUTE, 1), "table": (_NETLINK_NETFILTER, 7)}


@dataclass(frozen=True, slots=True)
class Change:
    """`what` is new or different, or is `gone`."""

    what: str  # "link", also for its part in its bridge; "table"; "overrun"
    gone: bool
    link: Link | None = None  # the link


class NetlinkMonitor:
    """Tells the changes in the network namespace of the thread that made it. `HostError` if it cannot: not all kernels
    have nftables, and its changes are root's to hear."""

    def __init__(self, what: str) -> None:
        if what not in _SOURCES:
            raise HostError(f"cannot watch {what} by netlink", errno=errno.EINVAL)
        protocol, group = _SOURCES[what]
        try:
            kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
            self._socket = socket.socket(socket.AF_NETLINK, kind, protocol)
            try:
                self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _KERNEL_BUFFER)
            except PermissionError:  # not root: no more than net.core.rmem_max
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _KERNEL_BUFFER)
            self._socket.bind((0, 1 << group - 1))
        except OSError as error:
            raise HostError(f"cannot watch {what}s by netlink: {error.strerror}", errno=error.errno or 0) from error

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> NetlinkMonitor:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def read(self) -> list[Change] | None:
        """The next that has come, which may be of no interest; None if nothing has."""
        try:
            data, (sender, _) = self._socket.recvfrom(_BUFFER)
        except BlockingIOError:
            return None
        except OSError:  # ENOBUFS: some were lost
            return [Change("overrun", False)]
        return parse_changes(data) if sender == 0 else []  # any process may send to us; the kernel is 0


def parse_changes(data: bytes) -> list[Change]:
    """Decode a datagram of notices; what is of no interest or damaged is left out."""
    found: list[Change] = []
    start = 0
    while start + _HEADER.size <= len(data):
        length, kind, _, _, _ = _HEADER.unpack_from(data, start)
        if not _HEADER.size <= length <= len(data) - start:
            break
        payload = data[start + _HEADER.size : start + length]
        start += (length + 3) & ~3
        if kind in (_NEWTABLE, _DELTABLE):
            found.append(Change("table", kind == _DELTABLE))
        elif kind in (NEWLINK, DELLINK):
            try:
                found.append(Change("link", kind == DELLINK, parse_link(payload)))
            except HostError:
                continue
    return found
