"""Starts what one machine, or one device that is plugged into it, needs beside the VMM. The VMM's ends of the
connections are left among the opened descriptors."""

from __future__ import annotations

import socket
from contextlib import ExitStack
from pathlib import Path

from kvik.conf.devices.interface import Interface
from kvik.conf.devices.other import Filesystem
from kvik.conf.domain import Domain
from kvik.errors import HostError
from kvik.hypervisor.descriptors import Opened, listen_unix
from kvik.hypervisor.names import alias_of, is_passt, passt_name
from kvik.hypervisor.sidecars import passt, swtpm, virtiofsd
from kvik.hypervisor.sidecars.group import Sidecar, Sidecars, wait_confined
from kvik.qmp.aio import short_unix_path

__all__ = ["check", "start_for_device", "start_sidecars"]

_READY = 5.0  # seconds for passt to bind its ports


def check(domain: Domain) -> None:
    """What no side process can do. Raises `ConfigError`s; needs nothing of the host."""
    virtiofsd.check(domain)
    for device in swtpm.emulated(domain):
        assert device.backend is not None
        swtpm.check(device.backend)


async def start_sidecars(
    domain: Domain, directory: Path, opened: Opened, *, tpm_states: Path, log_fd: int, undo: ExitStack
) -> Sidecars:
    """Raises `MissingPackages`, `HostError`, `HypervisorError`; then (by `undo`) none is left."""
    started = Sidecars(domain.name)
    undo.callback(started.kill)
    for device in swtpm.emulated(domain):
        alias, backend = alias_of(device), device.backend
        name = f"tpm:{alias}"
        if name in opened.fds:
            continue
        assert backend is not None
        state = swtpm.state_directory(tpm_states, domain, backend)
        with ExitStack() as close:
            theirs = _pair(opened, name, close)
            command = swtpm.swtpm_command(alias, backend, state, theirs)
            await swtpm.manufacture(state, backend, log_fd)
            started.spawn(command, log_fd)
    for share in virtiofsd.shares(domain):
        await _start_virtiofsd(started, share, directory, opened, log_fd)
    waiting = [_start_passt(started, nic, opened, log_fd) for nic in passt.users(domain)]
    for member in waiting:
        # A port that is taken must be an error of this start, not of a network that later does not work.
        if member is not None:
            await wait_confined(member, _READY)
    failure = started.failure(log_fd)
    if failure is not None:
        raise failure
    return started


async def start_for_device(
    sidecars: Sidecars, device: Filesystem | Interface, directory: Path, opened: Opened, log_fd: int
) -> Sidecar | None:
    """What a device that is plugged into a running machine needs; None if it needs nothing of ours.

    Raises as `start_sidecars` does; whoever calls it ends `sidecars.end(alias)` then.
    """
    member: Sidecar | None = None
    if isinstance(device, Interface):
        if is_passt(device) and (member := _start_passt(sidecars, device, opened, log_fd)) is not None:
            await wait_confined(member, _READY)
    elif virtiofsd.ours(device):
        member = await _start_virtiofsd(sidecars, device, directory, opened, log_fd)
    failure = sidecars.failure(log_fd, only=member.alias) if member is not None else None
    if failure is not None:
        raise failure
    return member


async def _start_virtiofsd(
    started: Sidecars, share: Filesystem, directory: Path, opened: Opened, log_fd: int
) -> Sidecar | None:
    name = f"fs:{alias_of(share)}"
    if name in opened.fds:
        return None
    with ExitStack() as close:
        listening = _listening(opened, name, directory, close)
        return started.spawn(await virtiofsd.virtiofsd_command(share, listening.fileno()), log_fd)


def _start_passt(started: Sidecars, nic: Interface, opened: Opened, log_fd: int) -> Sidecar | None:
    name = passt_name(alias_of(nic))
    if name in opened.fds:
        return None
    with ExitStack() as close:
        theirs = _pair(opened, name, close)
        return started.spawn(passt.passt_command(nic, theirs), log_fd)


def _pair(opened: Opened, name: str, close: ExitStack) -> socket.socket:
    """Opens QEMU's end under `name`; the other one is closed here when the side process has it."""
    try:
        ours, theirs = socket.socketpair()
    except OSError as error:
        raise HostError(f"cannot make a socket: {error.strerror}", errno=error.errno or 0) from error
    opened.add(name, ours.detach())
    close.callback(theirs.close)
    return theirs


def _listening(opened: Opened, name: str, directory: Path, close: ExitStack) -> socket.socket:
    """A socket that already has its one connection waiting; its path is gone before anybody else could use it."""
    path = directory / f"{name.replace(':', '-')}.sock"
    listening = listen_unix(path)
    close.callback(listening.close)
    close.callback(path.unlink, missing_ok=True)
    client = socket.socket(socket.AF_UNIX)
    opened.add(name, client.detach())
    with socket.socket(fileno=opened.fds[name]) as borrowed, short_unix_path(path) as short:
        try:
            borrowed.connect(short)
        finally:
            borrowed.detach()
    return listening
