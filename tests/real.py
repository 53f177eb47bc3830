"""A kvik of its own root directory with real QEMU machines, driven through the command as a user would."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import kvik
from kvik.guest.tiny import build_tiny
from kvik.paths import Paths

SOURCE = Path(kvik.__file__).parent.parent
LONG = 90.0  # seconds; a machine boots in two, on a host that is busy with other things it may take thirty


@functools.cache
def images() -> Path:
    """The tiny image, made once for all tests of this run."""
    directory = tempfile.mkdtemp(prefix="kv-img-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    paths = Paths.system(directory)
    build_tiny(paths)
    return paths.images


class Root:
    """A system scope below a short temporary directory, and its daemon."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="kv-"))
        self.paths = Paths.system(self.path)
        self.paths.images.parent.mkdir(parents=True)
        shutil.copytree(images(), self.paths.images, symlinks=True)
        self.environ = {**os.environ, "KVIK_ROOT": str(self.path), "PYTHONPATH": str(SOURCE), "NO_COLOR": "1"}
        self.environ.pop("KVIK_URI", None)
        self.uri = f"qemu+unix:///system?socket={self.paths.socket}"
        self.tiny = self.paths.images / "tiny/current"

    def command(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "kvik.cli.main", *words]

    def start(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(*words),
            env=self.environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __call__(self, *words: str, timeout: float = LONG) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*words),
            env=self.environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def out(self, *words: str) -> str:
        done = self(*words)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def names(self) -> list[str]:
        return self.out("-q", "list", "--all", "--name").split()

    def end(self) -> None:
        """Destroy every machine, end the daemon, remove everything."""
        for name in self.names():
            self("destroy", name)
        with contextlib.suppress(OSError, ValueError):
            os.kill(int((self.paths.run / "kvikd.pid").read_text()), signal.SIGTERM)
        deadline = time.monotonic() + 10
        while self.paths.socket.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        shutil.rmtree(self.path, ignore_errors=True)


class Terminal:
    """A command on a pseudo-terminal, and all that it showed."""

    def __init__(self, argv: list[str], environ: dict[str, str], *, columns: int = 80) -> None:
        import fcntl
        import struct
        import termios

        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.execvpe(argv[0], argv, {**environ, "TERM": "xterm"})
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.shown = ""

    def read(self, seconds: float) -> bool:
        """More into `shown`; False at the end."""
        if select.select([self.fd], [], [], seconds)[0]:
            try:
                data = os.read(self.fd, 65536)
            except OSError:
                return False
            self.shown += data.decode(errors="replace")
            return bool(data)
        return True

    def expect(self, pattern: str, timeout: float = LONG) -> re.Match[str]:
        deadline = time.monotonic() + timeout
        while not (found := re.search(pattern, self.shown)):
            assert time.monotonic() < deadline, f"{pattern!r} did not come: {self.shown[-2000:]!r}"
            assert self.read(0.1) or re.search(pattern, self.shown), (
                f"ended without {pattern!r}: {self.shown[-2000:]!r}"
            )
        return found

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def wait(self, timeout: float = LONG) -> int:
        """The exit code."""
        deadline = time.monotonic() + timeout
        while self.read(0.05):
            assert time.monotonic() < deadline, f"still there: {self.shown[-2000:]!r}"
        os.close(self.fd)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
