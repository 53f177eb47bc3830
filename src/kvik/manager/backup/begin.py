"""Beginning a backup: all disks, and a new checkpoint, from one moment on, or nothing.

facts on disk --> images --> the VMM's nodes --> one transaction: jobs and bitmaps --> exports --> checkpoint --> told
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

from kvik.conf.backup import Backup, BackupServer, parse_backup
from kvik.conf.checkpoint import Checkpoint, parse_checkpoint
from kvik.conf.devices.disk import BackingStore, DiskSource, Encryption, Format, Mirror
from kvik.conf.enums import DomainBackupBeginFlags, DomainState
from kvik.conf.storage_pool import AuthSecret
from kvik.errors import (
    AlreadyExists,
    ConfigError,
    HostError,
    InvalidArgument,
    KvikError,
    OperationInvalid,
)
from kvik.host.reach import about, reach
from kvik.host.secret_file import lent
from kvik.host.threads import in_thread
from kvik.hypervisor import new_image
from kvik.hypervisor.descriptors import listen_unix
from kvik.hypervisor.driver import BackupPart, Machine
from kvik.manager import disks
from kvik.manager.backup import job as jobs
from kvik.manager.backup.plan import JOB, complete, own_thread, parts_of, place_in, with_changes
from kvik.manager.certificates import check_server, open_server
from kvik.manager.checkpoints import create as checkpoints
from kvik.manager.checkpoints.resume import settle
from kvik.manager.encrypted_images import maker

if TYPE_CHECKING:
    from kvik.manager.domain import DomainObject

__all__ = ["begin"]

BACKLOG = 16  # NBD clients that wait to be accepted


async def begin(domain: DomainObject, xml: str, checkpoint_xml: str | None, flags: int) -> None:
    """virDomainBackupBegin. Raises `ConfigError`s for the documents, or what host or VMM say; then nothing is left."""
    backup = parse_backup(xml)
    checkpoint = parse_checkpoint(checkpoint_xml) if checkpoint_xml else None
    reuse = bool(flags & DomainBackupBeginFlags.REUSE_EXTERNAL)
    async with domain.jobs.hold("backup-begin"):
        machine, run = domain.require_machine(), domain.run
        assert run is not None
        backups = machine.backups
        if run.backup is not None:
            raise OperationInvalid(
                "another backup job is already running",
                remedy=f"wait for it, or end it: kvik domjobabort {domain.name}",
            )
        left = await jobs.found(domain)
        if left is not None:
            await jobs.undo(domain, left)
        await settle(domain)
        if checkpoint is not None:
            checkpoints.complete(domain, checkpoint)
        complete(domain, backup, checkpoint.name if checkpoint is not None else None, reuse=reuse)
        parts = await with_changes(domain, backup, parts_of(run.live, backup), backups)
        job = jobs.BackupJob(
            backup,
            created=[] if reuse else [place_in(item).file or "" for item in backup.chosen if item.type == "file"],
            checkpoint=checkpoint.name if checkpoint is not None else None,
            began=time.time(),
        )
        await reach(_check_places, domain, backup, reuse)
        await jobs.save(domain, job)
        try:
            await _begin(domain, job, parts, checkpoint, reuse=reuse)
        except BaseException:
            # What cannot be taken back now is so before the next one begins, or by the next daemon.
            with contextlib.suppress(KvikError):
                await asyncio.shield(jobs.undo(domain, job))
            raise
        jobs.began(domain, run, job)
        domain.log.note(f"backup ({backup.mode}) began; the disks' requests were held up for {job.held / 1000:.1f} ms")


async def _begin(
    domain: DomainObject, job: jobs.BackupJob, parts: list[BackupPart], checkpoint: Checkpoint | None, *, reuse: bool
) -> None:
    machine, backup = domain.require_machine(), job.backup
    backups = machine.backups
    encrypted = {f"{JOB}{item.name}": place_in(item).encryption for item in backup.chosen}
    for part in parts:
        if not reuse:
            try:
                await _make(domain, part, await machine.disk_size(part.disk), encrypted.get(part.job))
            except AlreadyExists:  # made by somebody else just now: not ours to remove
                job.created.remove(part.path)
                raise
    await _claim(domain, backup)
    if checkpoint is not None:
        await checkpoints.announce(domain, checkpoint, backups)
    tracked = checkpoints.new_bitmaps(domain, checkpoint) if checkpoint is not None else []
    with contextlib.ExitStack() as close:
        listening = -1
        if backup.server is not None:
            listening = await domain.manager.store.run(_listen, backup.server)
            close.callback(os.close, listening)
        async with _still(domain, machine, parts, pull=backup.pull):
            secrets = {name: _lend(domain, one, close) for name, one in encrypted.items() if one is not None}
            job.held = await backups.begin(parts, pull=backup.pull, track=tracked, secrets=secrets)
        if listening >= 0:
            certificates = None
            if backup.server is not None and backup.server.tls:
                certificates = await domain.manager.store.run(open_server, domain.manager.paths.certificates)
                close.callback(os.close, certificates)
            await backups.serve(parts, listening, certificates)
    if checkpoint is not None:
        await checkpoints.keep(domain, checkpoint)
    job.phase = jobs.RUNNING
    await jobs.save(domain, job)


def _lend(domain: DomainObject, encryption: Encryption, held: contextlib.ExitStack) -> int:
    """A descriptor of the passphrase. Raises `NoSecret`, `InvalidSecret`."""
    if not encryption.secrets:
        raise ConfigError("an encrypted backup needs a <secret>", path="/domainbackup/disks/disk/target/encryption")
    named = encryption.secrets[0]
    return held.enter_context(
        lent(domain.manager.pools.secret("volume", AuthSecret(uuid=named.uuid, usage=named.usage)))
    )


@contextlib.asynccontextmanager
async def _still(domain: DomainObject, machine: Machine, parts: list[BackupPart], *, pull: bool) -> AsyncIterator[None]:
    """A disk with a thread of its own writes while the VMM's main loop puts a transaction together: a write between the
    copying of its bitmap and the beginning of its job would be in the backup's disk, and not in the backup. Its guest
    stands still meanwhile."""
    assert domain.run is not None
    threaded = any(part.bitmap and own_thread(domain.run.live, part.disk) for part in parts)
    if pull or not threaded or domain.state != DomainState.RUNNING:
        yield
        return
    await machine.pause()
    try:
        yield
    finally:
        await machine.resume()


async def _make(domain: DomainObject, part: BackupPart, size: int, encryption: Encryption | None) -> None:
    source = DiskSource(dev=part.path) if part.block else DiskSource(file=part.path)
    image = Mirror(
        type="block" if part.block else "file",
        format=Format(type=part.format),
        source=source,
        backing_store=BackingStore(),
    )
    source.encryption = encryption
    if await reach(new_image.check, image, size, None):  # else it is a device, which is there
        await in_thread(new_image.make, image, size, None, maker(domain.manager, encryption))


def _check_places(domain: DomainObject, backup: Backup, reuse: bool) -> None:
    """Before anything is written down: files that are there already are not ours, and are never removed."""
    for item in backup.chosen:
        path = place_in(item).location or ""
        about(path)
        exists = os.path.lexists(path)
        if item.type == "block" and not exists:
            raise ConfigError(f"{path} does not exist")
        if item.type == "file" and exists and not reuse:
            raise AlreadyExists(
                f"disk '{item.name}': {path} exists already",
                remedy="remove it, name another file, or use it: --reuse-external",
            )
        if item.type == "file" and reuse and not Path(path).is_file():
            raise ConfigError(f"disk '{item.name}': {path} is no file that could be reused")
    server = backup.server
    if server is not None and server.tls:
        check_server(domain.manager.paths.certificates)
    if server is not None and server.socket and os.path.lexists(server.socket):
        raise AlreadyExists(f"{server.socket} exists already", remedy="remove it, or name another socket")


async def _claim(domain: DomainObject, backup: Backup) -> None:
    """What is written to is no image of any machine, this one's among them. Raises `ResourceBusy`."""
    run = domain.run
    assert run is not None
    for item in backup.chosen:
        use = await reach(disks.image_use, place_in(item))
        if use is None:
            raise ConfigError(f"{place_in(item).location} does not exist")
        disks.check_unused([use], [*domain.manager.disk_uses(domain), (domain.name, run.uses)])


def _listen(server: BackupServer) -> int:
    """A socket that NBD clients come to; only the daemon's user can connect to one with a path."""
    if server.transport == "unix":
        assert server.socket is not None
        return listen_unix(Path(server.socket)).detach()
    assert server.name is not None and server.port is not None
    try:
        found = socket.getaddrinfo(server.name, server.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise InvalidArgument(f"there is no address of {server.name!r}: {error}") from error
    # As clients do that are told a number: localhost is 127.0.0.1 before it is ::1.
    family, _, _, _, address = min(found, key=lambda item: item[0] != socket.AF_INET)
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise HostError(
            f"cannot listen on {server.name}, port {server.port}: {error.strerror}",
            errno=error.errno or 0,
            remedy="choose another port: <server transport='tcp' name='localhost' port='...'/>",
        ) from error
    return sock.detach()
