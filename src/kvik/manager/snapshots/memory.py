"""The memory of a running machine as part of a snapshot: a file as `save` writes it (`manager/saved/image`).

    guest stopped (with --live: while it runs, and it stands still when all was sent) -> memory -> firmware, TPM ->
    all disks change over in one step -> guest goes on

Going back fills a new VMM with it, on new images. A snapshot is restored again and again: its file stays.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from kvik.conf.domain import Domain
from kvik.conf.enums import DomainJobOperation, DomainState
from kvik.conf.enums import DomainSnapshotCreateFlags as Flags
from kvik.conf.snapshot import Snapshot
from kvik.errors import ConfigError, ConfigUnsupported, OperationInvalid
from kvik.host.reach import about
from kvik.host.threads import in_thread
from kvik.manager import lifecycle, prepare
from kvik.manager.saved import machine as saved
from kvik.manager.saved.image import Reader, Writer, temporary
from kvik.manager.saved.machine import Saved
from kvik.manager.states import Trigger

if TYPE_CHECKING:
    from kvik.manager.domain import DomainObject

__all__ = ["Standstill", "check_free", "document_of", "made", "open_memory", "place_of"]


def place_of(domain: DomainObject, snapshot: Snapshot, directory: Path, flags: int) -> str | None:
    """Where its memory goes: None for a snapshot of disks alone. `ConfigError`s for a place that cannot be."""
    wanted = snapshot.memory
    kind = wanted.snapshot if wanted is not None else None
    file = wanted.file if wanted is not None else None
    if file is not None and kind not in (None, "external"):
        raise ConfigError(f"a memory snapshot of kind {kind!r} has no file", path="/domainsnapshot/memory")
    if not domain.is_active or kind == "no" or flags & Flags.DISK_ONLY:
        if kind in ("internal", "external") or file is not None:
            why = "is off: it has no memory that could be saved" if not domain.is_active else "keeps its disks alone"
            raise ConfigUnsupported(f"the snapshot of machine {domain.name!r} {why}", path="/domainsnapshot/memory")
        return None
    if file is None and flags & Flags.NO_METADATA:
        raise ConfigUnsupported("without metadata the file for the memory has to be said", remedy="--memspec file=FILE")
    path = file or str(directory / f"{snapshot.name}.mem")
    if not path.startswith("/"):
        raise ConfigError(f"the path {path!r} for the memory is not absolute", path="/domainsnapshot/memory")
    return path


def check_free(path: str) -> None:
    """`ConfigUnsupported` where something is already (blocking)."""
    about(path)
    if Path(path).exists():
        raise ConfigUnsupported(f"the file for the memory already exists: {path}", remedy="remove it, or name another")


def made(path: str) -> list[str]:
    """The files that saving makes."""
    return [temporary(path), path]


class Standstill:
    """The guest, from its memory's being saved until it goes on."""

    def __init__(self, domain: DomainObject) -> None:
        self._domain, self._run = domain, domain.run
        self._running = domain.state == DomainState.RUNNING
        self._began = 0.0

    async def stop(self) -> None:
        """For what its VMM saves itself."""
        domain, run = self._domain, self._run
        assert run is not None
        saved.check_can_save(domain)
        run.unfinished = {"operation": "snapshot", "run": self._running}
        await domain.save_status()
        run.pause_cause = "snapshot"
        if self._running:
            self._began = time.monotonic()
            await domain.require_machine().pause()
            lifecycle.apply(domain, Trigger.PAUSED_FOR_SNAPSHOT)

    async def save(self, path: str, *, live: bool) -> None:
        """Afterwards the guest stands still. On an error it may, too: `go_on`."""
        domain, run = self._domain, self._run
        machine = domain.require_machine()
        assert run is not None
        saved.check_can_save(domain)
        text = saved.saved_document(run.live, run.directory, domain.config.parse())
        writer = await in_thread(
            Writer, path, text, driver=domain.driver.name, token=uuid4().hex, running=self._running
        )
        saved.follow(domain, writer, DomainJobOperation.SNAPSHOT)
        try:
            run.unfinished = {"operation": "snapshot", "run": self._running}
            await domain.save_status()
            run.pause_cause = "snapshot"
            if not live and self._running:
                self._began = time.monotonic()
                await machine.pause()
                lifecycle.apply(domain, Trigger.PAUSED_FOR_SNAPSHOT)
            await machine.save_state(writer)
            self._began = self._began or time.monotonic()
            await in_thread(saved.sync_disks, run.live)
            await in_thread(writer.place)
        except BaseException:
            await in_thread(writer.discard)
            raise

    async def go_on(self) -> int | None:
        """For how many microseconds it stood still; None if it does not run."""
        domain, run = self._domain, self._run
        if run is None or domain.run is not run or not run.unfinished:
            return None
        run.pause_cause = ""
        await saved.go_on(domain, run, self._running)
        return int((time.monotonic() - self._began) * 1e6) if self._began and self._running else None


async def open_memory(domain: DomainObject, snapshot: Snapshot) -> Saved | None:
    """What a machine that goes back to it goes on from; None for a snapshot of disks alone. The caller closes it."""
    kind = snapshot.memory.snapshot if snapshot.memory is not None else None
    path = snapshot.taken.memory if snapshot.taken is not None else None
    if kind != "external" and path is None:
        return None
    if path is None:
        raise OperationInvalid(
            f"snapshot {snapshot.name!r} was redefined: whether its memory is what its document says is not known",
            remedy="--force goes back to its disks alone",
        )
    reader = await in_thread(Reader, path)
    try:
        if reader.facts.driver != domain.driver.name:
            raise OperationInvalid(f"{path} was saved by {reader.facts.driver[:40]!r}, not by {domain.driver.name}")
        await in_thread(reader.document)
    except BaseException:
        reader.close()
        raise
    return Saved(reader, snapshot=True)


async def document_of(domain: DomainObject, memory: Saved) -> Domain:
    assert memory.reader is not None
    document = prepare.parse(await in_thread(memory.reader.document))
    document.name, document.uuid = domain.name, domain.uuid_text
    return document
