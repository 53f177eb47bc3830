"""A bare client of libvirt's wire protocol: the same bytes to both daemons, so that only the server is measured.

Framing and procedure numbers: libvirt's `src/rpc/virnetprotocol.x` and `src/remote/remote_protocol.x`.
"""

from __future__ import annotations

import selectors
import socket
import struct
import time
from pathlib import Path

PROGRAM = 0x20008086
HEADER = struct.Struct(">IIIiiIi")  # length, program, version, procedure, type, serial, status

CONNECT_OPEN = 1
DOMAIN_GET_XML_DESC = 14
DOMAIN_DEFINE_XML = 11
DOMAIN_LOOKUP_BY_NAME = 23
DOMAIN_UNDEFINE = 35
AUTH_LIST = 66
DOMAIN_IS_ACTIVE = 150
LIST_ALL_DOMAINS = 273
GET_ALL_DOMAIN_STATS = 344


def xdr_string(text: str) -> bytes:
    data = text.encode()
    return struct.pack(">I", len(data)) + data + bytes(-len(data) % 4)


class WireClient:
    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(str(path))
        self.serial = 0
        self.call(AUTH_LIST)
        self.call(CONNECT_OPEN, struct.pack(">I", 1) + xdr_string("qemu:///system") + struct.pack(">I", 0))

    def packet(self, procedure: int, payload: bytes = b"") -> bytes:
        self.serial += 1
        return HEADER.pack(28 + len(payload), PROGRAM, 1, procedure, 0, self.serial, 0) + payload

    def receive(self) -> bytes:
        data = bytearray()
        while len(data) < 4 or len(data) < int.from_bytes(data[:4], "big"):
            chunk = self.socket.recv(1 << 20)
            if not chunk:
                raise ConnectionError("the daemon closed the connection")
            data += chunk
        if HEADER.unpack_from(data)[6]:
            raise RuntimeError(f"the daemon answered with an error: {bytes(data[28:200])!r}")
        return bytes(data[28:])

    def call(self, procedure: int, payload: bytes = b"") -> bytes:
        self.socket.sendall(self.packet(procedure, payload))
        return self.receive()

    def define(self, xml: str) -> bytes:
        """Returns the domain handle {name, uuid, id} as encoded by the daemon."""
        return self.call(DOMAIN_DEFINE_XML, xdr_string(xml))

    def lookup(self, name: str) -> bytes:
        return self.call(DOMAIN_LOOKUP_BY_NAME, xdr_string(name))

    def close(self) -> None:
        self.socket.close()


def rate(client: WireClient, procedure: int, payload: bytes, seconds: float) -> float:
    """Calls per second of one client that waits for each answer."""
    count = 0
    start = time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        for _ in range(50):
            client.call(procedure, payload)
        count += 50
    return count / elapsed


def concurrent_rate(
    clients: list[WireClient], procedure: int, payload: bytes, seconds: float
) -> tuple[float, list[float]]:
    """Calls per second of all clients together, each with one call under way; and the latencies in seconds."""
    selector = selectors.EpollSelector()
    sent = {}
    packet = clients[0].packet(procedure, payload)
    size = None
    latencies = []
    for client in clients:
        selector.register(client.socket, selectors.EVENT_READ, client)
        sent[client] = time.perf_counter()
        client.socket.send(packet)
    start = time.perf_counter()
    while (now := time.perf_counter()) - start < seconds:
        for key, _ in selector.select():
            data = key.data.socket.recv(65536)
            size = size or len(data)
            if len(data) != size:
                raise RuntimeError("a reply came in pieces: this measure is for short replies")
            now = time.perf_counter()
            latencies.append(now - sent[key.data])
            sent[key.data] = now
            key.data.socket.send(packet)
    elapsed = time.perf_counter() - start
    for client in clients:
        client.socket.recv(65536)
    selector.close()
    return len(latencies) / elapsed, latencies
