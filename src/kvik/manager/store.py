"""Machines on disk: definitions, autostart links, live status. The daemon may be killed between any two steps.

    <config>/qemu/NAME.xml            the definition; written to a temporary name, fsynced, renamed, directory fsynced
    <config>/qemu/autostart/NAME.xml  link to it
    <run>/qemu/NAME.xml               live status: <domstatus> with how to find the VMM again and the live document
    <run>/qemu/ID-NAME/               the machine's runtime directory (sockets, pid files: the driver's)
    <run>/autostarted                 this boot's id and the UUIDs that autostart has dealt with

Order of steps, so that a kill leaves only what `load` puts right: the status is written as "starting" before anything
is spawned and removed after the VMM is gone; a rename first moves the file, whose name then rules over the <name>
inside; an autostart link is made before and removed after its definition moves, and one that points nowhere is
dropped. What cannot be read is set aside under another name, with a warning, and never stops the daemon.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import json
import logging
import shutil
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ParamSpec, TypeVar
from weakref import WeakValueDictionary
from xml.sax.saxutils import escape, quoteattr

from lxml import etree

from kvik.errors import HostError, InvalidArgument, KvikError
from kvik.host import documents, files
from kvik.host.documents import DOCUMENT_LIMIT, SUFFIX, check_document_name, set_aside
from kvik.host.process import boot_id
from kvik.paths import Paths

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

STATUS_LIMIT = 16 << 20
THREADS = 4


def check_name(name: str) -> str:
    """The name if a machine can have it, else `InvalidArgument`."""
    return check_document_name(name, "machine")


@dataclass(slots=True)
class Status:
    """A running machine as the next daemon must know it."""

    name: str
    id: int
    state: int
    reason: int
    boot: str  # this boot's id: a pid from another boot means nothing
    driver: str
    directory: str
    document: str  # live document, secrets included; the definition as it was while `starting`
    starting: bool = False  # the driver has been asked, and has not answered yet
    pid: int = 0
    pid_start: int = 0  # clock ticks since boot
    handle: dict[str, Any] = field(default_factory=dict)
    persistent: bool = True
    started: float = 0.0  # seconds since the epoch
    job: str = ""
    stages: dict[str, float] = field(default_factory=dict)  # boot stages reached, seconds since the start
    reason_text: str = ""
    arriving: str = ""  # document of a device that the VMM has been asked to take, and has not confirmed
    block_jobs: list[dict[str, Any]] = field(default_factory=list)  # `BlockJob.facts` of each
    unfinished: dict[str, Any] = field(default_factory=dict)  # saving or restoring under way: `saved.machine.settle`

    def to_xml(self) -> bytes:
        attributes = {
            "name": self.name,
            "id": self.id,
            "state": "starting" if self.starting else self.state,
            "reason": self.reason,
            "pid": self.pid,
            "pid-start": self.pid_start,
            "boot": self.boot,
            "driver": self.driver,
            "directory": self.directory,
            "persistent": "yes" if self.persistent else "no",
            "started": f"{self.started:.3f}",
        }
        head = " ".join(f"{key}={quoteattr(str(value))}" for key, value in attributes.items())
        return (
            f"<domstatus {head}>\n"
            f"<handle>{escape(json.dumps(self.handle))}</handle>\n"
            f"<stages>{escape(json.dumps(self.stages))}</stages>\n"
            f"<job>{escape(self.job)}</job>\n"
            f"<why>{escape(self.reason_text)}</why>\n"
            f"<arriving>{escape(self.arriving)}</arriving>\n"
            f"<blockjobs>{escape(json.dumps(self.block_jobs))}</blockjobs>\n"
            f"<unfinished>{escape(json.dumps(self.unfinished))}</unfinished>\n"
            f"{self.document}</domstatus>\n"
        ).encode()

    @classmethod
    def from_xml(cls, data: bytes) -> Status:
        """`ValueError` for anything that `to_xml` would not write."""
        parser = etree.XMLParser(resolve_entities=False, no_network=True, load_dtd=False, remove_blank_text=False)
        try:
            root = etree.fromstring(data, parser)
            handle = json.loads(root.findtext("handle") or "{}")
            stages = json.loads(root.findtext("stages") or "{}")
            block_jobs = json.loads(root.findtext("blockjobs") or "[]")
            unfinished = json.loads(root.findtext("unfinished") or "{}")
            document = root.find("domain")
            if (
                root.tag != "domstatus"
                or document is None
                or not isinstance(handle, dict)
                or not isinstance(stages, dict)
                or not isinstance(unfinished, dict)
                or not isinstance(block_jobs, list)
                or not all(isinstance(item, dict) for item in block_jobs)
            ):
                raise ValueError("not a complete status document")
            document.tail = None
            starting = root.attrib["state"] == "starting"
            return cls(
                name=str(root.attrib["name"]),
                id=int(root.attrib["id"]),
                state=0 if starting else int(root.attrib["state"]),
                reason=int(root.attrib["reason"]),
                boot=str(root.attrib["boot"]),
                driver=str(root.attrib["driver"]),
                directory=str(root.attrib["directory"]),
                document=etree.tostring(document, encoding="unicode"),
                starting=starting,
                pid=int(root.attrib["pid"]),
                pid_start=int(root.attrib["pid-start"]),
                handle=handle,
                persistent=root.attrib["persistent"] == "yes",
                started=float(root.attrib["started"]),
                job=root.findtext("job") or "",
                stages={str(name): float(seconds) for name, seconds in stages.items()},
                reason_text=root.findtext("why") or "",
                arriving=root.findtext("arriving") or "",
                block_jobs=block_jobs,
                unfinished=unfinished,
            )
        except (etree.XMLSyntaxError, KeyError, TypeError) as error:
            raise ValueError(f"not a status document: {error}") from error


def _quietly(function: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
    """For undoing: what fails there has its cause told already."""
    with contextlib.suppress(OSError, HostError):
        function(*args, **kwargs)


Moves = Sequence[tuple[Path, Path]]  # of directories and files: from, to


def move(source: Path, target: Path) -> bool:
    """Durably; False if there is none. `HostError` where there is something at `target`."""
    try:
        if target.is_file() and source.exists():
            raise FileExistsError(errno.EEXIST, f"{target} exists already")
        try:
            source.rename(target)
        except FileNotFoundError:
            return False
        files.fsync_directory(target.parent)
    except OSError as error:
        raise files.host_error("move", source, error) from error
    return True


@dataclass(slots=True)
class Loaded:
    """What `load` found."""

    documents: list[tuple[str, str]] = field(default_factory=list)  # (name by the file, text)
    autostart: set[str] = field(default_factory=set)
    statuses: list[Status] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


class Store:
    """All file operations of the manager. Coroutines run in a thread of our own: an fsync may take long."""

    def __init__(self, paths: Paths, boot: Callable[[], str] = boot_id) -> None:
        self.domains = paths.domains
        self.links = paths.domains / "autostart"
        self.status = paths.status
        self.marker = paths.run / "autostarted"
        self.boot = boot()
        self._executor = ThreadPoolExecutor(THREADS, thread_name_prefix="kvik-store")
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # by machine, while one is wanted

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a blocking function in a thread of the store.

        A caller that is cancelled is held until the function has returned: what it asked for is on disk or it is
        not, and nothing of it can come after what the next one asks for. Threads, not one: file systems put the
        syncs of many callers into one commit.
        """
        call = functools.partial(function, *args, **kwargs)
        future = asyncio.get_running_loop().run_in_executor(self._executor, call)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            await asyncio.wait({future})
            raise

    def close(self) -> None:
        self._executor.shutdown(wait=True)

    # loading (blocking; before the daemon answers anybody)

    def load(self) -> Loaded:
        """Read everything and put right what a kill left behind. `HostError` only if the directories cannot be had."""
        loaded = Loaded()
        for directory in (self.domains, self.links, self.status):
            files.ensure_directory(directory, durable=True)
            with contextlib.suppress(HostError):
                files.remove_temporaries(directory, older_than=0)
        for name, data in self._read_all(self.domains, DOCUMENT_LIMIT, loaded):
            try:
                loaded.documents.append((name, data.decode()))
            except UnicodeDecodeError as error:
                loaded.warnings.append(set_aside(self.domains / f"{name}{SUFFIX}", f"not UTF-8: {error}"))
        for name, data in self._read_all(self.status, STATUS_LIMIT, loaded):
            path = self.status / f"{name}{SUFFIX}"
            try:
                status = Status.from_xml(data)
                check_name(status.name)
                if not self._is_runtime_directory(Path(status.directory)):
                    raise ValueError(f"{status.directory!r} is no runtime directory of ours")
            except (ValueError, InvalidArgument) as error:
                loaded.warnings.append(set_aside(path, str(error)))
                continue
            if status.name != name:  # killed within a rename: the file's name rules
                status.name = name
            loaded.statuses.append(status)
        loaded.autostart = self._load_links({name for name, _ in loaded.documents}, loaded)
        return loaded

    def _read_all(self, directory: Path, limit: int, loaded: Loaded) -> Iterable[tuple[str, bytes]]:
        for path in sorted(directory.glob(f"*{SUFFIX}")):
            name = path.name.removesuffix(SUFFIX)
            try:
                check_name(name)
                yield name, files.read_file(path, limit=limit)
            except KvikError as error:
                loaded.warnings.append(set_aside(path, str(error)))

    def _load_links(self, defined: set[str], loaded: Loaded) -> set[str]:
        names = set()
        for link in self.links.glob(f"*{SUFFIX}"):
            name = link.name.removesuffix(SUFFIX)
            if name in defined:
                names.add(name)
                continue
            try:
                link.unlink()
            except OSError as error:
                loaded.warnings.append(f"cannot remove the stale autostart link {link}: {error.strerror}")
        return names

    # definitions

    def _definition(self, name: str) -> Path:
        return self.domains / f"{check_name(name)}{SUFFIX}"

    def _link(self, name: str) -> Path:
        return self.links / f"{check_name(name)}{SUFFIX}"

    async def save_definition(self, name: str, text: str) -> None:
        """On an error the old content is there, or no file if there was none."""
        await self.run(documents.replace, self._definition(name), text.encode(), self._link(name))

    async def remove_definition(self, name: str) -> None:
        def remove() -> None:
            documents.remove(self._definition(name))
            try:
                documents.remove(self._link(name))
            except HostError as error:  # the definition is gone; `load` drops a link without one
                logger.warning("%s", error)

        await self.run(remove)

    async def rename_definition(self, old: str, new: str, text: str, *, autostart: bool, moves: Moves = ()) -> None:
        """`text` is the document with the new name in it; `moves`: what goes with it. On an error the old
        name is back."""

        def rename() -> None:
            source, target = self._definition(old), self._definition(new)
            with contextlib.ExitStack() as undo:
                if autostart:
                    undo.callback(_quietly, files.remove_file, self._link(new), durable=False)
                    files.atomic_symlink(target, self._link(new))
                try:
                    source.rename(target)
                    undo.callback(_quietly, target.rename, source)
                    if moves:  # what goes with it must not be there before it is, also after a power loss
                        files.fsync_directory(target.parent)
                except OSError as error:
                    raise files.host_error("rename", source, error) from error
                for place, new_place in moves:
                    if move(place, new_place):
                        undo.callback(_quietly, new_place.rename, place)
                before = files.try_read_file(target, limit=DOCUMENT_LIMIT)
                if before is not None:
                    undo.callback(_quietly, files.atomic_write, target, before, durable=False)
                files.atomic_write(target, text.encode())
                undo.pop_all()
            try:
                documents.remove(self._link(old))
            except HostError as error:  # nothing has that name now; `load` drops the link
                logger.warning("%s", error)

        await self.run(rename)

    async def set_autostart(self, name: str, on: bool) -> None:
        def link() -> None:
            try:
                files.atomic_symlink(self._definition(name), self._link(name))
            except HostError:
                with contextlib.suppress(HostError):
                    files.remove_file(self._link(name), durable=False)
                raise

        await self.run(link if on else functools.partial(documents.remove, self._link(name)))

    # live status: must outlive the daemon, not the host, so nothing is fsynced

    def _status(self, name: str) -> Path:
        return self.status / f"{check_name(name)}{SUFFIX}"

    # Of one machine they come one after the other, as they were asked for: two threads could end in the other order,
    # and what an event had to say would take back that a save had begun.

    def _turn(self, name: str) -> asyncio.Lock:
        return self._turns.setdefault(name, asyncio.Lock())

    async def save_status(self, status: Status) -> None:
        data = status.to_xml()
        async with self._turn(status.name):
            await self.run(files.atomic_write, self._status(status.name), data, durable=False)

    async def remove_status(self, name: str, directory: Path | None = None) -> None:
        """Forget a machine that ended: its runtime directory first, so that the status still tells what to clean."""

        def remove() -> None:
            if directory is not None:
                self.remove_runtime_directory(directory)
            files.remove_file(self._status(name), durable=False)

        async with self._turn(name):
            await self.run(remove)

    # runtime directories

    def runtime_directory(self, id_: int, name: str) -> Path:
        """Short, because sockets below it must fit into 108 bytes; never more than 20 characters of the name."""
        short = "".join(char if char.isascii() and (char.isalnum() or char in "._-") else "_" for char in name[:20])
        return self.status / f"{id_}-{short}"

    def _is_runtime_directory(self, path: Path) -> bool:
        return path.parent == self.status and path.name.split("-", 1)[0].isdigit()

    async def make_runtime_directory(self, path: Path) -> None:
        """Exists afterwards, mode 0700 and empty. `HostError` if not."""

        def make() -> None:
            self.remove_runtime_directory(path)
            try:
                path.mkdir(0o700)
            except OSError as error:
                raise files.host_error("make directory", path, error) from error

        await self.run(make)

    def remove_runtime_directory(self, path: Path) -> None:
        if self._is_runtime_directory(path):
            shutil.rmtree(path, ignore_errors=True)

    def runtime_directories(self) -> list[Path]:
        return [path for path in self.status.iterdir() if self._is_runtime_directory(path) and path.is_dir()]

    # autostart, once per boot

    def autostarted(self) -> set[str]:
        """UUIDs that autostart dealt with since the host booted."""
        with contextlib.suppress(HostError, UnicodeDecodeError):
            boot, *uuids = (files.try_read_file(self.marker) or b"\n").decode().splitlines()
            if boot == self.boot:
                return set(uuids)
        return set()

    async def mark_autostarted(self, uuids: Iterable[str]) -> None:
        text = "\n".join([self.boot, *sorted(uuids)]) + "\n"
        await self.run(files.atomic_write, self.marker, text.encode(), durable=False)
