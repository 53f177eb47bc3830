"""Side processes of one machine: started before QEMU, watched while it runs, gone when it is gone.

Each is joined to QEMU by one end of a socket pair (or of a connected socket), so that it ends by itself when QEMU
does, however QEMU or the daemon died; ending them here as well only makes it sooner and certain. They live in
sessions of their own and are found again by pid and start time, as QEMU is.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvik.errors import HypervisorError, MissingPackages
from kvik.host import process
from kvik.host.packages import how_to_install, package_for
from kvik.host.process import BASE_ENVIRONMENT, ProcessHandle, describe_exit, find_program
from kvik.hypervisor import words

__all__ = ["Command", "Sidecar", "Sidecars", "attach_sidecars", "program"]

GRACE = 0.5  # seconds between asking and killing
_GRACES = {"qemu-storage-daemon": 5.0, "kvik-blk": 5.0}  # they write what they have cached of an image's tables
_LAST = 5.0  # seconds after which a process that even a kill does not end is left to the kernel
_MOST = 64  # of them, in a status file

NO_ROUTE = "this host has no route that passt could use: take a virtual network or a bridge, or no interface"
Died = Callable[["Sidecar", str], None]


def program(what: str, *, path: str = process.SEARCH_PATH, others: Sequence[str] = ()) -> str:
    """The absolute path of a tool, `others` being full paths it may also have. Raises `MissingPackages`."""
    found = find_program(what, path) or next((item for item in others if os.access(item, os.X_OK)), None)
    if found is None:
        package = package_for(what) or what
        raise MissingPackages(f"{what} is not installed", packages=(package,), remedy=how_to_install(what))
    return found


@dataclass(frozen=True, slots=True)
class Command:
    """What to run: `fds` are inherited under the numbers that `argv` mentions."""

    kind: str  # "swtpm", "virtiofsd", "passt", "qemu-storage-daemon", "kvik-blk"
    alias: str  # the device that it serves
    argv: Sequence[str]
    fds: Sequence[int] = ()
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Sidecar:
    kind: str
    alias: str
    process: ProcessHandle
    position: int = -1  # where its own words begin in the log, while the machine starts
    told: bool = False  # that it should end
    stop_watching: Callable[[], None] | None = None

    @property
    def label(self) -> str:
        return f"{self.kind} of {self.alias}"


class Sidecars:
    """Those of one machine. Empty for most."""

    def __init__(self, machine: str) -> None:
        self._machine = machine
        self._members: list[Sidecar] = []

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Any:
        return iter(self._members)

    def spawn(self, command: Command, log_fd: int) -> Sidecar:
        """Run it, its command line and its words in the machine's log. Raises `HostError`."""
        position = words.write_header(log_fd, f"starting {command.kind} for {command.alias}", command.argv)
        handle = process.spawn(
            command.argv,
            env={**BASE_ENVIRONMENT, **command.env},
            stdout=log_fd,
            stderr=log_fd,
            pass_fds=tuple(command.fds),
            cwd="/",
        )
        member = Sidecar(command.kind, command.alias, handle, position)
        self._members.append(member)
        return member

    def adopt(self, member: Sidecar) -> None:
        self._members.append(member)

    def failure(self, log_fd: int, *, qemu_alive: bool = True, only: str | None = None) -> HypervisorError | None:
        """The error of one (of the device `only`) that ended while it was starting: its own words are the reason.

        One that ended well after QEMU did (its connection was closed) is no reason for anything.
        """
        members = (item for item in self._members if only in (None, item.alias))
        dead = (item for item in members if not item.told and not item.process.alive)
        member = next((item for item in dead if qemu_alive or item.process.code != 0), None)
        if member is None:
            return None
        how = describe_exit(member.process.code)
        said = words.since(log_fd, member.position, of_qemu=False)
        when = f"while machine {self._machine} was starting" if only is None else "while it was starting"
        text = f"{member.label} ended {when} ({how})"
        remedy = NO_ROUTE if member.kind == "passt" and "No external routable interface" in said else ""
        return HypervisorError(f"{text}: {said}" if said else f"{text} and said nothing", remedy=remedy)

    def watch(self, died: Died) -> None:
        """Tell `died` of each that ends from now on, or has ended already."""
        for member in self._members:
            self.watch_one(member, died)

    def watch_one(self, member: Sidecar, died: Died) -> None:
        if not member.process.alive:
            died(member, describe_exit(member.process.code))
            return

        def ended() -> None:
            member.stop_watching = None
            died(member, describe_exit(member.process.code))

        member.stop_watching = member.process.on_exit(ended)

    def handles(self) -> list[dict[str, Any]]:
        """For the status file: `attach_sidecars` finds them by it."""
        return [
            {
                "kind": item.kind,
                "alias": item.alias,
                "pid": item.process.pid,
                "start_time": item.process.start_time,
            }
            for item in self._members
        ]

    def kill(self) -> None:
        """At once, without waiting."""
        for member in self._members:
            self._forget(member)
            member.process.kill()
            member.process.close()
        self._members.clear()

    async def end(self, only: str | None = None) -> None:
        """End them, or that of the device `only`: ask, after `GRACE` seconds kill, and wait until they are gone."""
        members = [item for item in self._members if only in (None, item.alias)]
        for member in members:
            self._forget(member)
            member.told = member.told or member.process.alive
        await asyncio.gather(*(_end(member) for member in members))
        if only is not None:
            self._members = [item for item in self._members if item not in members]

    def detach(self) -> None:
        """Let go of them: the daemon ends, the machine goes on."""
        for member in self._members:
            self._forget(member)
            member.process.close()
        self._members.clear()

    def _forget(self, member: Sidecar) -> None:
        if member.stop_watching is not None:
            member.stop_watching()
            member.stop_watching = None


async def _end(member: Sidecar) -> None:
    with contextlib.suppress(Exception):
        grace = _GRACES.get(member.kind, GRACE)
        async with asyncio.timeout(grace + _LAST):
            await member.process.terminate_async(grace)
    member.process.close()


def attach_sidecars(machine: str, handles: Any, boot: str) -> tuple[Sidecars, list[str]]:
    """Those of `Sidecars.handles` that still run, and the labels of those that do not.

    What is malformed is passed over: the status file is ours, but a damaged one must not lose us the machine.
    """
    found, lost = Sidecars(machine), []
    for item in handles[:_MOST] if isinstance(handles, list) else []:
        if not isinstance(item, dict):
            continue
        kind, alias, pid, start = (item.get(key) for key in ("kind", "alias", "pid", "start_time"))
        if not (isinstance(kind, str) and isinstance(alias, str) and isinstance(pid, int) and isinstance(start, int)):
            continue
        handle = process.find(pid, start, boot)
        if handle is None:
            lost.append(f"{kind} of {alias}")
        else:
            found.adopt(Sidecar(kind, alias, handle))
    return found, lost


async def wait_confined(member: Sidecar, deadline: float) -> None:
    """Until the process has installed its seccomp filter (proc(5), /proc/PID/status), or has ended, or time is up.

    For tools that have no other sign of being ready when they stay in the foreground.
    """
    end = time.monotonic() + deadline
    while time.monotonic() < end and member.process.alive:
        with contextlib.suppress(OSError):
            if b"\nSeccomp:\t2" in _status(member.process.pid):
                return
        await asyncio.sleep(0.005)


def _status(pid: int) -> bytes:
    with open(f"/proc/{pid}/status", "rb") as file:  # noqa: PTH123 - polled
        return file.read(8192)
