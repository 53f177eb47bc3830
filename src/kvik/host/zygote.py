"""A zygote as its keeper sees it: a child that forks processes for us (`vmm/zygote.py` is the other side).

What it forks is not our child: the kernel reaps it, and we hold it by the pidfd that it sent itself. So nobody waits
for it, its exit status is known where the kernel tells it (`process.exit_code`), and it is found again as any other.

A request that was not answered in time leaves two possibilities, of which one is a process that nobody knows, with a
machine's disks in its hands. So whatever goes wrong on the way ends the zygote: the socket is shut, after which no fork
can report any more (and one that cannot, ends), then what had reported before is killed.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

from kvik.errors import HostError, OperationTimeout
from kvik.host import process
from kvik.host.process import ProcessHandle, describe_exit, read_stat
from kvik.host.zygote_wire import MAX_ANSWER, PROTOCOL, Request, read_answer

__all__ = ["Refused", "Zygote"]

_GRACE = 1.0  # seconds for it to see that its socket is closed
_LAST_WORDS = 2000  # bytes


class Refused(HostError):
    """The zygote did not fork, and said why: it goes on, and nothing was started."""


class Zygote:
    """One of them. `ready` before anything else; `fork` is one at a time; `close` at last."""

    def __init__(self, command: Sequence[str]) -> None:
        """Run `command --zygote FD`. Raises `HostError`."""
        with ExitStack() as undo:
            try:
                self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                undo.callback(self._channel.close)
                with theirs:
                    self._stderr = os.memfd_create("zygote", os.MFD_CLOEXEC)
                    undo.callback(os.close, self._stderr)
                    fd = theirs.fileno()
                    words = [*command, "--zygote", str(fd)]
                    self.process = process.spawn(words, pass_fds=(fd,), stderr=self._stderr, cwd="/")
            except OSError as error:
                raise HostError(f"cannot make a zygote: {error.strerror}", errno=error.errno or 0) from error
            undo.pop_all()
        self._channel.setblocking(False)
        self._turn = asyncio.Lock()
        self.usable = False

    async def ready(self, timeout: float) -> None:
        """Wait until it can fork. `HostError` if it ends, speaks another protocol or its forks would not be known."""
        try:
            hello, fds = await self._receive(timeout)
            _close(fds)
            if hello.get("zygote") != PROTOCOL:
                raise HostError(f"the zygote speaks protocol {hello.get('zygote')!r}, this daemon {PROTOCOL}")
            if hello.get("renames") is not True:
                raise HostError("this kernel gives forks no command line of their own (CONFIG_CHECKPOINT_RESTORE)")
        except BaseException:
            self.close()
            raise
        self.usable = True

    async def fork(
        self, argv: Sequence[str], env: Mapping[str, str], files: Mapping[int, int], timeout: float
    ) -> ProcessHandle:
        """A process that runs `argv` in a session of its own, with `/` for its directory. `files`: the descriptor to
        give by the number that it is to have. Raises `Refused`; and `HostError` or `OperationTimeout` when the zygote
        is of no use any more. In no case is a process left then.
        """
        try:
            data = Request(list(argv), dict(env), list(files)).encode()
        except ValueError as error:
            raise Refused(str(error)) from None
        async with self._turn:
            if not self.usable:
                raise HostError("the zygote has ended")
            try:
                try:
                    socket.send_fds(self._channel, [data], list(files.values()))
                except OSError as error:
                    raise HostError(
                        f"the zygote cannot be reached: {error.strerror}", errno=error.errno or 0
                    ) from error
                said, fds = await self._receive(timeout)
                try:
                    return _handle(said, fds)
                finally:
                    _close(fds)
            except Refused:
                raise
            except BaseException:
                self.close()
                raise

    async def _receive(self, timeout: float) -> tuple[dict[str, object], list[int]]:
        loop = asyncio.get_running_loop()
        readable: asyncio.Future[None] = loop.create_future()

        def tell() -> None:
            if not readable.done():
                readable.set_result(None)

        loop.add_reader(self._channel, tell)
        try:
            await asyncio.wait_for(readable, timeout)
            data, fds, _, _ = socket.recv_fds(self._channel, MAX_ANSWER, 1, socket.MSG_CMSG_CLOEXEC)
        except TimeoutError:
            raise OperationTimeout(f"the zygote did not answer within {timeout:g} s") from None
        except OSError as error:
            raise HostError(f"the zygote cannot be heard: {error.strerror}", errno=error.errno or 0) from error
        finally:
            loop.remove_reader(self._channel)
        if not data:
            raise HostError(f"the zygote ended{self.last_words()}")
        try:
            return read_answer(data), fds
        except ValueError as error:
            _close(fds)
            raise HostError(f"the zygote cannot be understood: {error}") from None

    def last_words(self) -> str:
        """How it ended and what it said, as the end of a sentence. Reaps it."""
        try:
            code = self.process.wait(_GRACE)
            size = os.fstat(self._stderr).st_size
            said = os.pread(self._stderr, _LAST_WORDS, max(0, size - _LAST_WORDS)).decode("utf-8", "replace")
        except (OperationTimeout, OSError):
            return ""
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        return f" ({describe_exit(code)})" + (f": {lines[-1]}" if lines else "")

    def close(self) -> None:
        """End it, and what it forked and nobody heard of; what `fork` returned goes on. Idempotent."""
        self.usable = False
        if self._channel.fileno() < 0:
            return
        try:
            self._channel.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # the other end is gone
        while True:
            try:
                data, fds, _, _ = socket.recv_fds(self._channel, MAX_ANSWER, 1, socket.MSG_CMSG_CLOEXEC)
            except OSError:
                break
            for fd in fds:
                try:
                    signal.pidfd_send_signal(fd, signal.SIGKILL)
                except OSError:
                    pass  # it has ended
            _close(fds)
            if not data:
                break
        self._channel.close()
        self.process.kill()  # it may be stuck; it has nothing to tidy up
        try:
            self.process.wait(_GRACE)
        except OperationTimeout:
            pass  # in the kernel; it is reaped later
        os.close(self._stderr)
        self.process.close()


def _handle(said: dict[str, object], fds: list[int]) -> ProcessHandle:
    """Takes the pidfd out of `fds`."""
    if "error" in said:
        raise Refused(f"the zygote says: {str(said['error'])[:500]}")
    pid = said.get("pid")
    if type(pid) is not int or pid <= 0 or len(fds) != 1:
        raise HostError("the zygote answers without a process")
    stat = read_stat(pid)
    handle = ProcessHandle(pid, stat.start_time if stat is not None else 0, fds.pop())
    if not handle.alive:
        handle.start_time = 0  # what was read may be of another process that has the pid by now
    return handle


def _close(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
