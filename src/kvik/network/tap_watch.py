"""The addresses of machines, heard on their interfaces: whatever bridge, switch or device of the host those are on.

    watch.watch("vnet0", "52:54:00:00:00:01")
    watch.heard("vnet0")          # ["10.0.0.5", "fe80::5054:ff:fe00:1"], last heard first

One thread for all interfaces, asleep until a machine speaks of an address (host/packet.py chooses in the kernel: ARP,
ND, DHCP requests). A machine may speak as often as it likes and claim what it likes: beyond some frames a second its
socket is left alone until the second is over, and beyond some addresses the one that was not heard for longest is
forgotten.
"""

from __future__ import annotations

import logging
import select
import socket
import struct
import threading
import time

from kvik.host.packet import ADDRESS_CLAIMS, bound_to, is_up, open_packet_socket
from kvik.network.claims import Address, Claim, read_claim

__all__ = ["ADDRESSES_MAX", "TapWatch"]

logger = logging.getLogger(__name__)

ADDRESSES_MAX = 16  # of one interface
FRAMES_MAX = 32  # read a second from one interface
BUFFER = 1 << 15  # bytes: some thirty frames
LOOK = 1.0  # seconds between looks at interfaces that are down


class _Watched:
    __slots__ = ("device", "fd", "heard", "left", "mac", "outgoing", "second", "socket")

    def __init__(self, device: str, mac: str, *, outgoing: bool) -> None:
        self.device, self.mac, self.outgoing = device, mac, outgoing
        self.socket = open_packet_socket(device, ADDRESS_CLAIMS, outgoing=outgoing, buffer=BUFFER)
        self.fd = self.socket.fileno()
        self.heard: dict[Address, bool] = {}  # whether it is settled; last heard last
        self.second, self.left = 0, FRAMES_MAX

    def may_read(self) -> bool:
        now = int(time.monotonic())
        if now != self.second:
            self.second, self.left = now, FRAMES_MAX
        self.left -= 1
        return self.left >= 0

    def learn(self, claim: Claim) -> None:
        settled = self.heard.pop(claim.address, False) or claim.settled
        if not settled:  # what it asked for before, it did not get
            self.heard = {address: known for address, known in self.heard.items() if known}
        self.heard[claim.address] = settled
        if len(self.heard) > ADDRESSES_MAX:
            del self.heard[next(iter(self.heard))]


class TapWatch:
    """May be called from any thread."""

    def __init__(self) -> None:
        self._epoll: select.epoll | None = None
        self._watched: dict[str, _Watched] = {}
        self._by_fd: dict[int, _Watched] = {}
        self._resting: list[_Watched] = []
        self._down: list[_Watched] = []  # a socket is told when its interface goes down, not when it is deleted then
        self._lock = threading.Lock()

    def watch(self, device: str, mac: str, *, macvtap: bool = False) -> None:
        """Listen on an interface that exists, from now on; what was known of one of that name is forgotten. What a
        macvtap's machine sends is what the host sends there. HostError."""
        made = _Watched(device, mac, outgoing=macvtap)
        with self._lock:
            self._forget(device)
            self._watched[device] = self._by_fd[made.fd] = made
            if self._epoll is None:
                self._epoll = select.epoll()
                self._bell, self._ringer = socket.socketpair()
                self._epoll.register(self._bell, select.EPOLLIN)
                self._thread = threading.Thread(target=self._run, name="kvik-tap-watch", daemon=True)
                self._thread.start()
            self._epoll.register(made.fd, select.EPOLLIN)

    def heard(self, device: str) -> list[str]:
        """Addresses, last heard first; none of an interface that is not watched."""
        with self._lock:
            known = self._watched.get(device)
            return [str(address) for address in reversed(known.heard)] if known is not None else []

    def forget(self, device: str) -> None:
        """Harmless if it is not watched. An interface that is deleted is forgotten by itself."""
        with self._lock:
            self._forget(device)

    def _forget(self, device: str) -> None:
        known = self._watched.pop(device, None)
        if known is not None:
            del self._by_fd[known.fd]
            for kept in (self._resting, self._down):
                if known in kept:
                    kept.remove(known)
            known.socket.close()  # leaves the epoll set by itself

    def close(self) -> None:
        """End the thread. Must not be called from it."""
        if self._epoll is None:
            return
        self._ringer.close()
        self._thread.join()
        for device in list(self._watched):
            self.forget(device)
        self._epoll.close()
        self._bell.close()
        self._epoll = None

    def _run(self) -> None:
        epoll = self._epoll
        assert epoll is not None
        while True:
            for fd, _ in epoll.poll(self._pause()):
                if fd == self._bell.fileno():
                    return
                with self._lock:
                    one = self._by_fd.get(fd)
                    if one is None:
                        continue
                    if one.may_read():
                        self._read(one)
                    else:
                        epoll.modify(fd, 0)
                        self._resting.append(one)
            with self._lock:
                if self._resting and int(time.monotonic()) != self._resting[0].second:
                    for one in self._resting:
                        epoll.modify(one.fd, select.EPOLLIN)
                    self._resting.clear()
                for one in list(self._down):
                    self._look_at(one)

    def _look_at(self, one: _Watched) -> None:
        """One that was down: whether it is gone by now, or up."""
        name = bound_to(one.socket)
        if not name:
            self._forget(one.device)
        elif is_up(one.socket, name):
            self._down.remove(one)

    def _pause(self) -> float | None:
        """Until the second is over in which a machine spoke too much, or what is down is looked at."""
        if self._resting:
            return 1.0 - time.monotonic() % 1.0
        return LOOK if self._down else None

    def _read(self, one: _Watched) -> None:
        try:
            frame, address = one.socket.recvfrom(2048)
        except BlockingIOError:
            return
        except OSError:  # the interface went down, or away: then the socket is on none any more
            if one not in self._down:
                self._down.append(one)
            self._look_at(one)
            return
        if (address[2] == socket.PACKET_OUTGOING) != one.outgoing:
            return  # others say that too, and they may lie about it
        try:
            claim = read_claim(frame, one.mac)
        except (ValueError, struct.error, IndexError) as error:
            logger.debug("what the machine on %s says cannot be read: %s", one.device, error)
            return
        if claim is not None:
            one.learn(claim)
