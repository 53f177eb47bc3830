"""A switch in memory: ports are real socket pairs, the test holds the machines' ends."""

from __future__ import annotations

import contextlib
import socket
import struct
from typing import Any

from kvik.network.switch import dns
from kvik.network.switch.gateway import Gateway
from kvik.network.switch.outside import Outlet, Outside
from kvik.network.switch.packets import IPV4, UDP, mac_bytes, write_ip, write_udp
from kvik.network.switch.plane import Plane
from kvik.network.switch.port import Port
from kvik.network.switch.resolver import Resolver
from kvik.network.switch.settings import from_json

SETTINGS: dict[str, Any] = {
    "name": "default",
    "mac": "52:54:00:00:00:01",
    "ip": "10.0.0.1",
    "prefix": 24,
    "ranges": [["10.0.0.10", "10.0.0.20"]],
    "domain": "test",
}
GATEWAY = mac_bytes("52:54:00:00:00:01")
ALL = b"\xff" * 6
NONE = bytes(4)


def mac(number: int) -> bytes:
    return bytes((0x52, 0x54, 0, 0xAA, 0, number))


def message(kind: int, card: bytes, *, client: bytes = NONE, **options: bytes) -> bytes:
    """A DHCP client's message; options by name."""
    numbers = {"requested": 50, "server": 54, "name": 12}
    fixed = struct.pack("!BBBBIHH4s4s4s4s16s", 1, 1, 6, 0, 0x1234, 0, 0, client, NONE, NONE, NONE, card)
    packed = bytes((53, 1, kind)) + b"".join(
        bytes((numbers[name], len(value))) + value for name, value in options.items()
    )
    return fixed.ljust(236, b"\0") + b"\x63\x82\x53\x63" + packed + b"\xff"


def query(name: str, kind: int = 1, number: int = 7) -> bytes:
    return struct.pack("!HHHHHH", number, 0x100, 1, 0, 0, 0) + dns.encode_name(name) + struct.pack("!HH", kind, 1)


class Machine:
    """A card at a port."""

    def __init__(self, port: Port, sock: socket.socket, address: bytes) -> None:
        self.port, self.sock, self.mac = port, sock, address
        sock.setblocking(False)

    def send(self, *frames: bytes) -> None:
        self.sock.sendall(b"".join(struct.pack(">I", len(frame)) + frame for frame in frames))

    def frame(self, target: bytes, text: bytes = b"hello", kind: bytes = b"\x88\xb5") -> bytes:
        return target + self.mac + kind + text.ljust(46, b"\0")

    def udp(self, source: tuple[bytes, int], target: tuple[bytes, int], data: bytes, to: bytes = GATEWAY) -> bytes:
        return write_ip((to, self.mac), source[0], target[0], UDP, write_udp(source, target, data))

    def received(self) -> list[bytes]:
        data = b""
        with contextlib.suppress(BlockingIOError):
            while more := self.sock.recv(1 << 20):
                data += more
        found = []
        while data:
            (size,) = struct.unpack_from(">I", data)
            found.append(data[4 : 4 + size])
            data = data[4 + size :]
        return found


class Wire:
    def __init__(self, **settings: Any) -> None:
        self.outlets: list[Outlet] = []
        self.gateway = Gateway(
            from_json({**SETTINGS, **settings}),
            Resolver(lambda item: None, lambda item: None, "/nonexistent"),
            Outside(self.outlets.append, self.outlets.remove, 64),
        )
        self.plane = Plane(self.gateway)
        self.plane.now = 1000.0
        self.changed: list[Port] = []
        self.machines: list[Machine] = []

    def add(self, name: str, number: int, *, address: bytes = b"", isolated: bool = False) -> Machine:
        """With the card `mac(number)`, or `address`."""
        ours, theirs = socket.socketpair()
        port = Port(len(self.machines) + 1, ours, name, address or mac(number), isolated=isolated)
        port.changed = self.changed
        self.plane.add(port)
        machine = Machine(port, theirs, mac(number))
        self.machines.append(machine)
        return machine

    def uplink(self, machine: Machine) -> Machine:
        ours, theirs = socket.socketpair()
        port = Port(100 + machine.port.number, ours)
        port.serves, machine.port.uplink = machine.port, port
        port.changed = self.changed
        return Machine(port, theirs, GATEWAY)

    def run(self, *machines: Machine) -> None:
        """Whatever these (all, if none is named) have sent."""
        for machine in machines or self.machines:
            with contextlib.suppress(BlockingIOError):
                while True:
                    self.plane.receive(machine.port)

    def ask(self, machine: Machine, *frames: bytes) -> list[bytes]:
        """Send, switch, and what comes back to the sender."""
        machine.send(*frames)
        self.run(machine)
        return machine.received()

    def close(self) -> None:
        for machine in self.machines:
            self.plane.remove(machine.port)
            machine.sock.close()
            machine.port.close()


__all__ = ["ALL", "GATEWAY", "IPV4", "SETTINGS", "Machine", "Wire", "mac", "message", "query"]
