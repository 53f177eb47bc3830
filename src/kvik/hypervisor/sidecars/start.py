"""Starts what one machine needs beside QEMU, and leaves QEMU's ends of the connections among the opened descriptors."""

from __future__ import annotations

import socket
from contextlib import ExitStack
from pathlib import Path

from kvik.conf.domain import Domain
from kvik.errors import HostError
from kvik.hypervisor.descriptors import Opened, listen_unix
from kvik.hypervisor.names import alias_of, passt_name
from kvik.hypervisor.sidecars import passt, swtpm, virtiofsd
from kvik.hypervisor.sidecars.group import Sidecar, Sidecars, wait_confined
from kvik.qmp.aio import short_unix_path

__all__ = ["check", "start_sidecars"]

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
        name = f"fs:{alias_of(share)}"
        if name in opened.fds:
            continue
        with ExitStack() as close:
            listening = _listening(opened, name, directory, close)
            started.spawn(await virtiofsd.virtiofsd_command(share, listening.fileno()), log_fd)
    waiting: list[Sidecar] = []
    for nic in passt.users(domain):
        name = passt_name(alias_of(nic))
        if name in opened.fds:
            continue
        with ExitStack() as close:
            theirs = _pair(opened, name, close)
            waiting.append(started.spawn(passt.passt_command(nic, theirs), log_fd))
    for member in waiting:
        # A port that is taken must be an error of this start, not of a network that later does not work.
        await wait_confined(member, _READY)
    failure = started.failure(log_fd)
    if failure is not None:
        raise failure
    return started


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
