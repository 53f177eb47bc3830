"""A DHCP server that takes its time: the probe of a network hears it."""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
from contextlib import ExitStack
from functools import partial
from types import SimpleNamespace

import pytest

from kvik.conf.network import parse_network
from kvik.conf.network_addresses import ip_interface
from kvik.host.namespace import Namespace
from kvik.host.netlink import Netlink
from kvik.network import dhcp
from kvik.network.probe import STP_WAIT, _walk4, wire

pytestmark = [
    pytest.mark.functional,
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
]
LATE = 0.8  # seconds: longer than a round of the probe
DOCUMENT = """<network><name>lan</name><bridge name='virbr0'/><ip address='10.3.0.1' prefix='24'><dhcp>
<range start='10.3.0.2' end='10.3.0.9'/></dhcp></ip></network>"""


def offer(frame: bytes) -> bytes:
    """A DHCPOFFER of 10.3.0.2, from a frame with a DHCPDISCOVER."""
    body = bytearray(frame[42:])
    body[0] = 2  # BOOTREPLY
    body[16:20] = bytes((10, 3, 0, 2))
    at = body.index(b"\x63\x82\x53\x63") + 4
    body[at:] = bytes((53, 1, 2, 255))
    udp = struct.pack("!HHHH", 67, 68, 8 + len(body), 0)
    ip = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 28 + len(body), 0, 0, 64, 17, 0, bytes((10, 3, 0, 1)), b"\xff" * 4)
    return b"\xff" * 6 + frame[6:12] + b"\x08\x00" + ip + udp + body


def test_an_offer_that_takes_longer_than_a_round_is_heard() -> None:
    with Namespace() as here, Namespace() as guest, ExitStack() as undo:
        netlink = here.run(Netlink)
        undo.callback(netlink.close)
        port = here.run(partial(wire, netlink, guest, undo))
        server = here.run(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0800)))
        undo.callback(server.close)
        server.bind((port.name, 0x0800))
        over = threading.Event()

        def serve() -> None:
            waiting: list[tuple[float, bytes]] = []
            server.settimeout(0.02)
            while not over.is_set():
                try:
                    frame = server.recv(2048)
                    if dhcp.read_options(frame[282:]).get(53) == b"\x01":
                        waiting.append((time.monotonic() + LATE, offer(frame)))
                except TimeoutError:
                    pass
                while waiting and waiting[0][0] <= time.monotonic():
                    server.send(waiting.pop(0)[1])

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            document = parse_network(DOCUMENT)
            own = document.ips[0]
            walk = SimpleNamespace(document=document, tracer=SimpleNamespace(steps=list), stop=over, guest=guest)
            assert _walk4(walk, ip_interface(own), STP_WAIT) is None
        finally:
            over.set()
            thread.join()
