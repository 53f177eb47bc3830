"""Starting QEMU's process and finding it again: log header, spawn, the first words on its monitor, its last words."""

from __future__ import annotations

import contextlib
import os
import shlex
import stat
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from kvik.errors import HypervisorError, KvikError, OperationTimeout
from kvik.host import process
from kvik.host.process import BASE_ENVIRONMENT, ProcessHandle, describe_exit
from kvik.hypervisor.qemu.argv.build import CommandLine
from kvik.hypervisor.qemu.descriptors import with_paths

__all__ = ["died", "environment", "log_header", "log_position", "remedy_for", "shell_text", "spawn"]

_TAIL = 4096
_LINES = 12


def environment(line: CommandLine, directory: Path) -> dict[str, str]:
    """QEMU's whole environment: nothing of the daemon's leaks into it."""
    return {**BASE_ENVIRONMENT, "HOME": str(directory), "TMPDIR": str(directory), **line.env}


def shell_text(argv: Sequence[str], env: Mapping[str, str] | None = None) -> str:
    """The command as a person could type it: an option and its values on a line of their own."""
    lines = [shlex.quote(f"{key}={value}") for key, value in (env or {}).items()]
    words = list(argv)
    lines.append(shlex.quote(words.pop(0)))
    for word in words:
        if word.startswith("-") or not lines[-1].startswith("-"):
            lines.append(shlex.quote(word))
        else:
            lines[-1] += f" {shlex.quote(word)}"
    return " \\\n".join(lines)


def log_header(line: CommandLine, version: str) -> str:
    now = time.time()
    stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1000):03d}+0000"
    return f"{stamp}: starting up, QEMU {version}\n{shell_text(line.argv, line.env)}\n"


def log_position(fd: int) -> int:
    """Where the next words go; -1 for what cannot be read back."""
    try:
        info = os.fstat(fd)
    except OSError:
        return -1
    return info.st_size if stat.S_ISREG(info.st_mode) else -1


def spawn(line: CommandLine, directory: Path, log_fd: int, version: str) -> tuple[ProcessHandle, int]:
    """The running process, and where its own words begin in the log. Raises `HostError`."""
    data = memoryview(log_header(line, version).encode("utf-8", "surrogateescape"))
    with contextlib.suppress(OSError):  # a full log must not keep a machine from starting
        while data:
            data = data[os.write(log_fd, data) :]
    position = log_position(log_fd)
    handle = process.spawn(
        line.argv, env=environment(line, directory), stdout=log_fd, stderr=log_fd, pass_fds=line.fds, cwd="/"
    )
    return handle, position


def last_words(log_fd: int, position: int) -> str:
    """What QEMU wrote since `position`, the end of it."""
    if position < 0:
        return ""
    try:
        # The log is open for appending only: read it by another description of the same file.
        reader = os.open(f"/proc/self/fd/{log_fd}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        size = os.fstat(reader).st_size
        data = os.pread(reader, _TAIL, max(position, size - _TAIL))
    except OSError:
        return ""
    finally:
        os.close(reader)
    lines = [_without_stamp(text) for text in data.decode("utf-8", "replace").splitlines() if text.strip()]
    lines = [text for text in lines if not text.startswith("char device redirected to")]
    return "; ".join(lines[-_LINES:])


def _without_stamp(line: str) -> str:
    """Without -msg timestamp's prefix and the program's own name."""
    first, _, rest = line.partition(" ")
    if len(first) > 20 and first[4:5] == "-" and "T" in first:
        line = rest
    program, separator, message = line.partition(": ")
    return message if separator and "qemu" in program and " " not in program else line


async def died(
    name: str, handle: ProcessHandle, log_fd: int, position: int, cause: KvikError, *, images: Mapping[int, str]
) -> KvikError:
    """What to raise when the start failed with `cause`: QEMU's own words if it has ended. `images`: fdset -> file."""
    with contextlib.suppress(KvikError):
        # The end of the monitor's stream is seen a moment before the process can be reaped.
        await handle.wait_async(0.0 if isinstance(cause, OperationTimeout) else 1.0)
    if handle.alive:
        return cause
    words = with_paths(last_words(log_fd, position), images)
    how = describe_exit(handle.code)
    if not words:
        return HypervisorError(f"QEMU ended while machine {name} was starting ({how}) and said nothing")
    return HypervisorError(f"QEMU ended while machine {name} was starting ({how}): {words}", remedy=remedy_for(words))


# What QEMU says -> what a person can do
_REMEDIES = (
    (
        'Failed to get "write" lock',
        "another machine or program uses this image; stop it, or mark the disk <shareable/>",
    ),
    ('Failed to get shared "write" lock', "another machine or program uses this image"),
    ("Address already in use", "another program has this port; choose another one or autoport='yes'"),
    ("Cannot allocate memory", "give the machine less <memory> or free some on the host"),
    ("Could not access KVM kernel module", "kvik doctor says what is wrong with /dev/kvm"),
    ("cannot set up guest memory", "give the machine less <memory> or free some on the host"),
    ("failed to find romfile", "install the firmware: apt install seabios ipxe-qemu"),
    ("could not load PC BIOS", "install the firmware: apt install seabios"),
)


def remedy_for(words: str) -> str:
    return next((remedy for text, remedy in _REMEDIES if text in words), "")
