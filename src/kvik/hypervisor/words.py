"""What goes into a machine's log when something is started, and what the started one says there.

The log is one file for QEMU and its side processes, opened for appending; who said what is told by the position at
which each was started, and by the time stamps that only QEMU writes.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import stat
import time
from collections.abc import Iterator, Mapping, Sequence

__all__ = ["log_position", "shell_text", "since", "write_header"]

_TAIL = 4096
_LINES = 12
_HEADER = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}\+0000: starting ")
_QEMU = re.compile(r"\d{4}-\d\d-\d\dT\S+Z ")
# A tool's complaint about a host without a system log, which explains nothing
_NOISE = re.compile(r"Failed to send \d+ bytes to syslog|char device redirected to .*")


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


def write_header(fd: int, what: str, argv: Sequence[str], env: Mapping[str, str] | None = None) -> int:
    """Time, what is started and its command line; returns where its own words will begin (see `log_position`)."""
    now = time.time()
    stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1000):03d}+0000"
    data = memoryview(f"{stamp}: {what}\n{shell_text(argv, env)}\n".encode("utf-8", "surrogateescape"))
    with contextlib.suppress(OSError):  # a full log must not keep a machine from starting
        while data:
            data = data[os.write(fd, data) :]
    return log_position(fd)


def log_position(fd: int) -> int:
    """Where the next words go; -1 for what cannot be read back."""
    try:
        info = os.fstat(fd)
    except OSError:
        return -1
    return info.st_size if stat.S_ISREG(info.st_mode) else -1


def since(log_fd: int, position: int, *, of_qemu: bool = True) -> str:
    """What was said since `position`, the end of it: by QEMU, or by a side process that was started there."""
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
    lines = [text for text in _without_headers(data.decode("utf-8", "replace").splitlines()) if text.strip()]
    if not of_qemu:
        lines = [text for text in lines if not _QEMU.match(text)]
    lines = [_without_stamp(text) for text in lines if not _NOISE.fullmatch(text)]
    return "; ".join(lines[-_LINES:])


def _without_headers(lines: Sequence[str]) -> Iterator[str]:
    inside = False  # a header's command line, of which all lines but the last end with a backslash
    for line in lines:
        if _HEADER.match(line):
            inside = True
        elif inside:
            inside = line.endswith("\\")
        else:
            yield line


def _without_stamp(line: str) -> str:
    """Without -msg timestamp's prefix and the program's own name."""
    first, _, rest = line.partition(" ")
    if len(first) > 20 and first[4:5] == "-" and "T" in first:
        line = rest
    program, separator, message = line.partition(": ")
    return message if separator and "qemu" in program and " " not in program else line
