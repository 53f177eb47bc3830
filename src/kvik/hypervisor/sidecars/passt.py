"""passt(1): user-mode networking in a process of its own, with the host's addresses and forwarded ports.

<interface type='user'><backend type='passt'/><portForward proto='tcp'><range start='2222' to='22'/></portForward>
"""

from __future__ import annotations

import socket

from kvik.conf.devices.interface import Interface
from kvik.conf.domain import Domain
from kvik.conf.port_forward import passt_ports
from kvik.hypervisor.names import alias_of, is_passt
from kvik.hypervisor.sidecars.group import Command, program

__all__ = ["passt_command", "users"]


def users(domain: Domain) -> list[Interface]:
    return [item for item in domain.devices.interfaces if is_passt(item)]


def passt_command(device: Interface, connected: socket.socket) -> Command:
    """`connected` is its end of a socket pair: when QEMU's end closes, it ends. Raises `MissingPackages`."""
    argv = [program("passt"), "--foreground", "--quiet", "--fd", str(connected.fileno())]
    if device.source is not None and device.source.dev:
        argv += ["--interface", device.source.dev]
    if device.mtu is not None:
        argv += ["--mtu", str(device.mtu.size)]
    for ip in device.ips:
        argv += ["--address", ip.address]
        if ip.prefix is not None and ip.family != "ipv6":
            argv += ["--netmask", str(ip.prefix)]
    backend = device.backend
    if backend is not None and backend.log_file:
        argv += ["--log-file", backend.log_file]
    for forward in device.port_forwards:
        argv += [f"--{forward.proto}-ports", passt_ports(forward)]
    return Command("passt", alias_of(device), argv, (connected.fileno(),))
