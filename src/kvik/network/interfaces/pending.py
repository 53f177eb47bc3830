"""A change of the host's interfaces that is undone unless somebody says that it is good.

    begin (N seconds) -> add a switch, do it -> commit (keep, write the configuration) | rollback | nobody: undone

Everything that is needed to undo is in one file below /run before anything is done, and a process of its own
(`watchdog`) waits with it: whether the daemon ends, is killed or hangs, the host comes back. The host's configuration
is written by `commit` alone, so a reboot, too, brings back what was.

Each step is taken under one lock (open file description: the kernel drops it with its holder), so that "keep" and "too
late" cannot both be said.
"""

from __future__ import annotations

import os
import secrets
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import msgspec

import kvik
from kvik.errors import HostError, KvikError, OperationInvalid, OperationTimeout, ResourceBusy
from kvik.host.files import FileLock, atomic_write, ensure_directory, remove_file, try_read_file
from kvik.host.netlink import Netlink
from kvik.host.process import boot_id, find, spawn
from kvik.network.interfaces.switch import Switch, undo

SECONDS_MAX = 3600
ARMED_WAIT = 15.0  # seconds for the watchdog to say that it is ready
PATIENCE = 5.0  # seconds that the watchdog waits for a daemon in the middle of a step; a stuck one does not stop it
TRIES = 5
_WATCHDOG = Path(__file__).with_name("watchdog.py")


@dataclass
class Record:
    """`deadline` in seconds of CLOCK_BOOTTIME; 0: none, until commit or rollback. `staged`: configuration to write."""

    id: str
    boot: str
    namespace: int
    seconds: int
    deadline: float
    state: Literal["open", "kept", "reverted"] = "open"
    outcome: str = ""
    watchdog: int = 0
    watchdog_start: int = 0
    switches: list[Switch] = field(default_factory=list)
    staged: dict[str, bytes | None] = field(default_factory=dict)
    before: dict[str, str] = field(default_factory=dict)  # what they replace: SHA-256, empty for no file

    @property
    def words(self) -> str:
        return ", ".join(switch.words for switch in self.switches) or "changes of the configuration"

    @property
    def left(self) -> float:
        return max(0.0, self.deadline - boottime()) if self.deadline else 0.0


def boottime() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def namespace() -> int:
    """Which network namespace this thread is in."""
    return os.stat("/proc/thread-self/ns/net").st_ino  # noqa: PTH116


class Pending:
    """The one pending change of a host. Blocking; every method may be called from any thread or process."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.file = directory / "pending.json"
        self.log = directory / "watchdog.log"

    # the record

    @contextmanager
    def locked(self, patience: float = PATIENCE) -> Iterator[None]:
        ensure_directory(self.directory)
        lock = FileLock(self.directory / "pending.lock")
        lock.acquire(timeout=patience)
        try:
            yield
        finally:
            lock.release()

    def read(self) -> Record | None:
        """What is on disk; None if nothing is, or it is of another boot or namespace."""
        data = try_read_file(self.file)
        if data is None:
            return None
        try:
            record = msgspec.json.decode(data, type=Record)
        except msgspec.MsgspecError as error:
            raise HostError(f"{self.file} cannot be read: {error}", remedy="remove it") from error
        return record if (record.boot, record.namespace) == (boot_id(), namespace()) else None

    def write(self, record: Record) -> None:
        atomic_write(self.file, msgspec.json.encode(record))

    def open(self) -> Record | None:
        """The change that waits for commit or rollback."""
        record = self.read()
        return record if record is not None and record.state == "open" else None

    # steps

    def begin(self, seconds: int) -> Record:
        """Open a change, with a watchdog that undoes it after `seconds` (0: none)."""
        if not 0 <= seconds <= SECONDS_MAX:
            raise OperationInvalid(f"{seconds} s is not between 0 and {SECONDS_MAX}")
        with self.locked():
            present = self.read()
            if present is not None and present.state != "reverted":
                what = "already" if present.state == "open" else "whose configuration could not be written"
                raise ResourceBusy(
                    f"there is a pending change {what}: {present.words}",
                    remedy="keep it with 'kvik iface-commit' or undo it with 'kvik iface-rollback'",
                )
            deadline = boottime() + seconds if seconds else 0.0
            record = Record(secrets.token_hex(8), boot_id(), namespace(), seconds, deadline)
            self.write(record)
            if seconds:
                try:
                    record.watchdog, record.watchdog_start = self._arm()
                    self.write(record)
                except BaseException:
                    remove_file(self.file)
                    raise
            return record

    def change(self, work: Callable[[Record], None]) -> Record:
        """Run `work` on the open change under the lock; it calls `write` before it does what must be undone."""
        with self.locked():
            record = self.open()
            if record is None:
                raise OperationInvalid("there is no pending change", remedy="begin one: kvik iface-begin")
            work(record)
            return record

    def commit(self, save: Callable[[Record], None]) -> Record:
        """Keep the change: from here on nothing undoes it. `save` writes the configuration; if that fails the change is
        kept as it is and committing again tries it again."""
        with self.locked():
            record = self.read()
            if record is None:
                raise OperationInvalid("there is no pending change to commit")
            if record.state == "reverted":
                raise OperationInvalid(
                    f"too late: {record.words} was undone", remedy="do it again, and commit sooner or with more seconds"
                )
            if record.state == "open":
                record.state = "kept"
                self.write(record)
                self._dismiss(record)
            save(record)
            remove_file(self.file)
            return record

    def rollback(self) -> Record:
        """Undo the change now; also one that was kept, as long as its configuration could not be written."""
        with self.locked():
            record = self.read()
            if record is None or record.state == "reverted":
                raise OperationInvalid("there is no pending change to roll back")
            self._revert(record, "rolled back")
            self._dismiss(record)
            return record

    def forget(self) -> None:
        """Drop the record of a change that was undone, when whoever asked has been told."""
        with self.locked():
            record = self.read()
            if record is not None and record.state == "reverted":
                remove_file(self.file)

    def expire(self, known: Record) -> Record | None:
        """The watchdog's step: undo unless it was kept. `known` is what it uses if the file cannot be read."""
        try:
            with self.locked():
                return self._expire(known)
        except ResourceBusy:  # somebody is stuck in a step; the host must not stay cut off for that
            return self._expire(known)

    def _expire(self, known: Record) -> Record | None:
        try:
            record = self.read()
        except KvikError:
            record = known
        if record is None or record.id != known.id or record.state != "open":
            return None
        self._revert(record, f"not committed within {record.seconds} s")
        return record

    def _revert(self, record: Record, why: str) -> None:
        faults: list[str] = []
        for switch in reversed(record.switches):
            fault = _undo(switch)
            if fault:
                faults.append(fault)
        record.state = "reverted"
        record.outcome = f"{why}: undone" + (f", but {'; '.join(faults)}" if faults else "")
        try:
            self.write(record)
        except HostError:
            pass  # a full or read-only disk: the host is back, which is what counts

    def recover(self) -> Record | None:
        """What a daemon that starts has to see to: a change whose watchdog is gone is undone. Returns it then."""
        with self.locked():
            record = self.open()
            if record is None or not record.deadline:
                return None
            if find(record.watchdog, record.watchdog_start) is not None and record.left > 0:
                return None
            self._revert(record, "its watchdog was gone")
            return record

    # the watchdog

    def _arm(self) -> tuple[int, int]:
        """Start it and wait until it has all that it needs in memory."""
        reader, writer = os.pipe()
        # Isolated and from the package that the daemon was loaded from, as the VMM is (hypervisor/kvik/program.py); it
        # needs msgspec, so with site.
        argv = [sys.executable, "-I", str(_WATCHDOG), str(Path(kvik.__file__).parent.parent), str(self.directory)]
        try:
            log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                process = spawn(argv, stdout=writer, stderr=log)
            finally:
                os.close(log)
                os.close(writer)
            poller = select.poll()
            poller.register(reader, select.POLLIN)
            answer = os.read(reader, 16) if poller.poll(ARMED_WAIT * 1000) else b""
        finally:
            os.close(reader)
        if answer != b"armed\n":
            process.kill()
            process.wait()
            words = (try_read_file(self.log) or b"").decode(errors="replace").strip()[-500:]
            raise OperationTimeout(
                "the watchdog that would undo the change did not start, so nothing was changed"
                + (f": {words}" if words else "")
            )
        pid, start = process.pid, process.start_time
        process.close()
        return pid, start

    def _dismiss(self, record: Record) -> None:
        """Tell the watchdog that there is nothing left to do. It looks for itself before it believes that."""
        handle = find(record.watchdog, record.watchdog_start)
        if handle is not None:
            handle.signal(signal.SIGTERM)
            handle.close()

    def refresh(self, record: Record) -> None:
        """Tell the watchdog that the record has more in it."""
        handle = find(record.watchdog, record.watchdog_start)
        if handle is not None:
            handle.signal(signal.SIGHUP)
            handle.close()


def _undo(switch: Switch) -> str:
    """Undo one switch, with patience: the kernel may be short of memory, an interface on its way back. The fault."""
    fault = ""
    for _ in range(TRIES):
        try:
            with Netlink() as netlink:
                undo(netlink, switch)
            return ""
        except (HostError, OSError) as error:
            fault = str(error)
            time.sleep(0.2)
    return fault
