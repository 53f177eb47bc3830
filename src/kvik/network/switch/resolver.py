"""Questions that are not ours go to the host's own resolvers, each from a socket of its own.

A random port and a random number guard each answer against forgery (RFC 5452). Nothing is kept of an answer. What one
machine may have open is bounded, and so is the whole.
"""

from __future__ import annotations

import os
import socket
import struct

from kvik.network.switch.dns import Query, parse

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    # Of a question under way: port, the client's address and port, its message's id, the question.
    Key = tuple[int, tuple[bytes, int], bytes, bytes]

PENDING = 256
PER_PORT = 64
PATIENCE = 10.0  # seconds for an answer
_LARGEST = 65535
_CONFIG = "/etc/resolv.conf"
_CONFIG_LARGEST = 65536


class Pending:
    """One question under way; readable when its answer is there."""

    def __init__(
        self, sock: socket.socket, key: Key, number: bytes, expires: float, reply: Callable[[bytes], None]
    ) -> None:
        self.sock = sock
        self.key = key
        self.number = number  # the message's id on its way outside
        self.expires = expires
        self.reply = reply

    def fileno(self) -> int:
        return self.sock.fileno()


class Resolver:
    """`watch` and `unwatch` tell the poller of sockets."""

    def __init__(
        self, watch: Callable[[Pending], None], unwatch: Callable[[Pending], None], config: str = _CONFIG
    ) -> None:
        self._watch = watch
        self._unwatch = unwatch
        self._config = config
        self._read: tuple[int, int] = (-1, -1)
        self._servers: list[str] = []
        self._pending: dict[Key, Pending] = {}
        self._counts: dict[int, int] = {}
        self._next = 0

    def servers(self) -> list[str]:
        """The nameservers of resolv.conf(5), as they are at this moment."""
        try:
            status = os.stat(self._config)  # noqa: PTH116
            stamp = (status.st_mtime_ns, status.st_ino)
            if stamp != self._read:
                with open(self._config, "rb") as file:  # noqa: PTH123 - pathlib is not imported here
                    text = file.read(_CONFIG_LARGEST).decode("utf-8", "replace")
                words = [line.split() for line in text.splitlines()]
                self._servers = [line[1] for line in words if len(line) > 1 and line[0] == "nameserver"][:3]
                self._read = stamp
        except OSError:
            self._servers, self._read = [], (-1, -1)
        return self._servers

    def ask(
        self, port: int, client: tuple[bytes, int], data: bytes, now: float, reply: Callable[[bytes], None]
    ) -> bool:
        """Pass a query on; `reply` gets the answer, if one comes. False: it cannot be asked."""
        servers = self.servers()
        query = parse(data)
        if not servers or not isinstance(query, Query):
            return False
        key = (port, client, data[:2], query.question)
        if (old := self._pending.get(key)) is not None:  # asked again: the server did not answer, try the next
            self._next += 1
            self._drop(old)
        if len(self._pending) >= PENDING or self._counts.get(port, 0) >= PER_PORT:
            return False
        server = servers[self._next % len(servers)]
        family = socket.AF_INET6 if ":" in server else socket.AF_INET
        number = os.urandom(2)
        try:
            sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        except OSError:
            return False
        try:
            sock.connect((server, 53))
            sock.send(number + data[2:])
        except (OSError, ValueError):
            sock.close()
            self._next += 1
            return False
        pending = Pending(sock, key, number, now + PATIENCE, reply)
        self._pending[key] = pending
        self._counts[port] = self._counts.get(port, 0) + 1
        self._watch(pending)
        return True

    def readable(self, pending: Pending) -> None:
        try:
            data = pending.sock.recv(_LARGEST)
        except BlockingIOError:
            return
        except OSError:  # nobody listens there
            self._next += 1
            self._drop(pending)
            return
        _, _, original, question = pending.key
        if len(data) < 12 or data[:2] != pending.number or not data[2] & 0x80:
            return
        (questions,) = struct.unpack_from("!H", data, 4)
        if questions and data[12 : 12 + len(question)].lower() != question.lower():
            return
        self._drop(pending)
        pending.reply(original + data[2:])

    def expire(self, now: float) -> None:
        for pending in [item for item in self._pending.values() if item.expires <= now]:
            self._next += 1
            self._drop(pending)

    def removed(self, port: int) -> None:
        for pending in [item for item in self._pending.values() if item.key[0] == port]:
            self._drop(pending)

    def _drop(self, pending: Pending) -> None:
        if self._pending.pop(pending.key, None) is pending:
            port = pending.key[0]
            self._counts[port] -= 1
            if not self._counts[port]:
                del self._counts[port]
            self._unwatch(pending)
            pending.sock.close()
