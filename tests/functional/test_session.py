"""kvik for somebody who is not root: a clone that is not theirs, a session's daemon that comes and goes by itself."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2]
UID = pwd.getpwnam("nobody").pw_uid
pytestmark = [
    pytest.mark.functional,
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else"),
    pytest.mark.skipif(shutil.which("setpriv") is None, reason="setpriv is not installed"),
    pytest.mark.skipif(not Path("/usr/bin/python3").exists(), reason="needs a Python that everybody may run"),
    pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="qemu-system-x86_64 is not installed"),
]


class Session:
    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="kvs-"))
        self.path.chmod(0o755)
        self.clone, self.home = self.path / "clone", self.path / "home"
        for name in ("kvik", "scripts", "requirements", "src", "pyproject.toml"):
            source, target = SOURCE / name, self.clone / name
            target.parent.mkdir(exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target)  # with its bytecode: who runs it here may write none
            else:
                shutil.copy(source, target)
        subprocess.run(["chmod", "-R", "a+rX,go-w", self.clone], check=True)
        self.home.mkdir()
        os.chown(self.home, UID, UID)

    def __call__(self, *words: str, program: str = "", **environ: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups", program or self.clone / "kvik", *words],
            env={"HOME": str(self.home), "PATH": "/usr/bin:/bin", **environ},
            cwd="/",
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )

    @property
    def runtime(self) -> Path:
        """XDG_RUNTIME_DIR is not set."""
        return self.home / ".cache/kvik-run/kvik"

    def daemon(self) -> int:
        return int((self.runtime / "kvikd.pid").read_text())


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    session = Session()
    yield session
    session("destroy", "stays")
    with contextlib.suppress(OSError, ValueError):
        os.kill(session.daemon(), signal.SIGTERM)
        time.sleep(1)
    shutil.rmtree(session.path, ignore_errors=True)


def test_the_first_command_needs_nothing_and_leaves_its_state_in_xdg_directories(session: Session) -> None:
    done = session("run", "--name", "stays")
    assert done.returncode == 0, done.stderr
    assert "stays is ready" in done.stdout
    for place in (
        ".config/kvik/qemu/stays.xml",
        ".local/share/kvik/images/tiny",
        ".local/state/kvik/log/qemu/stays.log",
    ):
        assert (session.home / place).exists(), place
    assert os.stat(f"/proc/{session.daemon()}").st_uid == UID


def test_a_machine_outlives_its_daemon_and_is_found_again(session: Session) -> None:
    before = session.daemon()
    os.kill(before, signal.SIGKILL)
    done = session("exec", "stays", "--", "id", "-u")
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr
    assert session.daemon() != before


def test_an_idle_daemon_ends_and_the_machine_goes_on(session: Session) -> None:
    os.kill(session.daemon(), signal.SIGTERM)
    deadline = time.monotonic() + 10
    while (session.runtime / "kvikd.sock").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    (environment,) = [path for path in (session.home / ".cache/kvik").glob("env-*") if path.is_symlink()]
    done = session("--session", "--idle-timeout", "0.5", program=str(environment / "bin/kvikd"))
    assert done.returncode == 0, done.stderr
    assert "running" in session("domstate", "stays").stdout


def test_doctor_says_what_is_forbidden_and_why(session: Session) -> None:
    done = session("doctor")
    if Path("/dev/kvm").exists() and not Path("/dev/kvm").stat().st_mode & 0o006:
        assert "/dev/kvm may not be opened by nobody" in " ".join(done.stdout.split())
        assert "usermod -aG" in done.stdout
    assert "acceleration" in done.stdout


def test_a_path_too_long_for_a_socket_says_what_to_set(session: Session) -> None:
    runtime = session.home / ("x" * 100)
    runtime.mkdir()
    os.chown(runtime, UID, UID)
    done = session("list", XDG_RUNTIME_DIR=str(runtime))
    assert done.returncode == 1
    assert "set XDG_RUNTIME_DIR to a shorter directory" in done.stderr


def test_a_home_that_is_not_writable_says_what_to_set(session: Session) -> None:
    done = session("list", HOME="/nonexistent")
    assert done.returncode == 78
    assert "KVIK_ENV=DIR" in done.stderr
