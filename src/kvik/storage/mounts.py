"""Mounting what a pool's files lie on, and undoing it. What is mounted is read from /proc, which asks no server."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from kvik.errors import HostError, OperationTimeout, ResourceBusy
from kvik.host.filesystem import unescaped
from kvik.named import NamedTuple
from kvik.storage.tool import call

__all__ = ["OPTIONS", "Mount", "mount", "mounted_at", "unmount", "wait_for_mount"]

OPTIONS = ("nodev", "nosuid", "noexec")  # what lies in a pool is data
MOUNTINFO = "/proc/self/mountinfo"
MOUNTINFO_MAX = 16 << 20
DEADLINE = 60.0  # seconds that a server has to answer


class Mount(NamedTuple):
    """A line of mountinfo (proc(5)); `device` as "major:minor"."""

    device: str
    path: str
    type: str
    source: str


def mounted_at(path: str) -> Mount | None:
    """What is seen at `path`: of several mounts on one directory, the last."""
    found = None
    with Path(MOUNTINFO).open("rb") as file:
        lines = file.read(MOUNTINFO_MAX).decode(errors="surrogateescape").splitlines()
    for line in lines:
        before, separator, after = line.partition(" - ")
        fields, rest = before.split(" "), after.split(" ")
        if separator and len(fields) >= 6 and len(rest) >= 2 and unescaped(fields[4]) == path:
            found = Mount(fields[2], path, rest[0], unescaped(rest[1]))
    return found


def mount(
    source: str,
    target: str,
    type_: str = "",
    options: Sequence[str] = (),
    *,
    secret: tuple[str, bytes] | None = None,
    timeout: float = DEADLINE,
) -> None:
    """`secret`: the environment variable by which the helper is told the descriptor to read a password from, and that
    password: neither stands on the command line. HostError in the tool's words; OperationTimeout."""
    argv = ["mount", "--options", ",".join([*OPTIONS, *options])]
    if type_:
        argv += ["--types", type_]
    argv += ["--source", source, "--target", target]
    with _marked(target) as mark:
        if secret is None:
            call(argv, pass_fds=mark, timeout=timeout)
            return
        reading, writing = os.pipe()
        try:
            with os.fdopen(writing, "wb") as pipe:
                pipe.write(secret[1])  # shorter than a pipe holds
            call(argv, env={secret[0]: str(reading)}, pass_fds=[reading, *mark], timeout=timeout)
        finally:
            os.close(reading)


@contextmanager
def _marked(target: str) -> Iterator[list[int]]:
    """A descriptor of the directory that will be covered, locked: whoever inherits it is known to be at work there,
    also by the next daemon, should this one be killed."""
    try:
        fd = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:  # mount says why
        yield []
        return
    try:
        with suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_SH)
        yield [fd]
    finally:
        os.close(fd)


def wait_for_mount(target: str, *, timeout: float = DEADLINE) -> None:
    """Until no program of a daemon that was killed is about to mount something there. OperationTimeout."""
    end = time.monotonic() + timeout
    while not _unmarked(target):
        if time.monotonic() > end:
            raise OperationTimeout(f"a program still tries to mount something on {target}")
        time.sleep(0.05)


def _unmarked(target: str) -> bool:
    try:
        fd = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        os.close(fd)
    return True


def unmount(path: str, *, timeout: float = DEADLINE, lazy: bool = False) -> None:
    """Nothing if nothing is mounted there. ResourceBusy if it is in use. `lazy`: without asking a server that does not
    answer; whoever has a file of it open keeps that."""
    if mounted_at(path) is None:
        return
    # umount.nfs, the helper, asks the server.
    options = ["--internal-only", "--lazy"] if lazy else []
    done = call(["umount", "--no-canonicalize", *options, "--", path], timeout=timeout, check=False)
    if done.code == 0 or mounted_at(path) is None:
        return
    if "busy" in done.message:
        raise ResourceBusy(f"{path} cannot be unmounted: it is in use", remedy=f"see who uses it: fuser -vm {path}")
    raise HostError(f"{path} cannot be unmounted: {done.message}")
