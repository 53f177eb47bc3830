"""A machine's way out: passt(1), one process a card, between the switch and the host's sockets.

passt translates TCP, UDP and echo into the user's own sockets; it has its own sandbox and ends with its connection.
Why it and not code of ours: docs/adr/0014-rootless-switch.md.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvik.conf.devices.interface import PortForward, PortRange
from kvik.conf.port_forward import passt_ports
from kvik.errors import ConfigUnsupported, HostError, MissingPackages
from kvik.host import process
from kvik.host.packages import how_to_install, package_for
from kvik.host.process import ProcessHandle, describe_exit, find_program
from kvik.network.switch.udp import FORWARDS

__all__ = ["bind_udp", "forward_arguments", "last_words", "loopback_udp", "passt_udp", "start_uplink"]

LOG_SIZE = 65536  # bytes
ROOM = 4 << 20  # bytes of a connection's window: passt drops what it cannot send, and sends all of it again
READY = 5.0  # seconds for passt to bind its ports


def forward_arguments(forwards: Sequence[PortForward]) -> list[str]:
    """Raises `ConfigUnsupported`. UDP of loopback addresses is the switch's: `loopback_udp`."""
    words: list[str] = []
    for forward in forwards:
        if forward.proto == "tcp" or not _is_loopback(forward.address):
            words += [f"--{forward.proto}-ports", passt_ports(forward)]
    return words


def loopback_udp(forwards: Sequence[PortForward]) -> list[tuple[str, int, int]]:
    """What the switch relays of them: the host's address and port, and the machine's port. A forward from every
    address comes by loopback too. Raises `ConfigUnsupported`."""
    found: list[tuple[str, int, int]] = []
    for forward in forwards:
        if forward.proto != "udp" or forward.dev or not (forward.address is None or _is_loopback(forward.address)):
            continue
        excluded = {port for item in forward.ranges if item.exclude for port in _ports(item)}
        for item in forward.ranges:
            shift = (item.to or item.start) - item.start
            given = [] if item.exclude else [port for port in _ports(item) if port not in excluded]
            found += [(forward.address or "127.0.0.1", port, port + shift) for port in given]
    if len(found) > FORWARDS:
        raise ConfigUnsupported(
            f"{len(found)} UDP ports are to lead from the host's loopback to one machine; {FORWARDS} are the most",
            path="/domain/devices/interface/portForward",
            remedy="name fewer, or an address that is not loopback",
        )
    return found


def passt_udp(forwards: Sequence[PortForward]) -> list[tuple[int, int]]:
    """The machine's UDP ports, first and last, that passt leads to: what they answer goes by passt."""
    return [
        (item.to or item.start, (item.to or item.start) + len(_ports(item)) - 1)
        for forward in forwards
        if forward.proto == "udp" and not _is_loopback(forward.address)
        for item in forward.ranges
        if not item.exclude
    ]


def bind_udp(address: str, port: int) -> socket.socket:
    """Raises `HostError`."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    try:
        sock.bind((address, port))
    except OSError as error:
        sock.close()
        raise HostError(
            f"UDP port {port} of {address} cannot lead to the machine: {error.strerror}",
            errno=error.errno or 0,
            remedy="is the port taken, or below 1024?",
        ) from error
    return sock


def _ports(item: PortRange) -> range:
    return range(item.start, (item.start if item.end is None else item.end) + 1)


def _is_loopback(address: str | None) -> bool:
    return address is not None and address.startswith("127.")


def start_uplink(
    settings: dict[str, Any], address: str, arguments: Sequence[str], log: Path, *, wait: bool = False
) -> tuple[socket.socket, ProcessHandle]:
    """A passt for the machine at `address`, and the switch's end of its connection.

    What it says goes to `log`. `wait`: until it has bound its ports; what it cannot bind is an error of this call.
    Raises `MissingPackages`, `HostError`.
    """
    program = find_program("passt")
    if program is None:
        raise MissingPackages(
            "passt is not installed: machines on this network reach nothing outside of it but by UDP",
            packages=(package_for("passt") or "passt",),
            remedy=how_to_install("passt"),
        )
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, ROOM)  # as much of it as the host allows
        argv = [program, "--foreground", "--quiet", "--fd", str(theirs.fileno()), "--address", address]
        argv += ["--netmask", str(settings["prefix"]), "--gateway", settings["ip"], "--mac-addr", settings["mac"]]
        # Addresses and names are the switch's business. The gateway's address is no way to the host's own loopback.
        argv += ["--no-dhcp", "--no-dhcpv6", "--no-ndp", "--no-ra", "--no-map-gw", "--dns-forward", settings["ip"]]
        argv += ["--log-file", str(log), "--log-size", str(LOG_SIZE)]
        try:
            handle = process.spawn([*argv, *arguments], pass_fds=(theirs.fileno(),))
        except BaseException:
            ours.close()
            raise
    if wait and not _ready(handle):
        ours.close()
        handle.wait(1.0)
        how = describe_exit(handle.code)
        handle.close()
        raise HostError(
            f"passt cannot forward {' '.join(arguments)}: {last_words(log) or how}",
            remedy="is a port taken, or below 1024?",
        )
    return ours, handle


def last_words(log: Path) -> str:
    """Of a passt that ended: its last line, without the time."""
    try:
        with log.open("rb") as file:
            file.seek(-min(1000, log.stat().st_size), os.SEEK_END)
            lines = file.read(1000).decode("utf-8", "replace").splitlines()
    except OSError:
        return ""
    return lines[-1].rpartition(": ")[2].strip() if lines else ""


def _ready(handle: ProcessHandle) -> bool:
    """Whether it runs, ports bound: its seccomp filter is the last thing it sets up (proc(5), /proc/PID/status)."""
    end = time.monotonic() + READY
    while handle.alive and time.monotonic() < end:
        with contextlib.suppress(OSError), open(f"/proc/{handle.pid}/status", "rb") as file:  # noqa: PTH123 - polled
            if b"\nSeccomp:\t2" in file.read(8192):
                break
        time.sleep(0.002)
    return handle.alive
