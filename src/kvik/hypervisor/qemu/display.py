"""A viewer's connection to a machine's display, handed over as a socket: no port, no address, no password file."""

from __future__ import annotations

import contextlib
import socket
from typing import TYPE_CHECKING

from kvik.errors import KvikError, NoDevice, OperationUnsupported

if TYPE_CHECKING:
    from kvik.hypervisor.qemu.machine import QemuMachine

__all__ = ["open_graphics"]

_PROTOCOLS = {"vnc": "vnc", "spice": "spice", "dbus": "@dbus-display"}  # <graphics type> -> add_client's name
_NAME = "graphics-client"


async def open_graphics(machine: QemuMachine, index: int, skip_auth: bool) -> int:
    """The viewer's end of a socket pair whose other end QEMU serves. Raises `NoDevice`, `OperationUnsupported`,
    `MonitorError`."""
    displays = machine.domain.devices.graphics
    if not 0 <= index < len(displays):
        raise NoDevice(f"machine {machine.name} has no display number {index} (it has {len(displays)})")
    protocol = _PROTOCOLS.get(displays[index].type)
    if protocol is None:
        raise OperationUnsupported(f"a display of type {displays[index].type} takes no viewers")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with theirs:
            await machine.execute("getfd", {"fdname": _NAME}, fds=[theirs.fileno()])
            try:
                arguments = {"protocol": protocol, "fdname": _NAME, "skipauth": skip_auth}
                await machine.execute("add_client", arguments)
            except KvikError:
                with contextlib.suppress(KvikError):  # taken by the command unless it failed early
                    await machine.execute("closefd", {"fdname": _NAME})
                raise
    except BaseException:
        ours.close()
        raise
    return ours.detach()
