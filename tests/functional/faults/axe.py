"""A daemon that dies by SIGKILL just before a chosen one of its steps: changes to files, and commands to a VMM.

    python axe.py CONTROL [the daemon's options]

Steps are counted in the order in which the daemon takes them, whatever thread takes them; a command is one before it
is sent and one when its answer is there. What only asks is no step. Which step it is to be is written into the file
CONTROL by the test at any time (`Axe`), and the daemon looks there at each step.
"""

from __future__ import annotations

import mmap
import os
import signal
import struct
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

# The step that is the last (0: none), steps so far, what the last one was, what the first one has in it
_PLACE = struct.Struct("=QQ128s64s")
CHANGES = frozenset(
    {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown"}
)
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class Axe:
    """The test's side."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.write_bytes(bytes(_PLACE.size))
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), _PLACE.size)

    def set(self, step: int = 0, *, first: str = "") -> None:
        """Count from now on, or from one that has `first` in it, and die before this step (from 1)."""
        self._memory[:] = _PLACE.pack(step, 0, b"", first.encode())

    @property
    def steps(self) -> int:
        return int(_PLACE.unpack(self._memory)[1])

    @property
    def last(self) -> str:
        return bytes(_PLACE.unpack(self._memory)[2]).rstrip(b"\0").decode(errors="replace")


class _Daemon:
    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_RDWR)
        self._memory = mmap.mmap(self._fd, _PLACE.size)
        self._lock = threading.RLock()

    def step(self, what: str) -> None:
        with self._lock:
            last, steps, _, first = _PLACE.unpack(self._memory)
            if not steps and first.rstrip(b"\0") not in what.encode(errors="replace"):
                return
            steps += 1
            self._memory[:] = _PLACE.pack(last, steps, what.encode(errors="replace")[:128], first)
            if steps == last:
                os.kill(os.getpid(), signal.SIGKILL)

    def audit(self, event: str, args: tuple[Any, ...]) -> None:
        if event in CHANGES or (event == "open" and isinstance(args[2], int) and args[2] & WRITING):
            self.step(f"{event} {args[0]}")

    def before(self, primitive: Callable[..., Any], name: str) -> Callable[..., Any]:
        def stepped(fd: int, *args: Any, **kwargs: Any) -> Any:
            self.step(f"{name} {fd}")
            return primitive(fd, *args, **kwargs)

        return stepped


def main(control: str, options: list[str]) -> int:
    from kvik.daemon.main import main as kvikd
    from kvik.qmp.aio import QmpConnection

    daemon = _Daemon(control)
    execute = QmpConnection.execute

    async def stepped(
        self: QmpConnection, command: str, arguments: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> Any:
        if command.startswith(("query-", "qom-list", "qom-get", "human-")):
            return await execute(self, command, arguments, **kwargs)
        daemon.step(f"{command} is sent")
        reply = await execute(self, command, arguments, **kwargs)
        daemon.step(f"{command} was answered")
        return reply

    setattr(QmpConnection, "execute", stepped)  # noqa: B010 - mypy lets no method be assigned to
    for name in ("pwrite", "pwritev", "fsync", "fdatasync"):
        setattr(os, name, daemon.before(getattr(os, name), name))
    sys.addaudithook(daemon.audit)
    return kvikd(options)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
