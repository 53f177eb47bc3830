"""kvik-vmm's memory into a stream while its guest goes on: the saver is started, and told by every process that has
that memory mapped.

    begin     the saver is ready; the VMM and each kvik-blk watch their memory       the guest runs
    freeze    each kvik-blk, then the VMM: from here on nobody writes unseen         the guest stands still
    finish    the saver has written all of it                                        the guest runs

Nobody waits for the daemon: if it is killed the saver's pipe breaks, and with the saver all protection ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import kvik
from kvik.errors import HostError, HypervisorError, KvikError, MonitorError, OperationUnsupported
from kvik.host.process import ProcessHandle, describe_exit, spawn
from kvik.hypervisor.sidecars import kvik_blk, storage_daemon
from kvik.hypervisor.state import StateTarget, copy_out, in_own_thread, widen
from kvik.qmp.aio import QmpConnection

if TYPE_CHECKING:
    from kvik.hypervisor.kvik.machine import KvikMachine

__all__ = ["BackgroundSave"]

_PROGRAM = Path(kvik.__file__).parent / "vmm" / "saver" / "__main__.py"
_DEVICE = "/dev/userfaultfd"
_CONNECT, _READY, _DEADLINE = 5.0, 20.0, 60.0  # seconds
_ENDS = 10.0  # seconds for a thread to notice that its pipe has gone
_CHANNEL, _USERFAULTFD = "kvik-saver", "kvik-userfaultfd"  # the descriptors' names at the monitors


class BackgroundSave:
    """One attempt. `close` it whatever came of it."""

    def __init__(self, machine: KvikMachine, target: StateTarget) -> None:
        self._machine, self._target = machine, target
        self._saver: ProcessHandle | None = None
        self._said = -1
        self._copying: asyncio.Future[None] | None = None
        self._back_ends: dict[str, QmpConnection] = {}
        self._begun = self._finished = False

    async def begin(self) -> None:
        """`OperationUnsupported` with the reason why this machine has to stand still instead."""
        served = [member.alias for member in self._machine.sidecars if member.kind == kvik_blk.KIND]
        try:
            device = os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise OperationUnsupported(
                f"{_DEVICE} cannot be opened: {error.strerror}",
                remedy="it came with Linux 6.1, and is root's unless its mode says otherwise",
            ) from error
        try:
            channels = await self._start(len(served))
            try:
                # The VMM looks first at whether all who have its memory mapped are among these.
                self._begun = True
                words = {"served": served}
                await self._tell(self._machine, "x-kvik-background-begin", channels[0], device, words)
                for alias, channel in zip(served, channels[1:], strict=True):
                    path = storage_daemon.monitor_path(self._machine.directory, alias)
                    self._back_ends[alias] = await storage_daemon.connect(path, f"kvik-blk of {alias}", _CONNECT)
                    await self._tell(self._back_ends[alias], "x-kvik-protect-begin", channel, device, {})
            finally:
                for channel in channels:
                    os.close(channel)
        except MonitorError as error:
            if error.qmp_class == "CommandNotFound":
                raise OperationUnsupported("the machine was started by an older kvik") from error
            raise OperationUnsupported(str(error)) from error
        except OSError as error:
            raise OperationUnsupported(f"its memory's saver cannot be started: {error}") from error
        finally:
            os.close(device)

    async def _start(self, back_ends: int) -> list[int]:
        """The saver is ready; the other ends of its connections, the VMM's first."""
        ours: list[int] = []
        theirs: list[int] = []
        reader, writer = os.pipe2(os.O_CLOEXEC)
        self._said, told = os.pipe2(os.O_CLOEXEC)
        try:
            widen(writer)
            for _ in range(1 + back_ends):
                one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                ours.append(one.detach())
                theirs.append(other.detach())
            cached = ["-X", f"pycache_prefix={sys.pycache_prefix}"] if sys.pycache_prefix else []
            argv = [sys.executable, "-I", "-S", *cached, str(_PROGRAM), f"--out={writer}", f"--vmm={theirs[0]}"]
            argv += [f"--back-end={fd}" for fd in theirs[1:]]
            log = os.open(
                self._machine.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
            )
            try:
                self._saver = spawn(argv, stdout=told, stderr=log, pass_fds=(writer, *theirs))
            finally:
                os.close(log)
        except BaseException:
            for fd in (reader, *ours):
                os.close(fd)
            raise
        finally:
            for fd in (writer, told, *theirs):
                os.close(fd)
        self._copying = in_own_thread(lambda: copy_out(reader, self._target))
        try:
            async with asyncio.timeout(_READY):
                word = await in_own_thread(lambda: os.read(self._said, 4096))
        except TimeoutError as error:
            raise HostError("the process that saves its memory does not answer") from error
        if word != b"ready\n":
            raise HostError(f"the process that saves its memory cannot start: {word.decode(errors='replace').strip()}")
        return ours

    async def _tell(
        self, monitor: KvikMachine | QmpConnection, command: str, channel: int, device: int, more: dict[str, Any]
    ) -> None:
        names = {"fdname": _CHANNEL, "userfaultfd": _USERFAULTFD}
        try:
            for name, fd in zip(names.values(), (channel, device), strict=True):
                await monitor.execute("getfd", {"fdname": name}, fds=[fd])
            await monitor.execute(command, names | more, deadline=_DEADLINE)
        except BaseException:
            for name in names.values():
                with contextlib.suppress(KvikError):
                    await monitor.execute("closefd", {"fdname": name})
            raise

    async def freeze(self) -> None:
        """The guest stands still, and every disk's requests are at rest."""
        assert self._saver is not None
        back_ends = self._back_ends.values()
        try:
            await asyncio.gather(*(one.execute("x-kvik-protect", deadline=_DEADLINE) for one in back_ends))
            await self._machine.execute("x-kvik-background-freeze", deadline=_DEADLINE)
        except BaseException:
            self._saver.kill()  # whoever is protected already must not wait, for it is asked things still
            raise

    async def finish(self) -> None:
        """All of it is written, durably. Raises `OperationFailed`, `HostError`, `HypervisorError`."""
        assert self._saver is not None and self._copying is not None
        code = await self._saver.wait_async()
        if code:
            why = os.read(self._said, 4096).decode(errors="replace").strip() or describe_exit(code)
            await asyncio.wait([self._copying], timeout=_ENDS)
            if self._copying.done() and self._copying.exception() is not None:
                await self._copying  # why it was not written, rather than that the pipe broke
            raise HypervisorError(f"the memory of machine {self._machine.name} was not saved: {why}")
        await self._copying
        await in_own_thread(self._target.finish)
        self._finished = True

    async def close(self) -> None:
        """Nothing is protected any more, and nothing of it runs."""
        if self._saver is not None:
            self._saver.kill()
            await self._saver.wait_async(_ENDS)
            self._saver.close()
        if self._copying is not None:
            self._target.cancelled = True  # no harm where all is written
            await asyncio.wait([self._copying], timeout=_ENDS)
            if self._copying.done() and not self._copying.cancelled():
                self._copying.exception()
        if self._begun and not self._finished:  # else all have let go
            with contextlib.suppress(KvikError):
                await self._machine.execute("x-kvik-background-cancel")
        for connection in self._back_ends.values():
            if not self._finished:
                with contextlib.suppress(KvikError):
                    await connection.execute("x-kvik-protect-cancel")
            connection.close()
        self._back_ends.clear()
        if self._said >= 0:
            os.close(self._said)
            self._said = -1
