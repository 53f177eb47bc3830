"""kvik-vmm's memory and devices as a stream, and back.

It writes its stream into a pipe (`x-kvik-save-stream`), which is kept as it comes. Restoring, we are the source of a
migration: everything is sent to a machine that was started with --incoming, and RUN once it has said DONE. The frames:
`kvik/vmm/state/stream.py`.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import TYPE_CHECKING

from kvik.errors import HostError, HypervisorError, KvikError
from kvik.hypervisor.descriptors import Opened
from kvik.hypervisor.state import FD_NAME, PIECE, StateSource, StateTarget, in_own_thread, received

if TYPE_CHECKING:
    from kvik.hypervisor.kvik.machine import KvikMachine

__all__ = ["connection", "load", "save"]

_LONG = 7 * 24 * 3600.0  # seconds that writing a machine's memory may take
_POLL = 0.02  # seconds
_FRAME = struct.Struct("<B3xIQ")  # kind, size, address
_RUN, _READY, _DONE, _FAILED = 6, 16, 17, 18
_MAX_TEXT = 4096


async def save(machine: KvikMachine, target: StateTarget) -> None:
    """Raises `HypervisorError` and others; then the guest is here as it was. Afterwards it is stopped."""
    target.total = (machine.domain.memory or 0) * 1024
    await machine.pause()
    async with received(machine, target) as copying:
        try:
            await machine.execute("x-kvik-save-stream", {"fdname": FD_NAME}, deadline=_LONG)
        except KvikError:
            await asyncio.wait([copying], timeout=10)
            if copying.done() and copying.exception() is not None:
                await copying  # why it was not written, rather than that its pipe broke
            raise


def connection(opened: Opened) -> socket.socket:
    """Our end of what a machine that is about to start is filled through; its own is among `opened`."""
    try:
        ours, theirs = socket.socketpair()
    except OSError as error:
        raise HostError(f"cannot make a socket: {error.strerror}", errno=error.errno or 0) from error
    opened.add("state", theirs.detach())
    return ours


async def load(machine: KvikMachine, source: StateSource) -> None:
    """Into a machine that was started for it; it is stopped afterwards. If it refuses, it ends."""
    sock, machine.incoming = machine.incoming, None
    assert sock is not None
    await in_own_thread(lambda: _feed(sock, source, machine.name))
    while await machine.state() and machine.run_state == "inmigrate":
        if machine.ended:
            raise HypervisorError(f"{machine.name}: kvik-vmm ended when it had its saved state")
        await asyncio.sleep(_POLL)


def _feed(sock: socket.socket, source: StateSource, name: str) -> None:
    with sock:
        try:
            while data := source.read(PIECE):
                sock.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it has said why
        for expected in (_READY, _DONE):
            kind, size, _ = _FRAME.unpack(_take(sock, _FRAME.size, name))
            if kind == _FAILED:
                said = _take(sock, min(size, _MAX_TEXT), name).decode(errors="replace")
                raise HypervisorError(f"{name}: kvik-vmm does not take the saved state: {said}")
            if kind != expected:
                raise HypervisorError(f"{name}: kvik-vmm answered the saved state with frame {kind}")
        sock.sendall(_FRAME.pack(_RUN, 0, 0))
        sock.recv(1)  # until it has taken it: closing earlier could be its loss of the source


def _take(sock: socket.socket, size: int, name: str) -> bytes:
    data = b""
    while len(data) < size:
        part = sock.recv(size - len(data))
        if not part:
            raise HypervisorError(f"{name}: kvik-vmm ended while it was given the saved state")
        data += part
    return data
