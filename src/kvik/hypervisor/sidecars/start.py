"""Starts what one machine, or one device that is plugged into it, needs beside the VMM. The VMM's ends of the
connections are left among the opened descriptors."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from kvik.conf.devices.disk import Disk
from kvik.conf.devices.interface import Interface
from kvik.conf.devices.other import Filesystem
from kvik.conf.domain import Domain
from kvik.errors import HostError
from kvik.hypervisor.cpus import boot_vcpus
from kvik.hypervisor.descriptors import Opened, connected_listener
from kvik.hypervisor.names import alias_of, is_passt, passt_name, vhost_user_name
from kvik.hypervisor.sidecars import passt, storage_daemon, swtpm, virtiofsd
from kvik.hypervisor.sidecars.group import Sidecar, Sidecars, wait_confined

__all__ = ["check", "start_for_device", "start_sidecars"]

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
        await _start_virtiofsd(started, share, directory, opened, log_fd)
    daemons = [
        storage_daemon.start(disk, directory, opened, started, vcpus=boot_vcpus(domain), log_fd=log_fd)
        for disk in disks
        if vhost_user_name(alias_of(disk)) not in opened.fds
    ]
    waiting = [_start_passt(started, nic, opened, log_fd) for nic in passt.users(domain)]
    for member in waiting:
        # A port that is taken must be an error of this start, not of a network that later does not work.
        if member is not None:
            await wait_confined(member, _READY)
    for daemon in daemons:
        if daemon is not None:
            await daemon.ready()
    failure = started.failure(log_fd)
    if failure is not None:
        raise failure
    return started


async def start_for_device(
    sidecars: Sidecars,
    device: Filesystem | Interface | Disk,
    directory: Path,
    opened: Opened,
    log_fd: int,
    *,
    vcpus: int = 1,
) -> Sidecar | None:
    """What a device that is plugged into a running machine needs; None if it needs nothing of ours.

    Raises as `start_sidecars` does; whoever calls it ends `sidecars.end(alias)` then.
    """
    member: Sidecar | None = None
    if isinstance(device, Disk):
        daemon = storage_daemon.start(device, directory, opened, sidecars, vcpus=vcpus, log_fd=log_fd)
        if daemon is None:
            return None
        await daemon.ready()
        return daemon.member
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
        listening, client = connected_listener(directory / f"{name.replace(':', '-')}.sock")
        close.callback(listening.close)
        opened.add(name, client.detach())
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
