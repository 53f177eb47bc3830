"""The switch's process: one loop over all sockets, and what the daemon says on the control socket.

Control is a Unix seqpacket socket of the user's own: a JSON object a message, answered by one.

    {"do": "add", "name": ..., "alias": ..., "mac": ..., "isolated": false, "mtu": 0}   with the card's socket
    {"do": "uplink", "port": N, "udp": [[first, last]...]}       with the socket of the port's way out, and UDP ports of
                                                                 the machine that it leads to
    {"do": "udp", "port": N, "to": M}                       with a bound UDP socket, whose datagrams go to the machine
    {"do": "replace", "port": N}                                              with another socket of the card
    {"do": "hello"}      {"do": "remove", "port": N}      {"do": "ports", "after": N}
    {"do": "leases", "after": N}
    {"do": "configure", "settings": {...}}      {"do": "stop"}

The answer is `{"id": N, "return": ...}` or `{"id": N, "error": "..."}`, with the command's own "id": who gave up
waiting takes no late answer for that of its next question. What a machine does can end its own port, nothing else.
"""

from __future__ import annotations

import json
import os
import resource
import select
import socket
import struct
import sys
import time

from kvik.errors import InvalidArgument, KvikError
from kvik.network.switch.confine import confine
from kvik.network.switch.gateway import Gateway
from kvik.network.switch.mtu import LONG, STANDARD
from kvik.network.switch.outside import Outlet, Outside
from kvik.network.switch.packets import ip_text, mac_bytes, mac_text
from kvik.network.switch.plane import Plane
from kvik.network.switch.port import Port, PortGone
from kvik.network.switch.resolver import Pending, Resolver
from kvik.network.switch.settings import Settings, from_json
from kvik.network.switch.udp import FORWARDS, Flows, Forward

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

PORTS = 256
CLIENTS = 16
MESSAGE = 200_000  # bytes: what a Unix socket's default buffer takes
PAGE = 250  # ports or leases in one answer
IDLE = 60.0  # seconds without a port and without a daemon, after which nobody needs us
_NAME = 255  # characters
FILES = 8192  # descriptors, as far as the host allows
_OTHERS = 2048  # of them for ports, forwards and questions


class Client:
    """A daemon on the control socket."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    def fileno(self) -> int:
        return self.sock.fileno()


class Server:
    def __init__(self, listener: socket.socket, settings: Settings) -> None:
        self.listener = listener
        self._poll = select.epoll()
        self._objects: dict[int, Port | Pending | Forward | Outlet | Client | None] = {}
        self.gateway = Gateway(
            settings, Resolver(self._watch, self._unwatch), Outside(self._watch, self._unwatch, _outlets())
        )
        self.plane = Plane(self.gateway)
        self._changed: list[Port] = []
        self._clients = 0
        self._last = 0  # number of a port
        self._stop = False
        listener.listen(CLIENTS)  # anew: by this the kernel names us, not who started us, as the peer (unix(7))
        listener.setblocking(False)
        self._objects[listener.fileno()] = None
        self._poll.register(listener.fileno(), select.EPOLLIN)

    def _watch(self, item: Port | Pending | Forward | Outlet | Client) -> None:
        self._objects[item.fileno()] = item
        self._poll.register(item.fileno(), select.EPOLLIN)

    def _unwatch(self, item: Port | Pending | Forward | Outlet | Client) -> None:
        if self._objects.get(item.fileno()) is item:
            del self._objects[item.fileno()]
            self._poll.unregister(item.fileno())

    def run(self) -> None:
        """Until told to stop, or until nobody has needed it for a while."""
        plane = self.plane
        ticked = used = time.monotonic()
        while not self._stop:
            events = self._poll.poll(1.0)
            plane.now = now = time.monotonic()
            for fd, mask in events:
                item = self._objects.get(fd)
                if isinstance(item, Port):
                    self._port(item, mask)
                elif isinstance(item, Outlet):
                    self.gateway.outside.receive(self.gateway, item, mask)
                elif isinstance(item, Pending):
                    self.gateway.resolver.readable(item)
                elif isinstance(item, Forward):
                    if item.port.flows is not None:
                        item.port.flows.receive(item, self.gateway)
                elif isinstance(item, Client):
                    self._client(item)
                elif fd == self.listener.fileno():
                    self._accept()
            if self._changed:
                self._settle()
            if now - ticked >= 1.0:
                ticked = now
                plane.age()
                self.gateway.tick()
                if plane.ports or self._clients:
                    used = now
                elif now - used > IDLE:
                    say("nobody needs this network any more")
                    return

    # ports

    def _port(self, port: Port, mask: int) -> None:
        if mask & select.EPOLLOUT:
            port.flush()
            self._changed.append(port)
        if mask & ~select.EPOLLOUT and not port.gone:
            try:
                self.plane.receive(port)
            except BlockingIOError:
                pass
            except PortGone as gone:
                port.gone = str(gone)
                self._changed.append(port)
            except Exception as error:  # a mistake of ours that one machine brings about must not be everybody's
                port.gone = f"internal error: {error!r}"
                self._changed.append(port)

    def _settle(self) -> None:
        """Close what is gone, and ask the poller about room where something waits for it."""
        changed, self._changed[:] = list(self._changed), []
        for port in changed:
            if port.gone:
                self._remove(port, port.gone)
            elif bool(port.queued) != port.waiting and self._objects.get(port.fileno()) is port:
                port.waiting = bool(port.queued)
                self._ask(port)
                if port.uplink is not None:
                    self._ask(port.uplink)

    def _ask(self, port: Port) -> None:
        """What the poller is to tell of. A way out whose machine does not keep up is not read meanwhile."""
        held = port.serves is not None and port.serves.waiting
        events = (0 if held else select.EPOLLIN) | (select.EPOLLOUT if port.waiting else 0)
        self._poll.modify(port.fileno(), events)

    def _add(self, sock: socket.socket, name: str, mac: bytes | None, isolated: bool) -> Port:
        self._last += 1
        port = Port(self._last, sock, name, mac, isolated=isolated)
        port.changed = self._changed
        return port

    def _remove(self, port: Port, why: str) -> None:
        if self._objects.get(port.fileno()) is not port:
            return
        self._unwatch(port)
        port.close()
        port.gone = port.gone or why
        if port.serves is not None:
            say(f"port {port.serves.number} ({port.serves.name}) has lost its way out: {why}")
            port.serves.uplink = None
            return
        say(f"port {port.number} ({port.name}) closed: {why}")
        self.plane.remove(port)
        if port.flows is not None:
            for forward in port.flows.forwards:
                self._unwatch(forward)
            port.flows.close()
        if port.uplink is not None:
            uplink, port.uplink = port.uplink, None
            self._unwatch(uplink)
            uplink.close()

    # control

    def _accept(self) -> None:
        try:
            sock, _ = self.listener.accept()
        except OSError:
            return
        _, user, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if user not in (0, os.getuid()) or self._clients >= CLIENTS:
            sock.close()
            return
        sock.setblocking(False)
        self._clients += 1
        self._watch(Client(sock))

    def _client(self, client: Client) -> None:
        fds: list[int] = []
        try:
            data, fds, flags, _ = socket.recv_fds(client.sock, MESSAGE, 4, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return
        except OSError:
            data, flags = b"", 0
        answer: dict[str, Any] = {}
        try:
            if not data:
                self._drop(client)
                return
            try:
                if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                    raise InvalidArgument("the message is too long")
                given = json.loads(data)
                if not isinstance(given, dict):
                    raise InvalidArgument("a command is an object")
                answer["id"] = given.get("id")
                answer["return"] = self._command(given, fds)
            except (KvikError, ValueError, KeyError, TypeError, RecursionError, OSError) as error:
                answer["error"] = str(error) or type(error).__name__
        finally:
            for fd in fds:  # those that a port has taken are gone from the list
                os.close(fd)
        try:
            client.sock.send(json.dumps(answer).encode())
        except OSError:
            self._drop(client)

    def _drop(self, client: Client) -> None:
        self._unwatch(client)
        client.sock.close()
        self._clients -= 1

    def _command(self, given: dict[str, Any], fds: list[int]) -> Any:
        what = given["do"]
        if what == "add":
            return self._command_add(given, fds)
        if what == "uplink":
            return self._command_uplink(given, fds)
        if what == "udp":
            return self._command_udp(given, fds)
        if what == "replace":
            return self._command_replace(given, fds)
        if what == "hello":
            return {"pid": os.getpid(), "network": self.gateway.settings.name}
        if what == "remove":
            port = self.plane.ports.get(given["port"])
            if port is not None:
                self._remove(port, "removed")
            return port is not None
        after = int(given.get("after", 0))
        if what == "ports":
            return [self._describe(port) for port in self.plane.ports.values() if port.number > after][:PAGE]
        if what == "leases":
            return self.gateway.leases()[after : after + PAGE]
        if what == "configure":
            settings = from_json(given["settings"])
            now = self.gateway.settings
            if (settings.ip, settings.prefix, settings.mac) != (now.ip, now.prefix, now.mac):
                raise InvalidArgument("a running network keeps its address")
            self.gateway.configure(settings)
            return True
        if what == "stop":
            self._stop = True
            return True
        raise InvalidArgument(f"{what!r} is no command")

    def _command_add(self, given: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        if len(self.plane.ports) >= PORTS:
            raise InvalidArgument(f"this network has {PORTS} ports already")
        name, alias = str(given.get("name", "")).lower(), str(given.get("alias", ""))
        if len(name) > _NAME or len(alias) > _NAME:
            raise InvalidArgument("that name is too long")
        _check_socket(fds)
        mac = mac_bytes(given["mac"]) if given.get("mac") else None
        mtu = int(given.get("mtu", 0))
        if mtu and not STANDARD <= mtu <= LONG:
            raise InvalidArgument(f"no card has an MTU of {mtu} here")
        if mac is not None and mac[0] & 1:
            raise InvalidArgument(f"{mac_text(mac)} is a group's address")
        port = self._add(socket.socket(fileno=fds.pop(0)), name, mac, bool(given.get("isolated")))
        port.alias = alias
        port.mtu = mtu
        try:
            self.plane.add(port)
        except ValueError:
            port.close()
            raise
        self._watch(port)
        say(f"port {port.number} ({name}) opened for {given.get('mac') or 'any card'}")
        address = self.gateway.welcome(port)
        return {"port": port.number, "ip": ip_text(address) if address else ""}

    def _describe(self, port: Port) -> dict[str, Any]:
        address = self.gateway.expect(port)
        return {
            "port": port.number,
            "name": port.name,
            "alias": port.alias,
            "mac": mac_text(port.mac) if port.mac is not None else "",
            "isolated": port.isolated,
            "ip": ip_text(address) if address else "",
            "uplink": port.uplink is not None,
            "learned": [mac_text(mac) for mac in sorted(port.macs)[:8]],
            "queued": port.queued,
            "rx": [port.rx_bytes, port.rx_frames],  # from the machine
            "tx": [port.tx_bytes, port.tx_frames],
            "dropped": port.dropped,  # what the machine did not read, or sent to everybody too fast
            "refused": port.refused,  # what it may not send
        }

    def _command_uplink(self, given: dict[str, Any], fds: list[int]) -> bool:
        port = self.plane.ports.get(given["port"])
        if port is None:
            raise InvalidArgument("that port is gone")
        forwarded = [(int(first), int(last)) for first, last in given.get("udp", ())]
        if len(forwarded) > FORWARDS:
            raise InvalidArgument(f"more than {FORWARDS} ranges of ports lead to that machine")
        _check_socket(fds)
        port.forwarded = forwarded
        if port.uplink is not None:
            old, port.uplink = port.uplink, None
            self._unwatch(old)
            old.close()
        uplink = port.uplink = self._add(socket.socket(fileno=fds.pop(0)), "", None, False)
        uplink.serves = port
        self._watch(uplink)
        self._ask(uplink)
        self.gateway.introduce(port)
        return True

    def _command_udp(self, given: dict[str, Any], fds: list[int]) -> bool:
        port, to = self.plane.ports.get(given["port"]), int(given["to"])
        if port is None:
            raise InvalidArgument("that port is gone")
        if not 1 <= to <= 65535 or not self.gateway.ip:
            raise InvalidArgument(f"nothing can lead to port {to} of a machine here")
        _check_socket(fds, socket.AF_INET, socket.SOCK_DGRAM)
        flows = port.flows = port.flows or Flows()
        if len(flows.forwards) >= FORWARDS:
            raise InvalidArgument(f"{FORWARDS} ports of the host lead to that machine already")
        forward = Forward(socket.socket(fileno=fds.pop(0)), port, to)
        flows.forwards.append(forward)
        self._watch(forward)
        return True

    def _command_replace(self, given: dict[str, Any], fds: list[int]) -> bool:
        """The port stays what it is; what was on its way by the old socket is lost."""
        port = self.plane.ports.get(given["port"])
        if port is None:
            raise InvalidArgument("that port is gone")
        _check_socket(fds)
        self._unwatch(port)
        port.replace(socket.socket(fileno=fds.pop(0)))
        self._watch(port)
        if port.uplink is not None:
            self._ask(port.uplink)  # nothing waits any more
        return True


def _check_socket(fds: list[int], family: int = socket.AF_UNIX, kind: int = socket.SOCK_STREAM) -> None:
    if len(fds) != 1:
        raise InvalidArgument("one socket goes with this")
    with socket.socket(fileno=os.dup(fds[0])) as probe:
        if probe.family != family or probe.type != kind:
            raise InvalidArgument("that is another kind of socket")


def _outlets() -> int:
    """Sockets for UDP of all machines together: what the limit of descriptors leaves."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(256, soft - _OTHERS)


def say(text: str) -> None:
    """Into the network's log."""
    try:
        sys.stderr.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
        sys.stderr.flush()
    except OSError:
        pass  # a full disk must not end a network


def main(arguments: list[str]) -> int:
    """LISTENER SETTINGS: two descriptors, a listening seqpacket socket and a file of JSON."""
    listener = socket.socket(fileno=int(arguments[0]))
    with open(int(arguments[1]), "rb") as file:  # noqa: PTH123
        settings = from_json(json.loads(file.read(MESSAGE)))
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, FILES), hard))
    server = Server(listener, settings)
    try:
        confine()
    except OSError as error:  # a kernel without seccomp
        say(f"not confined: {error.strerror}")
    server.run()
    return 0
