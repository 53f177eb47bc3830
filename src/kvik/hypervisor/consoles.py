"""Serial lines, consoles and channels of a running machine: what the VMM says of them, and descriptors for clients."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import termios
import tty
from pathlib import Path

from kvik.conf.devices.chardev import Chardev, ChardevSource, Console
from kvik.conf.domain import Domain
from kvik.errors import HypervisorError, NoDevice, OperationUnsupported, ResourceBusy
from kvik.hypervisor.names import character_devices
from kvik.qmp.aio import short_unix_path

__all__ = ["mirror_console", "open_console", "set_pty"]


def open_console(domain: Domain, alias: str) -> int:
    """A non-blocking descriptor for both directions; the caller closes it. Raises `NoDevice`, `ResourceBusy`."""
    for device in character_devices(domain):
        if device.alias is None or device.alias.name != alias:
            continue
        path = device.source.path if device.source else None
        if device.type == "pty" and path:
            return _open_pty(path)
        if device.type == "unix" and path:
            return _open_socket(Path(path), alias)
        raise OperationUnsupported(f"device {alias} of type {device.type} has no console to open")
    raise NoDevice(f"machine {domain.name} has no serial line, console or channel {alias}")


def _open_pty(path: str) -> int:
    try:
        fd = os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise HypervisorError(f"cannot open console {path}: {error.strerror}") from error
    with contextlib.suppress(termios.error):
        tty.setraw(fd)
    return fd


def _open_socket(path: Path, alias: str) -> int:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        with short_unix_path(path) as name:
            sock.connect(name)
    except BlockingIOError:
        sock.close()
        raise ResourceBusy(f"somebody else holds console {alias}") from None
    except OSError as error:
        sock.close()
        raise HypervisorError(f"cannot open console {alias}: {error.strerror}") from error
    fd = sock.detach()
    fcntl.fcntl(fd, fcntl.F_SETFD, fcntl.FD_CLOEXEC)
    return fd


def set_pty(device: Chardev, path: str) -> None:
    if not path.startswith("/dev/pts/") or not path.removeprefix("/dev/pts/").isdecimal():
        return  # QEMU's word is not trusted to name any other file
    if not device.sources:
        device.sources = [ChardevSource()]
    device.sources[0].path = path
    device.tty = path if isinstance(device, Console) else device.tty


def mirror_console(console: Console, serial: Chardev) -> None:
    """The first console of type serial is the first serial line under another name."""
    console.type = serial.type
    path = serial.source.path if serial.source else None
    if path and serial.type == "pty":
        set_pty(console, path)
