"""Saving a machine with its memory, and going on from there: `save`, the managed save, `restore`.

saving     document and state into a file beside its place, synced, renamed; only then the VMM is ended. Whatever fails
           before that leaves the machine as it was.
restoring  the VMM is filled and stays stopped; the status says so; a managed save is removed, durably; the guest runs.
           A guest that has run once is never started from the same managed save again.

A daemon that is killed amid that leaves what `settle` needs in the machine's status: see there.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from kvik.conf.abi import check_same_machine
from kvik.conf.domain import Domain, format_domain, parse_domain
from kvik.conf.enums import DomainJobOperation, DomainState
from kvik.errors import (
    InvalidArgument,
    KvikError,
    NotFound,
    OperationFailed,
    OperationInvalid,
    ResourceBusy,
)
from kvik.host.files import fsync_directory, host_error
from kvik.host.threads import in_thread
from kvik.hypervisor.names import character_devices
from kvik.manager import lifecycle, prepare, volume_disks
from kvik.manager.backup.busy import check_no_backup
from kvik.manager.saved import image
from kvik.manager.saved.image import Reader, Writer
from kvik.manager.saved.managed import check_no_managed_save, managed_path
from kvik.manager.snapshots.files import snapshot_in
from kvik.manager.states import Trigger, state_text

if TYPE_CHECKING:
    from collections.abc import Hashable

    from kvik.manager.domain import DomainObject
    from kvik.manager.manager import Manager
    from kvik.manager.run import Run

logger = logging.getLogger(__name__)

__all__ = [
    "BYPASS_CACHE",
    "PAUSED",
    "RUNNING",
    "Saved",
    "check_no_managed_save",
    "define_document",
    "load",
    "managed_path",
    "managed_save",
    "open_managed",
    "remove_managed",
    "restore",
    "save",
    "settle",
    "show_document",
]

LONG = 7 * 24 * 3600.0  # seconds that writing a machine's memory may take
# virDomainSaveRestoreFlags
BYPASS_CACHE, RUNNING, PAUSED, RESET_NVRAM = 1, 2, 4, 8
FLAGS = BYPASS_CACHE | RUNNING | PAUSED


class Saved:
    """A machine's state that it is to be started from. `managed`: the file goes before the guest runs; `snapshot`: it
    goes back to one; `inside`: there is no file, the VMM finds it in the images, under this name, of these disks."""

    def __init__(
        self,
        reader: Reader | None,
        *,
        managed: bool = False,
        snapshot: bool = False,
        inside: tuple[str, frozenset[str]] | None = None,
        running: bool = False,
    ) -> None:
        self.reader = reader
        self.managed = managed
        self.snapshot = snapshot
        self.inside = inside
        self.running = reader.facts.running if reader is not None else running

    def close(self) -> None:
        if self.reader is not None:
            self.reader.close()

    async def used(self) -> None:
        """The guest is about to run."""
        if self.managed and self.reader is not None:
            await in_thread(image.remove, self.reader.path)

    def pending(self, *, run: bool) -> dict[str, Any]:
        """For the status: what the next daemon has still to do."""
        used = self.reader if self.managed else None
        path, token = (used.path, used.facts.token) if used is not None else ("", "")
        return {"operation": "restore", "path": path, "token": token, "run": run}


# Saving -----------------------------------------------------------------------------------------------------------


def check_flags(flags: int, known: int = FLAGS) -> None:
    if flags & ~known:
        raise InvalidArgument(f"unsupported flags (0x{flags & ~known:x}) for a saved machine")
    if flags & RUNNING and flags & PAUSED:
        raise InvalidArgument("a machine cannot be both running and paused when it is restored")


async def save(domain: DomainObject, path: str, xml: str | None, flags: int) -> None:
    """Into a file, and the machine is off. Raises `HostError` for a file that cannot be written, `HypervisorError`s;
    then the machine goes on."""
    check_flags(flags)
    async with domain.jobs.hold("save", limit=LONG):
        await _save(domain, path, xml, flags)


async def managed_save(domain: DomainObject, flags: int) -> None:
    """Where the next start finds it."""
    check_flags(flags)
    if not domain.persistent:
        raise OperationInvalid(f"machine {domain.name!r} is transient: nothing could start it from a managed save")
    async with domain.jobs.hold("managed-save", limit=LONG):
        path = managed_path(domain.manager, domain.name)
        await domain.manager.store.run(_make_directory, path.parent)
        await _save(domain, str(path), None, flags)
        domain.has_managed_save = True


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise host_error("make directory", path, error) from error


async def _save(domain: DomainObject, path: str, xml: str | None, flags: int) -> None:
    machine, run = domain.require_machine(), domain.run
    assert run is not None
    check_can_save(domain)
    text = saved_document(run.live, run.directory, domain.config.parse(), xml)
    running = domain.state == DomainState.RUNNING
    wanted = bool(flags & RUNNING) or (running and not flags & PAUSED)
    token = uuid4().hex
    writer = None
    run.unfinished = {"operation": "save", "path": path, "token": token, "run": running}
    try:
        await domain.save_status()
        writer = await in_thread(
            Writer,
            path,
            text,
            driver=domain.driver.name,
            token=token,
            running=wanted,
            bypass_cache=bool(flags & BYPASS_CACHE),
        )
        follow(domain, writer, DomainJobOperation.SAVE)
        if running:
            run.pause_cause = "save"
            await machine.pause()
            lifecycle.apply(domain, Trigger.PAUSED_TO_SAVE)
        await machine.save_state(writer)
        await in_thread(sync_disks, run.live)
        await in_thread(writer.place)
    except BaseException:
        if writer is not None:
            await in_thread(writer.discard)
        await go_on(domain, run, running)
        raise
    domain.log.note(f"saved to {path}")
    run.pending = Trigger.SAVED
    await lifecycle.end_run(domain, run)
    if domain.cleaning:
        await domain.cleaning


def check_can_save(domain: DomainObject) -> None:
    """`OperationInvalid`, `ResourceBusy` where its memory cannot be saved now."""
    if domain.state not in (DomainState.RUNNING, DomainState.PAUSED, DomainState.PMSUSPENDED):
        raise OperationInvalid(f"machine {domain.name!r} is {state_text(domain.state)}: it cannot be saved")
    disks = domain.run.live.devices.disks if domain.run is not None else []
    fleeting = [disk.target.dev for disk in disks if disk.transient is not None]
    if fleeting:
        raise OperationInvalid(
            f"machine {domain.name!r} has a transient disk, {fleeting[0]}: what the guest wrote to it would be lost, "
            "and its memory would not agree with what is left",
            remedy="leave <transient/> out of the definition and start the machine anew",
        )
    check_no_backup(domain, "saving its memory")
    busy = sorted(domain.run.block_jobs) if domain.run is not None else []
    if busy:
        raise ResourceBusy(
            f"machine {domain.name!r}: disk {busy[0]!r} has a block job, which would be lost",
            remedy=f"wait for it, or end it: kvik blockjob {domain.name} {busy[0]} --info, --pivot, --abort",
        )


def saved_document(
    live: Domain, directory: Path | None = None, config: Domain | None = None, xml: str | None = None
) -> str:
    """As the machine is now; `xml` is another one with the same guest hardware, `directory` the run's own, `config`
    what it was started from."""
    document = without_sockets(volume_disks.shown(live).copy(), directory)
    prepare.forget_run(document)
    if config is not None:
        without_taps(document, config)
    text = format_domain(document, secure=True, inactive=True)
    if xml is None:
        return text
    other = prepare.parse(xml)
    check_same_machine(parse_domain(text), other)
    return format_domain(other, secure=True, inactive=True)


def without_sockets(document: Domain, directory: Path | None) -> Domain:
    """Sockets that were made for one run are made anew for the next."""
    for device in character_devices(document):
        path = device.source.path if device.source is not None else None
        if directory is not None and path and Path(path).is_relative_to(directory):
            device.sources = []
    return document


def without_taps(document: Domain, config: Domain) -> None:
    """Taps, bridges and ports that a run was given are asked for anew by the next."""
    before = {item.mac.address: item for item in config.devices.interfaces if item.mac is not None}
    for interface in document.devices.interfaces:
        known = before.get(interface.mac.address) if interface.mac is not None else None
        if known is not None and known.type == interface.type:
            interface.source, interface.target, interface.virtualport = known.source, known.target, known.virtualport
        elif interface.source is not None and interface.type == "network":
            interface.source.portid = interface.source.bridge = interface.target = None


def follow(domain: DomainObject, writer: Writer, operation: int) -> None:
    """The machine's job shows how far it is, and can be given up."""
    job = domain.jobs.current
    if job is not None:
        job.operation = operation
        job.progress = lambda: (writer.size, max(writer.total, writer.size))
        job.cancel = lambda: setattr(writer, "cancelled", True)


def sync_disks(live: Domain) -> None:
    """What the guest has written is on disk before its memory is said to be: after a power failure they still agree."""
    import os

    for disk in live.devices.disks:
        location = disk.source.location if disk.source is not None else None
        if disk.readonly or disk.type not in ("file", "block") or not location:
            continue
        try:
            fd = os.open(location, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fdatasync(fd)
            finally:
                os.close(fd)
        except OSError as error:
            raise host_error("write out", location, error) from error


async def go_on(domain: DomainObject, run: Run, running: bool) -> None:
    """Nothing came of it: the guest is as it was before."""
    run.unfinished = {}
    if domain.run is not run or run.machine is None:
        return
    try:
        if running:
            await run.machine.resume()
            lifecycle.apply(domain, Trigger.RESUMED)
        await domain.save_status()
    except KvikError as error:
        logger.warning("machine %s does not go on after it was not saved: %s", domain.name, error)


# Going on from a file ---------------------------------------------------------------------------------------------


async def restore(
    manager: Manager, path: str, xml: str | None, flags: int, autodestroy: Hashable | None = None
) -> None:
    """Start the machine that a file holds. Raises `OperationFailed` for a damaged file, `OperationInvalid` for one that
    runs; then nothing was started. The file stays."""
    check_flags(flags, FLAGS | RESET_NVRAM)
    if not path.startswith("/"):
        raise InvalidArgument(f"{path!r} is no absolute path")
    reader = await in_thread(Reader, path, bypass_cache=bool(flags & BYPASS_CACHE))
    try:
        text = await in_thread(reader.document)
        document = prepare.parse(text)
        if xml is not None:
            other = prepare.parse(xml)
            check_same_machine(document, other)
            document = other
        await _check_state(manager, document, reader)
        run = bool(flags & RUNNING) or (reader.facts.running and not flags & PAUSED)
        await manager.create_xml(
            format_domain(document, secure=True, inactive=True),
            paused=not run,
            autodestroy=autodestroy,
            saved=Saved(reader),
            reset_nvram=bool(flags & RESET_NVRAM),
        )
    finally:
        reader.close()


async def _check_state(manager: Manager, document: Domain, reader: Reader) -> None:
    driver = manager.driver_of(document)
    if driver.name != reader.facts.driver:
        raise OperationInvalid(
            f"{reader.path} was saved by {reader.facts.driver[:40]!r}, and its document is run by {driver.name}",
            remedy="restore it with the <emulator> that it had",
        )
    for disk in document.devices.disks:
        location = (disk.source.location if disk.source is not None else None) or ""
        found = await snapshot_in(manager, location) if location and not disk.readonly else None
        if found is not None:
            raise OperationInvalid(
                f"{location}, which the saved machine writes to, keeps {found} by now",
                remedy="going on would change that snapshot: revert to it, or delete it first",
            )


async def open_managed(domain: DomainObject, flags: int) -> tuple[Saved, Domain]:
    """What the next start goes on from, and its document. `OperationFailed` if it is damaged."""
    path = str(managed_path(domain.manager, domain.name))
    try:
        reader = await in_thread(Reader, path, bypass_cache=bool(flags & BYPASS_CACHE))
    except OperationFailed as error:
        raise OperationFailed(
            f"the managed save of machine {domain.name!r} cannot be used: {error.message}",
            remedy=f"kvik start {domain.name} --force-boot boots it anew, and gives its saved memory up",
        ) from error
    try:
        document = prepare.parse(await in_thread(reader.document))
        if document.uuid != domain.uuid_text:
            raise OperationFailed(f"{path} is of another machine, {document.uuid}")
        document.name = domain.name
        await _check_state(domain.manager, document, reader)
    except BaseException:
        reader.close()
        raise
    return Saved(reader, managed=True), document


# The managed save -------------------------------------------------------------------------------------------------


async def remove_managed(domain: DomainObject) -> None:
    async with domain.jobs.hold("managed-save-remove"):
        if not domain.has_managed_save:
            raise OperationInvalid(f"machine {domain.name!r} has no managed save")
        await forget_managed(domain)


async def forget_managed(domain: DomainObject) -> None:
    await in_thread(image.remove, str(managed_path(domain.manager, domain.name)))
    domain.has_managed_save = False


def require_managed(domain: DomainObject) -> str:
    if not domain.has_managed_save:
        raise NotFound(
            f"machine {domain.name!r} has no managed save", remedy=f"kvik managedsave {domain.name} makes one"
        )
    return str(managed_path(domain.manager, domain.name))


async def show_document(path: str, *, secure: bool) -> str:
    text = await in_thread(image.document, path)
    return format_domain(parse_domain(text), secure=secure, inactive=True)


async def define_document(path: str, xml: str | None, flags: int) -> None:
    """Another document for the same guest hardware; whether it is to run when restored."""
    check_flags(flags & ~BYPASS_CACHE)
    text = None
    if xml is not None:
        text = saved_document(parse_domain(await in_thread(image.document, path)), xml=xml)
    running = True if flags & RUNNING else False if flags & PAUSED else None
    await in_thread(image.replace_document, path, text, running=running)


# When the daemon comes back ---------------------------------------------------------------------------------------


async def load(manager: Manager) -> None:
    """Which machines have a managed save; after the definitions were loaded."""
    names = await manager.store.run(_names, manager.paths.saves)
    for domain in manager.domains():
        domain.has_managed_save = domain.persistent and domain.name in names


def _names(directory: Path) -> set[str]:
    if not directory.is_dir():
        return set()
    return {path.name.removesuffix(".save") for path in directory.iterdir() if path.name.endswith(".save")}


async def settle(domain: DomainObject, run: Run, unfinished: dict[str, Any]) -> None:
    """A daemon was killed amid saving or restoring this machine, whose VMM is there and stopped.

    saving     the file is in its place: the VMM goes. It is not: what was written of it goes, and the guest goes on
    restoring  the managed save goes and the guest runs, as was wanted
    """
    machine = run.machine
    path, token = str(unfinished.get("path") or ""), unfinished.get("token")
    if machine is None:
        return
    there = bool(path) and await in_thread(_token_of, path) == token
    if unfinished.get("operation") == "save" and there:
        domain.log.note(f"saved to {path}: its end was seen to by the next daemon")
        run.pending = Trigger.SAVED
        await lifecycle.end_run(domain, run)
        return
    if unfinished.get("operation") == "save" and path:
        await in_thread(_remove_quietly, image.temporary(path))
    elif there:
        await in_thread(image.remove, path)
    run.unfinished = {}
    if unfinished.get("run"):
        await machine.resume()
        lifecycle.apply(domain, Trigger.RESUMED)
    await domain.save_quietly()


def _token_of(path: str) -> str | None:
    try:
        return image.look(path).token
    except KvikError:
        return None


def _remove_quietly(path: str) -> None:
    try:
        Path(path).unlink(missing_ok=True)
        fsync_directory(Path(path).parent)
    except OSError as error:
        logger.warning("%s is left: %s", path, error)
