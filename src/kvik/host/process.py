"""Starts, watches and ends processes; with `tools.py` the only place that does.

`spawn` is for what lives on (a machine's VMM, a network's dnsmasq); short tools are run by `tools.run`. No shell, an
explicit environment, no inherited descriptor but those named.

A process is identified by its pid *and* its start time (proc(5), field 22 of /proc/PID/stat, in clock ticks since
boot) and, across a reboot, by the boot's id. Once found it is held by a pidfd (pidfd_open(2)), which names that one
process for ever: a signal can never reach another process that got the same pid later.

Both go through `subprocess.Popen` without `preexec_fn` and without a change of user, which lets CPython
use vfork: the cost does not grow with the daemon's memory.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import select
import shutil
import signal
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvik.errors import HostError, OperationTimeout

SEARCH_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
BASE_ENVIRONMENT: Mapping[str, str] = {"PATH": SEARCH_PATH, "LC_ALL": "C", "HOME": "/"}
_TICK = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


def find_program(name: str, path: str = SEARCH_PATH) -> str | None:
    """The absolute path of an executable, or None. /usr/sbin is searched for everybody."""
    return shutil.which(name, path=path)


def boot_id() -> str:
    """This boot's id (random(4)); a pid and start time from another boot mean nothing."""
    return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()


# What /proc says ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ProcessStat:
    """The fields of /proc/PID/stat that we use (proc(5))."""

    state: str  # R, S, D, T (stopped), Z (zombie), X (dead), ...
    parent: int
    session: int
    user_ns: int
    system_ns: int
    threads: int
    start_time: int  # clock ticks since boot
    rss: int  # bytes
    name: str

    @property
    def ended(self) -> bool:
        return self.state in "ZXx"


def read_stat(pid: int) -> ProcessStat | None:
    """What the kernel says about a process, or None if there is none with this pid."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:  # noqa: PTH123 - hot path
            data = file.read(4096)
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The command name may itself contain spaces and parentheses: the last ")" ends it.
    head, _, tail = data.rpartition(b")")
    fields = tail.split()  # fields[0] is field 3
    return ProcessStat(
        state=fields[0].decode("ascii"),
        parent=int(fields[1]),
        session=int(fields[3]),
        user_ns=int(fields[11]) * 1_000_000_000 // _TICK,
        system_ns=int(fields[12]) * 1_000_000_000 // _TICK,
        threads=int(fields[17]),
        start_time=int(fields[19]),
        rss=int(fields[21]) * _PAGE,
        name=head.partition(b"(")[2].decode("utf-8", "replace"),
    )


# struct pidfd_info (linux/pidfd.h), its first version: mask, cgroup id, pid, tgid, ppid, eight user and group ids,
# the exit status as wait(2) gives it.
_PIDFD_INFO = struct.Struct("=QQ11Ii")
_PIDFD_GET_INFO = 0xC040_FF0B  # _IOWR(0xFF, 11, 64 bytes)
_PIDFD_INFO_EXIT = 1 << 3


def exit_code(pidfd: int) -> int | None:
    """How a process ended that somebody else has reaped, as `ProcessHandle.code`. None where the kernel does not say:
    before Linux 6.15, and for a process that is not reaped yet."""
    for pause in (1e-4, 1e-3, 0.0):  # the reaper may be some microseconds behind
        info = bytearray(_PIDFD_INFO.size)
        _PIDFD_INFO.pack_into(info, 0, _PIDFD_INFO_EXIT, *[0] * 13)
        try:
            fcntl.ioctl(pidfd, _PIDFD_GET_INFO, info)
        except OSError:
            return None
        fields = _PIDFD_INFO.unpack(info)
        if fields[0] & _PIDFD_INFO_EXIT:
            return os.waitstatus_to_exitcode(fields[-1])
        time.sleep(pause)
    return None


# One process ----------------------------------------------------------------------------------------------------


class ProcessHandle:
    """One process, held by a pidfd: signals and waits can never hit another one.

    `code` is, once the process has ended: its exit status (0 to 255), minus the signal that ended it, or None if it
    was not our child and the kernel does not tell others (Linux does from 6.15 on, see `exit_code`).
    """

    def __init__(self, pid: int, start_time: int, pidfd: int, child: subprocess.Popen[bytes] | None = None) -> None:
        self.pid = pid
        self.start_time = start_time
        self.code: int | None = None
        self._pidfd = pidfd
        self._child = child
        self._ended = False
        self._reaping = threading.Lock()

    def __repr__(self) -> str:
        return f"ProcessHandle(pid={self.pid}, start_time={self.start_time}, alive={self.alive})"

    def fileno(self) -> int:
        """The pidfd: readable when the process has ended."""
        return self._pidfd

    @property
    def alive(self) -> bool:
        """False once it has ended (a zombie counts as ended). Reaps our own child."""
        return not self._poll()

    def _poll(self) -> bool:
        if self._ended:
            return True
        if self._pidfd < 0:
            stat = read_stat(self.pid)
            return stat is None or stat.start_time != self.start_time or stat.ended
        poller = select.poll()
        poller.register(self._pidfd, select.POLLIN)
        if not poller.poll(0):
            return False
        self._reap()
        return True

    def _reap(self) -> None:
        with self._reaping:
            if self._ended:
                return
            if self._child is not None:
                try:
                    info = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOHANG)
                except ChildProcessError:
                    info = None  # somebody else reaped it
                if info is not None:
                    status = info.si_status
                    self.code = status if info.si_code == os.CLD_EXITED else -status
                # Popen must not warn about, or wait for, what is reaped already.
                self._child.returncode = self.code if self.code is not None else 0
            else:
                self.code = exit_code(self._pidfd)
            self._ended = True

    def signal(self, number: int) -> bool:
        """Send a signal. False if the process has ended already."""
        if self._ended or self._pidfd < 0:
            return False
        try:
            signal.pidfd_send_signal(self._pidfd, number)
        except ProcessLookupError:
            return False
        except PermissionError as error:
            raise HostError(f"not allowed to signal process {self.pid}", errno=error.errno or 0) from error
        return True

    def kill(self) -> bool:
        return self.signal(signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int | None:
        """Block until it has ended and return `code`; `OperationTimeout` after `timeout` seconds."""
        if self._poll():
            return self.code
        poller = select.poll()
        poller.register(self._pidfd, select.POLLIN)
        if not poller.poll(None if timeout is None else max(0, int(timeout * 1000))):
            raise OperationTimeout(f"process {self.pid} did not end within {timeout:g} s")
        self._reap()
        return self.code

    def terminate(self, grace: float = 2.0) -> int | None:
        """Ask it to end (SIGTERM), after `grace` seconds make it (SIGKILL); return `code`."""
        if grace > 0 and self.signal(signal.SIGTERM):
            try:
                return self.wait(grace)
            except OperationTimeout:
                pass
        self.kill()
        return self.wait()

    async def wait_async(self, timeout: float | None = None) -> int | None:
        """`wait` for an event loop: nothing blocks. Any number of tasks may wait."""
        if self._poll():
            return self.code
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[None] = loop.create_future()

        def tell() -> None:
            if not ended.done():
                ended.set_result(None)

        stop = self.on_exit(tell, loop)
        try:
            await asyncio.wait_for(ended, timeout)
        except TimeoutError:
            raise OperationTimeout(f"process {self.pid} did not end within {timeout:g} s") from None
        finally:
            stop()
        return self.code

    async def terminate_async(self, grace: float = 2.0) -> int | None:
        if grace > 0 and self.signal(signal.SIGTERM):
            try:
                return await self.wait_async(grace)
            except OperationTimeout:
                pass
        self.kill()
        return await self.wait_async()

    def on_exit(
        self, callback: Callable[[], object], loop: asyncio.AbstractEventLoop | None = None
    ) -> Callable[[], None]:
        """Call `callback` once, in the loop, after the process has ended and `code` is known.

        Returns a function that cancels it (calling it later is harmless).
        """
        loop = loop or asyncio.get_running_loop()
        # An own descriptor for each watcher: a loop keeps one reader per descriptor only.
        fd = os.dup(self._pidfd) if self._pidfd >= 0 else -1

        def stop() -> None:
            nonlocal fd
            if fd >= 0:
                loop.remove_reader(fd)
                os.close(fd)
                fd = -1

        def ready() -> None:
            stop()
            self._reap()
            callback()

        if fd < 0:
            raise ValueError("the handle is closed")
        loop.add_reader(fd, ready)
        return stop

    def stat(self) -> ProcessStat | None:
        """CPU time, memory, state; None once it has ended."""
        stat = read_stat(self.pid)
        return stat if stat is not None and stat.start_time == self.start_time else None

    def close(self) -> None:
        """Let go of the process, which goes on running if it does."""
        if self._pidfd < 0:
            return
        if self._child is not None and not self._poll():
            abandon(self._child)
        os.close(self._pidfd)
        self._pidfd = -1

    def __enter__(self) -> ProcessHandle:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        try:
            self.close()
        except Exception:  # interpreter shutdown
            pass


# Children whose handle was closed while they ran: reaped at the next spawn, so none stays a zombie for long.
_abandoned: list[subprocess.Popen[bytes]] = []
_abandoned_lock = threading.Lock()


def abandon(child: subprocess.Popen[bytes]) -> None:
    """Leave a child to be reaped later, whenever it ends."""
    with _abandoned_lock:
        _abandoned.append(child)


def reap_abandoned() -> None:
    with _abandoned_lock:
        _abandoned[:] = [child for child in _abandoned if child.poll() is None]


def find(pid: int, start_time: int, boot: str | None = None) -> ProcessHandle | None:
    """The process with this pid and start time, or None if it has ended (or is a zombie).

    `boot` is the `boot_id()` under which the two were noted; in another boot nothing is found.
    """
    if pid <= 0 or (boot is not None and boot != boot_id()):
        return None
    try:
        pidfd = os.pidfd_open(pid)
    except (ProcessLookupError, OSError):
        return None  # gone; EINVAL: a thread's id, which is no process
    # Looked up after the pidfd is held: equal start times now mean that the pidfd is that very process, because a
    # later owner of the pid started later.
    stat = read_stat(pid)
    if stat is None or stat.start_time != start_time or stat.ended:
        os.close(pidfd)
        return None
    return ProcessHandle(pid, start_time, pidfd)


def popen(argv: Sequence[str], env: Mapping[str, str] | None, **options: Any) -> subprocess.Popen[bytes]:
    program = argv[0]
    try:
        return subprocess.Popen(
            list(argv),
            env=dict(BASE_ENVIRONMENT if env is None else env),
            close_fds=True,
            start_new_session=True,
            **options,
        )
    except FileNotFoundError as error:
        what = options.get("cwd") if error.filename == options.get("cwd") and options.get("cwd") else program
        raise HostError(f"cannot run {program}: {what} does not exist", errno=error.errno or 0) from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise HostError(f"cannot run {program}: {reason}", errno=getattr(error, "errno", 0) or 0) from error


def spawn(
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    stdin: int | None = None,
    stdout: int | None = None,
    stderr: int | None = None,
    pass_fds: Sequence[int] = (),
    cwd: str | None = None,
) -> ProcessHandle:
    """Start a process that lives on, in a session of its own: no terminal, no signal meant for us, reaches it.

    `argv[0]` is a path or a name sought in `SEARCH_PATH`. `env` replaces the whole environment
    (`BASE_ENVIRONMENT` if None). Standard descriptors not given are /dev/null; `pass_fds` keep their numbers.
    """
    reap_abandoned()
    if "/" not in argv[0]:
        found = find_program(argv[0])
        if found is None:
            raise HostError(f"cannot run {argv[0]}: no such program in {SEARCH_PATH}", errno=2)
        argv = [found, *argv[1:]]
    child = popen(
        argv,
        env,
        stdin=subprocess.DEVNULL if stdin is None else stdin,
        stdout=subprocess.DEVNULL if stdout is None else stdout,
        stderr=subprocess.DEVNULL if stderr is None else stderr,
        pass_fds=tuple(pass_fds),
        cwd=cwd,
    )
    try:
        # Not reaped yet, so both exist even if it has ended meanwhile.
        pidfd = os.pidfd_open(child.pid)
        stat = read_stat(child.pid)
    except OSError as error:
        child.kill()
        child.wait()
        raise HostError(f"cannot watch {argv[0]}: {error.strerror}", errno=error.errno or 0) from error
    assert stat is not None
    return ProcessHandle(child.pid, stat.start_time, pidfd, child)


def describe_exit(code: int | None) -> str:
    """An exit status as words: "exit code 1", "killed by SIGSEGV", "ended"."""
    if code is None:
        return "ended"
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"
