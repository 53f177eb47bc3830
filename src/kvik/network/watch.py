"""What happens to networks behind our back: a bridge deleted, a packet filter flushed (`nft flush ruleset`, as a reload
of /etc/nftables.conf does). The kernel tells of both; what is heard is only a reason to look.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from collections.abc import Callable

from kvik.host.netlink import parse_link

__all__ = ["Watch"]

logger = logging.getLogger(__name__)

NETLINK_NETFILTER = 12  # linux/netlink.h
RTMGRP_LINK = 1  # linux/rtnetlink.h
NFNLGRP_NFTABLES = 7  # linux/netfilter/nfnetlink.h
RTM_DELLINK = 17
NFT_MSG_DELTABLE = 10 << 8 | 2  # NFNL_SUBSYS_NFTABLES and the message: linux/netfilter/nf_tables.h
_HEADER = struct.Struct("=IHHII")  # nlmsghdr
_BUFFER = 1 << 16
_DATAGRAMS = 256  # read at a time: the loop has others to serve


class Watch:
    """Calls `bridge_gone(name)` and `table_gone()` in the loop that made it, for its thread's network namespace."""

    def __init__(self, bridge_gone: Callable[[str], None], table_gone: Callable[[], None]) -> None:
        self._bridge_gone, self._table_gone = bridge_gone, table_gone
        self._loop = asyncio.get_running_loop()
        self._sockets: list[socket.socket] = []
        self._listen(socket.NETLINK_ROUTE, RTMGRP_LINK, self._heard_of_link)
        self._listen(NETLINK_NETFILTER, 1 << (NFNLGRP_NFTABLES - 1), self._heard_of_rules)

    def _listen(self, protocol: int, groups: int, heard: Callable[[int, bytes], None]) -> None:
        try:
            made = socket.socket(
                socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, protocol
            )
            made.bind((0, groups))
        except OSError as error:  # not root, or a kernel without: then nothing is put right by itself
            logger.info("changes of the host's networks are not watched: %s", error.strerror)
            return
        self._sockets.append(made)
        self._loop.add_reader(made, self._read, made, heard)

    def close(self) -> None:
        for each in self._sockets:
            self._loop.remove_reader(each)
            each.close()
        self._sockets.clear()

    def _read(self, source: socket.socket, heard: Callable[[int, bytes], None]) -> None:
        for _ in range(_DATAGRAMS):
            try:
                data = source.recv(_BUFFER)
            except BlockingIOError:
                return
            except OSError:  # ENOBUFS: some were lost, so anything may have happened
                self._table_gone()
                self._bridge_gone("")
                return
            while len(data) >= _HEADER.size:
                length, kind, _, _, _ = _HEADER.unpack_from(data)
                if not _HEADER.size <= length <= len(data):
                    break
                heard(kind, data[_HEADER.size : length])
                data = data[(length + 3) & ~3 :]

    def _heard_of_link(self, kind: int, payload: bytes) -> None:
        if kind == RTM_DELLINK:
            self._bridge_gone(parse_link(payload).name)

    def _heard_of_rules(self, kind: int, payload: bytes) -> None:
        if kind == NFT_MSG_DELTABLE:
            self._table_gone()
