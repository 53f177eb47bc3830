"""Short tools: run to their end, with a deadline, bounded output, and nothing left behind.

A tool that fails, hangs or talks too much is an error with its own words in it; it and what it started in its session
are killed and reaped before the error is raised.
"""

from __future__ import annotations

import asyncio
import os
import selectors
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO

from kvik.errors import HostError, OperationTimeout
from kvik.host.process import abandon, describe_exit, find_program, popen, reap_abandoned

__all__ = ["Completed", "run", "run_async"]

DEFAULT_TIMEOUT = 30.0  # seconds
DEFAULT_OUTPUT_LIMIT = 1 << 20  # bytes of each of stdout and stderr
_MESSAGE_LIMIT = 2000  # characters of a tool's own message that go into an error


@dataclass(frozen=True, slots=True)
class Completed:
    """What a tool did. `code` as in `ProcessHandle`."""

    argv: tuple[str, ...]
    code: int
    out: bytes
    err: bytes

    @property
    def text(self) -> str:
        return self.out.decode("utf-8", "replace")

    @property
    def message(self) -> str:
        """The tool's own words about a failure: stderr, or else stdout, without blank edges, bounded."""
        words = self.err.strip() or self.out.strip()
        return words.decode("utf-8", "replace")[-_MESSAGE_LIMIT:]


def run(
    argv: Sequence[str],
    *,
    input: bytes = b"",
    env: Mapping[str, str] | None = None,
    timeout: float = DEFAULT_TIMEOUT,
    limit: int = DEFAULT_OUTPUT_LIMIT,
    pass_fds: Sequence[int] = (),
    cwd: str | None = None,
    check: bool = True,
    listen: Callable[[bytes], None] | None = None,
) -> Completed:
    """Run a short tool to its end; `listen` is told what it prints (not: to stderr) when it does.

    Raises `OperationTimeout` when `timeout` seconds are over and `HostError` when it cannot be started, writes more
    than `limit` bytes to stdout or stderr or, with `check`, fails; its own message is in the error. In each case the
    tool and what it started in its session are killed and reaped before the error is raised.
    """
    return _Tool(
        argv,
        input=input,
        env=env,
        timeout=timeout,
        limit=limit,
        pass_fds=pass_fds,
        cwd=cwd,
        check=check,
        listen=listen,
    ).run()


async def run_async(
    argv: Sequence[str],
    *,
    input: bytes = b"",
    env: Mapping[str, str] | None = None,
    timeout: float = DEFAULT_TIMEOUT,
    limit: int = DEFAULT_OUTPUT_LIMIT,
    pass_fds: Sequence[int] = (),
    cwd: str | None = None,
    check: bool = True,
) -> Completed:
    """`run` in a thread, for an event loop. Cancelling it kills the tool."""
    tool = _Tool(argv, input=input, env=env, timeout=timeout, limit=limit, pass_fds=pass_fds, cwd=cwd, check=check)
    future = asyncio.get_running_loop().run_in_executor(None, tool.run)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        tool.abort()
        await asyncio.wait([future])
        future.cancelled() or future.exception()  # retrieved: no "never retrieved" warning
        raise


class _Tool:
    """One run of a short tool: a select loop over its pipes, its pidfd and an abort pipe."""

    def __init__(
        self,
        argv: Sequence[str],
        *,
        input: bytes,
        env: Mapping[str, str] | None,
        timeout: float,
        limit: int,
        pass_fds: Sequence[int],
        cwd: str | None,
        check: bool,
        listen: Callable[[bytes], None] | None = None,
    ) -> None:
        if "/" not in argv[0]:
            argv = [find_program(argv[0]) or argv[0], *argv[1:]]
        self.argv = tuple(argv)
        self.input = memoryview(input)
        self.env = env
        self.timeout = timeout
        self.limit = limit
        self.pass_fds = tuple(pass_fds)
        self.cwd = cwd
        self.check = check
        self.listen = listen
        self._abort_event = threading.Event()
        self._wake = -1
        self._wake_lock = threading.Lock()

    @property
    def name(self) -> str:
        return os.path.basename(self.argv[0])  # noqa: PTH119

    def abort(self) -> None:
        self._abort_event.set()
        with self._wake_lock:
            if self._wake >= 0:
                os.eventfd_write(self._wake, 1)

    def run(self) -> Completed:
        reap_abandoned()
        deadline = time.monotonic() + self.timeout
        child = popen(
            self.argv,
            self.env,
            stdin=subprocess.PIPE if self.input else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=self.pass_fds,
            cwd=self.cwd,
        )
        ended = False
        pidfd = -1
        try:
            pidfd = os.pidfd_open(child.pid)
            with self._wake_lock:
                self._wake = os.eventfd(0, os.EFD_CLOEXEC)
            out, err = self._converse(child, pidfd, deadline)
            code = child.wait()
            ended = True
        finally:
            if not ended:
                # Its own session, and not reaped yet: the group is certainly the one that we started.
                try:
                    os.killpg(child.pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
                try:
                    child.wait(1.0)
                except subprocess.TimeoutExpired:
                    # Stuck in the kernel (state D) on broken hardware or a dead file server: our caller is not.
                    abandon(child)
            with self._wake_lock:
                if self._wake >= 0:
                    os.close(self._wake)
                    self._wake = -1
            if pidfd >= 0:
                os.close(pidfd)
            for pipe in (child.stdin, child.stdout, child.stderr):
                if pipe is not None:
                    _close(pipe)
        done = Completed(self.argv, code, out, err)
        if self.check and code != 0:
            words = done.message
            raise HostError(f"{self.name} failed ({describe_exit(code)})" + (f": {words}" if words else ""))
        return done

    def _converse(self, child: subprocess.Popen[bytes], pidfd: int, deadline: float) -> tuple[bytes, bytes]:
        assert child.stdout is not None and child.stderr is not None
        stdout = child.stdout.fileno()
        gathered = {stdout: bytearray(), child.stderr.fileno(): bytearray()}
        with selectors.DefaultSelector() as selector:
            for fd in gathered:
                os.set_blocking(fd, False)
                selector.register(fd, selectors.EVENT_READ)
            if child.stdin is not None:
                os.set_blocking(child.stdin.fileno(), False)
                selector.register(child.stdin, selectors.EVENT_WRITE)
            selector.register(pidfd, selectors.EVENT_READ)
            selector.register(self._wake, selectors.EVENT_READ)
            exited = False
            # A grandchild may keep the pipes open for ever: the end is the tool's own, not end of file.
            while not exited:
                left = deadline - time.monotonic()
                ready = selector.select(left) if left > 0 else []
                if self._abort_event.is_set():
                    raise HostError(f"{self.name} was cancelled")
                if not ready:
                    words = Completed(self.argv, 0, *map(bytes, gathered.values())).message
                    raise OperationTimeout(
                        f"{self.name} did not finish within {self.timeout:g} s" + (f": {words}" if words else "")
                    )
                for key, _ in ready:
                    if key.fd == pidfd:
                        exited = True
                    elif child.stdin is not None and key.fileobj is child.stdin:
                        self._feed(selector, child.stdin)
                    elif key.fd in gathered:
                        before = len(gathered[key.fd])
                        if not self._gather(key.fd, gathered[key.fd]):
                            selector.unregister(key.fd)
                        elif self.listen is not None and key.fd == stdout:
                            self.listen(bytes(gathered[stdout][before:]))
            for fd, buffer in gathered.items():
                while self._gather(fd, buffer, drain=True):
                    pass
        out, err = gathered.values()
        return bytes(out), bytes(err)

    def _feed(self, selector: selectors.BaseSelector, pipe: IO[bytes]) -> None:
        try:
            self.input = self.input[os.write(pipe.fileno(), self.input) :]
        except BrokenPipeError:
            self.input = self.input[:0]  # it does not want the rest; its exit status tells
        if not self.input:
            selector.unregister(pipe)
            _close(pipe)

    def _gather(self, fd: int, buffer: bytearray, *, drain: bool = False) -> bool:
        """Read once; False at the end of file or, draining, when nothing is left."""
        try:
            data = os.read(fd, 65536)
        except BlockingIOError:
            return not drain
        buffer += data
        if len(buffer) > self.limit:
            raise HostError(f"{self.name} wrote more than {self.limit} bytes; it was stopped")
        return bool(data)


def _close(pipe: IO[bytes]) -> None:
    try:
        pipe.close()
    except BrokenPipeError:
        pass
