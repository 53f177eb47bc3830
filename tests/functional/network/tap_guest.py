"""A guest that is none, on a tap of a network's bridge: it boots, pings and gives its address back in microseconds."""

from __future__ import annotations

import contextlib
import os
import socket
import time

from kvik.host.bridge import bridge_ports
from kvik.host.netlink import Netlink
from kvik.host.tap import Tap, create_tap
from kvik.network.switch import dhcp
from kvik.network.switch.packets import UDP, write_ip, write_udp
from netns import until
from unit.network.switch.guest import Guest
from unit.network.switch.wire import ALL, message


class TapGuest(Guest):
    """Its card is a tap, on `bridge` if one is named. Made and used in the namespace of the bridge."""

    def __init__(self, mac: str, bridge: str | None = None, *, tap: Tap | None = None) -> None:
        self.tap = tap or create_tap("", bridge=bridge, vnet_header=False)
        spare, self._other = socket.socketpair()
        super().__init__(spare, mac)  # for its deadline
        os.set_blocking(self.tap.fds[0], False)
        if bridge is not None:
            with Netlink() as netlink:
                until(lambda: self._port_forwards(netlink))

    def _port_forwards(self, netlink: Netlink) -> bool:
        """A port opens when the kernel's link watch has seen its carrier; what is sent before is lost."""
        return any(port.link.index == self.tap.index and port.state == "forwarding" for port in bridge_ports(netlink))

    def send(self, frame: bytes) -> None:
        os.write(self.tap.fds[0], frame.ljust(60, b"\0"))

    def frame(self) -> bytes:
        seconds = self.sock.gettimeout()
        end = time.monotonic() + (20.0 if seconds is None else seconds)
        while time.monotonic() < end:
            try:
                frame = os.read(self.tap.fds[0], 65536)
                if frame[:6] == self.mac or frame[0] & 1:  # a bridge that does not know yet floods others' frames
                    return frame
            except BlockingIOError:
                time.sleep(0.001)
        raise TimeoutError("no frame in time")

    def _dhcp(self, kind: int, **options: bytes) -> tuple[int, bytes]:
        with contextlib.suppress(BlockingIOError):
            while os.read(self.tap.fds[0], 65536):  # what came for others, to everybody
                pass
        return super()._dhcp(kind, **options)

    def release(self, server: bytes) -> None:
        """Give the address back (RFC 2131, 4.4.4)."""
        body = message(dhcp.RELEASE, self.mac, client=self.ip, server=server)
        data = write_udp((self.ip, 68), (server, 67), body)
        self.send(write_ip((ALL, self.mac), self.ip, server, UDP, data))

    def close(self) -> None:
        self.tap.close()
        self._other.close()
        super().close()
