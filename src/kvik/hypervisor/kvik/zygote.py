"""The daemon's zygote: a process of this installation's kvik-vmm that has everything imported and forks machines.

It is an optimisation and no more: whenever it cannot be used, the machine is executed as it was before, and the log
says why. One is made when a document for kvik-vmm is first checked, and again when it is missed; what starts meanwhile
is executed. It ends with the daemon, its machines do not (`host/zygote.py`, `vmm/zygote.py`).

A zygote runs the code that it imported, so it is used only while the files are as they were before it began: an upgrade
makes it obsolete, and the next machine runs what is on disk, as one that is executed does.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path

from kvik.errors import KvikError
from kvik.host.process import ProcessHandle
from kvik.host.zygote import Refused, Zygote

__all__ = ["ZygoteKeeper", "identity"]

log = logging.getLogger(__name__)

READY_DEADLINE = 30.0  # seconds to import everything, on a host that does much else
FORK_DEADLINE = 5.0  # seconds for an answer; milliseconds are usual
PAUSE = 1.0  # seconds between two attempts to make one

# What a machine imports of the package (docs/internals/architecture.md), beside the modules on top of it.
_PACKAGES = ("kvm", "qmp", "image", "host", "vmm")


def identity(package: Path, interpreter: str) -> Hashable:
    """Equal as long as a process that imports `package` with `interpreter` would run the same code. Raises OSError."""
    found = [_stamp(interpreter, os.stat(interpreter))]  # noqa: PTH116 - a millisecond for all, at each start
    directories = [str(package / name) for name in _PACKAGES]
    with os.scandir(package) as entries:
        found += [_stamp(entry.name, entry.stat()) for entry in entries if entry.name.endswith(".py")]
    while directories:
        directory = directories.pop()
        with os.scandir(directory) as entries:
            for entry in entries:
                if entry.name.endswith(".py"):
                    found.append(_stamp(entry.path, entry.stat()))
                elif "." not in entry.name and entry.name != "__pycache__" and entry.is_dir():
                    directories.append(entry.path)
    return tuple(sorted(found))


def _stamp(name: str, info: os.stat_result) -> tuple[str, int, int, int]:
    return name, info.st_ino, info.st_mtime_ns, info.st_size


class ZygoteKeeper:
    """Keeps one zygote of the program `command`; `made_of` says what that is made of now (see `identity`)."""

    def __init__(self, command: Sequence[str], made_of: Callable[[], Hashable]) -> None:
        self._command, self._made_of = command, made_of
        self._zygote: Zygote | None = None
        self._identity: Hashable = None  # of what `_zygote` runs
        self._making: asyncio.Task[None] | None = None
        self._tried = -PAUSE
        self._later: asyncio.TimerHandle | None = None  # of the next attempt
        self._why = "there is no zygote yet"
        self._stop_watching: Callable[[], None] = lambda: None
        self._closed = False

    @property
    def pid(self) -> int:
        """Of the zygote that is ready, or 0."""
        return self._zygote.process.pid if self._zygote is not None else 0

    def warm(self, *, wanted: bool = True) -> None:
        """Make one in the background, unless there is one. If the last attempt was a moment ago, a little later, or
        not at all if nobody wants it now."""
        if self._closed or self._zygote is not None or self._making is not None:
            return
        loop, wait = asyncio.get_running_loop(), self._tried + PAUSE - time.monotonic()
        if wait <= 0:
            self._tried, self._why = time.monotonic(), "the zygote is not ready yet"
            self._making = loop.create_task(self._make(), name="zygote")
        elif wanted and self._later is None:
            self._later = loop.call_later(wait, self._retry)

    def _retry(self) -> None:
        self._later = None
        self.warm()

    async def _make(self) -> None:
        try:
            made_of = self._made_of()
            made = Zygote(self._command)
            await made.ready(READY_DEADLINE)
        except (KvikError, OSError) as error:
            self._why = f"no zygote could be made: {error}"
            log.warning("%s", self._why)
            return
        finally:
            self._making = None
        self._zygote, self._identity = made, made_of
        self._stop_watching = made.process.on_exit(lambda: self._ended(made))
        log.debug("machines of kvik-vmm are forks of process %d from now on", made.process.pid)

    def _ended(self, zygote: Zygote) -> None:
        """It was killed, or failed: machines that it forked do not care."""
        if zygote is self._zygote:
            self._drop(f"the zygote ended{zygote.last_words()}")
            log.warning("%s", self._why)
            self.warm(wanted=False)

    def _drop(self, why: str) -> None:
        self._why = why
        zygote, self._zygote = self._zygote, None
        self._stop_watching()
        if zygote is not None:
            zygote.close()

    async def fork(
        self, name: str, argv: Sequence[str], env: Mapping[str, str], files: Mapping[int, int]
    ) -> ProcessHandle | None:
        """The process of machine `name`, or None if it has to be executed; the log says why. `files`: as `Zygote.fork`
        takes them."""
        zygote, level = self._zygote, logging.INFO
        if zygote is not None and not self._current():
            self._drop("kvik was changed on disk since the zygote began")
            zygote = None
        why = self._why
        if zygote is not None:
            try:
                return await zygote.fork(argv, env, files, FORK_DEADLINE)
            except Refused as error:
                why = str(error)
            except KvikError as error:
                why = str(error)
                if zygote is self._zygote:
                    self._drop(why)
            level = logging.WARNING
        log.log(level, "machine %s is executed, not forked: %s", name, why)
        self.warm()
        return None

    def _current(self) -> bool:
        try:
            return self._made_of() == self._identity
        except OSError:  # amid an upgrade
            return False

    async def close(self) -> None:
        """End the zygote. Its machines go on."""
        self._closed = True
        if self._later is not None:
            self._later.cancel()
        if self._making is not None:
            self._making.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._making
        self._drop("the daemon ends")
