"""passt(1): user-mode networking in a process of its own, with the host's addresses and forwarded ports.

<interface type='user'><backend type='passt'/><portForward proto='tcp'><range start='2222' to='22'/></portForward>
"""

from __future__ import annotations

import socket

from kvik.conf.devices.interface import Interface, PortForward
from kvik.conf.domain import Domain
from kvik.errors import ConfigUnsupported
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
        argv += [f"--{forward.proto}-ports", port_specification(forward)]
    return Command("passt", alias_of(device), argv, (connected.fileno(),))


def port_specification(forward: PortForward) -> str:
    """`127.0.0.1%eth0/2000-2100:3000-3100,~2050`, as in passt(1), --tcp-ports; without ranges: all ports."""
    words = []
    for ports in forward.ranges:
        word = f"{'~' if ports.exclude else ''}{ports.start}"
        if ports.end is not None:
            word += f"-{ports.end}"
        if ports.to is not None:
            if ports.exclude:
                raise ConfigUnsupported("an excluded port range leads nowhere", path="/domain/devices/interface")
            word += f":{ports.to}"
            if ports.end is not None:
                word += f"-{ports.to + ports.end - ports.start}"
        words.append(word)
    where = (forward.address or "") + (f"%{forward.dev}" if forward.dev else "")
    text = ",".join(words) or "all"
    return f"{where}/{text}" if where else text
