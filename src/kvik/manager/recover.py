"""What happens when the daemon comes back: definitions are loaded, running machines found again, the rest put right.

A machine whose status says "starting" was never confirmed to anybody: what is left of it is ended. One whose status is
complete is attached to; if its VMM is gone, the machine is off, with the reason kept; if its VMM does not answer (it
may be stopped), the machine stays as it was last known and is tried again until it answers or is destroyed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

from kvik.conf.devices_xml import parse_device
from kvik.conf.domain import parse_domain
from kvik.conf.enums import DomainState
from kvik.errors import ConfigError, HostError, InvalidArgument, KvikError
from kvik.host import process
from kvik.host.documents import SUFFIX, set_aside
from kvik.host.reach import reach
from kvik.hypervisor.driver import EventKind, MachineEvent
from kvik.manager import (
    block_following,
    devices,
    disks,
    guest,
    lifecycle,
    pivots,
    ports,
    prepare,
    renaming,
    rx_filters,
)
from kvik.manager.backup import job as backup_job
from kvik.manager.checkpoints import resume as checkpoints
from kvik.manager.definition import Definition
from kvik.manager.domain import DomainObject
from kvik.manager.interfaces import listen
from kvik.manager.run import Run
from kvik.manager.saved import machine as saved_machine
from kvik.manager.stages import BootStages
from kvik.manager.states import Trigger
from kvik.manager.store import Loaded, Status

if TYPE_CHECKING:
    from kvik.manager.manager import Manager

logger = logging.getLogger(__name__)

ATTACH_WAIT = 2.0  # seconds until a VMM that does not answer is left for later
RETRY_FIRST, RETRY_LAST = 1.0, 30.0  # seconds between tries
EVERYTHING = "everything"  # in the list of what was started: this boot needs no more
RETRY = 5.0  # seconds until storage that did not answer is asked again
CURIOSITY = 5.0  # seconds to ask an attached VMM for its run state


async def recover(manager: Manager) -> None:
    loaded = await manager.store.run(manager.store.load)
    manager.warnings += loaded.warnings
    await _load_definitions(manager, loaded)
    manager.warnings += await manager.pivots.load()
    directories = {status.directory for status in loaded.statuses}
    for path in manager.store.runtime_directories():
        if str(path) not in directories:  # killed between the removal of the status and of the directory, or before
            await _end_orphans(path)
            manager.store.remove_runtime_directory(path)
    # QEMUs that were only asked what they can do: they would wait for the next question for ever.
    await _end_orphans(manager.paths.cache / "qemu")
    for status in loaded.statuses:
        manager.skip_ids(status.id)
    await asyncio.gather(*(_recover_one(manager, status) for status in loaded.statuses))


def _warn(manager: Manager, text: str) -> None:
    manager.warnings.append(text)
    logger.warning("%s", text)


# Definitions ----------------------------------------------------------------------------------------------------


async def _load_definitions(manager: Manager, loaded: Loaded) -> None:
    mismatched = []
    for name, text in loaded.documents:
        try:
            document = parse_domain(text)
            if document.uuid is None:  # written by hand
                document.name = document.name or name
                await prepare.complete(document, manager.driver_of(document))
                config = Definition(document)
                await manager.store.save_definition(name, config.text)
            else:
                config = Definition(document, text)
        except KvikError as error:
            _set_aside(manager, name, str(error))
            continue
        if config.name != name:
            mismatched.append((name, document))
        else:
            _add(manager, config, loaded)
    # A rename that was interrupted: the file was moved, its content not yet. The file's name rules, unless somebody
    # merely copied a file: then the original has the UUID already.
    for name, document in mismatched:
        was, document.name = document.name, name
        try:
            config = Definition(document)
            if _add(manager, config, loaded):
                for warning in await manager.store.run(renaming.finish, manager, was, name):
                    _warn(manager, warning)
                await manager.store.save_definition(name, config.text)
                _warn(manager, f"the renaming of machine {was!r} to {name!r} was completed")
        except (ConfigError, InvalidArgument) as error:
            _set_aside(manager, name, str(error))


def _add(manager: Manager, config: Definition, loaded: Loaded) -> bool:
    other = manager.known_uuid(config.uuid)
    if other is not None:
        _set_aside(manager, config.name, f"machine {other.name!r} has the same UUID")
        return False
    domain = DomainObject(manager, config, persistent=True)
    domain.autostart = config.name in loaded.autostart
    manager.add(domain)
    return True


def _set_aside(manager: Manager, name: str, why: str) -> None:
    manager.warnings.append(set_aside(manager.store.domains / f"{name}{SUFFIX}", why))


# Running machines -----------------------------------------------------------------------------------------------


async def _recover_one(manager: Manager, status: Status) -> None:
    try:
        if status.boot != manager.store.boot:
            await _forget_status(manager, status, Trigger.HOST_REBOOTED, "the host was rebooted")
        elif status.starting:
            await _end_unconfirmed(manager, status)
        else:
            await _adopt(manager, status)
    except Exception as error:
        # One machine that cannot be recovered must not keep the others, or the daemon, from coming up.
        logger.exception("machine %s", status.name)
        _warn(manager, f"machine {status.name!r} could not be recovered: {error}")


async def _forget_status(manager: Manager, status: Status, trigger: Trigger, why: str) -> None:
    domain = _object(manager, status)
    domain.log.note(f"ended: {trigger.value} ({why})")
    domain.state, domain.id = DomainState.RUNNING, -1
    lifecycle.apply(domain, trigger, why)
    await ports.release(manager, domain, parse_domain(status.document).devices.interfaces)
    await manager.store.remove_status(status.name, Path(status.directory))
    if not domain.persistent:
        manager.forget(domain)


def _object(manager: Manager, status: Status) -> DomainObject:
    """The machine this status belongs to; a transient one is made up from its live document."""
    config = Definition(parse_domain(status.document))
    known = manager.known_uuid(config.uuid)
    if known is not None:
        return known
    domain = DomainObject(manager, config, persistent=False)
    domain.name = domain.jobs.owner = status.name
    manager.add(domain)
    return domain


async def _end_unconfirmed(manager: Manager, status: Status) -> None:
    directory = Path(status.directory)
    domain = _object(manager, status)
    with contextlib.suppress(KvikError, TimeoutError):
        async with asyncio.timeout(ATTACH_WAIT):
            live = parse_domain(status.document)
            machine = await manager.driver_of(live).attach(live, directory, {}, lambda event: None)
        if machine is not None:
            await machine.quit(0)
    await _end_orphans(directory)
    domain.log.note("ended: the daemon was stopped while the machine was starting")
    domain.state = DomainState.SHUTOFF
    lifecycle.apply(domain, Trigger.START_FAILED, "the daemon was stopped while the machine was starting")
    with contextlib.suppress(ConfigError):
        await ports.release(manager, domain, parse_domain(status.document).devices.interfaces)
    await manager.store.remove_status(status.name, directory)
    _warn(
        manager, f"machine {status.name!r} was being started when the daemon was stopped: what was left of it was ended"
    )
    if not domain.persistent:
        manager.forget(domain)


async def _adopt(manager: Manager, status: Status) -> None:
    domain = _object(manager, status)
    if domain.is_active:
        raise KvikError("there are two status files for it")
    live = parse_domain(status.document)
    live.id = status.id
    run = Run(live, Path(status.directory), BootStages(live, status.started))
    run.started = status.started
    run.pid, run.pid_start = status.pid, status.pid_start
    domain.run = run
    domain.id = status.id
    domain.state, domain.reason, domain.reason_text = status.state, status.reason, status.reason_text
    manager.activated(domain)
    ports.rejoin(domain, live.devices.interfaces)
    await ports.put_back(domain, live.devices.interfaces)
    run.stages.restore(status.stages)
    block_following.remember(domain, run, status.block_jobs)
    await _find_uses(domain, run)
    await checkpoints.load(domain)
    if not await _attach(domain, run, status, ATTACH_WAIT):
        domain.spawn(_attach_later(domain, run, status))


async def _find_uses(domain: DomainObject, run: Run) -> None:
    """Which images it has; nobody is kept waiting for storage that does not answer, whose machines say so later."""
    try:
        async with asyncio.timeout(CURIOSITY):
            run.uses = await reach(disks.uses, run.live)
    except (HostError, TimeoutError) as error:
        domain.log.note(f"its images are not looked at yet: {error or 'their storage does not answer'}")
        domain.spawn(_find_uses_later(domain, run))


async def _find_uses_later(domain: DomainObject, run: Run) -> None:
    while domain.run is run:
        await asyncio.sleep(RETRY)
        with contextlib.suppress(HostError):
            run.uses = await reach(disks.uses, run.live)
            domain.log.note("its images were looked at")
            return


async def _attach(domain: DomainObject, run: Run, status: Status, wait: float) -> bool:
    """False if the VMM does not answer yet; a VMM that is gone is dealt with."""

    def sink(event: MachineEvent) -> None:
        lifecycle.heard(domain, run, event)

    try:
        async with asyncio.timeout(wait):
            machine = await domain.driver.attach(run.live, run.directory, status.handle, sink)
    except (KvikError, TimeoutError) as error:
        domain.reason_text = f"the VMM (process {run.pid}) does not answer: {error or 'no reply'}"
        return False
    if machine is None:
        lifecycle.finish(
            domain, run, Trigger.LOST, "its VMM ended while the daemon was away; see the log for its words"
        )
        if domain.cleaning:
            await asyncio.shield(domain.cleaning)  # the files are right before anybody is answered
        return True
    run.machine = machine
    run.pid = machine.pid
    domain.reason_text = status.reason_text
    try:
        if status.arriving:
            run.arriving = parse_device(status.arriving)[1]
        async with asyncio.timeout(CURIOSITY):
            await devices.settle(domain)
    except (KvikError, TimeoutError) as error:
        domain.log.note(f"its devices were not compared: {error or 'no reply'}")
    try:
        async with asyncio.timeout(CURIOSITY):
            await pivots.machine_found(domain, run)
            await block_following.take_up(domain, run)
    except (KvikError, TimeoutError) as error:
        domain.log.note(f"its block jobs were not looked at: {error or 'no reply'}")
    try:
        async with asyncio.timeout(CURIOSITY):
            await backup_job.take_up(domain, run)
            await checkpoints.settle(domain)
    except (KvikError, TimeoutError) as error:
        domain.log.note(f"its backup was not looked at: {error or 'no reply'}")
    early, run.early = run.early or [], None
    for event in early:
        lifecycle.heard(domain, run, event)
    run.unfinished = status.unfinished
    if status.unfinished:
        try:
            await saved_machine.settle(domain, run, status.unfinished)
        except KvikError as error:
            domain.log.note(f"what was broken off when it was saved or restored is not ended: {error}")
    domain.log.note(f"found again by the daemon: pid {run.pid}")
    if domain.run is run:
        domain.spawn(_catch_up(domain, run))
    return True


async def _attach_later(domain: DomainObject, run: Run, status: Status) -> None:
    pause = RETRY_FIRST
    while domain.run is run:
        await asyncio.sleep(pause)
        pause = min(pause * 2, RETRY_LAST)
        if domain.run is run and await _attach(domain, run, status, CURIOSITY):
            return


# What a VMM says of itself -> the event that the daemon missed
_MISSED = {"running": "resumed", "paused": "paused", "shutdown": "shutdown", "crashed": "crashed"}


async def _catch_up(domain: DomainObject, run: Run) -> None:
    """What happened while nobody listened: a guest that powered off, panicked, was paused; an agent that is up."""
    await listen(domain.manager, run.live.devices.interfaces)
    with contextlib.suppress(KvikError, TimeoutError):
        async with asyncio.timeout(CURIOSITY):
            if run.machine is None:
                return
            state = await run.machine.state()
        missed = _MISSED.get(state)
        if missed is not None and domain.run is run:
            lifecycle.heard(domain, run, MachineEvent(EventKind(missed), "guest" if missed == "shutdown" else ""))
    await rx_filters.follow_all(domain, run)
    if domain.run is run and run.machine is not None and not run.stages.has("agent"):
        with contextlib.suppress(KvikError, TimeoutError):
            await run.machine.agent("guest-ping", None, timeout=CURIOSITY)
            run.stages.reach("first output")
            guest.agent_is_up(domain, run)


# Processes that nobody knows ------------------------------------------------------------------------------------


async def _end_orphans(directory: Path) -> None:
    """Kill what a killed daemon had started for `directory`: VMMs with it on their command line, or with that home."""
    needle, home = f"{directory}/".encode(), f"HOME={directory}".encode()
    mine = os.getuid()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            if entry.stat().st_uid != mine and mine != 0:
                continue
            command = (entry / "cmdline").read_bytes()
            program = command.split(b"\0", 1)[0].rsplit(b"/", 1)[-1]
            # What was opened for it may be on its command line as descriptors only, and an emulator may have any name:
            # then its home still tells. On a command line alone the directory may be there for somebody to look at.
            named = program.startswith((b"qemu", b"kvik")) and needle in command
            if named or home in (entry / "environ").read_bytes().split(b"\0"):
                stat = process.read_stat(int(entry.name))
                found = process.find(int(entry.name), stat.start_time) if stat else None
                if found is not None:
                    logger.warning("ending process %s, left behind in %s", entry.name, directory)
                    found.signal(signal.SIGKILL)
                    found.close()


# Autostart ------------------------------------------------------------------------------------------------------


async def autostart(manager: Manager) -> None:
    """Start what starts with the host, each once per boot, however often the daemon is restarted."""
    done = await manager.store.run(manager.store.autostarted)
    if EVERYTHING in done:
        return
    for domain in manager.domains():
        if not domain.autostart or domain.uuid_text in done:
            continue
        if not domain.is_active:
            try:
                await domain.start()
            except KvikError as error:
                _warn(manager, f"machine {domain.name!r} was not started automatically: {error}")
        done.add(domain.uuid_text)
        with contextlib.suppress(KvikError):
            await manager.store.mark_autostarted(done)
    # Also when there was nothing to start: what is set to start from now on starts with the next boot.
    with contextlib.suppress(KvikError):
        await manager.store.mark_autostarted(done | {EVERYTHING})
