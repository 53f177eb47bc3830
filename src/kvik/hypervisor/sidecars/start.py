"""Starts what one machine needs beside QEMU, and leaves QEMU's ends of the connections among the opened descriptors."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from kvik.conf.devices.disk import Disk
from kvik.conf.domain import Domain
from kvik.errors import HostError
from kvik.hypervisor.descriptors import Opened, connected_listener
from kvik.hypervisor.names import alias_of, passt_name, vhost_user_name
from kvik.hypervisor.sidecars import passt, storage_daemon, swtpm, virtiofsd
from kvik.hypervisor.sidecars.group import Sidecar, Sidecars, wait_confined

__all__ = ["check", "start_sidecars"]

_READY = 5.0  # seconds for passt to bind its ports


def check(domain: Domain) -> None:
    """What no side process can do. Raises `ConfigError`s; needs nothing of the host."""
    virtiofsd.check(domain)
    for device in swtpm.emulated(domain):
        assert device.backend is not None
        swtpm.check(device.backend)


async def start_sidecars(
    domain: Domain,
    directory: Path,
    opened: Opened,
    *,
    tpm_states: Path,
    log_fd: int,
    undo: ExitStack,
    disks: Sequence[Disk] = (),
) -> Sidecars:
    """`disks`: those that the VMM reaches over vhost-user.

    Raises `MissingPackages`, `HostError`, `HypervisorError`; then (by `undo`) none is left."""
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
            listening, client = connected_listener(directory / f"{name.replace(':', '-')}.sock")
            close.callback(listening.close)
            opened.add(name, client.detach())
            started.spawn(await virtiofsd.virtiofsd_command(share, listening.fileno()), log_fd)
    daemons = [
        storage_daemon.start(
            disk, directory, opened, started, vcpus=domain.vcpu.value if domain.vcpu else 1, log_fd=log_fd, undo=undo
        )
        for disk in disks
        if vhost_user_name(alias_of(disk)) not in opened.fds
    ]
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
    for daemon in daemons:
        if daemon is not None:
            await daemon.ready()
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
