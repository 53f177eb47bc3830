"""A call on the system's D-Bus, blocking: what kvik asks of firewalld, and no more of the protocol than that.

    with SystemBus() as bus:
        zones = bus.call("org.example", "/org/example", "org.example.Zones", "getZones")

Arguments are strings. Nobody is started by a call: a service that does not run refuses it (`ServiceUnknown`).
https://dbus.freedesktop.org/doc/dbus-specification.html
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from types import TracebackType
from typing import Any

from kvik.errors import DBusError, HostError

__all__ = ["SystemBus"]

DEFAULT = "unix:path=/run/dbus/system_bus_socket"
LIMIT = 1 << 20  # bytes of one message; what is asked for here has a few hundred
DEADLINE = 10.0  # seconds without a byte; firewalld answers once all its rules are in the kernel
_CALL, _REPLY, _ERROR, _SIGNAL = 1, 2, 3, 4
_NO_AUTO_START = 2
_PATH, _INTERFACE, _MEMBER, _ERROR_NAME, _REPLY_SERIAL, _DESTINATION, _SIGNATURE = 1, 2, 3, 4, 5, 6, 8
_HEAD = struct.Struct("<BBBBII")  # byte order, type, flags, version, length of the body, serial


class SystemBus:
    """A connection, of one thread. `HostError` with ENOENT or ECONNREFUSED if there is no bus."""

    def __init__(self, deadline: float = DEADLINE) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._socket.settimeout(deadline)
        self._serial = 0
        self._first = b"BEGIN\r\n"
        try:
            self._socket.connect(_address(os.environ.get("DBUS_SYSTEM_BUS_ADDRESS") or DEFAULT))
            self._authenticate()
            self.call("org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus", "Hello")
        except BaseException as error:
            self._socket.close()
            if isinstance(error, OSError):
                raise _failed(error) from error
            raise

    def __enter__(self) -> SystemBus:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def fileno(self) -> int:
        """Readable when there is a signal."""
        return self._socket.fileno()

    def subscribe(self, rule: str) -> None:
        """From now on the bus sends what matches; such a connection makes no more calls."""
        self.call("org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus", "AddMatch", rule)

    def receive_signal(self) -> bool:
        """Take one message; whether it is a signal of what was subscribed. `HostError` when the bus has ended."""
        self._socket.settimeout(1.0)  # what has begun is there as a whole: nobody is made to wait
        try:
            kind, fields, _ = self._receive()
        except OSError as error:
            raise _failed(error) from error
        return kind == _SIGNAL and fields.get(_MEMBER) != "NameAcquired"  # which each connection is told of itself

    def call(self, destination: str, path: str, interface: str, member: str, *strings: str) -> list[Any]:
        """What the service answers: strings, lists of strings, numbers. `DBusError` if it refuses."""
        self._serial += 1
        body = b""
        for text in strings:
            body = _padded(body, 4) + _string(text)
        fields = [(_PATH, "o", path), (_INTERFACE, "s", interface), (_MEMBER, "s", member)]
        fields += [(_DESTINATION, "s", destination)]
        header = b""
        for code, letter, text in fields:
            header = _padded(header, 8) + bytes((code, 1)) + letter.encode() + b"\0" + _string(text)
        if strings:
            signature = "s" * len(strings)
            header = _padded(header, 8) + bytes((_SIGNATURE, 1)) + b"g\0" + bytes((len(strings),))
            header += signature.encode() + b"\0"
        head = _HEAD.pack(ord("l"), _CALL, _NO_AUTO_START, 1, len(body), self._serial)
        try:
            before, self._first = self._first, b""
            self._socket.sendall(before + _padded(head + struct.pack("<I", len(header)) + header, 8) + body)
            while True:
                kind, found, answer = self._receive()
                if kind in (_REPLY, _ERROR) and found.get(_REPLY_SERIAL) == self._serial:
                    break
        except OSError as error:
            raise _failed(error) from error
        if kind == _ERROR:
            name = str(found.get(_ERROR_NAME, ""))
            said = str(answer[0]) if answer and isinstance(answer[0], str) else name
            raise DBusError(f"{destination} refuses {member}: {said}", name=name)
        return answer

    def _authenticate(self) -> None:
        """EXTERNAL: the kernel tells the bus who we are."""
        self._socket.sendall(b"\0AUTH EXTERNAL " + str(os.geteuid()).encode().hex().encode() + b"\r\n")
        line = b""
        while not line.endswith(b"\r\n"):
            more = self._socket.recv(1)
            if not more or len(line) > 4096:
                raise HostError("the system's D-Bus ended the connection", errno=errno.ECONNRESET)
            line += more
        if not line.startswith(b"OK "):
            raise HostError("the system's D-Bus does not let us in", errno=errno.EACCES)

    def _receive(self) -> tuple[int, dict[int, Any], list[Any]]:
        """One message: type, header fields, body."""
        start = self._read(16)
        order = {ord("l"): "<", ord("B"): ">"}.get(start[0], "")
        if not order:
            raise HostError("what came over D-Bus is no message", errno=errno.EBADMSG)
        length, _, size = struct.unpack_from(f"{order}III", start, 4)
        if length > LIMIT or size > LIMIT:
            raise HostError(f"a D-Bus message of {length + size} bytes is too long", errno=errno.EMSGSIZE)
        data = start + self._read(-(-size // 8) * 8)
        reader = _Reader(data, order, 16, 16 + size)
        fields: dict[int, Any] = {}
        while reader.position < reader.end:
            reader.align(8)
            code = reader.take(1)[0]
            fields[code] = reader.value(reader.signature())
        body = self._read(length)
        given = fields.get(_SIGNATURE, "")
        if start[1] not in (_REPLY, _ERROR) or not isinstance(given, str):
            return start[1], fields, []  # a signal: nobody asked
        return start[1], fields, _Reader(body, order, 0, len(body)).values(given)

    def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            more = self._socket.recv(size - len(data))
            if not more:
                raise HostError("the system's D-Bus ended the connection", errno=errno.ECONNRESET)
            data += more
        return data


class _Reader:
    """Values out of a message; `HostError` where they do not fit into it."""

    def __init__(self, data: bytes, order: str, position: int, end: int) -> None:
        self.data, self.order, self.position, self.end = data, order, position, end

    def align(self, size: int) -> None:
        self.position = -(-self.position // size) * size

    def take(self, size: int) -> bytes:
        if size < 0 or self.position + size > self.end:
            raise HostError("a D-Bus message is cut short", errno=errno.EBADMSG)
        self.position += size
        return self.data[self.position - size : self.position]

    def number(self) -> int:
        self.align(4)
        return int(struct.unpack(f"{self.order}I", self.take(4))[0])

    def signature(self) -> str:
        return self.take(self.take(1)[0] + 1)[:-1].decode("ascii", "replace")

    def value(self, kind: str) -> Any:
        if kind in ("s", "o"):
            return self.take(self.number() + 1)[:-1].decode("utf-8", "replace")
        if kind in ("u", "i", "b"):
            return self.number()
        if kind == "g":
            return self.signature()
        if kind == "as":
            size = self.number()
            stop = self.position + size
            found = []
            while self.position < stop:
                found.append(self.value("s"))
            return found
        raise HostError(f"a D-Bus value of type {kind!r} was not asked for", errno=errno.EBADMSG)

    def values(self, signature: str) -> list[Any]:
        found = []
        while signature:
            kind = signature[:2] if signature.startswith("a") else signature[:1]
            signature = signature[len(kind) :]
            if kind not in ("s", "o", "u", "i", "b", "g", "as"):
                break  # of an error or a signal: nobody needs it
            found.append(self.value(kind))
        return found


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<I", len(data)) + data + b"\0"


def _padded(data: bytes, size: int) -> bytes:
    return data + bytes(-len(data) % size)


def _address(text: str) -> str:
    for one in text.split(";"):
        kind, _, rest = one.partition(":")
        values = dict(item.partition("=")[::2] for item in rest.split(","))
        if kind == "unix" and "path" in values:
            return values["path"]
        if kind == "unix" and "abstract" in values:
            return "\0" + values["abstract"]
    raise HostError(f"the system's D-Bus has the address {text!r}, which is no Unix socket", errno=errno.EAFNOSUPPORT)


def _failed(error: OSError) -> HostError:
    reason = "it did not answer" if isinstance(error, TimeoutError) else error.strerror
    return HostError(f"cannot ask the system's D-Bus: {reason}", errno=error.errno or 0)
