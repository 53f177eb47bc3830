"""What changes in a network namespace, as the kernel tells it: links, addresses, neighbours, bridge tables, routes.

    with NetlinkMonitor({"link", "neighbour"}) as monitor:
        async for change in monitor:
            ...

The kernel drops what a slow reader leaves lying (ENOBUFS) and says so: an "overrun" asks for a new list of everything.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import struct
from collections import deque
from collections.abc import AsyncIterator, Collection
from dataclasses import dataclass

from kvik.errors import HostError
from kvik.host.neighbour import DELNEIGH, NEWNEIGH, FdbEntry, Neighbour, parse_fdb, parse_neighbour
from kvik.host.netlink import DELADDR, DELLINK, NEWADDR, NEWLINK, Address, Link, parse_address, parse_link
from kvik.host.route import DELROUTE, NEWROUTE, Route, parse_route

_HEADER = struct.Struct("=IHHII")
_SO_RCVBUFFORCE = 33
_BUFFER = 1 << 17
_KERNEL_BUFFER = 1 << 20  # what the kernel keeps for us, in bytes, before it drops
# What can be watched -> its multicast groups (RTNLGRP_*, numbered from 1).
_GROUPS = {"link": (1,), "address": (5, 9), "neighbour": (3,), "fdb": (3,), "route": (7, 11)}
Item = Link | Address | Neighbour | FdbEntry | Route


@dataclass(frozen=True, slots=True)
class Change:
    """`what` is now as `item` says, or is `gone`."""

    what: str  # "link", "port" (a link's part in its bridge), "address", "neighbour", "fdb", "route"; "overrun"
    gone: bool
    item: Item | None  # None: of an overrun


class NetlinkMonitor:
    """Tells the changes in the network namespace of the thread that made it."""

    def __init__(self, what: Collection[str] = ("link", "address")) -> None:
        if unknown := set(what) - set(_GROUPS):
            raise HostError(f"cannot watch {', '.join(sorted(unknown))} by netlink", errno=errno.EINVAL)
        self._what = {*what, *(("port",) if "link" in what else ())}
        groups = {group for each in what for group in _GROUPS[each]}
        kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        self._socket = socket.socket(socket.AF_NETLINK, kind, socket.NETLINK_ROUTE)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _KERNEL_BUFFER)
        except PermissionError:  # not root: no more than net.core.rmem_max
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _KERNEL_BUFFER)
        self._socket.bind((0, sum(1 << group - 1 for group in groups)))
        self._waiting: deque[Change] = deque()

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> NetlinkMonitor:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def read(self) -> list[Change]:
        """What has come so far, without waiting."""
        try:
            data, (sender, _) = self._socket.recvfrom(_BUFFER)
        except BlockingIOError:
            return []
        except OSError as error:
            if error.errno == errno.ENOBUFS:
                return [Change("overrun", False, None)]
            raise HostError(f"cannot watch the network: {error.strerror}", errno=error.errno or 0) from error
        return [change for change in parse_changes(data) if change.what in self._what] if sender == 0 else []

    def __aiter__(self) -> AsyncIterator[Change]:
        return self

    async def __anext__(self) -> Change:
        while not self._waiting:
            self._waiting.extend(self.read())
            if not self._waiting:
                await self._readable()
        return self._waiting.popleft()

    async def _readable(self) -> None:
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[None] = loop.create_future()

        def wake() -> None:
            if not ready.done():
                ready.set_result(None)

        loop.add_reader(self.fileno(), wake)
        try:
            await ready
        finally:
            loop.remove_reader(self.fileno())


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
        try:
            change = _parse(kind, payload)
        except HostError:
            continue
        if change is not None:
            found.append(change)
    return found


def _parse(kind: int, payload: bytes) -> Change | None:
    what: str
    item: Item | None
    family = payload[0] if payload else 0
    if kind in (NEWLINK, DELLINK):
        what, item = "port" if family == socket.AF_BRIDGE else "link", parse_link(payload)
    elif kind in (NEWADDR, DELADDR):
        what, item = "address", parse_address(payload)
    elif kind in (NEWNEIGH, DELNEIGH) and family == socket.AF_BRIDGE:
        what, item = "fdb", parse_fdb(payload)
    elif kind in (NEWNEIGH, DELNEIGH):
        what, item = "neighbour", parse_neighbour(payload)
    elif kind in (NEWROUTE, DELROUTE):
        what, item = "route", parse_route(payload)
    else:
        return None
    gone = kind in (DELLINK, DELADDR, DELNEIGH, DELROUTE)
    return Change(what, gone, item) if item is not None else None
